"""Stacked layers: the form on the GPU of several layers that read the same input, checked by decoding it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends.cuda.layer import FACTOR_GROUP, MOST_STACKED, FragmentLayer, prepare, stack, stack_shared
from slimc.errors import KernelError
from slimc.runtime.formats import LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear


def make(rows: int, rank: int, columns: int = 256, dtype: torch.dtype = torch.bfloat16) -> FragmentLayer:
    weight = WeightFormat(rows, columns, bits=4, per_tensor=True, dtype=dtype)
    factors = [WeightFormat(*shape, bits=4, group=64, dtype=dtype) for shape in ((rows, rank), (rank, columns)) if rank]
    spec = LinearFormat(weight, *factors)
    tensors: dict[str, Tensor] = {
        name: torch.randint(0, 256, shape, dtype=kind) if kind == torch.uint8 else torch.rand(shape).to(kind)
        for name, (shape, kind) in spec.tensor_specs().items()
    }
    return prepare(PackedLinear.assemble(spec, tensors))


@pytest.fixture
def correction(decode_fragments: Callable[..., Tensor]) -> Callable[[FragmentLayer], Tensor]:
    """Computes L @ R as the kernels do: each tile of L reads its ranks as ``rank_range`` says."""

    def multiply(layer: FragmentLayer) -> Tensor:
        assert layer.rank_range is not None
        left, right = decode_fragments(layer.left, layer.left_scale), decode_fragments(layer.right, layer.right_scale)
        parts = []
        for tile, (start, units) in enumerate(layer.rank_range.tolist()):
            width = units * FACTOR_GROUP
            assert start + width <= layer.ranks
            parts.append(left[16 * tile : 16 * tile + 16, :width] @ right[start : start + width])
        return torch.cat(parts)

    return multiply


@pytest.mark.parametrize("ranks", [(57, 57, 57), (130, 20, 64), (20, 130, 1), (1, 20, 130)])
def test_each_layer_of_a_stack_keeps_its_own_adapters(ranks: tuple[int, ...], correction: Any) -> None:
    layers = [make(rows, rank) for rows, rank in zip((512, 256, 100), ranks, strict=True)]
    stacked = stack(layers)
    assert stacked.format.rows == 868
    expected = torch.cat([correction(layer) for layer in layers])
    torch.testing.assert_close(correction(stacked), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("ranks", [(57, 57, 57), (130, 20, 64), (0, 0, 0)])
def test_a_part_of_a_stack_is_the_layer_in_the_same_memory(ranks: tuple[int, ...], correction: Any) -> None:
    layers = [make(rows, rank) for rows, rank in zip((512, 256, 100), ranks, strict=True)]
    stacked, parts = stack_shared(layers)
    memory = stacked.codes.untyped_storage().data_ptr()
    # Rows of L have room for as many ranks as the widest layer has, and each reads no more than its own.
    for layer, one, (rows, own) in zip(layers, stack(parts).members, stack(parts).parts, strict=False):
        assert FACTOR_GROUP * one.rank_units == layer.ranks == own.stop - own.start
        assert rows.start == one.first_row
    for layer, part in zip(layers, parts, strict=True):
        assert part.codes.untyped_storage().data_ptr() == memory
        assert part.codes.is_contiguous()
        assert torch.equal(part.codes, layer.codes)
        assert torch.equal(part.scale, layer.scale.expand(layer.format.rows))
        assert (part.row_tiles, part.ranks, part.format.rank) == (layer.row_tiles, layer.ranks, layer.format.rank)
        if layer.ranks:
            assert torch.equal(correction(part), correction(layer))


def test_scales_and_codes_lie_one_layer_after_another() -> None:
    layers = [make(256, 0), make(48, 0)]
    stacked = stack(layers)
    assert torch.equal(stacked.codes, torch.cat([layer.codes for layer in layers]))
    assert torch.equal(stacked.scale[:256], layers[0].scale.expand(256))
    assert torch.equal(stacked.scale[256:], layers[1].scale.expand(48))
    assert not stacked.format.weight.per_tensor


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(100, 0, 256), (256, 0, 256)], "multiple of 256 rows"),
        ([(256, 0, 256), (256, 0, 128)], "cannot be stacked"),
        ([(256, 20, 256), (256, 0, 256)], "cannot be stacked"),
    ],
)
def test_layers_that_do_not_fit(layers: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        stack([make(*sizes) for sizes in layers])


def test_no_more_layers_are_stacked_than_a_launch_can_be_told_of() -> None:
    layers = [make(256, 20) for _ in range(MOST_STACKED + 1)]
    assert len(stack(layers[:-1]).members) == MOST_STACKED
    with pytest.raises(KernelError, match=f"at most {MOST_STACKED} layers can be stacked, not {MOST_STACKED + 1}"):
        stack(layers)
