"""From a model to a folder that ONNX Runtime serves: what ``slimc.export_onnx`` does."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimc.backends import hf
from slimc.backends.hf_text import can_generate
from slimc.backends.onnx.decoder import why_without_cache
from slimc.backends.onnx.exporters import check_exporter
from slimc.backends.onnx.files import DATA, MODEL, OnnxGraph, SiteSize, folder_of, is_replaceable, write_folder
from slimc.backends.onnx.generation import decoder_graph
from slimc.backends.onnx.graph import export_module
from slimc.backends.onnx.number_range import check_range
from slimc.backends.onnx.weights import COMPUTE_DTYPES, check_options
from slimc.errors import InputError, closest
from slimc.ir.capture import Batch
from slimc.runtime.files import check_replaceable, check_writable, readable

__all__ = ["OnnxReport", "compute_dtype", "export_folder", "images", "with_mask"]

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTE_DTYPES}


@dataclass(frozen=True)
class OnnxReport:
    """What an exported folder takes; a table if printed.

    Attributes:
        folder: where it is.
        target: what it is for.
        opset: of the standard operators.
        file_bytes: of the graph and of its constants together.
        other_bytes: of the constants that belong to no compressed layer.
        sites: the compressed layers by name.
        notes: what else there is to know.
    """

    folder: Path
    target: str
    opset: int
    file_bytes: int
    other_bytes: int
    sites: dict[str, SiteSize]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say what is how large, and why it is larger than the packed form where it is."""
        layers = sum(site.bytes for site in self.sites.values())
        packed = sum(site.packed_bytes for site in self.sites.values())
        weights = sum(site.shape[0] * site.shape[1] for site in self.sites.values())
        as_exported, as_packed = 8 * layers / max(weights, 1), 8 * packed / max(weights, 1)
        lines = [
            f"{self.folder}: {readable(self.file_bytes)}, target {self.target}, opset {self.opset}",
            f"  compressed layers: {len(self.sites)}, {readable(layers)}, {as_exported:.2f} bits a weight",
            f"    as slimc packs them: {readable(packed)}, {as_packed:.2f} bits a weight",
            f"  everything else: {readable(self.other_bytes)}",
            *(f"  {note}" for note in self.notes),
        ]
        counts = Counter(note for site in self.sites.values() for note in site.notes)
        return "\n".join(lines + [f"  {note} ({count} of the layers)" for note, count in counts.items()])


def compute_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        InputError: a graph cannot compute in it.
    """
    if name not in _DTYPES:
        known = " or ".join(_DTYPES)
        raise InputError(f"an ONNX graph cannot compute in {name!r}{closest(name, _DTYPES)}: use {known}")
    return _DTYPES[name]


def with_mask(model: nn.Module, example: Batch) -> Batch:
    """Add an attention mask to the example of a language model that takes one, so that samples may be padded."""
    args, kwargs = example
    tokens, takes = kwargs.get("input_ids"), inspect.signature(model.forward).parameters
    if tokens is None or "attention_mask" in kwargs or "attention_mask" not in takes:
        return example
    return args, {**kwargs, "attention_mask": torch.ones_like(tokens)}


def images(model: nn.Module) -> Batch | None:
    """Return an example of a Hugging Face model that reads images of one size, None for others."""
    config = getattr(model, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if getattr(model, "main_input_name", None) != "pixel_values" or not isinstance(channels, int):
        return None
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return None if height is None else ((), {"pixel_values": torch.zeros(2, channels, height, width)})


def cache_notes(model: nn.Module) -> tuple[str, ...]:
    """Return what the report says of a model that generates text, but whose cache is not known."""
    reason = why_without_cache(model) if can_generate(model) else None
    if reason is None:
        return ()
    consequence = "every new token takes a call with the whole text, and 'slimc generate' refuses the folder"
    return (f"no cache, so {consequence}: {reason}",)


def check_destination(path: Path, *, overwrite: bool) -> Path:
    """Return the folder that ``path`` names.

    Raises:
        InputError: it cannot be written, or holds something that must not be replaced.
    """
    folder = folder_of(path)
    check_replaceable(folder, overwrite=overwrite, replaceable=is_replaceable)
    check_writable(folder)
    return folder


def export_folder(
    model: nn.Module,
    path: Path,
    example: Batch | None,
    *,
    target: str,
    dtype: torch.dtype,
    opset: int | None,
    accuracy_level: int,
    embedding_bits: int | None,
    exporter: str,
    tokenizer: Any,
    overwrite: bool,
    notes: tuple[str, ...] = (),
) -> OnnxReport:
    """Export ``model`` and write its folder; see ``slimc.export_onnx``. Without an example it gets a cache.

    ``notes`` are for the report.
    """
    check_options(target, dtype, opset, accuracy_level)
    check_exporter(exporter)
    folder = check_destination(path, overwrite=overwrite)
    check_range(model, dtype)
    _, write_model_files = hf.saved_form(model, tokenizer)
    options: dict[str, Any] = {"target": target, "dtype": dtype, "opset": opset, "accuracy_level": accuracy_level}
    if embedding_bits is not None and example is not None:
        raise InputError("embeddings are rounded in models with a cache only; leave embedding_bits out")
    graph = (
        decoder_graph(model, embedding_bits=embedding_bits, exporter=exporter, **options)
        if example is None
        else export_module(model, example, **options)
    )
    write_folder(graph, folder, write_extra=write_model_files, overwrite=overwrite)
    return report_of(graph, folder, notes)


def report_of(graph: OnnxGraph, folder: Path, notes: tuple[str, ...] = ()) -> OnnxReport:
    """Add up a graph that was written to ``folder``."""
    names: Sequence[str] = (MODEL, DATA)
    return OnnxReport(
        folder=folder,
        target=graph.description.target,
        opset=graph.description.opset,
        file_bytes=sum((folder / name).stat().st_size for name in names),
        other_bytes=graph.nbytes - sum(site.bytes for site in graph.sites.values()),
        sites=graph.sites,
        notes=notes,
    )
