"""GGUF headers, checked before any other reader sees the file.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, number of tensors and of
metadata entries; the metadata; for each tensor its name, sides, type and offset; then, aligned, the data.
Readers that trust these numbers can be made to loop for hours or to allocate without limit by a small file.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from slimc.errors import FormatError, InputError
from slimc.runtime.files import regular_file_size

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_ARRAY = 1 << 24
"""Longest metadata array; vocabularies have less than a million entries."""

MAX_SIDE = 1 << 40
MAX_DIMENSIONS = 4
MAX_NESTING = 2

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]

_SMALLEST_ENTRY = _U64.size + 1 + _U32.size + 1
_SMALLEST_TENSOR = _U64.size + 1 + _U32.size + _U64.size + _U32.size + _U64.size

_WIDTHS = (
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "expert_count",
)
"""Metadata that readers allocate by; none can exceed the longest side of a tensor."""

_TOKEN_TABLE = "token_embd.weight"
_POSITION_TABLE = "position_embd.weight"

_LEARNED_POSITIONS = frozenset({"bert", "gpt2", "starcoder"})
"""Architectures whose readers allocate a row for each position; others only compute with the context length."""


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file announces: scalar and string metadata, and each tensor's shape (as in PyTorch)."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]


class _Reader:
    """Reads little-endian values from a file and refuses to pass its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def fail(self, problem: str) -> NoReturn:
        raise FormatError(f"{self.path}: {problem} (at byte {self.position}); the file is damaged, get it again")

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, size: int, what: str) -> int:
        """Step over ``size`` bytes and return where they start."""
        if size > self.left:
            self.fail(f"the file ends inside {what}, which needs {size} bytes where {self.left} are left")
        start = self.position
        self.position += size
        return start

    def scalar(self, form: struct.Struct, what: str) -> Any:
        return form.unpack_from(self.data, self.take(form.size, what))[0]

    def count(self, form: struct.Struct, what: str, smallest: int) -> int:
        """Read a number of items that take at least ``smallest`` bytes each, all of them still to come."""
        number: int = self.scalar(form, what)
        if number * smallest > self.left:
            self.fail(f"{what} {number} cannot be right: the file has only {self.left} bytes left")
        return number

    def text(self, what: str) -> str:
        size = self.count(_U64, f"the length of {what}", 1)
        start = self.take(size, what)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        """Read a metadata value; arrays are stepped over and give ``None``."""
        what = f"the value of {key!r}"
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            self.array(key, what, depth)
            return None
        if kind not in _SCALARS:
            self.fail(f"{what} has the unknown type {kind}")
        return self.scalar(_SCALARS[kind], what)

    def array(self, key: str, what: str, depth: int) -> None:
        if depth == MAX_NESTING:
            self.fail(f"{what} nests arrays more than {MAX_NESTING} deep")
        kind = self.scalar(_U32, what)
        smallest = _SCALARS[kind].size if kind in _SCALARS else _U64.size
        number = self.count(_U64, f"the number of items of {key!r},", smallest)
        if number > MAX_ARRAY:
            self.fail(f"{what} has {number} items, more than {MAX_ARRAY}")
        if kind in _SCALARS:
            self.take(number * smallest, what)
            return
        for _ in range(number):
            self.value(kind, key, depth + 1)


