"""``cuda-stored``: decode the canonical tensors (``unpack.cu``), multiply densely. For nearly every form.

It is for forms that no other kernel reads. Nothing is derived and nothing is kept: W, L and R are decoded at every
call into memory of PyTorch's allocator.
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

__all__ = ["STORED", "StoredLayer", "fill_up", "prepare", "run"]


@dataclass
class StoredLayer:
    """A layer as it is stored; nothing is copied.

    Attributes:
        packed: the canonical tensors.
        unpackers: launches made so far, by the part that they decode.
    """

    packed: PackedLinear
    unpackers: dict[str, Unpacker] = field(default_factory=dict)

    def dense(self, part: str, weight: PackedWeight) -> Tensor:
        """Return a part, always the same under one name, as a dense matrix for reading only.

        It has whole pieces of columns; those that are not the part's own are zeros.
        """
        if weight.format.bits is None and weight.pattern is None:
            return fill_up(weight.values, 1, PIECE_COLUMNS)
        known = self.unpackers.get(part)
        if known is None:
            known = self.unpackers[part] = unpacker(weight)
        columns = whole_pieces(weight.format.columns)
        made = weight.values.new_empty(weight.format.rows, columns, dtype=weight.format.dtype)
        known(made)
        return made

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
    scaled = flat if packed.input_scale is None else flat * packed.input_scale
    y = layer.add_adapters(functional.linear(scaled, weight, bias), flat)
    return y.view(*x.shape[:-1], spec.rows)


def _accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, _tokens: int) -> str | None:
    parts = [part for part in (spec.weight, spec.left, spec.right) if part is not None]
    if any(part.dtype != spec.weight.dtype for part in parts):
        return "needs a weight and adapters of one dtype"
    reasons = (refuses_weight(part) for part in parts)
    return refuses_machine(spec, dtype, device) or next((reason for reason in reasons if reason), None)


STORED = Kernel("cuda-stored", _accepts, prepare, run, transient=True)
