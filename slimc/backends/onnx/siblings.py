"""Fewer and larger products: layers that read the same input as one, and a weight with its left factor as one.

A processor computes the small products of a decoder's single token in about the time that it takes to start one. A
layer with adapters starts three of them and a sum; here

    y = x W^T + (x R^T) L^T   becomes   t = x R^T,  y = [x, t] [W, L]^T

and for layers with one input W is their weights below each other, R their right factors, and L block-diagonal. The
zeros of its other blocks are read for nothing, so layers are only joined where those are few. Without adapters there
are none, and W alone is one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimc.backends.onnx.one_width import common_codes
from slimc.runtime.decode import expand_groups
from slimc.runtime.packing import PackedLinear, PackedWeight, pack_weight

__all__ = ["JoinedLayers", "join"]

_GROUPS = (128, 64, 32, 16)
"""Columns that may share a scale in a joined weight, the most first."""

_WASTE_A_LAYER = 32 << 10
"""Bytes of zeros that are read in about the time that a further layer's products take to start."""


@dataclass(frozen=True)
class JoinedLayers:
    """Layers as two products, or as one.

    Attributes:
        right: R of all, [ranks, columns]; None without adapters.
        weight: [W, L] of all, [rows, columns + ranks].
        rows: of each layer.
    """

    right: PackedWeight | None
    weight: PackedWeight
    rows: tuple[int, ...]


def join(layers: Sequence[PackedLinear]) -> JoinedLayers | None:
    """Return layers of one input, or a layer with adapters, as fewer products; None if it cannot be done or costs.

    What it computes is the same but for the order of sums.
    """
    first = layers[0]
    if not all(_alike(first, one) for one in layers):
        return None
    return _join_plain(layers) if first.left is None else _join_adapted(layers)


def _join_plain(layers: Sequence[PackedLinear]) -> JoinedLayers | None:
    """Return weights below each other; None for a single one, or where no group fits all."""
    weights = [one.weight for one in layers]
    per_row = all(part.format.group is None for part in weights)
    group = 0 if per_row else next((size for size in _GROUPS if _divides(size, layers)), None)
    if len(layers) == 1 or group is None:
        return None
    columns = weights[0].format.columns
    parts = [_codes(part, group or columns) for part in weights]
    weight = pack_weight(
        torch.cat([codes for codes, _ in parts]),
        bits=weights[0].format.bits,
        scale=torch.cat([scale for _, scale in parts]),
        group=group or None,
    )
    return JoinedLayers(None, weight, tuple(part.format.rows for part in weights))


def _join_adapted(layers: Sequence[PackedLinear]) -> JoinedLayers | None:
    """Return layers with adapters as two products; None where no group fits all, or zeros cost more than it saves."""
    first = layers[0]
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
    parts = [part for part in (other.weight, other.left, other.right) if part is not None]
    return (
        (other.left is None) == (one.left is None)
        and all(part.format.bits == one.weight.format.bits is not None and not part.format.asymmetric for part in parts)
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
    codes = common_codes(packed)
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
