"""Layers joined to two products: the same result, and a refusal where a form does not allow it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimc.backends.onnx.siblings import JoinedLayers, join
from slimc.runtime.formats import NM
from slimc.runtime.packing import PackedBinary, PackedLinear, PackedWeight, pack_signs, pack_weight


def packed(rows: int, columns: int, *, group: int | None = None, seed: int = 0, **options: object) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    shape = (1, 1) if options.pop("per_tensor", False) else (rows, 1 if group is None else -(-columns // group))
    scale = torch.rand(shape, generator=generator) + 0.5
    return pack_weight(codes, bits=4, scale=scale, group=group, **options)  # type: ignore[arg-type]


def layer(rows: int, rank: int, *, columns: int = 128, seed: int = 0, **options: object) -> PackedLinear:
    return PackedLinear(
        packed(rows, columns, seed=seed, **options),
        packed(rows, rank, group=64, seed=seed + 1),
        packed(rank, columns, group=64, seed=seed + 2),
    )


def computed(joined: JoinedLayers, x: Tensor) -> Tensor:
    x = x.double()
    if joined.right is None:
        return x @ joined.weight.decode().double().T
    inner = x @ joined.right.decode().double().T
    return torch.cat((x, inner), dim=-1) @ joined.weight.decode().double().T


def expected(layers: list[PackedLinear], x: Tensor) -> Tensor:
    parts = []
    for one in layers:
        assert one.left is not None
        assert one.right is not None
        weight, left, right = (part.decode().double() for part in (one.weight, one.left, one.right))
        parts.append(x.double() @ weight.T + x.double() @ right.T @ left.T)
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize(
    "layers",
    [
        [layer(24, 7)],
        [layer(24, 7, per_tensor=True)],
        [layer(24, 7, group=64), layer(8, 70, group=64, seed=5), layer(8, 3, group=64, seed=9)],
        [layer(16, 5, per_tensor=True), layer(16, 5, seed=3)],
    ],
    ids=["a row", "a tensor", "groups", "mixed"],
)
def test_joined_layers_compute_what_the_layers_do(layers: list[PackedLinear]) -> None:
    x = torch.randn(3, 128)
    joined = join(layers)
    assert joined is not None
    assert joined.right is not None
    assert joined.rows == tuple(one.format.rows for one in layers)
    # Scales and codes are the same numbers; float64 sums of fewer than 2^8 terms in another order.
    reference = expected(layers, x)
    assert (computed(joined, x) - reference).abs().max() <= 2**-40 * reference.abs().max()


@pytest.mark.parametrize("grouped", [False, True])
def test_layers_without_adapters_are_one_product(grouped: bool) -> None:
    """Of one scale a tensor each row keeps its own; groups are cut to a size that fits all."""
    weights = (
        [packed(24, 128, group=64), packed(8, 128, group=32, seed=5)]
        if grouped
        else [packed(24, 128, per_tensor=True), packed(8, 128, seed=5)]
    )
    joined, x = join([PackedLinear(one) for one in weights]), torch.randn(3, 128)
    assert joined is not None
    assert joined.right is None
    assert joined.rows == (24, 8)
    assert joined.weight.format.group == (32 if grouped else None)
    exact = torch.cat([x.double() @ one.decode().double().T for one in weights], dim=-1)
    assert (computed(joined, x) - exact).abs().max() <= 2**-40 * exact.abs().max()


def test_groups_with_widths_of_their_own_are_joined_in_the_widest() -> None:
    codes = torch.randint(0, 4, (24, 128), dtype=torch.uint8)
    codes[:, 64:] *= 4
    scale = torch.rand(24, 2) + 0.5
    mixed = pack_weight(codes, bits=None, scale=scale, group=64, widths=(2, 4))
    layers = [replace(layer(24, 7, group=64), weight=mixed), layer(8, 3, group=64, seed=5)]
    x, joined = torch.randn(3, 128), join(layers)
    assert joined is not None
    reference = expected(layers, x)
    assert (computed(joined, x) - reference).abs().max() <= 2**-40 * reference.abs().max()


def test_pruned_positions_stay_zero() -> None:
    mask = torch.tensor([True, False, False, True]).repeat(16, 32)
    one = replace(layer(16, 5), weight=packed(16, 128, mask=mask, sparsity=NM(2, 4)))
    joined = join([one])
    assert joined is not None
    assert not joined.weight.decode()[:, :128][~mask].any()


@pytest.mark.parametrize(
    "layers",
    [
        [PackedLinear(packed(8, 128))],
        [PackedLinear(packed(8, 128)), PackedLinear(packed(8, 128, group=24))],
        [layer(8, 4, group=24)],
        [replace(layer(8, 4), input_scale=torch.ones(128))],
        [replace(layer(8, 4), activation="int8")],
        [
            replace(
                layer(8, 4),
                binary=PackedBinary(pack_signs(torch.ones(8, 128) < 0), torch.ones(8, 1), torch.ones(1, 128)),
            )
        ],
        [layer(8, 4), PackedLinear(packed(8, 128))],
        [layer(4096, 200), layer(4096, 200)],
        [replace(layer(8, 4), weight=packed(8, 128, zero_point=torch.zeros(8, 1, dtype=torch.uint8)))],
    ],
    ids=[
        "one alone",
        "groups that do not go together",
        "odd groups",
        "scaled inputs",
        "rounded inputs",
        "signs",
        "one without",
        "too many zeros",
        "zero points",
    ],
)
def test_other_forms_are_left_alone(layers: list[PackedLinear]) -> None:
    assert join(layers) is None
