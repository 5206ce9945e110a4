"""The layout ``fragments``: a 4-bit layer in the order of the tensor cores, with nothing canonical beside it.

Stacked layers lie one after another: each has its tiles of rows of W and L, and its ranks of R. So a part is a slice
of every tensor, and can be computed, or turned back into canonical tensors, by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from slimc.backends.cuda.counters import Counters
from slimc.backends.cuda.fragments import TILE_ROWS, code_bytes, metadata_pattern, scale_groups
from slimc.backends.cuda.layer import FACTOR_GROUP, FragmentLayer, prepare, settle, stack
from slimc.runtime.formats import LinearFormat, WeightFormat
from slimc.runtime.layouts import WHOLE, Formats, Layout, register_layout
from slimc.runtime.packing import PackedLinear

__all__ = ["FRAGMENTS"]


def tensors(layer: FragmentLayer) -> dict[str, Tensor]:
    """Return what of a layer must be kept; the rest follows from its formats."""
    named = {
        "codes": layer.codes,
        "metadata": layer.metadata,
        "scale": layer.scale,
        "right": layer.right,
        "right_scale": layer.right_scale,
        "left": layer.left,
        "left_scale": layer.left_scale,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def assemble(formats: Formats, named: Mapping[str, Tensor], part: int) -> FragmentLayer:
    """Return a part of stacked layers, or with `WHOLE` all of them as one layer; it shares the tensors."""
    held = dict(named) if part == WHOLE else _part(formats, named, part)
    spec = _whole_format(formats) if part == WHOLE else formats[part]
    layer = FragmentLayer(
        spec,
        held["codes"],
        held.get("metadata"),
        held["scale"],
        held.get("right"),
        held.get("right_scale"),
        held.get("left"),
        held.get("left_scale"),
    )
    if layer.right is not None:
        ranges = _rank_ranges(formats if part == WHOLE else (formats[part],))
        layer.rank_range = torch.tensor(ranges, dtype=torch.int32, device=layer.codes.device)
        layer.counters = Counters(layer.codes.device)
    settle(layer.codes.device)
    return layer


def restore(formats: Formats, named: Mapping[str, Tensor], part: int) -> PackedLinear:
    """Return the canonical tensors of a part."""
    spec, held = formats[part], _part(formats, named, part)
    made = _restore_matrix(spec.weight, "", held["codes"], held.get("metadata"), held["scale"])
    if spec.left is not None and spec.right is not None:
        made |= _restore_matrix(spec.left, "left_", held["left"], None, held["left_scale"])
        made |= _restore_matrix(spec.right, "right_", held["right"], None, held["right_scale"])
    return PackedLinear.assemble(spec, made)


def _restore_matrix(
    spec: WeightFormat, prefix: str, codes: Tensor, metadata: Tensor | None, scale: Tensor
) -> dict[str, Tensor]:
    specs = spec.tensor_specs()
    (rows, size), _ = specs["values"]
    made = {f"{prefix}values": code_bytes(codes, rows, size)}
    if metadata is not None:
        made[f"{prefix}pattern"] = metadata_pattern(metadata, rows, spec.columns)
    if spec.group is None:
        made[f"{prefix}scale"] = scale.clone().view(spec.scale_shape)
    else:
        made[f"{prefix}scale"] = scale_groups(scale, *spec.scale_shape, spec.dtype)
    return made


def _part(formats: Formats, named: Mapping[str, Tensor], part: int) -> dict[str, Tensor]:
    """Return the slices of the tensors that are a part's own."""
    if len(formats) == 1:
        return dict(named)
    spec = formats[part]
    tiles = _slice([_tiles(form.rows) for form in formats], part)
    ranks = _slice([_ranks(form) // TILE_ROWS for form in formats], part)
    rows = _slice([form.rows for form in formats], part)
    if spec.weight.per_tensor:
        rows = slice(rows.start, rows.start + 1)
    where = {
        "scale": rows if spec.weight.group is None else tiles,
        "right": ranks,
        "right_scale": ranks,
    }
    return {name: tensor[where.get(name, tiles)] for name, tensor in named.items()}


def _slice(sizes: list[int], part: int) -> slice:
    return [slice(*ends) for ends in pairwise(accumulate(sizes, initial=0))][part]


def _tiles(rows: int) -> int:
    return -(-rows // TILE_ROWS)


def _ranks(form: LinearFormat) -> int:
    """Ranks of a layer, with the padding that they have here."""
    return -(-form.rank // FACTOR_GROUP) * FACTOR_GROUP


def _rank_ranges(formats: Formats) -> list[tuple[int, int]]:
    """For every tile of rows of stacked layers, the first of the ranks that it reads, and how many units of 64."""
    starts = accumulate((_ranks(form) for form in formats), initial=0)
    return [
        (start, _ranks(form) // FACTOR_GROUP)
        for form, start in zip(formats, starts, strict=False)
        for _ in range(_tiles(form.rows))
    ]


def _whole_format(formats: Formats) -> LinearFormat:
    if len(formats) == 1:
        return formats[0]
    rows = sum(form.rows for form in formats)
    return LinearFormat(replace(formats[0].weight, rows=rows, per_tensor=False))


FRAGMENTS = register_layout(Layout("fragments", prepare, tensors, assemble, restore, stack))
"""Every kernel of this package that takes a `FragmentLayer` computes in this layout."""
