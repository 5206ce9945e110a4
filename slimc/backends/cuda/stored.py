"""``cuda-stored``: decode the canonical tensors (``unpack.cu``), multiply densely. For nearly every form.

It is for forms that no other kernel reads. Nothing is derived and nothing is kept: W, L and R are decoded at every
call into memory of PyTorch's allocator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends.cuda.layer import refuses_machine
from slimc.backends.cuda.rounding import round_inputs
from slimc.backends.cuda.signs import SignProduct, Signs
from slimc.backends.cuda.unpack import PIECE_COLUMNS, Unpacker, refuses_weight, unpacker, whole_pieces
from slimc.runtime.formats import LinearFormat
from slimc.runtime.packing import PackedLinear, PackedWeight
from slimc.runtime.select import Kernel

__all__ = ["STORED", "StoredAdapters", "StoredLayer", "StoredMatrix", "decode_with_signs", "fill_up", "prepare", "run"]


class StoredMatrix:
    """A matrix as it is stored, and the launch that decodes it, made when it is first needed."""

    def __init__(self, packed: PackedWeight) -> None:
        self.packed = packed
        self._unpackers: dict[bool, Unpacker] = {}

    def dense(self) -> Tensor:
        """Return the dense matrix, for reading only, its columns filled up to whole pieces by zeros."""
        return fill_up(self.packed.values, 1, PIECE_COLUMNS) if self._is_dense else self._unpacked(None)

    def with_signs(self, product: SignProduct) -> Tensor:
        """Return the dense matrix [rows, columns] with a binary part; rows may be apart."""
        columns = self.packed.format.columns
        if self._is_dense:
            return product.add_to(self.packed.values.clone())
        return self._unpacked(product.arguments)[:, :columns]

    @property
    def _is_dense(self) -> bool:
        return self.packed.format.bits is None and self.packed.pattern is None

    def _unpacked(self, signs: Signs | None) -> Tensor:
        spec, signed = self.packed.format, signs is not None
        if signed not in self._unpackers:
            self._unpackers[signed] = unpacker(self.packed, signs=signed)
        made = self.packed.values.new_empty(spec.rows, whole_pieces(spec.columns), dtype=spec.dtype)
        self._unpackers[signed](made, signs)
        return made


@dataclass
class StoredAdapters:
    """L and R as they are stored."""

    left: StoredMatrix
    right: StoredMatrix

    @classmethod
    def of(cls, packed: PackedLinear) -> StoredAdapters | None:
        """Return the adapters of a layer, or None if it has none."""
        if packed.left is None or packed.right is None:
            return None
        return cls(StoredMatrix(packed.left), StoredMatrix(packed.right))

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Add ``(x @ R^T) @ L^T`` to y [tokens, rows], in place; return y."""
        # Products with a rank that is no multiple of 8 take several times as long.
        right = fill_up(self.right.dense(), 0, PIECE_COLUMNS)[:, : x.shape[1]]
        return y.addmm_(torch.mm(x, right.t()), self.left.dense().t())


@dataclass
class StoredLayer:
    """A layer as it is stored; nothing is copied."""

    format: LinearFormat
    weight: StoredMatrix
    adapters: StoredAdapters | None
    input_scale: Tensor | None


def fill_up(matrix: Tensor, axis: int, multiple: int) -> Tensor:
    """Return a matrix with zeros added so that its size is a multiple; itself if it is one."""
    missing = -matrix.shape[axis] % multiple
    if not missing:
        return matrix
    return functional.pad(matrix, (0, missing) if axis == 1 else (0, 0, 0, missing))


def prepare(packed: PackedLinear) -> StoredLayer:
    """Take the tensors as they are."""
    return StoredLayer(packed.format, StoredMatrix(packed.weight), StoredAdapters.of(packed), packed.input_scale)


def decode_with_signs(layer: StoredLayer, product: SignProduct) -> Tensor:
    """Return W with its binary part, dense [rows, columns]; rows may be apart."""
    return layer.weight.with_signs(product)


def run(x: Tensor, layer: StoredLayer, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns]."""
    spec = layer.format
    flat = x.reshape(-1, spec.columns)
    scaled = flat if layer.input_scale is None else flat * layer.input_scale
    rounded = round_inputs(scaled, spec.activation)
    y = functional.linear(rounded, layer.weight.dense()[:, : spec.columns], bias)
    if layer.adapters is not None:
        layer.adapters.add(y, rounded if layer.input_scale is None else flat)
    return y.view(*x.shape[:-1], spec.rows)


def _accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, _tokens: int) -> str | None:
    parts = [part for part in (spec.weight, spec.left, spec.right) if part is not None]
    if any(part.dtype != spec.weight.dtype for part in parts):
        return "needs a weight and adapters of one dtype"
    reasons = (refuses_weight(part) for part in parts)
    return refuses_machine(spec, dtype, device) or next((reason for reason in reasons if reason), None)


STORED = Kernel("cuda-stored", _accepts, prepare, run, transient=True, timed=False)
