"""``cuda-dense``: decode the weight (``unpack.cu``), then multiply densely. For nearly every form, on any card.

It is for forms that no other kernel reads, for cards that have no other kernel, and for so many tokens that the dense
product hides what decoding costs. The dense weight lives in memory of PyTorch's allocator for the time of a call, so
that layer after layer of a stream decodes into the same place, and a captured graph has a place of its own.

Adapters stand beside the weight as further columns, ``y = [x * input_scale, x @ R^T] @ [W, L]^T``: one product more
than without, and nothing is added up in 16 bits. For very many tokens ``W + L @ R`` takes fewer operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends.cuda.layer import refuses_machine
from slimc.backends.cuda.unpack import Unpacker, refuses_weight, unpacker, whole_pieces
from slimc.runtime.formats import LinearFormat
from slimc.runtime.packing import PackedLinear, PackedWeight
from slimc.runtime.select import Kernel

__all__ = ["DENSE", "StoredLayer", "prepare", "run"]


@dataclass
class StoredLayer:
    """A layer as it is stored; nothing is copied.

    Attributes:
        packed: the canonical tensors.
        unpackers: launches made so far, by the part that they decode.
    """

    packed: PackedLinear
    unpackers: dict[str, Unpacker] = field(default_factory=dict)

    def scratch(self, rows: int, columns: int) -> Tensor:
        """Return memory for a matrix of the weight's dtype, its columns filled up to what is decoded at once."""
        packed = self.packed.weight
        device = packed.values.device
        return torch.empty(rows, whole_pieces(columns), dtype=packed.format.dtype, device=device)

    def decode(self, part: str, weight: PackedWeight | None, dense: Tensor) -> None:
        """Decode a part, always the same under one name, into ``dense``; columns that are not its own become zeros."""
        if weight is None:
            return
        columns = weight.format.columns
        if weight.format.bits is None and weight.pattern is None:
            dense[:, :columns] = weight.values
            dense[:, columns:].zero_()
            return
        known = self.unpackers.get(part)
        if known is None:
            known = self.unpackers[part] = unpacker(weight)
        known(dense)


def prepare(packed: PackedLinear) -> StoredLayer:
    """Take the tensors as they are."""
    return StoredLayer(packed)


def run(x: Tensor, layer: StoredLayer, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns]."""
    spec, scale = layer.packed.format, layer.packed.input_scale
    flat = x.reshape(-1, spec.columns)
    if not spec.rank:
        y = functional.linear(flat if scale is None else flat * scale, _weight(layer), bias)
    elif scale is None and len(flat) > _merging_pays(spec):
        y = functional.linear(flat, _merged(layer), bias)
    else:
        y = _beside(layer, flat, bias)
    return y.view(*x.shape[:-1], spec.rows)


def _weight(layer: StoredLayer) -> Tensor:
    """Return W [rows, columns], for reading only."""
    weight = layer.packed.weight
    if weight.format.bits is None and weight.pattern is None:
        return weight.values
    dense = layer.scratch(weight.format.rows, weight.format.columns)
    layer.decode("weight", weight, dense)
    return dense[:, : weight.format.columns]


def _merged(layer: StoredLayer) -> Tensor:
    """Return W + L @ R [rows, columns], rounded once more than W."""
    packed, spec = layer.packed, layer.packed.format
    weight, left = layer.scratch(spec.rows, spec.columns), layer.scratch(spec.rows, spec.rank)
    right = layer.scratch(spec.rank, spec.columns)
    layer.decode("weight", packed.weight, weight)
    layer.decode("left", packed.left, left)
    layer.decode("right", packed.right, right)
    return weight.addmm_(left[:, : spec.rank], right)[:, : spec.columns]


def _beside(layer: StoredLayer, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``[x * input_scale, x @ R^T] @ [W, L]^T + bias``."""
    packed, spec = layer.packed, layer.packed.format
    columns, rank = whole_pieces(spec.columns), whole_pieces(spec.rank)
    weights, right = layer.scratch(spec.rows, columns + rank), layer.scratch(spec.rank, spec.columns)
    layer.decode("weight", packed.weight, weights[:, :columns])
    layer.decode("left", packed.left, weights[:, columns:])
    layer.decode("right", packed.right, right)
    inputs = layer.scratch(len(x), columns + rank)
    if (columns, rank) != (spec.columns, spec.rank):
        inputs.zero_()
    inputs[:, : spec.columns] = x if packed.input_scale is None else x * packed.input_scale
    torch.mm(x, right[:, : spec.columns].t(), out=inputs[:, columns : columns + spec.rank])
    return functional.linear(inputs, weights, bias)


def _merging_pays(spec: LinearFormat) -> float:
    """Return for how many tokens multiplying by the factors takes as many operations as multiplying them."""
    return spec.rows * spec.columns / (spec.rows + spec.columns)


def _accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, _tokens: int) -> str | None:
    parts = [part for part in (spec.weight, spec.left, spec.right) if part is not None]
    if any(part.dtype != spec.weight.dtype for part in parts):
        return "needs a weight and adapters of one dtype"
    reasons = (refuses_weight(part) for part in parts)
    return refuses_machine(spec, dtype, device) or next((reason for reason in reasons if reason), None)


DENSE = Kernel("cuda-dense", _accepts, prepare, run)
