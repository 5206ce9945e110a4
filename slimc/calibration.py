"""From what a user calls calibration data to calls of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimc.backends import hf
from slimc.errors import InputError
from slimc.ir.capture import Batch
from slimc.passes import Calibrate
from slimc.passes.journal import Journal
from slimc.progress import Progress


def is_language_model(model: nn.Module) -> bool:
    """Tell whether ``model`` reads token ids: a Hugging Face model with input embeddings."""
    return hasattr(model, "config") and hasattr(model, "get_input_embeddings")


def calibration_batches(
    model: nn.Module,
    calibration: Any,
    settings: Calibrate,
    *,
    tokenizer: Any = None,
    journal: Journal | None = None,
    progress: Progress,
) -> list[Batch]:
    """Return the calls of the model that calibration runs.

    Args:
        model: the model; its device is where tensors go.
        calibration: ``None`` (the model writes its own text), a text or a list of texts (with ``tokenizer``), a tensor
            ``[samples, ...]``, or an iterable of batches, each a tensor, a tuple of arguments or a dict of keyword arguments.
        settings: how many samples of which length; used for text, and to cut one tensor into batches.
        tokenizer: for texts.
        journal: keeps the tokens; a resumed run takes them from there when the model wrote them.
        progress: told how self-sampling goes.

    Raises:
        InputError: there is no data, too little text, or data of a form that slimc does not know.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if calibration is None:
        batches = _self_sampled(model, settings, tokenizer, journal, progress)
    elif isinstance(calibration, str) or _are_texts(calibration):
        batches = _tokenised(calibration, settings, tokenizer, journal)
    elif isinstance(calibration, Tensor):
        batches = list(calibration.split(settings.batch))
    elif isinstance(calibration, Mapping):
        batches = [calibration]
    elif isinstance(calibration, Iterable):
        batches = list(calibration)
    else:
        raise InputError(f"calibration is a {type(calibration).__name__}; give texts, a tensor, or an iterable of batches.")
    if not batches:
        raise InputError("The calibration data is empty: give at least one batch.")
    return [_call(model, batch, device) for batch in batches]


def example_batches(model: nn.Module) -> list[Batch]:
    """Return one small call to capture a language model with, when no calibration data is needed.

    Raises:
        InputError: the model is not one whose inputs are known.
    """
    if not is_language_model(model):
        raise InputError(
            f"Pass calibration= with at least one batch: {type(model).__name__} must be captured with an example of its inputs."
        )
    device = next(model.parameters()).device
    return [((), {"input_ids": torch.arange(2 * 9, device=device).view(2, 9) % 8})]


def count_tokens(batches: Sequence[Batch]) -> int:
    """Return the number of rows that the first tensor of each batch holds: tokens for text, samples otherwise."""
    total = 0
    for args, kwargs in batches:
        first = next(leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor))
        total += first.shape[0] if first.is_floating_point() else first.numel()
    return total


def _self_sampled(
    model: nn.Module, settings: Calibrate, tokenizer: Any, journal: Journal | None, progress: Progress
) -> list[Any]:
    recorded = journal.tokens() if journal else None
    if recorded is not None:
        return list(recorded)
    if not (is_language_model(model) and hf.can_generate(model)):
        raise InputError(
            f"{type(model).__name__} cannot write its own calibration text, because it cannot generate. Pass calibration= with texts or "
            "batches of inputs (on the command line: --calibration FILE)."
        )
    samples = hf.sample_calibration(model, tokenizer, settings.samples, settings.length, settings.seed, progress)
    return _record(torch.stack(list(samples)), settings, journal)


def _tokenised(texts: str | Sequence[str], settings: Calibrate, tokenizer: Any, journal: Journal | None) -> list[Any]:
    if tokenizer is None:
        raise InputError("Calibration texts need tokenizer=, to turn them into tokens.")
    return _record(hf.tokenize_text(tokenizer, texts, settings.samples, settings.length), settings, journal)


def _record(tokens: Tensor, settings: Calibrate, journal: Journal | None) -> list[Any]:
    batches = list(tokens.split(settings.batch))
    if journal:
        journal.record_tokens(batches)
    return batches


def _are_texts(calibration: Any) -> bool:
    return isinstance(calibration, list | tuple) and bool(calibration) and all(isinstance(text, str) for text in calibration)


def _call(model: nn.Module, batch: Any, device: torch.device) -> Batch:
    """Return one batch as a call of the model: a bare tensor of integers is a language model's ``input_ids``."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Tensor):
        if is_language_model(model) and not batch.is_floating_point():
            return (), {"input_ids": move(batch)}
        return (move(batch),), {}
    if isinstance(batch, Mapping):
        return (), {str(name): move(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list) and any(isinstance(value, Tensor) for value in batch):
        return tuple(move(value) for value in batch), {}
    raise InputError(f"A calibration batch is a {type(batch).__name__}; give a tensor, a tuple of arguments or a dict of keywords.")
