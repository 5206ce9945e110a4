"""The journal of a run: what a crash must not lose.

A folder with the fingerprint of the run, the calibration tokens that the model wrote, and one safetensors file a
finished site. Every file is written under another name and renamed, so that a file that exists is whole, and carries
the digest of its tensors. A resumed run replays the graph with the recorded sites and goes on at the first one that is
missing; on the same device, thread count and versions the result is the same byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from slimc.errors import FormatError, InputError, ResumeError
from slimc.ir.program import Site
from slimc.passes.report import SiteRow
from slimc.runtime.files import parse_json, read_json, write_bytes
from slimc.runtime.packing import LinearFormat, PackedLinear

_FINGERPRINT = "journal.json"
_TOKENS = "tokens.safetensors"
_SITES = "sites"
_BIAS = "bias"
_DIGEST = "sha256"

_GRAPH = "model's code or configuration"
"""The part of a fingerprint that is a digest of the captured graph."""

_DECIDES_THE_GRAPH = ("version of slimc", "version of torch", "device of the model")
"""Other parts with which the text of the graph may change although the model has not."""

_CIRCUMSTANCES = (*_DECIDES_THE_GRAPH, "device", "number of threads", "float32 matmul precision")
"""The parts of a fingerprint that say where and with what a run computes, not what."""


_TELLING = 300
"""Longer values say nothing to a person."""


class Journal:
    """The journal at ``folder``.

    Args:
        folder: created with the first record; belongs to this run alone.
        resume: go on from what is there. Without it, finished sites of an earlier run are an error, never overwritten.

    Raises:
        InputError: there are finished sites and ``resume`` was not asked for, or ``folder`` is something else.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self.folder = folder
        self.resume = resume
        _check_journal(folder)
        if not resume and _holds_records(folder / _SITES):
            raise InputError(
                f"{folder} holds the journal of a run that did not finish. Add --resume (resume=True) to go on with "
                "it, or --overwrite to start again (in Python: delete the folder)."
            )

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Record the fingerprint of this run, or compare it with the recorded one.

        Where no site is finished, the records of another run are replaced: it failed before it had anything to lose.

        Raises:
            ResumeError: they differ; the message names what changed.
            FormatError: the recorded one cannot be read, or is gone while finished sites are there.
            InputError: the journal cannot be written.
        """
        path = self.folder / _FINGERPRINT
        if _holds_records(self.folder / _SITES):
            if not path.exists():
                raise FormatError(f"{path} is missing, so nobody knows what {_SITES} belong to. {self._advice}")
            self._compare(read_json(path), fingerprint)
            return
        if self.resume and path.exists() and not _changes(self._fingerprint(read_json(path)), fingerprint):
            return
        discard(self.folder)
        try:
            (self.folder / _SITES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder}: the journal cannot be created ({error.strerror}).") from error
        write_bytes(path, json.dumps(fingerprint, sort_keys=True, indent=1).encode())

    def tokens(self) -> list[Tensor] | None:
        """Return the recorded calibration tokens by batch, or ``None`` if there are none."""
        path = self.folder / _TOKENS
        if not path.exists():
            return None
        tensors, _ = self._load(path)
        names = [str(index) for index in range(len(tensors))]
        if set(names) != tensors.keys() or any(tensor.dtype != torch.int64 for tensor in tensors.values()):
            raise FormatError(f"{path} does not hold batches of tokens. {self._advice}")
        return [tensors[name] for name in names]

    def record_tokens(self, batches: Sequence[Tensor]) -> None:
        """Write the calibration tokens, so that a resumed run need not sample them again."""
        tensors = {str(index): batch.cpu().contiguous() for index, batch in enumerate(batches)}
        _save(self.folder / _TOKENS, tensors, {})

    def read(self, site: Site, device: torch.device) -> tuple[PackedLinear, SiteRow, Tensor | None] | None:
        """Return the recorded form of ``site`` on ``device``, its report row and its own bias, or ``None``.

        Raises:
            FormatError: the record is damaged, or is not one of this site.
        """
        path = self._path(site.name)
        if not path.exists():
            return None
        tensors, metadata = self._load(path)
        try:
            row = _parse_row(parse_json(metadata.get("row", "").encode(), "row"))
            form = LinearFormat.from_json(parse_json(metadata.get("format", "").encode(), "format"))
            if (row.name, row.shape) != (site.name, site.shape) or (form.rows, form.columns) != site.shape:
                raise FormatError(f"it is of '{row.name}' {form.rows} x {form.columns}, not of '{site.name}'")
            bias = tensors.pop(_BIAS, None)
            if bias is not None and tuple(bias.shape) != site.shape[:1]:
                raise FormatError(f"its bias has the shape {tuple(bias.shape)}, not {site.shape[:1]}")
            packed = PackedLinear.from_tensors(form, {name: tensor.to(device) for name, tensor in tensors.items()})
        except FormatError as error:
            raise FormatError(f"{path} is not the record of a site: {error}. {self._advice}") from error
        return packed, row, None if bias is None else bias.to(device)

    def write(self, name: str, packed: PackedLinear, row: SiteRow, bias: Tensor | None = None) -> None:
        """Record a finished site, with its bias if that is not the dense one."""
        metadata = {"format": json.dumps(packed.format.to_json()), "row": json.dumps(asdict(row))}
        stored = packed.tensors() | ({} if bias is None else {_BIAS: bias})
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in stored.items()}
        _save(self._path(name), tensors, metadata)

    def _compare(self, recorded: Any, fingerprint: Mapping[str, Any]) -> None:
        known = self._fingerprint(recorded)
        changed = _changes(known, fingerprint)
        if changed:
            details = _differences(known, fingerprint, changed)
            raise ResumeError(
                f"{self.folder} belongs to another run: {details}. Resume with the same model, recipe, calibration, "
                "device, number of threads and versions, or start again with --overwrite (in Python: delete the "
                "folder)."
            )

    def _fingerprint(self, recorded: Any) -> dict[str, Any]:
        if not isinstance(recorded, dict):
            raise FormatError(f"{self.folder / _FINGERPRINT} is not the fingerprint of a run. {self._advice}")
        return recorded

    def _load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} cannot be read ({error}). {self._advice}") from error
        if metadata.get(_DIGEST) != _content_digest(tensors, metadata):
            raise FormatError(
                f"{path} is damaged: its content does not have the digest it was written with. {self._advice}"
            )
        return tensors, metadata

    @property
    def _advice(self) -> str:
        return f"Delete {self.folder} and start again without resuming."

    def _path(self, name: str) -> Path:
        """Name the file by a digest: module paths may be longer than file names, or differ by case only."""
        return self.folder / _SITES / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"


def discard(folder: Path) -> None:
    """Delete the journal at ``folder``, if there is one.

    Raises:
        InputError: ``folder`` holds something that no journal does, or cannot be deleted.
    """
    _check_journal(folder)
    if not folder.exists():
        return
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise InputError(f"{folder}: the journal cannot be deleted ({error.strerror}).") from error


def differences_in_task(recorded: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> str:
    """Say in what a finished run was another task: model, recipe or calibration; an empty string if in nothing.

    A finished result stays valid on another machine and with other versions.
    """
    changed = [key for key in _changes(recorded, fingerprint) if key not in _CIRCUMSTANCES]
    if any(recorded.get(key) != fingerprint[key] for key in _DECIDES_THE_GRAPH):
        changed = [key for key in changed if key != _GRAPH]
    return _differences(recorded, fingerprint, changed)


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    write_bytes(path, save(dict(tensors), {**metadata, _DIGEST: _content_digest(tensors, metadata)}))


def _content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the digest of everything in a file but the digest itself."""
    words = json.dumps({key: value for key, value in metadata.items() if key != _DIGEST}, sort_keys=True)
    return hashlib.sha256(f"{words}\n{digest(sorted(tensors.items()))}".encode()).hexdigest()


