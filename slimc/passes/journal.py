"""The journal of a run: what a crash must not lose.

A folder with the fingerprint of the run, the calibration tokens, and one safetensors file a finished site. Every file is
written under another name and renamed, so that a file that exists is whole. A resumed run replays the graph with the
recorded sites and goes on at the first one that is missing; on the same device, thread count and versions the result is the
same byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from slimc.errors import FormatError, InputError, ResumeError
from slimc.passes.report import SiteRow
from slimc.runtime.packing import LinearFormat, PackedLinear
from slimc.runtime.files import read_json, write_bytes

_FINGERPRINT = "journal.json"
_TOKENS = "tokens.safetensors"
_SITES = "sites"


class Journal:
    """The journal at ``folder``.

    Args:
        folder: created with the first record; belongs to this run alone.
        resume: go on from what is there. Without it, a journal of an earlier run is an error, never overwritten.

    Raises:
        InputError: there is a journal and ``resume`` was not asked for, or ``folder`` is something else.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self.folder = folder
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if folder.exists() and not (folder.is_dir() and found <= {_FINGERPRINT, _TOKENS, _SITES}):
            raise InputError(f"{folder} exists and is not a journal. Move it away or choose another output.")
        if found and not resume:
            raise InputError(
                f"{folder} holds the journal of a run that did not finish. Add --resume (resume=True) to go on with it, or delete it."
            )

    def tokens(self) -> list[Tensor] | None:
        """Return the recorded calibration tokens by batch, or ``None`` if there are none."""
        path = self.folder / _TOKENS
        if not path.exists():
            return None
        tensors, _ = _read(path)
        return [tensors[str(index)] for index in range(len(tensors))]

    def record_tokens(self, batches: Sequence[Tensor]) -> None:
        """Write the calibration tokens, so that a resumed run need not sample or tokenise them again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.folder / _TOKENS, save({str(index): batch.cpu().contiguous() for index, batch in enumerate(batches)}))

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Record the fingerprint of this run, or compare it with the recorded one.

        Raises:
            ResumeError: they differ; the message names what changed.
        """
        path = self.folder / _FINGERPRINT
        if not path.exists():
            (self.folder / _SITES).mkdir(parents=True, exist_ok=True)
            write_bytes(path, json.dumps(fingerprint, sort_keys=True, indent=1).encode())
            return
        recorded = read_json(path)
        changed = sorted(key for key in recorded.keys() | fingerprint.keys() if recorded.get(key) != fingerprint.get(key))
        if changed:
            details = "; ".join(f"{key} was {recorded.get(key)!r}, is {fingerprint.get(key)!r}" for key in changed)
            raise ResumeError(
                f"{self.folder} belongs to another run ({details}). Resume with the same model, recipe, calibration, device and number "
                "of threads, or delete the journal to start again."
            )

    def read(self, name: str, device: torch.device) -> tuple[PackedLinear, SiteRow] | None:
        """Return the recorded form of a site on ``device``, or ``None``."""
        path = self._path(name)
        if not path.exists():
            return None
        tensors, metadata = _read(path)
        row = json.loads(metadata["row"])
        form = LinearFormat.from_json(json.loads(metadata["format"]))
        packed = PackedLinear.from_tensors(form, {key: tensor.to(device) for key, tensor in tensors.items()})
        return packed, SiteRow(**{**row, "shape": tuple(row["shape"])})

    def write(self, name: str, packed: PackedLinear, row: SiteRow) -> None:
        """Record a finished site."""
        metadata = {"format": json.dumps(packed.format.to_json()), "row": json.dumps(asdict(row))}
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in packed.tensors().items()}
        write_bytes(self._path(name), save(tensors, metadata))

    def _path(self, name: str) -> Path:
        """Name the file by a digest: module paths may be longer than file names, or differ by case only."""
        return self.folder / _SITES / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read ({error}). Delete the journal's folder and start again.") from error


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
