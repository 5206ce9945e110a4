"""A model as an exported program whose inputs and outputs are a flat list of named tensors."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from slimc.errors import CaptureError, InputError
from slimc.ir.capture import Batch

__all__ = ["PREFIX", "Traced", "batch_experts", "quiet", "trace", "twin"]

PREFIX = "model_to_export."
"""What the names of all parameters of a traced program begin with."""

_LOGGERS = ("torch._subclasses.fake_tensor", "torch.export", "torch.fx.experimental.symbolic_shapes", "torch.onnx")


@dataclass(frozen=True)
class Traced:
    """A model as a program.

    Attributes:
        program: takes and returns tensors by position.
        inputs: their names.
        outputs: theirs.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Flat(nn.Module):
    """A model that is called with the tensors among its arguments, and returns those in its result."""

    def __init__(self, model: nn.Module, structure: Any, leaves: Sequence[Any]) -> None:
        super().__init__()
        self.model_to_export = model
        self._structure = structure
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        result = self.model_to_export(*args, **kwargs)
        return tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))


def twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a model of the same structure on the CPU, with numbers of ``dtype``; tensors that fit already are shared.

    Raises:
        InputError: the model cannot be copied.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    # Casting a module replaces the content of its parameters, so that the copy must not have the model's own.
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.detach(), requires_grad=False)
        if isinstance(tensor, nn.Parameter)
        else tensor.detach()
        for _, tensor in tensors
    }
    try:
        with quiet():
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(f"{type(model).__name__} cannot be copied, and so not be exported ({error})") from error
    return copied.to("cpu", dtype).eval()


def trace(model: nn.Module, example: Batch, dtype: torch.dtype = torch.float32) -> Traced:
    """Export a model with every size left open that may vary: batches, and all axes of token ids and masks.

    Args:
        model: on the CPU; see `twin`.
        example: a call of it. Where all its tensors hold a single sample it is doubled, because a size of 1 would be
            taken for a constant.
        dtype: of the model's numbers, to which those of the example are brought.

    Raises:
        InputError: the example does not fit, the model fails on it, or it returns no tensor.
        CaptureError: ``torch.export`` cannot trace the model.
    """
    name = type(model).__name__
    _choose_traceable_code(model)
    paths, leaves, structure = _named_leaves(model, example)
    inputs = tuple(path for path, leaf in zip(paths, leaves, strict=True) if isinstance(leaf, Tensor))
    flat = _Flat(model, structure, leaves).eval()
    tensors = [_on_cpu(leaf, dtype) for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise InputError(f"The example of {name} has no tensor; give a call of the model with its inputs.")
    with torch.no_grad(), quiet():
        try:
            outputs = _output_names(model, *pytree.tree_unflatten(_with(leaves, tensors), structure))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"{name}, the model itself, fails on the example: {reason}") from error
        if not outputs:
            raise InputError(f"{name} returns no tensor, so there is nothing to export.")
        failure: Exception | None = None
        for trial in _trials(tensors):
            try:
                program = torch.export.export(flat, tuple(trial), dynamic_shapes=(_open_axes(trial),), strict=False)
            except Exception as error:
                failure = failure or error
            else:
                return Traced(program, inputs, outputs)
    raise CaptureError(
        f"torch.export cannot trace {name}: {(str(failure).strip().splitlines() or ['no reason given'])[0]}"
    ) from failure


def _choose_traceable_code(model: nn.Module) -> None:
    """Have a model of transformers compute what can be exported: without a cache, experts by batched products."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    batch_experts(model)


def batch_experts(model: nn.Module) -> None:
    """Have a model of transformers compute its experts by batched products: ONNX has none of groups, the default."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]


def _trials(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    if all(tensor.ndim and tensor.shape[0] == 1 for tensor in tensors):
        yield [torch.cat([tensor, tensor]) for tensor in tensors]
    yield tensors


def _open_axes(tensors: Sequence[Tensor]) -> tuple[dict[int, Any], ...]:
    """Mark the axes that may vary; the exporter fixes those that the model's code fixes."""
    return tuple(
        {
            axis: torch.export.Dim.AUTO
            for axis, size in enumerate(tensor.shape)
            if size > 1 and (axis == 0 or not tensor.is_floating_point())
        }
        for tensor in tensors
    )


def _named_leaves(model: nn.Module, example: Batch) -> tuple[list[str], list[Any], Any]:
    """Return the leaves of a call with the names of the arguments that they belong to."""
    args, kwargs = example
    try:
        bound = inspect.signature(model.forward).bind(*args, **dict(kwargs))
    except TypeError as error:
        raise InputError(f"The example does not fit forward() of {type(model).__name__}: {error}.") from error
    names = [name for name in bound.arguments if name not in kwargs][: len(args)]
    named: list[tuple[str, Any]] = [
        (names[index] if index < len(names) - 1 or len(names) == len(args) else f"input_{index}", value)
        for index, value in enumerate(args)
    ]
    named += list(kwargs.items())
    paths = [path for name, value in named for path in _paths(name, value)]
    leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
    return paths, leaves, structure


def _paths(name: str, value: Any) -> list[str]:
    """Name the leaves of a value: ``past``, or ``past.0``, ``past.1``, ... if it is nested."""
    found, _ = pytree.tree_flatten_with_path(value)
    return [".".join([name, *(_step(step) for step in path)]) for path, _ in found]


def _step(step: Any) -> str:
    return str(next((getattr(step, name) for name in ("key", "idx", "name") if hasattr(step, name)), step))


def _output_names(model: nn.Module, args: Any, kwargs: Any) -> tuple[str, ...]:
    """Name the tensors of the model's result: by their keys, by their position, or ``output``."""
    found, _ = pytree.tree_flatten_with_path(model(*args, **kwargs))
    names = []
    for path, leaf in found:
        words = [_step(step) for step in path]
        if isinstance(leaf, Tensor):
            names.append(".".join(words if words and not words[0].isdigit() else ["output", *words]))
    return tuple(names)


def _with(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    following = iter(tensors)
    return [next(following) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _on_cpu(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring an example to the CPU, and numbers to ``dtype``."""
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters from warning of their own internals, and from logging what they also raise."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