def _parse_row(record: Any) -> SiteRow:
    """Check a report row from a file; a wrong type would only show when the report is saved or printed."""
    names = {field.name for field in fields(SiteRow)}
    if not isinstance(record, dict) or record.keys() != names:
        raise FormatError("its report row has other fields")
    shape = record["shape"]
    numbers = [record["bits"], record["weight_error"]]
    errors = [record[name] for name in ("base_output_error", "output_error", "held_out_error", "stream_error")]
    errors.append(record["compression_ratio"])
    if not (
        all(isinstance(record[name], str) for name in ("name", "expression"))
        and isinstance(shape, list)
        and [type(side) for side in shape] == [int, int]
        and all(type(number) in (float, int) for number in numbers)
        and all(record[name] is None or isinstance(record[name], str) for name in ("unrounded", "fallback"))
        and all(error is None or type(error) in (float, int) for error in errors)
    ):
        raise FormatError("its report row has values of other types")
    return SiteRow(**{**record, "shape": tuple(shape)})


def _changes(recorded: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> list[str]:
    """Return the keys in which a recorded fingerprint differs from the present one."""
    return [key for key in fingerprint if recorded.get(key) != json.loads(json.dumps(fingerprint[key]))]


def _differences(recorded: Mapping[str, Any], fingerprint: Mapping[str, Any], changed: Sequence[str]) -> str:
    """Say how the parts called ``changed`` differ."""
    return "; ".join(
        _recipe_difference(recorded.get(key), fingerprint[key])
        if key == "recipe"
        else _difference(key, recorded.get(key), fingerprint[key])
        for key in changed
    )


def _difference(key: str, recorded: Any, present: Any) -> str:
    """Say how one part of the fingerprint changed; digests and long lists would say nothing to a person."""
    shown = [value if isinstance(value, str | int) else json.dumps(value) for value in (recorded, present)]
    if any(len(str(value)) > _TELLING for value in shown) or any(_is_digest(value) for value in shown):
        return f"the {key} changed"
    return f"the {key} changed from {shown[0]} to {shown[1]}"


def _recipe_difference(recorded: Any, present: Any) -> str:
    """Say which options of which passes changed; a recipe as a whole is too long to compare by eye."""
    try:
        before, after = ([next(iter(line.items())) for line in recipe] for recipe in (recorded, present))
        names = [[name for name, _ in recipe] for recipe in (before, after)]
        if names[0] != names[1]:
            return f"the passes changed from {', '.join(names[0])} to {', '.join(names[1])}"
        changes = [
            _change(f"{name}.{option}", _option(old, option), _option(new, option))
            for (name, old), (_, new) in zip(before, after, strict=True)
            for option in sorted(old.keys() | new.keys())
            if _option(old, option) != _option(new, option)
        ]
    except (AttributeError, TypeError, StopIteration):  # the journal comes from a file
        return "the recipe changed"
    return "; ".join(changes) or "the recipe changed"


def _change(what: str, before: str, after: str) -> str:
    """Say that something changed, and how if that is no long list."""
    told = max(len(before), len(after)) <= _TELLING
    return f"{what} changed from {before} to {after}" if told else f"{what} changed"


def _option(options: Mapping[str, Any], name: str) -> str:
    """Return the value of an option for people; a recipe line leaves out those that are not changed."""
    if name not in options:
        return "its default"
    value = options[name]
    return value if isinstance(value, str) else json.dumps(value)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_partial(path: Path) -> bool:
    """Tell whether ``path`` is what a process that died left of a file that it was writing."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _check_journal(folder: Path) -> None:
    """Refuse a path at which something is that is not a journal."""
    found = [path for path in folder.iterdir() if not _is_partial(path)] if folder.is_dir() else []
    strangers = {path.name for path in found} - {_FINGERPRINT, _TOKENS, _SITES}
    sites = folder / _SITES
    records = [path for path in sites.iterdir() if not _is_partial(path)] if sites.is_dir() else []
    if (
        strangers
        or (folder.exists() and not folder.is_dir())
        or any(path.suffix != ".safetensors" or not path.is_file() for path in records)
    ):
        raise InputError(f"{folder} exists and is not a journal. Move it away or choose another output.")


def _holds_records(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(not _is_partial(child) for child in path.iterdir()))
