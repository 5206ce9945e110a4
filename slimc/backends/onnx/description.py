"""``slim_onnx.json``: what a program must know of an exported folder to run it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimc.errors import FormatError
from slimc.runtime.files import file_inside, json_bytes, read_json, regular_file_size

__all__ = [
    "DESCRIPTION",
    "FIRST_LOGITS",
    "CacheLayout",
    "Description",
    "check_files",
    "is_onnx_folder",
    "read_description",
]

DESCRIPTION = "slim_onnx.json"
FORMAT = 1

FIRST_LOGITS = "first_logits"
"""Name of an input of decoders, int64 [1]: the first of the new tokens whose logits are computed; 0 by default."""


@dataclass(frozen=True)
class CacheLayout:
    """The cache of a decoder: for each layer keys and values [batch, ``heads``, length, ``size``].

    Attributes:
        layers: how many layers.
        heads: key heads.
        size: of a head.
        dtype: ``float32`` or ``float16``.
        shared: one buffer may be input and output of a call: its length is then how many tokens there is room for,
            and the mask says how many there are. Otherwise the output is one call's tokens longer than the input.
    """

    layers: int
    heads: int
    size: int
    dtype: str
    shared: bool

    def names(self, prefix: str) -> list[str]:
        """Return the names of the tensors, ``prefix.0.key``, ``prefix.0.value`` and so on, in the graph's order."""
        return [f"{prefix}.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]


@dataclass(frozen=True)
class Description:
    """The content of ``slim_onnx.json``.

    Attributes:
        target: ``portable``, ``ort``, ``cuda`` or ``dense``.
        opset: of the standard operators.
        inputs: names of the graph's inputs, in order.
        outputs: names of its outputs.
        cache: of a decoder, None if the graph has none.
        positions: how many tokens a learned table of positions has room for, None without one.
        model: name of the graph's file.
        accuracy_level: what its MatMulNBits ask for: 0 is exact, 4 rounds inputs to 8 bits.
        embedding_bits: to how many the embedding of tokens was rounded, None if it was not.
    """

    target: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: CacheLayout | None = None
    positions: int | None = None
    model: str = "model.onnx"
    accuracy_level: int = 0
    embedding_bits: int | None = None

    def content(self) -> bytes:
        """Return the file."""
        return json_bytes({"format": FORMAT} | asdict(self))


def is_onnx_folder(folder: Path) -> bool:
    """Tell whether ``folder`` is one that ``slimc export --format onnx`` wrote."""
    return (folder / DESCRIPTION).is_file()


def read_description(folder: Path) -> Description:
    """Read ``slim_onnx.json``.

    Raises:
        FormatError: it is missing, damaged, or of another version.
    """
    source = file_inside(folder, DESCRIPTION)
    record = read_json(source)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise FormatError(f"{source}: is of format {found!r}, this slimc reads format {FORMAT}; export the model again")
    try:
        return _description(record)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{source}: lacks or garbles {error}; export the model again") from error


def check_files(folder: Path) -> dict[str, int]:
    """Return the files that ``slim_onnx.json`` lists, with their sizes, after checking that they are there.

    Raises:
        FormatError: a file is missing or of another size, or none is listed.
    """
    source = file_inside(folder, DESCRIPTION)
    record = read_json(source)
    sizes = record.get("files") if isinstance(record, dict) else None
    if not isinstance(sizes, dict) or not sizes:
        raise FormatError(f"{source}: lists no files; export the model again")
    for name, size in sizes.items():
        if Path(name).name == name and not (folder / name).exists():
            raise FormatError(
                f"{folder / name}: is missing, but {DESCRIPTION} lists it; copy the whole folder, or export again"
            )
        found = regular_file_size(file_inside(folder, name))
        if found != size:
            raise FormatError(f"{folder / name}: has {found} bytes, not the {size} that {DESCRIPTION} promises")
    return sizes


def _description(record: dict[str, Any]) -> Description:
    cache = record["cache"]
    layout = None
    if cache is not None:
        if cache["dtype"] not in ("float32", "float16"):
            raise ValueError("cache.dtype")
        layers, heads, size = (int(cache[name]) for name in ("layers", "heads", "size"))
        layout = CacheLayout(layers, heads, size, cache["dtype"], bool(cache["shared"]))
    return Description(
        target=str(record["target"]),
        opset=int(record["opset"]),
        inputs=tuple(map(str, record["inputs"])),
        outputs=tuple(map(str, record["outputs"])),
        cache=layout,
        positions=None if record["positions"] is None else int(record["positions"]),
        model=str(record["model"]),
        accuracy_level=int(record["accuracy_level"]),
        embedding_bits=None if record["embedding_bits"] is None else int(record["embedding_bits"]),
    )
