"""Fewer and larger products: layers that read the same input as one, and a weight with its left factor as one.

A processor computes the small products of a decoder's single token in about the time that it takes to start one. A
layer with adapters starts three of them and a sum; here

    y = x W^T + (x R^T) L^T   becomes   t = x R^T,  y = [x, t] [W, L]^T

and for layers with one input W is their weights below each other, R their right factors, and L block-diagonal. The
zeros of its other blocks are read for nothing, so layers are only joined where those are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimc.backends.onnx.weights import of_one_width
from slimc.runtime.decode import expand_groups
from slimc.runtime.packing import PackedLinear, PackedWeight, pack_weight

__all__ = ["JoinedLayers", "join"]

_GROUPS = (128, 64, 32, 16)
"""Columns that may share a scale in a joined weight, the most first."""

_WASTE_A_LAYER = 32 << 10
"""Bytes of zeros that are read in about the time that a further layer's products take to start."""


@dataclass(frozen=True)
class JoinedLayers:
    """Layers as two products.

    Attributes:
        right: R of all, [ranks, columns].
        weight: [W, L] of all, [rows, columns + ranks].
        rows: of each layer.
    """

    right: PackedWeight
    weight: PackedWeight
    rows: tuple[int, ...]


def join(layers: Sequence[PackedLinear]) -> JoinedLayers | None:
    """Return layers of one input, or a single layer, as two products; None if their forms do not allow it or it costs.

    What it computes is the same but for the order of sums.
    """
    layers = [replace(one, weight=of_one_width(one.weight)) for one in layers]
    first = layers[0]
    if first.left is None or first.right is None or not all(_alike(first, one) for one in layers):
        return None
    columns = first.weight.format.columns
    group = next((size for size in _GROUPS if _divides(size, layers)), None)
    if group is None:
        return None
    ranks = [-(-one.format.rank // group) * group for one in layers]
    rows = [one.format.rows for one in layers]
    needed = sum(own * rank for own, rank in zip(rows, ranks, strict=True))
    wasted = (sum(rows) * sum(ranks) - needed) * (first.weight.format.bits or 0) // 8
    if wasted > _WASTE_A_LAYER * (len(layers) - 1):
        return None
    rights = [one.right for one in layers if one.right is not None]
    lefts = [one.left for one in layers if one.left is not None]
    right = _stacked([_codes(one, group) for one in rights], ranks, group, rights[0])
    zero = 1 << ((first.weight.format.bits or 1) - 1)
    codes = torch.full((sum(rows), columns + sum(ranks)), zero, dtype=torch.uint8)
    scale = torch.ones(sum(rows), codes.shape[1] // group, dtype=_scale_of(first.weight).dtype)
    down, across = 0, columns
    for layer, left, own, rank in zip(layers, lefts, rows, ranks, strict=True):
        for part, begin in ((layer.weight, 0), (left, across)):
            part_codes, part_scale = _codes(part, group)
            codes[down : down + own, begin : begin + part_codes.shape[1]] = part_codes
            place = begin // group
            scale[down : down + own, place : place + part_scale.shape[1]] = part_scale
        down, across = down + own, across + rank
    weight = pack_weight(codes, bits=first.weight.format.bits, scale=scale, group=group)
    return JoinedLayers(right, weight, tuple(rows))


def _alike(one: PackedLinear, other: PackedLinear) -> bool:
    """Tell whether two layers can be parts of one product."""
    if other.left is None or other.right is None:
        return False
    parts = (other.weight, other.left, other.right)
    return (
        all(part.format.bits == one.weight.format.bits is not None and not part.format.asymmetric for part in parts)
        and other.input_scale is None
        and other.activation is None
        and other.binary is None
        and other.weight.format.columns == one.weight.format.columns
        and all(part.format.dtype == one.weight.format.dtype for part in parts)
    )


def _divides(group: int, layers: Sequence[PackedLinear]) -> bool:
    """Tell whether no group of this size lies across two scales, or across W and L."""
    parts = [part for one in layers for part in (one.weight, one.left, one.right) if part is not None]
    grouped = [part.format.group for part in parts if part.format.group is not None]
    within = all(size % group == 0 for size in grouped)
    return within and layers[0].weight.format.columns % group == 0


def _scale_of(packed: PackedWeight) -> Tensor:
    if packed.scale is None:
        raise ValueError("a weight of numbers has no scale")
    return packed.scale


def _codes(packed: PackedWeight, group: int) -> tuple[Tensor, Tensor]:
    """Return codes [rows, columns] and the scale of each ``group`` columns of a row."""
    codes, _ = packed.unpack()
    rows, columns = codes.shape
    scale = expand_groups(_scale_of(packed), columns, packed.format.group or 0)
    return codes, scale.expand(rows, columns)[:, ::group]


def _stacked(
    parts: Sequence[tuple[Tensor, Tensor]], heights: Sequence[int], group: int, like: PackedWeight
) -> PackedWeight:
    """Return matrices below each other, each filled up with rows of zeros to its height."""
    zero = 1 << ((like.format.bits or 1) - 1)
    codes = torch.full((sum(heights), parts[0][0].shape[1]), zero, dtype=torch.uint8)
    scale = torch.ones(sum(heights), parts[0][1].shape[1], dtype=_scale_of(like).dtype)
    down = 0
    for (part, part_scale), height in zip(parts, heights, strict=True):
        codes[down : down + len(part)] = part
        scale[down : down + len(part)] = part_scale
        down += height
    return pack_weight(codes, bits=like.format.bits, scale=scale, group=group)
