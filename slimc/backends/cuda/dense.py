"""``cuda-dense``: decode the weight (``unpack.cu``), then multiply densely. For nearly every form, on any card.

It is for forms that no other kernel reads, for cards that have no other kernel, and for so many tokens that the dense
product hides what decoding costs. The dense weight lives in memory of PyTorch's allocator for the time of a call, so
that layer after layer of a stream decodes into the same place, and a captured graph has a place of its own.

Adapters are two products more, the second of which adds to y. For very many tokens ``W + L @ R`` is less work.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends.cuda.layer import refuses_machine
from slimc.backends.cuda.unpack import PIECE_COLUMNS, Unpacker, refuses_weight, unpacker, whole_pieces
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

    def dense(self, part: str, weight: PackedWeight) -> Tensor:
        """Return a part, always the same under one name, as a dense matrix for reading only.

        It has whole pieces of columns; those that are not the part's own are zeros.
        """
        if weight.format.bits is None and weight.pattern is None:
            return fill_up(weight.values, 1, PIECE_COLUMNS)
        made = self.scratch(weight.format.rows, weight.format.columns)
        self.decode(part, weight, made)
        return made

    def decode(self, part: str, weight: PackedWeight, dense: Tensor) -> None:
        """Decode a part, always the same under one name, into ``dense``."""
        known = self.unpackers.get(part)
        if known is None:
            known = self.unpackers[part] = unpacker(weight)
        known(dense)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return L [rows, rank] and R [rank, columns] as dense matrices, of a rank that is filled up by zeros."""
        left, right = self.packed.left, self.packed.right
        if left is None or right is None:
            return None
        wide_left, narrow_right = self.dense("left", left), self.dense("right", right)
        # Products with a rank that is no multiple of 8 take several times as long.
        return wide_left, fill_up(narrow_right, 0, PIECE_COLUMNS)[:, : right.format.columns]

    def add_adapters(self, y: Tensor, x: Tensor) -> Tensor:
        """Add ``(x @ R^T) @ L^T`` to y [tokens, rows], in place, if there are adapters."""
        factors = self.factors()
        if factors is None:
            return y
        left, right = factors
        return y.addmm_(torch.mm(x, right.t()), left.t())


def fill_up(matrix: Tensor, axis: int, multiple: int) -> Tensor:
    """Return a matrix with zeros added so that its size is a multiple; itself if it is one."""
    missing = -matrix.shape[axis] % multiple
    if not missing:
        return matrix
    return functional.pad(matrix, (0, missing) if axis == 1 else (0, 0, 0, missing))


def prepare(packed: PackedLinear) -> StoredLayer:
    """Take the tensors as they are."""
    return StoredLayer(packed)


def run(x: Tensor, layer: StoredLayer, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns]."""
    packed, spec = layer.packed, layer.packed.format
    flat = x.reshape(-1, spec.columns)
    weight = layer.dense("weight", packed.weight)[:, : spec.columns]
    if packed.input_scale is None and spec.rank and len(flat) > _merging_pays(spec):
        y = functional.linear(flat, _merged(weight, layer), bias)
    else:
        scaled = flat if packed.input_scale is None else flat * packed.input_scale
        y = layer.add_adapters(functional.linear(scaled, weight, bias), flat)
    return y.view(*x.shape[:-1], spec.rows)


def _merged(weight: Tensor, layer: StoredLayer) -> Tensor:
    """Return W + L @ R, rounded once more than W."""
    factors = layer.factors()
    return weight if factors is None else torch.addmm(weight, *factors)


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
