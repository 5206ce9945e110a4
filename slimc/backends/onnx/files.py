"""A folder with an ONNX model: what is in it, and how it appears whole or not at all.

    model.onnx                    the graph, with its smallest constants
    model.onnx.data               the others, one after another
    slim_onnx.json                what the folder is: target, opset, inputs and outputs, sizes, notes
    config.json, tokenizer files  for Hugging Face models, written by the caller

The constants go into their file one by one, each made when its turn comes, so that a model of any size is written in
the memory that the largest of them takes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from slimc.backends.onnx.description import DESCRIPTION, Description, check_files, is_onnx_folder, read_description
from slimc.backends.onnx.initializers import Initializer
from slimc.backends.onnx.weights import CALLING
from slimc.errors import FormatError, InputError
from slimc.runtime.files import (
    file_inside,
    flush_to_disk,
    json_bytes,
    publish_folder,
    read_json,
    write_file,
)
from slimc.runtime.formats import LinearFormat
from slimc.runtime.storage import files_in, may_be_replaced
from slimc.version import __version__

__all__ = [
    "DATA",
    "MODEL",
    "OnnxGraph",
    "SiteSize",
    "damaged_files",
    "folder_of",
    "is_replaceable",
    "open_folder",
    "site_sizes",
    "write_folder",
]

MODEL = "model.onnx"
DATA = "model.onnx.data"

_SMALL = 1024
"""Bytes below which a constant stays in the graph: shapes and axes must be known where sizes are derived."""

_ALIGNMENT = 64
"""Constants begin at multiples of it, so that what maps the file can use them where they are."""

_LARGEST_GRAPH = 2**31 - 1
"""Bytes that a message of protocol buffers may have."""

_ROOM_FOR_DESCRIPTION = 16 << 20
"""Free space asked for beyond the constants."""


@dataclass(frozen=True)
class SiteSize:
    """What a compressed layer takes in a graph.

    Attributes:
        form: its packed form, for people.
        shape: output and input features.
        bytes: of its constants in the graph, without the bias.
        packed_bytes: of its packed form.
        notes: why it takes more.
    """

    form: str
    shape: tuple[int, int]
    bytes: int
    packed_bytes: int
    notes: tuple[str, ...] = ()


@dataclass
class OnnxGraph:
    """A model in ONNX whose constants are yet to be made.

    Attributes:
        model: nodes, functions, inputs and outputs; it has no initializers.
        stored: the constants by name.
        description: what a program must know to run it.
        sites: the compressed layers by name.
    """

    model: ModelProto
    stored: dict[str, Initializer]
    description: Description
    sites: dict[str, SiteSize] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all constants."""
        return sum(constant.nbytes for constant in self.stored.values())

    def whole(self) -> ModelProto:
        """Return the model with its constants inside, for small ones."""
        model = ModelProto()
        model.CopyFrom(self.model)
        model.graph.initializer.extend(constant.proto(name) for name, constant in self.stored.items())
        return model


def site_sizes(
    formats: Mapping[str, LinearFormat],
    stored: Mapping[str, Initializer],
    notes: Mapping[str, Sequence[str]],
) -> dict[str, SiteSize]:
    """Return what each layer takes: the constants whose names begin with its own, but not its bias."""
    sizes = dict.fromkeys(formats, 0)
    for name, constant in stored.items():
        owner, _, part = name.rpartition(".")
        while owner and owner not in sizes:
            owner, _, ahead = owner.rpartition(".")
            part = f"{ahead}.{part}"
        if owner in sizes and part.partition(".")[0] != "bias":
            sizes[owner] += constant.nbytes
    return {
        name: SiteSize(
            form.describe(), (form.rows, form.columns), sizes[name], form.nbytes(), tuple(notes.get(name, ()))
        )
        for name, form in formats.items()
    }


def folder_of(path: Path) -> Path:
    """Return the folder that ``path`` names: itself, or that of a file ``model.onnx`` in it.

    Raises:
        InputError: it names a file of another name.
    """
    if path.suffix != ".onnx":
        return path
    if path.name != MODEL:
        raise InputError(
            f"{path}: the graph is one of several files of a folder, in which it is called {MODEL}; name the folder"
        )
    return path.parent


