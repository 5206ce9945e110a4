"""Packed tensors, as they are stored, to dense matrices of 16-bit numbers on a GPU (``unpack.cu``).

The result is what `PackedWeight.decode` gives, bit for bit.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimc.backends.cuda import driver
from slimc.backends.cuda.layer import pointer, source
from slimc.backends.cuda.signs import Signs
from slimc.runtime.bits import unpack_bits
from slimc.runtime.formats import NM, WeightFormat
from slimc.runtime.packing import PackedWeight

__all__ = ["PIECE_COLUMNS", "Unpacker", "refuses_weight", "unpacker", "whole_pieces"]

KERNEL_NAME = "unpack_weight"

THREADS = 128
PIECE_COLUMNS = 8
"""Columns that are written at once."""

SEGMENT_COLUMNS = 256
MOST_GRID_ROWS = 65535
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
    ]  # fmt: skip


class _SignedArguments(_Arguments):
    """The same with SIGNS."""

    _fields_ = [("signs", Signs)]


@dataclass
class Unpacker:
    """The launch that decodes one matrix, ready but for where the result goes.

    Attributes:
        packed: the matrix; the launch reads its tensors.
    """

    packed: PackedWeight
    _kept_before: Tensor | None
    _arguments: _Arguments
    _launcher: driver.Launcher
    _rows_a_thread: int

    def __call__(self, dense: Tensor, signs: Signs | None = None) -> None:
        """Decode into ``dense`` [rows, a multiple of 8 columns]; those beyond the matrix's own become zeros.

        Rows of ``dense`` begin at multiples of 16 bytes. ``signs``, if it was made for them, are added, and the
        sums rounded once a rank.
        """
        # Another thread may use the same launch.
        arguments = type(self._arguments).from_buffer_copy(self._arguments)
        if isinstance(arguments, _SignedArguments) and signs is not None:
            arguments.signs = signs
        rows, width = dense.shape
        arguments.dense, arguments.stride, arguments.width = dense.data_ptr(), dense.stride(0), width
        self._launcher(
            arguments,
            grid=(-(-width // (PIECE_COLUMNS * THREADS)), min(-(-rows // self._rows_a_thread), MOST_GRID_ROWS), 1),
            block=(THREADS, 1, 1),
            stream=torch.cuda.current_stream(dense.device).cuda_stream,
        )


def unpacker(weight: PackedWeight, *, signs: bool = False) -> Unpacker:
    """Compile the kernel for a form, if that was not done yet, and fill in all but where the result goes.

    Args:
        weight: the matrix.
        signs: whether every call has a binary part to add.

    Raises:
        KernelError: the kernel cannot be compiled or loaded.
    """
    spec, values = weight.format, weight.values
    kept_before = None
    kept = KEPT_ALL if weight.pattern is None else KEPT_2_OF_4
    if weight.pattern is not None and spec.sparsity != NM(2, 4):
        kept, kept_before = KEPT_BY_PATTERN, _kept_before(weight.pattern, spec)
    bits = spec.bits or 0
    row_bytes = 0 if values.dim() == 1 else values.element_size() * values.stride(0)
    rows_a_thread = 2 if kept == KEPT_BY_PATTERN else 4
    kind = _SignedArguments if signs else _Arguments
    arguments = kind(
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
    defines = {
        "BFLOAT16": int(spec.dtype == torch.bfloat16),
        "ARCH": 10 * major,
        "BITS": bits,
        "KEPT": kept,
        "SCALES": int(not spec.per_tensor),
        "ASYMMETRIC": int(spec.asymmetric),
        "LOAD_BYTES": _load_bytes(piece_bits, row_bytes, values.data_ptr()) if whole else 1,
        "TAIL": int(not whole),
        "ROWS": rows_a_thread,
        "SIGNS": int(signs),
    }
    module = driver.load(source("unpack.cu"), KERNEL_NAME, values.get_device(), defines)
    launcher = module.function(KERNEL_NAME).prepare([kind])
    return Unpacker(weight, kept_before, arguments, launcher, rows_a_thread)


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
