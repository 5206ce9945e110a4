"""``cuda-stored``: decode the canonical tensors (``unpack.cu``), multiply densely. For nearly every form.

It is for forms that no other kernel reads. Nothing is derived and nothing is kept: W, L and R are decoded at every
call, into memory of PyTorch's allocator or, for a few tokens, into registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends.cuda.layer import refuses_machine
from slimc.backends.cuda.rounding import round_inputs
from slimc.backends.cuda.signs import SignProduct, Signs
from slimc.backends.cuda.unpack import MOST_PRODUCT_TOKENS, PIECE_COLUMNS, Unpacker, refuses_weight, whole_pieces
from slimc.runtime.formats import LinearFormat
from slimc.runtime.packing import PackedLinear, PackedWeight
from slimc.runtime.select import Kernel

__all__ = ["STORED", "StoredAdapters", "StoredLayer", "StoredMatrix", "fill_up", "prepare", "run", "run_with_signs"]


class StoredMatrix:
    """A matrix as it is stored, and the launches that decode it, made when they are first needed."""

    def __init__(self, packed: PackedWeight) -> None:
        self.packed = packed
        self._unpackers: dict[bool, Unpacker] = {}

    def dense(self) -> Tensor:
        """Return the dense matrix, for reading only, its columns filled up to whole pieces by zeros."""
        return fill_up(self.packed.values, 1, PIECE_COLUMNS) if self._is_dense else self._decoded(None)

    def product(
        self, x: Tensor, bias: Tensor | None = None, binary: SignProduct | None = None, *, filled: bool = False
    ) -> Tensor:
        """Return ``x @ W^T + bias`` [tokens, rows] of x [tokens, columns].

        Args:
            x: inputs.
            bias: [rows] or ``None``.
            binary: what is added to W.
            filled: whether the result shall have columns of zeros up to whole pieces, as further products want it.
        """
        rows = self.packed.format.rows
        if self._are_few(x):
            width = whole_pieces(rows) if filled else rows
            y = x.new_zeros(len(x), width) if width > rows else x.new_empty(len(x), rows)
            self._multiply(x, bias, y[:, :rows], binary=binary)
            return y
        if binary is None:
            matrix = self.dense()
        elif self._is_dense:
            matrix = binary.matrix().add_(self.packed.values)
        else:
            matrix = self._decoded(binary.arguments)
        # Products with a rank that is no multiple of 8 take several times as long.
        matrix = fill_up(matrix, 0, PIECE_COLUMNS) if filled else matrix
        return functional.linear(x, matrix[:, : x.shape[1]], bias)

    def add_product(self, y: Tensor, x: Tensor) -> Tensor:
        """Add ``x @ W^T`` to y [tokens, rows], in place; return y."""
        if not self._are_few(x):
            return y.addmm_(x, self.dense()[:, : x.shape[1]].t())
        self._multiply(x, None, y, add=True)
        return y

    @property
    def _is_dense(self) -> bool:
        return self.packed.format.bits is None and self.packed.pattern is None

    def _are_few(self, x: Tensor) -> bool:
        return x.is_cuda and len(x) <= MOST_PRODUCT_TOKENS and not self._is_dense

    def _multiply(
        self, x: Tensor, bias: Tensor | None, y: Tensor, *, add: bool = False, binary: SignProduct | None = None
    ) -> None:
        x = fill_up(x, 1, PIECE_COLUMNS)
        readable = x.stride(1) == 1 and x.stride(0) % PIECE_COLUMNS == x.data_ptr() % 16 == 0
        x = x if readable else x.clone(memory_format=torch.contiguous_format)
        signs = None if binary is None else binary.arguments
        self._unpacker(signs).multiply(x, bias, y, add=add, signs=signs)

    def _decoded(self, signs: Signs | None) -> Tensor:
        spec = self.packed.format
        made = self.packed.values.new_empty(spec.rows, whole_pieces(spec.columns), dtype=spec.dtype)
        self._unpacker(signs).write(made, signs)
        return made

    def _unpacker(self, signs: Signs | None) -> Unpacker:
        signed = signs is not None
        if signed not in self._unpackers:
            self._unpackers[signed] = Unpacker(self.packed, signs=signed)
        return self._unpackers[signed]


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
        return self.left.add_product(y, self.right.product(x, filled=True))


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


def run_with_signs(x: Tensor, layer: StoredLayer, binary: SignProduct, bias: Tensor | None) -> Tensor:
    """Compute y [tokens, rows] from x [tokens, columns] by a weight that is nothing else, and a binary part."""
    return layer.weight.product(x, bias, binary)


def run(x: Tensor, layer: StoredLayer, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns]."""
    spec = layer.format
    flat = x.reshape(-1, spec.columns)
    scaled = flat if layer.input_scale is None else flat * layer.input_scale
    rounded = round_inputs(scaled, spec.activation)
    y = layer.weight.product(rounded, bias)
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
