"""GGUF headers: a whole file is read, and any file that promises what it does not hold is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimc.backends import gguf
from slimc.errors import FormatError, InputError

F32, Q8_0 = 0, 8
UINT8, UINT32, STRING, ARRAY, UINT64 = 0, 4, 8, 9, 10


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def number(key: str, value: int) -> bytes:
    return entry(key, UINT32, struct.pack("<I", value))


def strings(key: str, items: list[str], count: int | None = None) -> bytes:
    head = struct.pack("<IQ", STRING, len(items) if count is None else count)
    return entry(key, ARRAY, head + b"".join(map(text, items)))


def tensor(name: str, sides: list[int], offset: int, kind: int = F32) -> bytes:
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)


ARCHITECTURE = entry("general.architecture", STRING, text("llama"))
METADATA = [
    ARCHITECTURE,
    number("llama.block_count", 1),
    number("llama.embedding_length", 4),
    number("llama.context_length", 2048),
    strings("tokenizer.ggml.tokens", ["a", "b", "c"]),
]
TENSORS = [tensor("token_embd.weight", [4, 3], 0), tensor("output_norm.weight", [4], 64)]


def image(
    metadata: list[bytes] = METADATA,
    tensors: list[bytes] = TENSORS,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    entry_count: int | None = None,
    data: int = 96,
) -> bytes:
    """The bytes of a file with ``data`` bytes of tensor data."""
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(metadata) if entry_count is None else entry_count,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(metadata) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def read(tmp_path: Path, content: bytes) -> gguf.GgufHeader:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return gguf.read_header(path)


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    header = read(tmp_path, image())
    assert header.tensors == {"token_embd.weight": (3, 4), "output_norm.weight": (4,)}
    assert header.metadata["llama.context_length"] == 2048
    assert header.metadata["tokenizer.ggml.tokens"] is None


def test_a_file_of_the_gguf_package_is_read(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(1)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_array("some.flags", [True, False])
    writer.add_tensor("a", np.ones((3, 5), dtype=np.float32))
    blocks = quants.quantize(np.ones((2, 64), dtype=np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("b", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = gguf.read_header(tmp_path / "x.gguf")
    assert header.tensors == {"a": (3, 5), "b": (2, 64)}
    assert header.metadata["llama.rope.freq_base"] == 10000.0


def test_no_prefix_of_a_file_is_taken_for_the_file(tmp_path: Path) -> None:
    content = image(data=64 + 16)
    read(tmp_path, content)
    for size in range(len(content)):
        with pytest.raises(FormatError, match="model.gguf"):
            read(tmp_path, content[:size])


@given(position=st.integers(0, 300), value=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    content = bytearray(image())
    content[position % len(content)] = value
    with suppress(FormatError):
        read(tmp_path_factory.mktemp("gguf"), bytes(content))


def nested(depth: int) -> bytes:
    value = struct.pack("<IQ", UINT8, 0)
    for _ in range(depth):
        value = struct.pack("<IQ", ARRAY, 1) + value
    return entry("x", ARRAY, value)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "another magic": (lambda: image(magic=b"GGML"), "so it is not a GGUF file"),
    "version 1": (lambda: image(version=1), "has GGUF version 1; versions 2 and 3"),
    "version of the other byte order": (lambda: image(version=3 << 24), "has GGUF version 50331648"),
    "endless tensors": (lambda: image(tensor_count=2**60), "the number of tensors 1152921504606846976 cannot be right"),
    "endless metadata": (lambda: image(entry_count=2**60), "the number of metadata entries .* cannot be right"),
    "endless key": (lambda: image([text("x", 2**62)]), "the length of a metadata key 4611686018427387904 cannot"),
    "endless string": (
        lambda: image([entry("k", STRING, text("v", 2**40))]),
        "the length of the value of 'k' .* cannot",
    ),
    "endless array": (lambda: image([strings("k", [], 2**50)]), "the number of items of 'k', .* cannot be right"),
    "array of arrays of arrays": (lambda: image([ARCHITECTURE, nested(3)]), "nests arrays more than 2 deep"),
    "unknown type": (lambda: image([entry("k", 77, b"")]), "the value of 'k' has the unknown type 77"),
    "key is not text": (lambda: image([text(b"\xff")]), "a metadata key is not UTF-8"),
    "key twice": (lambda: image([*METADATA, METADATA[1]]), "'llama.block_count' appears twice"),
    "alignment zero": (lambda: image([*METADATA, number("general.alignment", 0)]), "alignment 0 is not a power of two"),
    "odd alignment": (
        lambda: image([*METADATA, number("general.alignment", 24)]),
        "alignment 24 is not a power of two",
    ),
    "tensor twice": (lambda: image(tensors=[TENSORS[0], TENSORS[0]]), "'token_embd.weight' appears twice"),
    "no dimensions": (lambda: image(tensors=[tensor("t", [], 0)], data=999), "'t' has 0 dimensions"),
    "five dimensions": (lambda: image(tensors=[tensor("t", [1] * 5, 0)]), "'t' has 5 dimensions"),
    "empty side": (lambda: image(tensors=[tensor("t", [0, 4], 0)]), "'t' has the impossible sides"),
    "absurd side": (lambda: image(tensors=[tensor("t", [2**63], 0)]), "'t' has the impossible sides"),
    "absurd product": (lambda: image(tensors=[tensor("t", [2**30] * 4, 0)]), "'t' has the impossible sides"),
    "unknown tensor type": (lambda: image(tensors=[tensor("t", [4], 0, 999)]), "'t' has the unknown type 999"),
    "half a block": (lambda: image(tensors=[tensor("t", [33], 0, Q8_0)]), "not a multiple of the block of 32"),
    "offset between": (lambda: image(tensors=[tensor("t", [4], 5)]), "offset 5, which is not a multiple of 32"),
    "offset outside": (lambda: image(tensors=[tensor("t", [4], 2**40)]), "bytes after the end of the file"),
    "data cut": (lambda: image(data=64), "would end 16 bytes after the end of the file"),
    "overlap": (lambda: image(tensors=[tensor("a", [16], 0), tensor("b", [4], 32)]), "overlaps that of another tensor"),
    "no architecture": (lambda: image(METADATA[1:]), "does not say which architecture"),
    "absurd layers": (
        lambda: image([ARCHITECTURE, number("llama.block_count", 10**9)]),
        r"llama\.block_count is 1000000000, which cannot belong to its 2 tensors",
    ),
    "absurd width": (
        lambda: image([ARCHITECTURE, number("llama.embedding_length", 10**9)]),
        r"llama\.embedding_length is 1000000000",
    ),
    "absurd vocabulary": (
        lambda: image([*METADATA, number("llama.vocab_size", 8_000_000)]),
        r"llama\.vocab_size is 8000000, .* which allow 3 at most",
    ),
    "absurd positions": (
        lambda: image(tensors=[*TENSORS, tensor("position_embd.weight", [4, 2], 96)], data=128),
        r"llama\.context_length is 2048, .* which allow 2 at most",
    ),
    "width is text": (
        lambda: image([ARCHITECTURE, entry("llama.embedding_length", STRING, text("4"))]),
        r"llama\.embedding_length is '4'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(tmp_path: Path, case: str) -> None:
    make, message = HOSTILE[case]
    with pytest.raises(FormatError, match=message) as refusal:
        read(tmp_path, make())
    assert "model.gguf" in str(refusal.value)


def test_too_long_an_array_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_ARRAY", 2)
    with pytest.raises(FormatError, match="has 3 items, more than 2"):
        read(tmp_path, image())


def test_lists_of_widths_are_stepped_over(tmp_path: Path) -> None:
    """Some models have another width in each layer; the reader does not allocate by such a list."""
    widths = entry("llama.feed_forward_length", ARRAY, struct.pack("<IQ2I", UINT32, 2, 3, 4))
    assert read(tmp_path, image([*METADATA, widths])).metadata["llama.feed_forward_length"] is None


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing: Any = None
    monkeypatch.setitem(__import__("sys").modules, "gguf.constants", missing)
    with pytest.raises(InputError, match=r"needs the package gguf: pip install 'slimc\[hf\]'"):
        read(tmp_path, image())
