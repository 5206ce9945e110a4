"""Hugging Face checkpoint folders, checked before transformers sees them. No transformers in here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimc.errors import FormatError, InputError
from slimc.runtime.description import DESCRIPTION
from slimc.runtime.files import read_json
from slimc.runtime.tensor_files import Entry, read_header

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

FEW_LAYERS = 1024
"""A repetition count up to here is never suspicious, whatever the number of tensors."""

_REPETITIONS = re.compile(r"(layers?|experts?|blocks?|depths?)$")

_DIRECTIVES = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "distributed_config",
        "experts_implementation",
        "fusion_config",
        "kernel_config",
        "quantization_config",
        "transformers_weights",
    }
)
"""Keys that tell transformers to run or fetch something, rather than what the model is."""


@dataclass(frozen=True)
class Checkpoint:
    """A dense checkpoint folder: its configuration, and every tensor that its weight files announce."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Entry]

    @property
    def elements(self) -> int:
        """Number of weights in the files."""
        return sum(entry.elements for entry in self.tensors.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check a local checkpoint folder: the configuration, the index, and every safetensors header.

    Raises:
        InputError: the folder is not a dense safetensors checkpoint; the message says what to do.
        FormatError: a file is missing, truncated or malformed.
    """
    _refuse_other_kinds(folder)
    config = read_config(folder / CONFIG)
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise InputError(f"{folder}: is already quantised ({str(method)[:40]}); start from the dense model instead")
    tensors: dict[str, Entry] = {}
    for path in _weight_files(folder):
        tensors |= read_header(path)
    check_repetitions(config, len(tensors), folder / CONFIG)
    return Checkpoint(folder, config, tensors)


def read_config(path: Path) -> dict[str, Any]:
    """Read a ``config.json`` that holds a JSON object."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise FormatError(f"{path}: is not a JSON object")
    return config


def _refuse_other_kinds(folder: Path) -> None:
    if (folder / DESCRIPTION).exists():
        raise InputError(f"{folder}: holds a model that slimc has compressed already; open it with slimc.load")
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: holds a PEFT adapter; merge it into its base model and save that")
    if any(folder.glob("shard-*-model-*.safetensors")):
        raise InputError(f"{folder}: is a distributed training checkpoint; save it with save_pretrained first")
    if not (folder / CONFIG).exists():
        ggufs = sorted(folder.glob("*.gguf"))
        advice = f"; name the file itself, {ggufs[0]}" if ggufs else "; name the folder that save_pretrained wrote"
        raise InputError(f"{folder}: has no {CONFIG}, so it is not a Hugging Face model{advice}")
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise InputError(
                f"{folder}: has its weights in {pickles[0]}, a pickle, which can run code when it is opened; slimc "
                "reads safetensors only. If you trust its author, open it with transformers and save_pretrained it"
            )
        raise InputError(f"{folder}: has no weights ({WEIGHTS} or {INDEX})")


def _weight_files(folder: Path) -> list[Path]:
    """Return the files transformers would read: the single one if it is there, else those of the index."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise FormatError(f"{folder / INDEX}: has no weight_map from tensor names to file names")
    names = sorted(set(places.values()))
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise FormatError(f"{folder / INDEX}: {name[:100]!r} is not the name of a safetensors file in this folder")
    return [folder / name for name in names]


def check_repetitions(config: Mapping[str, Any], tensors: int, source: Path) -> None:
    """Refuse a configuration that asks for more layers, blocks or experts than there are tensors to fill them.

    Raises:
        FormatError: a count is too high; the message names it.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_repetitions(value, tensors, source)
            continue
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and _REPETITIONS.search(key) and number > max(tensors, FEW_LAYERS):
                raise FormatError(f"{source}: {key} is {number}, but the weight files hold only {tensors} tensors")


def without_directives(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` without private keys and keys that would have transformers run or fetch something."""
    return {
        key: without_directives(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _DIRECTIVES and not key.startswith("_")
    }
