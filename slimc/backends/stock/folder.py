"""A folder for stock transformers: what is in it, and how its files are written and recognised.

config.json                             with the scheme of the codes
model-0000i-of-0000n.safetensors        codes, and everything that is dense
model.safetensors.index.json            always: without it servers would take the adapters for part of the model
adapter_config.json, adapter_model.safetensors  the adapters, if there are some
README.md                               how to open it
slimc_export.json                       digests of the files, and what became of each layer; nobody else reads it
tokenizer files
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from slimc.backends.checkpoints import INDEX
from slimc.errors import FormatError
from slimc.runtime.files import file_inside, json_bytes, read_json, write_file
from slimc.runtime.storage import files_in, may_be_replaced, tensor_nbytes
from slimc.runtime.tensor_files import write_tensors
from slimc.version import __version__

__all__ = [
    "ADAPTER_CONFIG",
    "Record",
    "damaged_files",
    "is_replaceable",
    "is_stock_folder",
    "read_record",
    "write_adapters",
    "write_record",
    "write_shards",
]

RECORD = "slimc_export.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

MAX_SHARD_BYTES = 2_000_000_000
"""How large a weight file may grow, and how much of the weights is in memory besides the model; adapters are whole."""


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int = MAX_SHARD_BYTES) -> None:
    """Write tensors, each made when its turn comes, into files of at most ``limit`` bytes, and their index.

    A single larger tensor gets a file of its own.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = room = 0

    def flush() -> None:
        write_tensors(folder / _unnumbered(len(shards)), pending)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        size = tensor_nbytes(tensor)
        if pending and size > room:
            flush()
        if not pending:
            room = limit
        pending[name] = tensor
        room -= size
        total += size
    flush()
    places: dict[str, str] = {}
    for index, members in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _unnumbered(index)).rename(folder / name)
        places |= dict.fromkeys(members, name)
    write_file(folder / INDEX, json_bytes({"metadata": {"total_size": total}, "weight_map": places}))


def _unnumbered(index: int) -> str:
    """Name a file while it is not known how many there will be."""
    return f"model-{index + 1:05d}.partial"


def write_adapters(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], task: str | None) -> None:
    """Write adapters as PEFT has them: ``left`` [rows, rank] is ``lora_B``, ``right`` [rank, columns] ``lora_A``.

    Ranks may differ. PEFT multiplies by alpha / rank, which is 1 for each of them.
    """
    ranks = {name: left.shape[1] for name, (left, _) in factors.items()}
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": ".",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = {}
    for name, (left, right) in factors.items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": right, f"base_model.model.{name}.lora_B.weight": left}
    write_tensors(folder / ADAPTER_WEIGHTS, tensors)
    write_file(folder / ADAPTER_CONFIG, json_bytes(config))


@dataclass(frozen=True)
class Record:
    """What a folder says about itself.

    Attributes:
        scheme: of its codes, for people; None if there are none.
        rounded: whether layers were decoded with their adapters, and so rounded anew.
        sites: what each layer takes.
    """

    scheme: str | None
    rounded: bool
    sites: Mapping[str, Any]


def write_record(folder: Path, record: Record) -> None:
    """Write what the folder is, once all other files are in it."""
    described = {
        "format": "hf",
        "slimc_version": __version__,
        "scheme": record.scheme,
        "rounded": record.rounded,
        "sites": dict(record.sites),
        "sha256": {name: _digest(folder / name) for name in sorted(files_in(folder))},
    }
    write_file(folder / RECORD, json_bytes(described))


def read_record(path: Path) -> Record:
    """Read what a folder is.

    Raises:
        FormatError: it does not say so.
    """
    found = read_json(file_inside(path, RECORD))
    sound = isinstance(found, dict) and isinstance(found.get("sites"), dict) and type(found.get("rounded")) is bool
    if not sound or not isinstance(found.get("scheme"), str | None):
        raise FormatError(f"{path / RECORD}: lacks or garbles scheme, rounded or sites; export the model again")
    return Record(found["scheme"], found["rounded"], found["sites"])


def is_stock_folder(path: Path) -> bool:
    """Tell whether ``path`` is a folder that this module wrote."""
    return (path / RECORD).is_file()


def is_replaceable(path: Path) -> bool:
    """Tell whether ``path`` is a folder that this module wrote; one that others put files into is refused by name.

    Raises:
        InputError: it is such a folder and holds files that were not written with it.
    """
    return may_be_replaced(path, RECORD, _written)


def _written(path: Path) -> Iterable[str]:
    try:
        return _digests(path)
    except FormatError:
        return ()


def damaged_files(path: Path) -> Sequence[str]:
    """Return the files that are missing or whose SHA-256 is not the one that was recorded.

    Raises:
        FormatError: the record cannot be read.
    """
    return [name for name, expected in _digests(path).items() if _digest_inside(path, name) != expected]


def _digests(path: Path) -> dict[str, str]:
    record = read_json(path / RECORD)
    digests = record.get("sha256") if isinstance(record, dict) else None
    if not isinstance(digests, dict) or not digests:
        raise FormatError(f"{path / RECORD}: has no SHA-256 of the files; export the model again")
    return digests


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_inside(path: Path, name: str) -> str | None:
    """Return the SHA-256 of a file of a folder, None if it is not there."""
    try:
        return _digest(file_inside(path, name))
    except FormatError:
        return None
