"""The layout ``fragments``: a layer in the order of the tensor cores, with nothing canonical beside it.

Stacked layers lie one after another: each has its tiles of rows of W and L, and its ranks of R. So a part is a slice
of every tensor, and can be computed, or turned back into canonical tensors, by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise

from torch import Tensor

from slimc.backends.cuda.fragments import TILE_ROWS, code_bytes, metadata_pattern, scale_groups, value_matrix
from slimc.backends.cuda.layer import FACTOR_GROUP, FragmentLayer, complete, prepare
from slimc.runtime.formats import WeightFormat
from slimc.runtime.layouts import Formats, Layout, register_layout
from slimc.runtime.packing import PackedLinear

__all__ = ["FRAGMENTS", "assemble", "restore", "tensors"]


def tensors(layer: FragmentLayer) -> dict[str, Tensor]:
    """Return what of a layer, or of a stack, must be kept; the rest follows from the formats."""
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
    """Return a layer of a stack; it reads the memory of the tensors given."""
    held = _part(formats, named, part)
    return complete(
        FragmentLayer(
            formats[part],
            codes=held["codes"],
            metadata=held.get("metadata"),
            scale=held["scale"],
            right=held.get("right"),
            right_scale=held.get("right_scale"),
            left=held.get("left"),
            left_scale=held.get("left_scale"),
        )
    )


def restore(formats: Formats, named: Mapping[str, Tensor], part: int) -> PackedLinear:
    """Return the canonical tensors of a layer of a stack."""
    spec, held = formats[part], _part(formats, named, part)
    made = _restore_matrix(spec.weight, "", held["codes"], held.get("metadata"), held["scale"])
    if spec.left is not None and spec.right is not None:
        made |= _restore_matrix(spec.left, "left_", held["left"], None, held["left_scale"])
        made |= _restore_matrix(spec.right, "right_", held["right"], None, held["right_scale"])
    return PackedLinear.assemble(spec, made)


def _restore_matrix(
    spec: WeightFormat, prefix: str, codes: Tensor, metadata: Tensor | None, scale: Tensor
) -> dict[str, Tensor]:
    (rows, size), _ = spec.tensor_specs()["values"]
    of_values = spec.bits is None
    values = value_matrix(codes, rows, size, spec.dtype) if of_values else code_bytes(codes, rows, size)
    made = {f"{prefix}values": values}
    if metadata is not None:
        made[f"{prefix}pattern"] = metadata_pattern(metadata, rows, spec.columns)
    if spec.group is not None:
        made[f"{prefix}scale"] = scale_groups(scale, *spec.scale_shape, spec.dtype)
    elif not of_values:
        made[f"{prefix}scale"] = scale.clone().view(spec.scale_shape)
    return made


def _part(formats: Formats, named: Mapping[str, Tensor], part: int) -> dict[str, Tensor]:
    """Return the slices of the tensors that are a layer's own."""
    if len(formats) == 1:
        return dict(named)
    weight = formats[part].weight
    tiles = _slice([-(-form.rows // TILE_ROWS) for form in formats], part)
    ranks = _slice([-(-form.rank // FACTOR_GROUP) * (FACTOR_GROUP // TILE_ROWS) for form in formats], part)
    rows = _slice([form.rows for form in formats], part)
    # A stack has a scale a row where its layers have one each.
    own = slice(rows.start, rows.start + 1) if weight.per_tensor else rows
    where = {"scale": own if weight.group is None else tiles, "right": ranks, "right_scale": ranks}
    return {name: tensor[where.get(name, tiles)] for name, tensor in named.items()}


def _slice(sizes: list[int], part: int) -> slice:
    return [slice(*ends) for ends in pairwise(accumulate(sizes, initial=0))][part]


FRAGMENTS = register_layout(Layout("fragments", prepare, tensors, assemble, restore))
"""Every kernel of this package that takes a `FragmentLayer` computes in this layout."""
