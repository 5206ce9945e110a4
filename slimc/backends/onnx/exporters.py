"""Who traces a decoder: the exporter of transformers where there is one, or ``torch.export`` called directly.

Both trace the same call of the same placeholders, so the graphs are equal. transformers' exporter besides replaces
code of models that cannot be traced while it works, and undoes that.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from slimc.backends.hf_library import quiet, transformers
from slimc.errors import InputError, closest

__all__ = ["EXPORTERS", "check_exporter", "export_program", "has_transformers_exporter"]

EXPORTERS = ("auto", "transformers", "slimc")
"""``auto`` is that of transformers if it is installed and can trace the model, and slimc's own otherwise."""


def check_exporter(name: str) -> None:
    """Raise `InputError` if there is no such exporter, or transformers is to have one and does not."""
    if name not in EXPORTERS:
        raise InputError(f"there is no exporter {name!r}{closest(name, EXPORTERS)}: choose from {', '.join(EXPORTERS)}")
    if name == "transformers" and not has_transformers_exporter():
        library = transformers()
        raise InputError(
            f"transformers {library.__version__} with torch {torch.__version__} has no exporter that works: it came "
            "with transformers 5.14, and asks for torch 2.11; update them, or leave exporter out"
        )


def has_transformers_exporter() -> bool:
    """Tell whether transformers has an exporter that takes this version of PyTorch."""
    return _parts() is not None


def export_program(
    module: nn.Module, inputs: Mapping[str, Any], dynamic_shapes: Mapping[str, Any], exporter: str
) -> ExportedProgram:
    """Trace one call of a module, ``module(**inputs)``.

    Args:
        module: takes tensors, and lists of them.
        inputs: an example of each, in the order in which the program is to take them.
        dynamic_shapes: of each, which axes are open, as ``torch.export.export`` takes them.
        exporter: one of `EXPORTERS`.
    """
    parts = None if exporter == "slimc" else _parts()
    if parts is not None:
        try:
            return _by_transformers(*parts, module, inputs, dynamic_shapes)
        except Exception:
            # It is experimental, and what it cannot trace may yet be traced without its replacements.
            if exporter == "transformers":
                raise
    return torch.export.export(module, (), dict(inputs), dynamic_shapes=dict(dynamic_shapes), strict=False)


def _parts() -> tuple[Any, Any] | None:
    """Return transformers' exporter to exported programs and the class of its configuration, None if there is none."""
    transformers()
    try:
        with quiet():
            module = importlib.import_module("transformers.exporters")
            return module.DynamoExporter(), module.DynamoConfig
    except (ImportError, AttributeError):
        return None


def _by_transformers(
    exporter: Any, config: Any, module: nn.Module, inputs: Mapping[str, Any], dynamic_shapes: Mapping[str, Any]
) -> ExportedProgram:
    with quiet():
        exported = exporter.export(module, dict(inputs), config(dynamic=True, dynamic_shapes=dict(dynamic_shapes)))
    # Until transformers 5.18 that was the program itself.
    program: ExportedProgram = exported if isinstance(exported, ExportedProgram) else exported.program
    return program
