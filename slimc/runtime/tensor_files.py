"""safetensors files: a header reader that believes nothing, and a writer whose bytes depend on the tensors alone.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, little-endian; the
header, a JSON object that gives each tensor's dtype, shape and byte range; then the tensors' bytes without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimc.errors import FormatError
from slimc.runtime.files import flush_to_disk, parse_json, regular_file_size

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_ELEMENTS = 1 << 48
"""No tensor is larger; keeps products of sides within 64 bits."""

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

DTYPES_BY_TORCH_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
"""The same dtypes under the names that PyTorch users know: ``"bfloat16"``."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype and shape, and the range of its bytes counted from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors that a safetensors file announces, after checking that the file really holds them.

    Nothing is allocated but the header. Checked: the header's length and JSON, that every entry has exactly
    the fields of the format, a known dtype, a sane shape and as many bytes as both imply, and that the byte
    ranges follow each other without gap or overlap up to the last byte of the file.

    Raises:
        FormatError: one of these does not hold.
    """
    size = regular_file_size(path)
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise FormatError(f"{path}: is truncated or not a safetensors file ({size} bytes); get the file again")
            if length > MAX_HEADER_BYTES:
                raise FormatError(f"{path}: a safetensors header of {length} bytes is too large; the file is damaged")
            header = parse_json(file.read(length), f"{path} (header)")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the safetensors header is not a JSON object; the file is damaged")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, record, 8 + length) for name, record in header.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            problem = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise FormatError(f"{path}: tensor {name[:200]!r} {problem}; the file is damaged")
        position = entry.end
    if position != size:
        raise FormatError(
            f"{path}: the header describes a file of {position} bytes, but it has {size}; "
            "the download or copy was cut short, get the file again"
        )
    return entries


def _entry(path: Path, name: str, record: Any, origin: int) -> Entry:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(record, dict) or record.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where} must have exactly dtype, shape and data_offsets; the file is damaged")
    if not isinstance(record["dtype"], str) or record["dtype"] not in DTYPES:
        raise FormatError(f"{where} has the unknown dtype {str(record['dtype'])[:40]!r}")
    dtype = DTYPES[record["dtype"]]
    shape, offsets = record["shape"], record["data_offsets"]
    if not _are_sizes(shape) or math.prod(shape) > MAX_ELEMENTS:
        raise FormatError(f"{where} has the impossible shape {str(shape)[:80]}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{where} has the impossible offsets {str(offsets)[:80]}")
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise FormatError(f"{where} of shape {shape} and dtype {record['dtype']} cannot take {end - start} bytes")
    return Entry(dtype, tuple(shape), origin + start, origin + end)


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(side) is int and 0 <= side <= MAX_ELEMENTS for side in value)
    )


def torch_name(dtype: torch.dtype) -> str:
    """Return the name under which PyTorch users know ``dtype``."""
    return str(dtype).removeprefix("torch.")


def storage_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of ``tensors`` in the order of a file: wide dtypes first, which aligns all; then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whose bytes depend on names, dtypes, shapes and values alone, and wait for the disk.

    One tensor at a time is brought to the CPU, so that a model on an accelerator is never there as a whole.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    order = storage_order(tensors)
    for name in order:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start on a multiple of eight, as the format advises
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(tensor_bytes(tensors[name]))
        file.flush()
        flush_to_disk(file.fileno())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of ``tensor`` in row-major order, as a file holds them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class TensorDigest:
    """The SHA-256 of a sequence of tensors: the bytes of each, after its name, dtype and shape.

    A tensor in memory and the same tensor in a file give the same digest.
    """

    CHUNK = 1 << 20

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def _describe(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._sha.update(f"{name} {NAMES[dtype]} {list(shape)}\n".encode())

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor in memory."""
        self._describe(name, tensor.dtype, tuple(tensor.shape))
        self._sha.update(tensor_bytes(tensor))

    def add_stored(self, name: str, path: Path, entry: Entry) -> None:
        """Add a tensor of a file, read piece by piece."""
        self._describe(name, entry.dtype, entry.shape)
        with path.open("rb") as file:
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                piece = file.read(min(left, self.CHUNK))
                if not piece:
                    raise FormatError(f"{path}: became shorter while it was read")
                self._sha.update(piece)
                left -= len(piece)

    def hexdigest(self) -> str:
        """Return the digest of all tensors added so far."""
        return self._sha.hexdigest()
