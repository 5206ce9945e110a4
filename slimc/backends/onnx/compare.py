"""An ONNX model in ONNX Runtime beside the PyTorch model that it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slimc.backends.hf_library import require
from slimc.backends.onnx.session import OnnxDecoder
from slimc.backends.onnx.tracing import twin

__all__ = ["Difference", "compare_decoder", "compare_outputs", "open_session", "relative_error"]

_SAMPLES, _LENGTH = 2, 7
"""Sizes of the inputs that are tried."""

_GREEDY = 16
"""Tokens that a language model continues them by."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Difference:
    """How far the two are apart.

    Attributes:
        dtype: of the outputs in ONNX Runtime.
        error: the largest difference of an output, relative to the largest number in it.
        tokens: how many tokens both chose greedily, None if the model is no language model.
        equal_tokens: how many of them are equal.
    """

    dtype: str
    error: float
    tokens: int | None = None
    equal_tokens: int = 0


def open_session(model: bytes | str, entries: Mapping[str, str] | None = None) -> Any:
    """Open a model in ONNX Runtime on the CPU, with products in the dtype of the graph.

    Args:
        model: its content, or its path.
        entries: further settings of the session.
    """
    runtime = require("onnxruntime", "verifying an ONNX model", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    for key, value in ({"session.qdq_matmulnbits_accuracy_level": "0"} | dict(entries or {})).items():
        options.add_session_config_entry(key, value)
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def compare_decoder(folder: Path, model: nn.Module) -> Difference:
    """Compare a decoder with a cache: the logits of a prompt, and what both continue it by.

    Raises:
        InputError: ONNX Runtime is not installed.
        FormatError: the folder is damaged.
    """
    exact = _exact(model)
    ids = _token_ids((_SAMPLES, _LENGTH), exact)
    decoder = OnnxDecoder(folder)
    (expected, *_), found = _torch_outputs(exact, {"input_ids": ids}), decoder.logits(ids.numpy())
    made = torch.tensor(decoder.generate(ids.tolist(), _GREEDY))
    chosen = _continued({"input_ids": ids}, lambda inputs: _torch_outputs(exact, inputs)[0])
    equal = int((made == chosen).sum())
    return Difference(str(found.dtype), relative_error(found, expected.numpy()), made.numel(), equal)


def compare_outputs(session: Any, model: nn.Module) -> Difference | None:
    """Compare a model without a cache by random inputs; None if its inputs are nested, so that their names say little.

    A model of token ids that returns logits is also asked for the tokens that it continues them by.
    """
    exact = _exact(model)
    inputs = {value.name: _example(value, exact) for value in session.get_inputs()}
    if any("." in name for name in inputs):
        return None
    expected, found = _torch_outputs(exact, inputs), _runtime_outputs(session, inputs)
    error = max(relative_error(one.numpy(), other.numpy()) for one, other in zip(found, expected, strict=False))
    dtype = str(found[0].dtype).removeprefix("torch.")
    if "input_ids" not in inputs or session.get_outputs()[0].name != "logits":
        return Difference(dtype, error)
    ours = _continued(inputs, lambda longer: _runtime_outputs(session, longer)[0])
    theirs = _continued(inputs, lambda longer: _torch_outputs(exact, longer)[0])
    return Difference(dtype, error, ours.numel(), int((ours == theirs).sum()))


def relative_error(found: Array, expected: Array) -> float:
    """Return the largest difference relative to the largest expected number; infinity for other shapes, or NaN."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0)
    return float(difference / max(np.abs(expected).max(initial=0.0), np.finfo(np.float32).tiny))


def _exact(model: nn.Module) -> nn.Module:
    """Return the model in float32, without a cache."""
    exact = twin(model, torch.float32)
    config: Any = getattr(exact, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return exact


def _example(value: Any, model: nn.Module) -> Tensor:
    """Return an input of the shape and type that the graph asks for; open sizes are small numbers."""
    sizes = [size if isinstance(size, int) else (_SAMPLES, _LENGTH)[axis > 0] for axis, size in enumerate(value.shape)]
    if "float" in value.type:
        numbers = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
        return numbers.to(torch.float16 if "16" in value.type else torch.float32)
    if value.name == "input_ids":
        return _token_ids(tuple(sizes), model)
    return torch.full(sizes, int("mask" in value.name))


def _token_ids(shape: tuple[int, ...], model: nn.Module) -> Tensor:
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 2))
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def _torch_outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    exact = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        result = model(**exact)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _runtime_outputs(session: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return [torch.from_numpy(one) for one in session.run(None, {name: value.numpy() for name, value in inputs.items()})]


def _continued(inputs: Mapping[str, Tensor], logits: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    """Return the likeliest tokens [samples, new] after those of ``inputs``; a mask grows by ones."""
    inputs, length = dict(inputs), inputs["input_ids"].shape[1]
    for _ in range(_GREEDY):
        chosen = logits(inputs)[:, -1].argmax(-1, keepdim=True)
        inputs = {
            name: torch.cat([value, chosen if name == "input_ids" else torch.ones_like(chosen)], dim=1)
            for name, value in inputs.items()
        }
    return inputs["input_ids"][:, length:]
