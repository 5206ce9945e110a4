"""GPUs, compilers and folders that are not as they should be: a reason, a fallback that is stated, or an error."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends import FRAGMENT_KERNELS, KERNELS, private_folder, reference
from slimc.backends.cuda import cache, compiler, compose, decode, dense, driver, layer, prefill, stored, stream
from slimc.errors import KernelError
from slimc.runtime.formats import NM, LinearFormat, Unstructured, WeightFormat
from slimc.runtime.select import Choice, KernelTable, choices, choose

GPU = torch.device("cuda", 0)
SPEC = LinearFormat(WeightFormat(256, 640, 4, per_tensor=True, sparsity=NM(2, 4), dtype=torch.bfloat16))


def chosen(dtype: torch.dtype = torch.bfloat16) -> list[Choice]:
    return choices(KernelTable(KERNELS), SPEC, dtype, GPU)


def test_what_each_generation_of_gpu_runs(gpu: SimpleNamespace) -> None:
    assert all(choice.kernel in FRAGMENT_KERNELS for choice in chosen())
    gpu.capability = (8, 0)
    assert chosen()[0].kernel is decode.DECODE
    assert chosen()[-1].kernel is dense.DENSE
    gpu.capability = (7, 5)
    assert all(choice.kernel is reference.DECODE for choice in chosen())
    assert "needs a GPU of compute capability 8.0 or more" in str(chosen()[0])


def test_forms_that_no_layout_holds(gpu: SimpleNamespace) -> None:
    def last(**form: Any) -> Any:
        spec = LinearFormat(WeightFormat(256, 640, **({"dtype": torch.bfloat16} | form)))
        return choose(KernelTable(KERNELS), spec, spec.weight.dtype, GPU, 1)[0]

    # Decoded for the call as long as that can be compiled: dense weights beside packed ones would only take memory.
    assert last(bits=8, sparsity=NM(2, 4)) is stored.STORED
    assert last(bits=4, sparsity=Unstructured(), nonzeros=7000) is stored.STORED
    assert last(bits=4, group=12) is compose.DECODED
    assert last(bits=4, dtype=torch.float32) is compose.DECODED


def test_without_a_compiler_the_weight_is_decoded_and_explain_says_so(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise KernelError("kernels are compiled by NVRTC (libnvrtc.so), which was not found")

    monkeypatch.setattr(compiler, "version", missing)
    for choice in chosen():
        assert choice.kernel is reference.DECODE
        assert "NVRTC (libnvrtc.so), which was not found" in str(choice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_inputs_of_another_dtype_are_left_to_the_reference(gpu: SimpleNamespace, dtype: torch.dtype) -> None:
    for choice in chosen(dtype):
        assert choice.kernel is reference.DECODE
    assert "one 16-bit dtype" in chosen(dtype)[0].refusals["cuda-decode"]


@pytest.mark.parametrize("module", [decode, stream, prefill], ids=["decode", "stream", "prefill"])
@pytest.mark.parametrize("view", ["misaligned", "strided", "transposed", "plain"])
def test_inputs_reach_a_kernel_dense_and_aligned(
    make_packed: Any, monkeypatch: pytest.MonkeyPatch, module: Any, view: str
) -> None:
    given: list[Tensor] = []
    monkeypatch.setattr(module, "make_plan", lambda *_: None)
    monkeypatch.setattr(module, "launch", lambda _plan, x, _layer, _bias: given.append(x))
    memory = torch.randn(8 + 3 * 512).bfloat16()
    views = {
        "misaligned": memory[1 : 1 + 3 * 256].view(3, 256),
        "strided": memory[: 3 * 512].view(3, 512)[:, ::2],
        "transposed": memory[: 3 * 256].view(256, 3).t(),
        "plain": memory[: 3 * 256].view(3, 256),
    }
    module.run(views[view], layer.prepare(make_packed(256, 256)), None)
    (x,) = given
    assert torch.equal(x, views[view])
    assert x.is_contiguous()
    assert x.data_ptr() % 16 == 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Replaces the compiler by one that remembers what it was asked for, and gives every test a cache folder."""
    asked: list[str] = []

    def compile_source(source: str, **_: object) -> bytes:
        asked.append(source)
        return b"cubin"

    monkeypatch.setattr(compiler, "compile_source", compile_source)
    monkeypatch.setattr(compiler, "version", lambda: "13.0")
    monkeypatch.setattr(cache, "_in_memory", {})
    monkeypatch.setenv("SLIMC_CACHE_DIR", str(tmp_path))
    return asked


def read_only(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_read_only_cache_costs_only_time(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, what: str
) -> None:
    if what == "file":
        monkeypatch.setattr(private_folder, "_create", read_only)
    else:
        monkeypatch.setattr(private_folder, "_make_private", read_only)
    private_folder._warn_once.cache_clear()
    for _ in range(2):
        assert cache.cached_cubin("s", name="k", arch="sm_90a", defines={}, driver="13.0") == b"cubin"
    assert compiled == ["s"]
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert "Read-only file system" in said.message
    assert "SLIMC_CACHE_DIR" in said.message
    assert not list(tmp_path.rglob("*partial"))


def test_a_cubin_that_the_driver_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(_status: int, into: Any) -> int:
        into._obj.value = b"CUDA_ERROR_INVALID_IMAGE"
        return 0

    library = SimpleNamespace(
        cuModuleLoadData=lambda *_: 200,
        cuGetErrorName=named,
        cuGetErrorString=named,
        cuCtxPushCurrent_v2=lambda *_: 0,
        cuCtxPopCurrent_v2=lambda *_: 0,
        cuDriverGetVersion=lambda *_: 0,
    )
    monkeypatch.setattr(driver, "_library", lambda: library)
    monkeypatch.setattr(driver, "_primary_context", lambda _index: 0)
    with pytest.raises(KernelError, match=r"loading a cubin onto cuda:0.*CUDA_ERROR_INVALID_IMAGE \(200\)"):
        driver.Module(b"not a cubin", 0)
