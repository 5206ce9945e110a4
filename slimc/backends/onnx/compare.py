"""An ONNX model in ONNX Runtime beside the PyTorch model that it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slimc.backends.onnx.lowering import round_embedding
from slimc.backends.onnx.session import OnnxDecoder, import_runtime
from slimc.backends.onnx.tracing import twin
from slimc.backends.onnx.weights import decode_exactly

__all__ = ["Difference", "compare_decoder", "compare_outputs", "open_session", "relative_error"]

_SAMPLES, _LENGTH = 2, 7
"""Sizes of the inputs that are tried."""

_PROMPTS = (7, 12, 5, 9)
"""Tokens of the prompts that a decoder continues, together and the first one alone."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Difference:
    """How far the two are apart.

    Attributes:
        largest: the largest difference of an output, relative to the largest number in it.
        typical: the root mean square of the differences, relative to that of the outputs.
        tokens: how many tokens both chose greedily, None if the model is no language model.
        equal_tokens: how many of them are equal.
    """

    largest: float
    typical: float
    tokens: int | None = None
    equal_tokens: int = 0


def open_session(model: bytes | str, entries: Mapping[str, str] | None = None) -> Any:
    """Open a model in ONNX Runtime on the CPU, with products in the dtype of the graph.

    Args:
        model: its content, or its path.
        entries: further settings of the session.
    """
    runtime = import_runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    for key, value in ({"session.qdq_matmulnbits_accuracy_level": "0"} | dict(entries or {})).items():
        options.add_session_config_entry(key, value)
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def compare_decoder(folder: Path, model: nn.Module, *, tokens: int) -> Difference:
    """Compare a decoder with a cache: the logits of random prompts, and what it continues them by.

    ONNX Runtime continues four prompts of several lengths together and the first one alone. PyTorch reads each text
    as it has become, and every new token should be its own choice there.

    Args:
        folder: of the decoder.
        model: in PyTorch. If the folder's embedding was rounded, so is that of the copy which is compared with.
        tokens: how many each prompt is continued by; fewer if the model has no more positions.

    Raises:
        InputError: ONNX Runtime is not installed, or too old.
        FormatError: the folder is damaged.
    """
    decoder = OnnxDecoder(folder)
    exact = _exact(model)
    bits, positions = decoder.description.embedding_bits, decoder.description.positions
    if positions is not None:
        tokens = min(tokens, positions - max(_PROMPTS) + 1)
    if bits is not None:
        _round_embedding(exact, bits)
    ids = _token_ids((len(_PROMPTS), max(_PROMPTS)), exact)
    prompts = [row[:length] for row, length in zip(ids, _PROMPTS, strict=True)]
    (expected, *_), found = _torch_outputs(exact, {"input_ids": ids}), decoder.logits(ids.numpy())
    together = torch.tensor(decoder.generate([prompt.tolist() for prompt in prompts], tokens))
    alone = torch.tensor(decoder.generate([prompts[0].tolist()], tokens))
    equal = 0
    for prompt, made in zip([*prompts, prompts[0]], [*together, *alone], strict=True):
        chosen = _chosen(exact, {"input_ids": torch.cat((prompt, made))[None]}, tokens)
        equal += int((chosen[0] == made).sum())
    return replace(
        _difference([(found, expected.numpy())]), tokens=together.numel() + alone.numel(), equal_tokens=equal
    )


def _round_embedding(model: Any, bits: int) -> None:
    """Put what an export makes of the embedding into the embedding of ``model`` and what is tied."""
    table = model.get_input_embeddings()
    packed = round_embedding("the embedding", table.weight, bits)
    # A twin shares its tensors with the model that it was made of.
    rounded = nn.Parameter(decode_exactly(packed).to(table.weight.dtype), requires_grad=False)
    for module in model.modules():
        if getattr(module, "weight", None) is not table.weight or module is table:
            continue
        module.weight = rounded
    table.weight = rounded


def _chosen(model: nn.Module, inputs: Mapping[str, Tensor], new: int) -> Tensor:
    """Return the tokens [samples, new] that PyTorch takes for the likeliest where the last ``new`` of the inputs stand.

    If they are those that stand there, they are what PyTorch would have written itself, one after another.
    """
    logits = _torch_outputs(model, inputs)[0]
    return logits[:, -new - 1 : -1].argmax(-1)


def compare_outputs(session: Any, model: nn.Module, *, tokens: int) -> Difference | None:
    """Compare a model without a cache by random inputs; None if its inputs are nested, so that their names say little.

    A model of token ids that returns logits is also asked for the ``tokens`` that it continues them by.
    """
    exact = _exact(model)
    inputs = {value.name: _example(value, exact) for value in session.get_inputs()}
    if any("." in name for name in inputs):
        return None
    expected, found = _torch_outputs(exact, inputs), _runtime_outputs(session, inputs)
    difference = _difference([(one.numpy(), other.numpy()) for one, other in zip(found, expected, strict=False)])
    if "input_ids" not in inputs or session.get_outputs()[0].name != "logits":
        return difference
    longer = _continued(inputs, tokens, lambda longer: _runtime_outputs(session, longer)[0])
    made = longer["input_ids"][:, -tokens:]
    equal = int((_chosen(exact, longer, tokens) == made).sum())
    return replace(difference, tokens=made.numel(), equal_tokens=equal)


def relative_error(found: Array, expected: Array) -> float:
    """Return the largest difference relative to the largest expected number; infinity for other shapes, or NaN."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0)
    return float(difference / max(np.abs(expected).max(initial=0.0), np.finfo(np.float32).tiny))


def _difference(pairs: Sequence[tuple[Array, Array]]) -> Difference:
    """Return how far outputs are from those that are expected: of each pair the first from the second."""
    return Difference(
        max(relative_error(found, expected) for found, expected in pairs),
        max(_relative_root_mean_square(found, expected) for found, expected in pairs),
    )


def _relative_root_mean_square(found: Array, expected: Array) -> float:
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    exact = expected.astype(np.float64)
    squares = ((found - exact) ** 2).sum() / max((exact**2).sum(), np.finfo(np.float32).tiny)
    return float(np.sqrt(squares))


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


def _continued(
    inputs: Mapping[str, Tensor], tokens: int, logits: Callable[[dict[str, Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Return inputs with the likeliest ``tokens`` after them, one after another; a mask grows by ones."""
    inputs = dict(inputs)
    for _ in range(tokens):
        chosen = logits(inputs)[:, -1].argmax(-1, keepdim=True)
        inputs = {
            name: torch.cat([value, chosen if name == "input_ids" else torch.ones_like(chosen)], dim=1)
            for name, value in inputs.items()
        }
    return inputs
