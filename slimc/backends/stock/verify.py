"""Checks a folder for stock transformers: its files, and what transformers computes with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimc.backends.check import Check
from slimc.backends.hf_library import explained, require, transformers
from slimc.backends.stock.folder import ADAPTER_CONFIG, damaged_files, read_record
from slimc.runtime.modules import SlimLinear
from slimc.runtime.rebuild import replace_modules

__all__ = ["verify_folder"]

_WITHIN, _ROUNDED_WITHIN = 1e-3, 1e-1
"""How far outputs may be apart, relative to the largest: where weights are equal, and where some were rounded anew."""

_SHAPE = (2, 16)
"""Samples and tokens that are compared."""


def verify_folder(path: Path, *, against: nn.Module | None = None) -> Iterator[Check]:
    """Yield the checks of a folder as they are done: digests, and with ``against`` what transformers makes of it.

    Args:
        path: the folder.
        against: the model that it was exported from; it is left as it is. Two dense copies in float32 are made.

    Raises:
        InputError: a package that the folder needs is not installed.
        FormatError: the folder cannot be opened.
    """
    record = read_record(path)
    damaged = damaged_files(path)
    wrong = f"not the bytes that were written: {', '.join(damaged)}"
    yield Check("digests", not damaged, wrong if damaged else "all files have the SHA-256 that they were written with")
    if against is None or damaged:
        return
    if record.scheme is not None:
        require("compressed_tensors", "opening codes with transformers", extra="stock")
    if (path / ADAPTER_CONFIG).exists():
        require("peft", "opening adapters with transformers", extra="stock")
    if getattr(against, "main_input_name", None) != "input_ids" or _of_two_texts(against):
        yield Check("outputs", True, "not compared, because the model reads other than one text of tokens")
        return
    cls: Any = type(against)
    with explained(path):
        opened = cls.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    vocabulary = int(getattr(against.config, "vocab_size", 2))
    ids = torch.randint(0, vocabulary, _SHAPE, generator=torch.Generator().manual_seed(0))
    error = _relative_error(_first_output(opened.float(), ids), _first_output(_dense(against), ids))
    detail = f"transformers {transformers().__version__} and slimc differ by {error:.1e} of the largest output"
    yield Check("outputs", error <= (_ROUNDED_WITHIN if record.rounded else _WITHIN), detail)


def _of_two_texts(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _dense(model: nn.Module) -> nn.Module:
    """Return a copy that computes in float32 with exactly the decoded weights, adapters included."""
    twin = copy.deepcopy(model)
    dense = {}
    for name, module in twin.named_modules():
        if isinstance(module, SlimLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            linear.weight = nn.Parameter(module.packed.decode(), requires_grad=False)
            linear.register_parameter("bias", module.bias)
            dense[name] = linear
    return replace_modules(twin, dense).float()


def _first_output(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=ids)[0]
    return result


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected number; infinity for other shapes, or NaN."""
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