def read_header(path: Path) -> GgufHeader:
    """Return what a GGUF file announces, after checking that the file really holds it.

    Checked: magic and version, that every count, string and array fits in what is left of the file, that
    names are unique, and that the tensors have known types, sane sides, aligned offsets, and byte ranges that
    lie inside the file without overlap; and that the model's sizes in the metadata can belong to the tensors.

    Raises:
        InputError: the ``gguf`` package, which knows the tensor types, is not installed.
        FormatError: one of the checks fails.
    """
    if regular_file_size(path) < 24:
        raise FormatError(f"{path}: is too short for a GGUF file; get it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(path, data)
        start = reader.take(4, "the magic")
        if data[start : start + 4] != MAGIC:
            raise FormatError(f"{path}: does not start with {MAGIC!r}, so it is not a GGUF file")
        version = reader.scalar(_U32, "the version")
        if version not in VERSIONS:
            raise FormatError(
                f"{path}: has GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} can be read"
            )
        tensor_count = reader.count(_U64, "the number of tensors", _SMALLEST_TENSOR)
        entry_count = reader.count(_U64, "the number of metadata entries", _SMALLEST_ENTRY)
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = reader.text("a metadata key")
            if key in metadata:
                reader.fail(f"the metadata key {key[:100]!r} appears twice")
            metadata[key] = reader.value(reader.scalar(_U32, f"the type of {key!r}"), key)
        tensors = _read_tensors(reader, tensor_count, _alignment(reader, metadata))
    header = GgufHeader(metadata, tensors)
    _check_model_sizes(path, header)
    return header


def _alignment(reader: _Reader, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        reader.fail(f"the alignment {alignment!r} is not a power of two")
    return alignment


def _read_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    ranges: list[tuple[int, int, str]] = []
    for _ in range(count):
        name = reader.text("a tensor name")
        if name in shapes:
            reader.fail(f"the tensor {name[:100]!r} appears twice")
        dimensions = reader.scalar(_U32, f"the dimensions of {name!r}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            reader.fail(f"the tensor {name[:100]!r} has {dimensions} dimensions")
        sides = [reader.scalar(_U64, f"the sides of {name!r}") for _ in range(dimensions)]
        if not all(1 <= side <= MAX_SIDE for side in sides) or math.prod(sides) > MAX_SIDE:
            reader.fail(f"the tensor {name[:100]!r} has the impossible sides {sides}")
        size = _tensor_nbytes(reader, name, sides, reader.scalar(_U32, f"the type of {name!r}"))
        offset = reader.scalar(_U64, f"the offset of {name!r}")
        if offset % alignment:
            reader.fail(f"the tensor {name[:100]!r} has the offset {offset}, which is not a multiple of {alignment}")
        shapes[name] = tuple(reversed(sides))
        ranges.append((offset, offset + size, name))
    room = len(reader.data) - -(-reader.position // alignment) * alignment
    end = 0
    for first, last, name in sorted(ranges):
        if last > room:
            reader.fail(f"the data of tensor {name[:100]!r} would end {last - room} bytes after the end of the file")
        if first < end:
            reader.fail(f"the data of tensor {name[:100]!r} overlaps that of another tensor")
        end = last
    return shapes


def _tensor_nbytes(reader: _Reader, name: str, sides: list[int], kind: int) -> int:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise InputError("reading GGUF files needs the package gguf: pip install 'slimc[hf]'") from None
    try:
        block, block_nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        reader.fail(f"the tensor {name[:100]!r} has the unknown type {kind}")
    if sides[0] % block:
        reader.fail(f"rows of tensor {name[:100]!r} have {sides[0]} values, not a multiple of the block of {block}")
    nbytes: int = math.prod(sides) // block * block_nbytes
    return nbytes


def _check_model_sizes(path: Path, header: GgufHeader) -> None:
    """Check the sizes that a model would be built with against the tensors that are there to fill it."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise FormatError(f"{path}: does not say which architecture it is for (general.architecture)")
    longest = max((side for shape in header.tensors.values() for side in shape), default=0)
    limits = dict.fromkeys(_WIDTHS, longest) | {"block_count": len(header.tensors)}
    limits["vocab_size"] = header.tensors.get(_TOKEN_TABLE, (longest,))[0]
    if _POSITION_TABLE in header.tensors or architecture in _LEARNED_POSITIONS:
        limits["context_length"] = header.tensors.get(_POSITION_TABLE, (longest,))[0]
    for key, limit in limits.items():
        value = header.metadata.get(f"{architecture}.{key}")
        if value is not None and (type(value) is not int or not 0 <= value <= limit):
            raise FormatError(
                f"{path}: {architecture}.{key} is {value!r}, which cannot belong to its {len(header.tensors)} tensors "
                f"with sides up to {longest}, which allow {limit} at most; the file is damaged, get it again"
            )
