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
from slimc.runtime.packing import PackedLinear, PackedWeight


def make_layer(
    weight: WeightFormat, rank: int, bits: int | None = 4, scaled: bool = False, seed: int = 0
) -> PackedLinear:
    group = 64 if bits else None
    shapes = ((weight.rows, rank), (rank, weight.columns)) if rank else ()
    factors = [WeightFormat(*shape, bits, group, dtype=weight.dtype) for shape in shapes]
    spec = LinearFormat(weight, *factors, input_scaled=scaled)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (shape, kind) in spec.tensor_specs().items():
        if kind == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, generator=generator, dtype=kind)
        else:
            tensors[name] = (torch.rand(shape, generator=generator) + 0.5).mul(0.02).to(kind)
    if weight.sparsity is not None:
        masks = torch.tensor([3, 5, 9, 6, 10, 12], dtype=torch.uint8)
        nibbles = masks[torch.randint(6, (weight.rows, weight.columns // 8, 2), generator=generator)]
        tensors["pattern"] = nibbles[..., 0] | nibbles[..., 1] << 4
    return PackedLinear.assemble(spec, tensors)


def check(packed: PackedLinear, x: Tensor, bias: Tensor, y: Tensor) -> None:
    """Bound: y is rounded once for W's product and once for the sum, t and a merged weight once each."""
    unit = torch.finfo(x.dtype).eps / 2
    scale = 1 if packed.input_scale is None else packed.input_scale.double()
    weight = packed.weight.decode().double()
    exact = (x.double() * scale) @ weight.T + bias.double()
    size = (x.double() * scale).abs() @ weight.abs().T + bias.double().abs()
    if packed.left is not None and packed.right is not None:
        left, right = packed.left.decode().double(), packed.right.decode().double()
        exact += x.double() @ right.T @ left.T
        size += x.double().abs() @ right.abs().T @ left.abs().T
    assert bool(((y.double() - exact).abs() <= 3 * unit * size).all())


class FakeUnpacker:
    def __init__(self, packed: PackedWeight) -> None:
        self.packed = packed

    def __call__(self, into: Tensor) -> None:
        assert into.shape[1] == whole_pieces(self.packed.format.columns)
        into.zero_()[:, : self.packed.format.columns] = self.packed.decode()


@pytest.fixture(autouse=True)
def unpacker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "unpacker", FakeUnpacker)


@pytest.mark.parametrize(("rank", "bits"), [(0, None), (9, 4), (9, None), (64, 3)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("columns", [64, 100])
def test_stored_matrices_of_any_width_and_rank(columns: int, scaled: bool, rank: int, bits: int | None) -> None:
    for weight in (WeightFormat(24, columns, 3, dtype=torch.bfloat16), WeightFormat(24, columns, dtype=torch.bfloat16)):
        packed = make_layer(weight, rank, bits, scaled)
        x, bias = torch.randn(2, 5, columns).bfloat16(), torch.randn(24).bfloat16()
        y = stored.run(x, stored.prepare(packed), bias)
        assert y.shape == (2, 5, 24)
        check(packed, x.flatten(0, 1), bias, y.flatten(0, 1))


def from_fragments(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the dense matrix of fragments with groups of 64 columns, by the definition of their order."""
    tiles, units = codes.shape[:2]
    words = codes.view(tiles, units, 8, 4, 4)  # g, t, instruction
    whole = torch.zeros(tiles, 16, units, 64)
    rows = torch.arange(8)
    for place in range(4):
        for instruction in range(4):
            word = words[:, :, :, place, instruction].long() & 0xFFFFFFFF
            for register in range(4):
                column = 16 * instruction + 8 * (register // 2) + 2 * place
                for half in range(2):
                    code = ((word >> (4 * register + 16 * half)) & 15) - 8
                    whole[:, rows + 8 * (register % 2), :, column + half] = code.transpose(1, 2).float()
    bits = torch.stack((scale & 0xFFFF, (scale >> 16) & 0xFFFF), dim=1).to(torch.int32)  # tile, half, group, g
    numbers = bits.to(torch.int16).view(torch.bfloat16).float().permute(0, 1, 3, 2).reshape(tiles, 16, units)
    return (whole * numbers[..., None]).flatten(2).flatten(0, 1).bfloat16()


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    def weight(layer: FragmentLayer) -> Tensor:
        spec = layer.format.weight
        return from_fragments(layer.codes, layer.scale)[: spec.rows, : spec.columns].contiguous()

    def factor(name: str) -> Any:
        def expand(layer: FragmentLayer) -> Tensor:
            found = from_fragments(getattr(layer, name), getattr(layer, f"{name}_scale"))
            return found[: layer.format.rows] if name == "left" else found[:, : layer.format.columns]

        return expand

    monkeypatch.setattr(dense, "expand_weight", weight)
    monkeypatch.setattr(dense, "expand_left", factor("left"))
    monkeypatch.setattr(dense, "expand_right", factor("right"))


@pytest.mark.parametrize("tokens", [1, 3, 300])
@pytest.mark.parametrize("ranks", [(9, 9), (130, 20), (20, 130), (0, 0)])
def test_each_layer_of_a_stack_has_its_own_adapters(expanded: None, ranks: tuple[int, int], tokens: int) -> None:
    weights = [WeightFormat(rows, 128, 4, FACTOR_GROUP, dtype=torch.bfloat16) for rows in (256, 40)]
    parts = [make_layer(weight, rank, seed=rank) for weight, rank in zip(weights, ranks, strict=True)]
    x, bias = torch.randn(tokens, 128).bfloat16(), torch.randn(296).bfloat16()
    y = dense.run(x[None], stack([prepare(part) for part in parts]), bias)[0]
    check(parts[0], x, bias[:256], y[:, :256])
    check(parts[1], x, bias[256:], y[:, 256:])
    check(parts[0], x, bias[:256], dense.run(x, prepare(parts[0]), bias[:256]))


@pytest.mark.parametrize("tokens", [1, 8, 13])
@pytest.mark.parametrize(("rank", "bits"), [(0, None), (9, 4), (9, None)])
@pytest.mark.parametrize("scaled", [False, True])
def test_products_by_the_library(
    monkeypatch: pytest.MonkeyPatch, tokens: int, rank: int, bits: int | None, scaled: bool
) -> None:
    packed = make_layer(WeightFormat(128, 256, sparsity=NM(2, 4), dtype=torch.bfloat16), rank, bits, scaled)
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
    check(packed, x, bias, y[0])
    assert asked == [(128, 144, 256, -(-tokens // 8) * 8, 17)]
