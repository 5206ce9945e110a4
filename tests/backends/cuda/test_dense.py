"""What multiplies by decoded matrices, with the kernels that decode replaced by the meaning of their results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends import cusparselt
from slimc.backends.cuda import dense, stored
from slimc.backends.cuda.layer import FACTOR_GROUP, FragmentLayer, prepare, stack
from slimc.backends.cuda.unpack import whole_pieces
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.packing import PackedWeight


def linear(weight: WeightFormat, rank: int, bits: int | None = 4, scaled: bool = False) -> LinearFormat:
    shapes = ((weight.rows, rank), (rank, weight.columns)) if rank else ()
    factors = [WeightFormat(*shape, bits, 64 if bits else None, dtype=weight.dtype) for shape in shapes]
    return LinearFormat(weight, *factors, input_scaled=scaled)


class FakeUnpacker:
    def __init__(self, packed: PackedWeight, *, signs: bool = False) -> None:
        assert not signs
        self.packed = packed

    def write(self, into: Tensor, _signs: None) -> None:
        assert into.shape[1] == whole_pieces(self.packed.format.columns)
        into.zero_()[:, : self.packed.format.columns] = self.packed.decode()


@pytest.fixture(autouse=True)
def unpacker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "Unpacker", FakeUnpacker)


@pytest.mark.parametrize(("rank", "bits"), [(0, None), (9, 4), (9, None), (64, 3)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("columns", [64, 100])
def test_stored_matrices_of_any_width_and_rank(
    fill: Any, check: Any, columns: int, scaled: bool, rank: int, bits: int | None
) -> None:
    for weight in (WeightFormat(24, columns, 3, dtype=torch.bfloat16), WeightFormat(24, columns, dtype=torch.bfloat16)):
        packed = fill(linear(weight, rank, bits, scaled))
        x, bias = torch.randn(2, 5, columns).bfloat16(), torch.randn(24).bfloat16()
        y = stored.run(x, stored.prepare(packed), bias)
        assert y.shape == (2, 5, 24)
        check(y.flatten(0, 1), x.flatten(0, 1), packed, bias)


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch, decode_fragments: Any) -> None:
    def weight(layer: FragmentLayer) -> Tensor:
        spec = layer.format.weight
        return decode_fragments(layer.codes, layer.scale).bfloat16()[: spec.rows, : spec.columns].contiguous()

    def factor(name: str) -> Any:
        def expand(layer: FragmentLayer) -> Tensor:
            found = decode_fragments(getattr(layer, name), getattr(layer, f"{name}_scale")).bfloat16()
            return found[: layer.format.rows] if name == "left" else found[:, : layer.format.columns]

        return expand

    monkeypatch.setattr(dense, "expand_weight", weight)
    monkeypatch.setattr(dense, "expand_left", factor("left"))
    monkeypatch.setattr(dense, "expand_right", factor("right"))


@pytest.mark.parametrize("tokens", [1, 3, 300])
@pytest.mark.parametrize("ranks", [(9, 9), (130, 20), (20, 130), (0, 0)])
@pytest.mark.usefixtures("expanded")
def test_each_layer_of_a_stack_has_its_own_adapters(fill: Any, check: Any, ranks: tuple[int, int], tokens: int) -> None:
    weights = [WeightFormat(rows, 128, 4, FACTOR_GROUP, dtype=torch.bfloat16) for rows in (256, 40)]
    parts = [fill(linear(weight, rank), seed=rank) for weight, rank in zip(weights, ranks, strict=True)]
    x, bias = torch.randn(tokens, 128).bfloat16(), torch.randn(296).bfloat16()
    y = dense.run(x[None], stack([prepare(part) for part in parts]), bias)[0]
    check(y[:, :256], x, parts[0], bias[:256])
    check(y[:, 256:], x, parts[1], bias[256:])
    check(dense.run(x, prepare(parts[0]), bias[:256]), x, parts[0], bias[:256])


@pytest.mark.parametrize("tokens", [1, 8, 13])
@pytest.mark.parametrize(("rank", "bits"), [(0, None), (9, 4), (9, None)])
@pytest.mark.parametrize("scaled", [False, True])
def test_products_by_the_library(
    fill: Any, check: Any, monkeypatch: pytest.MonkeyPatch, tokens: int, rank: int, bits: int | None, scaled: bool
) -> None:
    packed = fill(linear(WeightFormat(128, 256, sparsity=NM(2, 4), dtype=torch.bfloat16), rank, bits, scaled))
    asked: list[tuple[int, ...]] = []

    def multiply(compressed: Tensor, inputs: Tensor, *, bias: Tensor, transpose_result: bool, alg_id: int) -> Tensor:
        asked.append((*compressed.shape, *inputs.shape, alg_id))
        assert inputs.t().is_contiguous()
        assert torch.equal(compressed.view(-1)[: 128 * 128].view(128, 128), packed.weight.values)
        return torch.nn.functional.linear(inputs.t(), packed.weight.decode(), bias)

    monkeypatch.setattr(cusparselt, "_multiply", multiply)
    monkeypatch.setattr(cusparselt, "_algorithm", lambda compressed, inputs: 17)
    x, bias = torch.randn(tokens, 256).bfloat16(), torch.randn(128).bfloat16()
    y = cusparselt.run(x[None], cusparselt.prepare(packed), bias)
    assert y.shape == (1, tokens, 128)
    check(y[0], x, packed, bias)
    assert asked == [(128, 144, 256, -(-tokens // 8) * 8, 17)]
