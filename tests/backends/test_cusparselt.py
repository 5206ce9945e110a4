"""The layout of cuSPARSELt, as far as it can be told without a GPU, and what the kernels refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from slimc.backends import cusparselt
from slimc.backends.cuda.fragments import metadata_words
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear
from slimc.runtime.select import Case

SPARSE = WeightFormat(128, 256, sparsity=NM(2, 4), dtype=torch.bfloat16)
CODES = WeightFormat(128, 256, 4, per_tensor=True, sparsity=NM(2, 4), dtype=torch.bfloat16)


def refuses(weight: WeightFormat, *factors: WeightFormat) -> str | None:
    return cusparselt._refuses_values(LinearFormat(weight, *factors))


def test_forms_that_are_refused() -> None:
    assert refuses(SPARSE) is None
    assert cusparselt._refuses_weight(CODES) is None
    assert "weights of 16-bit values, not 2:4 int4 per tensor" in str(refuses(CODES))
    assert "computes 2:4 weights, not bf16" in str(refuses(replace(SPARSE, sparsity=None)))
    assert "is for bfloat16" in str(refuses(replace(SPARSE, dtype=torch.float16)))
    assert "multiples of 128 rows and columns" in str(refuses(replace(SPARSE, rows=64)))
    assert "multiples of 128 rows and columns" in str(refuses(replace(SPARSE, columns=192)))
    factors = [WeightFormat(*shape, 4, 64, dtype=torch.bfloat16) for shape in ((128, 9), (9, 256))]
    assert refuses(SPARSE, *factors) is None
    assert "one dtype" in str(refuses(SPARSE, *(replace(factor, dtype=torch.float16) for factor in factors)))
    assert "multiple of 8 columns, not 12" in str(refuses(SPARSE, factors[0], replace(factors[1], group=12)))


@pytest.mark.parametrize("kernel", [cusparselt.CUSPARSELT, cusparselt.DECODED])
def test_without_a_gpu_they_say_so(kernel: Any) -> None:
    spec = LinearFormat(SPARSE)
    assert kernel.accepts(spec, torch.bfloat16, torch.device("cpu"), 64) == "needs a CUDA GPU, not cpu"


def test_few_tokens_do_not_pay_for_decoding() -> None:
    case = LinearFormat(CODES), torch.bfloat16, torch.device("cpu")
    assert "fewer than 4096 tokens" in str(cusparselt._expects_decoded(Case(*case, 2048)))
    assert cusparselt._expects_decoded(Case(*case, 4096)) is None


def test_another_kernel_is_faster_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(LinearFormat(CODES), torch.bfloat16, torch.device("cuda"), 8192)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert cusparselt._expects_decoded(case) == "is slower than cuda-prefill"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    assert cusparselt._expects_decoded(case) is None


def test_metadata_in_the_librarys_order() -> None:
    rows, columns = 128, 256
    masks = torch.tensor([3, 5, 9, 6, 10, 12], dtype=torch.uint8)
    chosen = torch.randint(6, (rows, columns // 4), generator=torch.Generator().manual_seed(0))
    codes = torch.tensor([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110])[chosen]
    nibbles = masks[chosen].view(rows, -1, 2)
    found = cusparselt.ordered_metadata(metadata_words(nibbles[..., 0] | nibbles[..., 1] << 4))
    assert found.shape == (rows * columns // 8,)
    for row in range(rows):
        for group in range(columns // 4):
            block = row // 64 * (columns // 32) + group // 8
            byte = 256 * block + row // 16 % 4 * 64 + row % 8 * 8 + group % 4 * 2 + group // 4 % 2
            assert int(found[byte]) >> (4 * (row // 8 % 2)) & 15 == int(codes[row, group])


@pytest.mark.parametrize(("bits", "scaled"), [(None, True), (4, False)])
def test_the_canonical_tensors_come_back(bits: int | None, scaled: bool) -> None:
    group = 64 if bits else None
    factors = [WeightFormat(*shape, bits, group, dtype=torch.bfloat16) for shape in ((128, 9), (9, 256))]
    spec = LinearFormat(SPARSE, *factors, input_scaled=scaled)
    tensors = {
        name: torch.randint(0, 256, shape, dtype=kind) if kind == torch.uint8 else torch.rand(shape).to(kind)
        for name, (shape, kind) in spec.tensor_specs().items()
    }
    masks = torch.tensor([3, 5, 9, 6, 10, 12], dtype=torch.uint8)[torch.randint(6, (128, 32, 2))]
    tensors["pattern"] = masks[..., 0] | masks[..., 1] << 4
    held = cusparselt.tensors(cusparselt.prepare(PackedLinear.assemble(spec, tensors)))
    assert sum(tensor.nbytes for tensor in held.values()) == spec.nbytes()
    state = cusparselt.assemble((spec,), held, 0)
    assert state.compressed is held["compressed"]
    restored = cusparselt.restore((spec,), cusparselt.tensors(state), 0).tensors()
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in restored.items())


def test_algorithms_are_read_from_disk_and_nonsense_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("SLIMC_CACHE_DIR", str(tmp_path))
    cusparselt._known_algorithms.cache_clear()
    assert cusparselt._known_algorithms("a") == {}
    cusparselt._FOLDER.write("b", json.dumps({16: 3}).encode())
    cusparselt._FOLDER.write("c", b"[1]")
    assert cusparselt._known_algorithms("b") == {16: 3}
    assert cusparselt._known_algorithms("c") == {}
    cusparselt._known_algorithms.cache_clear()
