"""From what a user calls calibration data to calls of the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimc.backends import hf
from slimc.errors import InputError
from slimc.ir.capture import Batch
from slimc.passes import Calibrate
from slimc.passes.journal import Journal
from slimc.progress import Progress
from slimc.runtime.devices import copy_to
from slimc.runtime.positions import check_positions, check_tokens

_EXAMPLE = (2, 9)
"""Samples and tokens a sample of a text that is only captured with: no size is 1, and no two are equal."""


def is_language_model(model: nn.Module) -> bool:
    """Tell whether ``model`` reads token ids: a Hugging Face model whose main input is ``input_ids``."""
    return hasattr(model, "config") and getattr(model, "main_input_name", None) == "input_ids"


def calibration_batches(
    model: nn.Module, calibration: Any, settings: Calibrate, *, tokenizer: Any = None
) -> list[Batch]:
    """Return the calls of the model that calibration runs.

    Args:
        model: the model; its device is where tensors go.
        calibration: a text or an iterable of texts (with ``tokenizer``), a tensor ``[samples, ...]``, a dict of keyword
            arguments, or an iterable of batches, each a tensor, a tuple of arguments or a dict of keyword arguments.
            One row of token ids is a batch of one.
        settings: how many samples of which length to take of text; into batches of which size to cut a tensor.
        tokenizer: for texts.

    Raises:
        InputError: there is no data, too little text, or data of a form that slimc or the model does not know.
    """
    if isinstance(calibration, str):
        batches: list[Any] = [calibration]
    elif isinstance(calibration, Tensor):
        batches = _split(calibration, settings) if calibration.ndim > 1 else [calibration]
    elif isinstance(calibration, Mapping):
        batches = [calibration]
    elif isinstance(calibration, Iterable):
        batches = list(calibration)
    else:
        raise InputError(
            f"calibration is a {type(calibration).__name__}; give texts, a tensor, or an iterable of batches."
        )
    if not batches:
        raise InputError("The calibration data is empty: give at least one batch.")
    if all(isinstance(batch, str) for batch in batches):
        batches = _tokenised(calibration if isinstance(calibration, str) else batches, settings, tokenizer)
    return [_call(model, batch) for batch in batches]


def self_sampled_batches(
    model: nn.Module,
    settings: Calibrate,
    *,
    tokenizer: Any,
    device: torch.device | None = None,
    journal: Journal | None,
    progress: Progress,
) -> list[Batch]:
    """Return calls with text that the model writes itself, on ``device``, or that ``journal`` has from before.

    Raises:
        InputError: the text does not fit the model's positions.
        NumericsError: the model's logits hold NaN or Inf.
    """
    batches = journal.tokens() if journal else None
    if batches is None:
        writer = model if device is None else copy_to(model, device)
        samples = hf.sample_calibration(writer, tokenizer, settings.samples, settings.length, settings.seed, progress)
        batches = _split(torch.stack(list(samples)), settings)
        if journal:
            journal.record_tokens(batches)
    return [_call(model, batch) for batch in batches]


def self_sampled_outline(model: nn.Module, settings: Calibrate) -> list[Batch]:
    """Return calls shaped like self-sampled text, to capture the model before hours go into sampling.

    Raises:
        InputError: the model cannot generate.
    """
    if not (is_language_model(model) and hf.can_generate(model)):
        raise InputError(
            f"{type(model).__name__} cannot write its own calibration text, because it cannot generate. Pass "
            "calibration= with texts or batches of inputs (on the command line: --calibration FILE)."
        )
    zeros = torch.zeros((1, 1), dtype=torch.int64).expand(settings.samples, settings.length)
    return [_call(model, batch) for batch in _split(zeros, settings)]


def example_batches(model: nn.Module, *, needed: str = "calibration=") -> list[Batch]:
    """Return one small call to capture a language model with, when no calibration data is needed.

    Args:
        model: the model.
        needed: the argument that brings an example where this function has none, for the message.

    Raises:
        InputError: the model is not one whose inputs are known.
    """
    if not is_language_model(model):
        raise InputError(
            f"Pass {needed} with at least one batch: {type(model).__name__} must be captured with an example of "
            "its inputs."
        )
    return [_call(model, torch.zeros(_EXAMPLE, dtype=torch.int64))]


def example_settings(settings: Calibrate) -> Calibrate:
    """Return ``settings`` with as little text as an example of the model's inputs needs, when nothing is calibrated."""
    samples, length = _EXAMPLE
    return replace(settings, samples=samples, length=length)


def count_tokens(batches: Sequence[Batch]) -> int:
    """Return how much the first tensor of all batches holds: token ids for text, samples otherwise."""
    total = 0
    for args, kwargs in batches:
        first = next((leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)), torch.empty(0))
        total += first.numel() if not first.is_floating_point() else len(first) if first.ndim else 1
    return total


def _tokenised(texts: str | Sequence[str], settings: Calibrate, tokenizer: Any) -> list[Tensor]:
    if tokenizer is None:
        raise InputError("Calibration texts need tokenizer=, to turn them into tokens.")
    options = "fewer or shorter samples: --samples and --length, in Python Calibrate(samples=, length=)"
    windows = hf.tokenize_text(tokenizer, texts, settings.samples, settings.length, options=options)
    return _split(windows, settings)


def _split(samples: Tensor, settings: Calibrate) -> list[Tensor]:
    """Cut ``[samples, ...]`` into batches, the last one perhaps smaller."""
    size = settings.batch_of(len(samples))
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _call(model: nn.Module, batch: Any) -> Batch:
    """Return one batch as a call of ``model``, on its device."""
    args, kwargs = _arguments(model, batch)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors:
        raise InputError(
            f"A calibration batch is a {type(batch).__name__} without a tensor; give a tensor, a tuple of arguments "
            "or a dict of keyword arguments."
        )
    if not all(tensor.numel() for tensor in tensors):
        raise InputError("A calibration batch holds an empty tensor; leave such batches out.")
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"A calibration batch does not fit {type(model).__name__}.forward: {error}. Give tuples of its positional "
            "arguments or dicts of its keyword arguments."
        ) from error
    if isinstance(tokens := kwargs.get("input_ids"), Tensor):
        check_positions(model, tokens.shape[-1])
        # Beside images a token outside the table may stand for one.
        if not any(tensor.is_floating_point() for tensor in tensors):
            check_tokens(model, tokens)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return tuple(move(value) for value in args), {name: move(value) for name, value in kwargs.items()}


def _arguments(model: nn.Module, batch: Any) -> Batch:
    """Return positional and keyword arguments; a bare tensor of integers is a language model's ``input_ids``."""
    if isinstance(batch, Tensor):
        if is_language_model(model) and not batch.is_floating_point():
            return (), {"input_ids": batch.unsqueeze(0) if batch.ndim == 1 else batch}
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {str(name): value for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise InputError(
        f"A calibration batch is a {type(batch).__name__}; give a tensor, a tuple of arguments or a dict of keywords."
    )
