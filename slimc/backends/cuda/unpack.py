"""Packed tensors, as they are stored, to dense matrices of 16-bit numbers on a GPU (``unpack.cu``).

The numbers are what `PackedWeight.decode` gives, bit for bit. A few tokens are multiplied by them without a matrix.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimc.backends.cuda import driver
from slimc.backends.cuda.layer import pointer, source
from slimc.backends.cuda.signs import Signs
from slimc.errors import KernelError
from slimc.runtime.bits import unpack_bits
from slimc.runtime.formats import NM, WeightFormat
from slimc.runtime.packing import PackedWeight

__all__ = ["MOST_PRODUCT_TOKENS", "PIECE_COLUMNS", "Unpacker", "refuses_weight", "whole_pieces"]

MATRIX_KERNEL = "unpack_weight"
PRODUCT_KERNEL = "unpack_linear"

THREADS = 128
PIECE_COLUMNS = 8
"""Columns that are written at once."""

SEGMENT_COLUMNS = 256
MOST_GRID_ROWS = 65535
MOST_PRODUCT_TOKENS = 4
"""Up to here multiplying by numbers as they are decoded is faster than a dense matrix and cuBLAS."""

MOST_VALUES = 2**31
"""Offsets into one stream of values are 32-bit numbers."""

KEPT_ALL, KEPT_BY_PATTERN, KEPT_2_OF_4 = range(3)


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "values", "pattern", "scale", "zero_point", "kept_before", "dense",
        )),
        ("value_bytes", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("row_bytes", "stride")),
        *((name, ctypes.c_int) for name in (
            "rows", "columns", "width", "group", "groups", "pattern_bytes", "segments",
        )),
        ("signs", Signs),
    ]  # fmt: skip


class _ProductArguments(ctypes.Structure):
    """``struct ProductArguments`` of the source."""

    _fields_ = [
        ("weight", _Arguments),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y")),
        *((name, ctypes.c_uint32) for name in ("x_stride", "y_stride")),
        *((name, ctypes.c_int) for name in ("tokens", "add")),
    ]  # fmt: skip


class Unpacker:
    """The launches that decode one matrix, or multiply by it, ready but for where the result goes.

    Args:
        weight: the matrix; launches read its tensors.
        signs: whether every call has a binary part to add.
    """

    def __init__(self, weight: PackedWeight, *, signs: bool = False) -> None:
        """Compile nothing yet."""
        spec, values = weight.format, weight.values
        kept_before = None
        kept = KEPT_ALL if weight.pattern is None else KEPT_2_OF_4
        if weight.pattern is not None and spec.sparsity != NM(2, 4):
            kept, kept_before = KEPT_BY_PATTERN, _kept_before(weight.pattern, spec)
        bits = spec.bits or 0
        row_bytes = 0 if values.dim() == 1 else values.element_size() * values.stride(0)
        self.weight = weight
        self._device_index = values.get_device()
        self._kept_before = kept_before
        self._rows_a_thread = 2 if kept == KEPT_BY_PATTERN else 4
        self._arguments = _Arguments(
            values=values.data_ptr(),
            pattern=pointer(weight.pattern),
            scale=pointer(weight.scale),
            zero_point=pointer(weight.zero_point),
            kept_before=pointer(kept_before),
            value_bytes=values.nbytes,
            row_bytes=row_bytes,
            rows=spec.rows,
            columns=spec.columns,
            group=spec.group or 0,
            groups=spec.scale_shape[1],
            pattern_bytes=0 if weight.pattern is None else weight.pattern.shape[1],
            segments=0 if kept_before is None else kept_before.shape[1],
        )
        piece_bits = PIECE_COLUMNS * bits // (2 if kept == KEPT_2_OF_4 else 1)
        whole = kept != KEPT_BY_PATTERN and spec.columns % PIECE_COLUMNS == 0
        major, _ = torch.cuda.get_device_capability(values.device)
        self._defines = {
            "BFLOAT16": int(spec.dtype == torch.bfloat16),
            "ARCH": 10 * major,
            "BITS": bits,
            "KEPT": kept,
            "SCALES": int(not spec.per_tensor),
            "ASYMMETRIC": int(spec.asymmetric),
            "LOAD_BYTES": _load_bytes(piece_bits, row_bytes, values.data_ptr()) if whole else 1,
            "TAIL": int(not whole),
            "ROWS": self._rows_a_thread,
            "SIGNS": int(signs),
        }
        self._launchers: dict[int, driver.Launcher] = {}

    def write(self, dense: Tensor, signs: Signs | None = None) -> None:
        """Decode into ``dense`` [rows, a multiple of 8 columns]; those beyond the matrix's own become zeros.

        Args:
            dense: its rows begin at multiples of 16 bytes.
            signs: the binary part, if it was made for one; sums are rounded once a rank.

        Raises:
            KernelError: the kernel cannot be compiled or loaded, or was made for another binary part or none.
        """
        arguments = self._arguments_of_call(signs)
        rows, width = dense.shape
        arguments.dense, arguments.stride, arguments.width = dense.data_ptr(), dense.stride(0), width
        self._launcher(0)(
            arguments,
            grid=(-(-width // (PIECE_COLUMNS * THREADS)), min(-(-rows // self._rows_a_thread), MOST_GRID_ROWS), 1),
            block=(THREADS, 1, 1),
            stream=torch.cuda.current_stream(dense.device).cuda_stream,
        )

    def multiply(
        self, x: Tensor, bias: Tensor | None, y: Tensor, *, add: bool = False, signs: Signs | None = None
    ) -> None:
        """Compute ``x @ W^T + bias`` of a few tokens into y, or add it, by numbers that `write` would have written.

        Args:
            x: [tokens, a multiple of 8 columns], rows at multiples of 16 bytes; columns beyond the matrix's are not
                read.
            bias: [rows] or ``None``.
            y: [tokens, rows]; its rows may be apart.
            add: to what is in y, and not in its place.
            signs: as in `write`.

        Raises:
            KernelError: as in `write`.
        """
        tokens, rows = y.shape
        tile = min(1 << (tokens - 1).bit_length(), MOST_PRODUCT_TOKENS)
        self._launcher(tile)(
            _ProductArguments(
                weight=self._arguments_of_call(signs),
                x=x.data_ptr(),
                bias=pointer(bias),
                y=y.data_ptr(),
                x_stride=x.stride(0),
                y_stride=y.stride(0),
                tokens=tokens,
                add=int(add),
            ),
            grid=(-(-rows // self._rows_a_thread), -(-tokens // tile), 1),
            block=(THREADS, 1, 1),
            stream=torch.cuda.current_stream(x.device).cuda_stream,
        )

    def _arguments_of_call(self, signs: Signs | None) -> _Arguments:
        if bool(self._defines["SIGNS"]) != (signs is not None):
            raise KernelError(
                "a launch was made for a weight with a binary part, and none is given, or without and one is"
            )
        # Another thread may use the same launch.
        arguments = _Arguments.from_buffer_copy(self._arguments)
        if signs is not None:
            arguments.signs = signs
        return arguments

    def _launcher(self, tokens: int) -> driver.Launcher:
        """Return the launcher of the product with so many tokens at once, of what writes the matrix if 0."""
        found = self._launchers.get(tokens)
        if found is None:
            kernel, kind = (PRODUCT_KERNEL, _ProductArguments) if tokens else (MATRIX_KERNEL, _Arguments)
            defines = self._defines | {"TOKENS": max(tokens, 1)}
            module = driver.load(source("unpack.cu"), "unpack", self._device_index, defines)
            found = self._launchers[tokens] = module.function(kernel).prepare([kind])
        return found


def refuses_weight(spec: WeightFormat) -> str | None:
    """Say why a form cannot be decoded, or return ``None``."""
    if spec.widths is not None:
        return f"decodes codes of one width, not {spec.describe()}"
    if spec.group is not None and spec.group % PIECE_COLUMNS and spec.group < spec.columns:
        return f"knows groups of a multiple of {PIECE_COLUMNS} columns, not {spec.group}"
    if spec.nonzeros is not None and spec.nonzeros >= MOST_VALUES:
        return f"holds fewer than 2^31 values of an unstructured weight, not {spec.nonzeros}"
    return None


def whole_pieces(columns: int) -> int:
    """Return the number of columns, filled up to what a thread writes at once."""
    return -(-columns // PIECE_COLUMNS) * PIECE_COLUMNS


def _load_bytes(piece_bits: int, row_bytes: int, address: int) -> int:
    """Return how many bytes can be loaded at once if all pieces of all rows are whole loads, else 1."""
    for size in (4, 2):
        if piece_bits and piece_bits % (8 * size) == row_bytes % size == address % size == 0:
            return size
    return 1


def _kept_before(pattern: Tensor, spec: WeightFormat) -> Tensor:
    """Return how many values of their stream are ahead of each 256 columns of each row, int32 [rows, segments]."""
    segments = -(-spec.columns // SEGMENT_COLUMNS)
    mask = pad(unpack_bits(pattern, 1, spec.columns), (0, segments * SEGMENT_COLUMNS - spec.columns))
    kept = torch.unflatten(mask, 1, (segments, SEGMENT_COLUMNS)).sum(-1, dtype=torch.int64)
    one_stream = spec.nonzeros is not None
    ahead = kept.flatten().cumsum(0).view_as(kept) if one_stream else kept.cumsum(1)
    return (ahead - kept).to(torch.int32)