def write_folder(
    graph: OnnxGraph,
    path: Path,
    *,
    write_extra: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder; it appears whole or not at all.

    Args:
        graph: the model.
        path: the folder, or ``model.onnx`` in it.
        write_extra: writes further files into the folder that it is given.
        overwrite: replace a folder of the same kind.

    Returns:
        The folder.

    Raises:
        InputError: the folder exists, cannot be written, or the disk is full; nothing is left then.
    """
    target = folder_of(path)
    described = ModelProto()
    described.CopyFrom(graph.model)
    end = 0
    offsets = {}
    for name, constant in graph.stored.items():
        if constant.nbytes < _SMALL:
            described.graph.initializer.append(constant.proto(name))
            continue
        offsets[name] = end = -(-end // _ALIGNMENT) * _ALIGNMENT
        described.graph.initializer.append(constant.external_proto(name, DATA, end))
        end += constant.nbytes
    if described.ByteSize() > _LARGEST_GRAPH:
        raise InputError(f"{target}: the graph alone is larger than ONNX allows; export a part of the model")
    content = described.SerializeToString(deterministic=True)
    record = _record(graph, files={MODEL: len(content), DATA: end})
    with publish_folder(
        target, needed=end + len(content) + _ROOM_FOR_DESCRIPTION, overwrite=overwrite, replaceable=is_replaceable
    ) as folder:
        digest = _write_constants(folder / DATA, graph.stored, offsets)
        write_file(folder / MODEL, content)
        if write_extra is not None:
            write_extra(folder)
        record["extra_files"] = sorted(files_in(folder) - {MODEL, DATA})
        record["sha256"] = {MODEL: hashlib.sha256(content).hexdigest(), DATA: digest} | {
            name: _digest(folder / name) for name in record["extra_files"]
        }
        write_file(folder / DESCRIPTION, json_bytes(record))
    return target


def _write_constants(path: Path, stored: Mapping[str, Initializer], offsets: Mapping[str, int]) -> str:
    """Write the file of constants; return its SHA-256."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for name, offset in offsets.items():
            for piece in (bytes(offset - file.tell()), stored[name].content().data):
                file.write(piece)
                digest.update(piece)
        flush_to_disk(file.fileno())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged_files(path: Path, record: Mapping[str, Any]) -> list[str]:
    """Return the files of a folder that are missing or whose SHA-256 is not the one that its description has.

    Raises:
        FormatError: the description has none for the model's files.
    """
    digests = record.get("sha256")
    if not isinstance(digests, dict) or not {MODEL, DATA} <= digests.keys():
        raise FormatError(f"{path / DESCRIPTION}: has no SHA-256 of {MODEL} and {DATA}; export the model again")
    return [name for name, expected in digests.items() if _digest_inside(path, name) != expected]


def _digest_inside(path: Path, name: str) -> str | None:
    """Return the SHA-256 of a file of a folder, None if it is not there."""
    try:
        return _digest(file_inside(path, name))
    except FormatError:
        return None


def is_replaceable(path: Path) -> bool:
    """Tell whether ``path`` is a folder with an ONNX model; one that others put files into is refused by name.

    Raises:
        InputError: it is such a folder and holds files that were not written with it.
    """
    return may_be_replaced(path, DESCRIPTION, lambda folder: {MODEL, DATA, *_extra_files(folder)})


def _extra_files(folder: Path) -> set[str]:
    """Return the files beside the model that the description lists, none if it cannot be read."""
    try:
        record = read_json(folder / DESCRIPTION)
    except FormatError:
        return set()
    names = record.get("extra_files") if isinstance(record, dict) else None
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _record(graph: OnnxGraph, files: Mapping[str, int]) -> dict[str, Any]:
    """Return the description, with what people and `slimc.backends.onnx.verify` want to know besides."""
    in_sites = sum(site.bytes for site in graph.sites.values())
    record: dict[str, Any] = json.loads(graph.description.content())
    return record | {
        "slimc_version": __version__,
        # ONNX Runtime rounds the inputs of the products that it finds to 8 bits unless it is told not to.
        "session": {"session.qdq_matmulnbits_accuracy_level": "0"} if graph.description.target in CALLING else {},
        "files": dict(files),
        "sizes": {
            "layers": in_sites,
            "layers_packed": sum(site.packed_bytes for site in graph.sites.values()),
            "others": graph.nbytes - in_sites,
        },
        "sites": {name: asdict(site) for name, site in graph.sites.items()},
    }


def open_folder(path: Path) -> tuple[ModelProto, Description, dict[str, Any]]:
    """Return the graph of a folder, its constants left where they are, its description, and the whole of that file.

    Raises:
        InputError: there is no such folder, or it is not one with an ONNX model of slimc's.
        FormatError: a file is missing, of another size than described, or damaged.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    if not is_onnx_folder(path):
        raise InputError(
            f"{path}: has no {DESCRIPTION}, so it is not an ONNX model that slimc wrote; write one with 'slimc export'"
        )
    description = read_description(path)
    record = read_json(file_inside(path, DESCRIPTION))
    if not {MODEL, DATA} <= check_files(path).keys():
        raise FormatError(f"{path / DESCRIPTION}: does not list {MODEL} and {DATA}; export the model again")
    _check_record(record, path / DESCRIPTION)
    try:
        model = onnx.load(str(path / MODEL), load_external_data=False)
    except Exception as error:
        raise FormatError(f"{path / MODEL}: is not an ONNX model ({error}); export it again") from error
    return model, description, record


def _check_record(record: Mapping[str, Any], source: Path) -> None:
    """Raise `FormatError` unless the sizes and the layers of a description are what a program can read."""
    sites, sizes = record.get("sites"), record.get("sizes")
    sound = isinstance(sizes, dict) and all(type(sizes.get(name)) is int for name in ("layers", "others"))
    if not sound:
        raise FormatError(f"{source}: lacks or garbles sizes; export the model again")
    if not isinstance(sites, dict) or not all(map(_is_site, sites.values())):
        raise FormatError(f"{source}: lacks or garbles sites; export the model again")


def _is_site(site: object) -> bool:
    if not isinstance(site, dict) or type(site.get("form")) is not str or type(site.get("bytes")) is not int:
        return False
    shape = site.get("shape")
    return isinstance(shape, list) and [type(side) for side in shape] == [int, int] and min(shape) > 0
