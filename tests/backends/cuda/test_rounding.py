"""Rounding by one launch, in the parts that need no GPU: who is asked to round, and how a launch is divided."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends.cuda import rounding
from slimc.backends.cuda.rounding import round_inputs, threads_for
from slimc.runtime.activations import round_tokens
from slimc.runtime.formats import ACTIVATIONS

kinds = pytest.mark.parametrize("kind", ACTIVATIONS)


@kinds
def test_the_processor_rounds_by_the_definition(kind: str) -> None:
    x = torch.randn(3, 40).bfloat16()
    assert torch.equal(round_inputs(x, kind), round_tokens(x, kind))
    assert round_inputs(x, None) is x


@kinds
@pytest.mark.parametrize(
    ("capability", "shape", "dtype"),
    [
        ((9, 0), (3, 40), torch.float32),
        ((9, 0), (3, 36), torch.bfloat16),
        ((9, 0), (0, 40), torch.bfloat16),
        ((8, 9), (3, 40), torch.bfloat16),
    ],
)
def test_what_the_kernel_does_not_take(
    gpu: SimpleNamespace, kind: str, capability: tuple[int, int], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    gpu.capability = capability
    x: Any = SimpleNamespace(is_cuda=True, dtype=dtype, shape=shape, device=None, numel=lambda: shape[0] * shape[1])
    # Before Hopper there is no conversion to float8 that kernels for all of Ampere may use.
    assert rounding._has_kernel(x, kind) is (capability == (8, 9) and kind == "int8")


@kinds
def test_one_launch_has_a_block_a_token(monkeypatch: pytest.MonkeyPatch, gpu: SimpleNamespace, kind: str) -> None:
    launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(rounding, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(rounding, "_launcher", lambda *_: lambda *given, **how: launches.append((given, how)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=7))
    x = torch.randn(2, 3, 256).bfloat16()
    for given in (x, x.transpose(0, 1)):
        rounded = round_inputs(given, kind)
        (arguments, how) = launches.pop()
        assert rounded.shape == given.shape
        assert arguments[1:] == (rounded.data_ptr(), 256)
        assert how == {"grid": (6, 1, 1), "block": (128, 1, 1), "stream": 7, "programmatic": True}
        assert (arguments[0] == x.data_ptr()) is given.is_contiguous()


def test_a_view_that_begins_anywhere_is_moved(monkeypatch: pytest.MonkeyPatch, gpu: SimpleNamespace) -> None:
    read: list[int] = []
    monkeypatch.setattr(rounding, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(rounding, "_launcher", lambda *_: lambda x, *_given, **_how: read.append(x))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=0))
    memory: Tensor = torch.zeros(65, dtype=torch.float16)
    round_inputs(memory[1:].view(1, 64), "int8")
    assert read[0] % 16 == 0


def test_threads_grow_with_a_token_until_each_has_enough() -> None:
    assert [threads_for(columns) for columns in (8, 8192, 8200, 32768, 100_000)] == [128, 128, 256, 512, 512]
    assert [threads_for(columns, 8) for columns in (8, 1024, 1032, 4096)] == [128, 128, 256, 512]
