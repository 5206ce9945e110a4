"""A model whose matrices have become placeholders: what is traced, so that no graph ever holds a weight.

A placeholder is one node of domain ``slim.placeholder`` with the layer's name. It keeps the graph small, the export
quick and in little memory, and it leaves the choice of the nodes that take its place to whoever knows the target.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slimc.errors import InputError
from slimc.runtime.devices import CANNOT_BE_COPIED
from slimc.runtime.modules import SlimLinear

__all__ = ["PLACEHOLDER", "Outline", "outline_of"]

PLACEHOLDER = "slim.placeholder"
"""The domain of nodes that stand for a layer."""


class _Placeholder(nn.Module):
    """Stands for one layer in the traced model."""

    def __init__(self, kind: str, names: list[str], width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.names, self.width, self.dtype = kind, names, width, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the layer's shape; the node says what it is of."""
        shape = (*x.shape, self.width) if self.kind == "Embedding" else (*x.shape[:-1], self.width)
        result: Tensor = torch.onnx.ops.symbolic(
            f"{PLACEHOLDER}::{self.kind}", (x,), {"layer": self.names[0]}, dtype=self.dtype, shape=shape, version=1
        )
        return result


@dataclass
class Outline:
    """A copy of a model without its matrices.

    Attributes:
        model: the copy; its small parameters (norms, learned positions) have the dtype of the export.
        linears: the compressed layers, by the name that their placeholders bear.
        dense: linear layers that are not compressed.
        embeddings: tables of embeddings.
    """

    model: nn.Module
    linears: dict[str, SlimLinear] = field(default_factory=dict)
    dense: dict[str, nn.Linear] = field(default_factory=dict)
    embeddings: dict[str, nn.Embedding] = field(default_factory=dict)


def outline_of(model: nn.Module, dtype: torch.dtype) -> Outline:
    """Return the outline of ``model``, which shares nothing that a trace could change with it.

    Layers with hooks, and subclasses of ``nn.Linear`` and ``nn.Embedding`` that may compute something else, stay as
    they are; what a subclass of ``nn.Embedding`` holds stays dense.

    Raises:
        InputError: the model cannot be copied.
    """
    outline = Outline(nn.Module())
    stands_for: dict[int, _Placeholder] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in stands_for:
            stands_for[id(module)].names.append(name)
        elif isinstance(module, SlimLinear):
            outline.linears[name] = module
            stands_for[id(module)] = _Placeholder("Compressed", [name], module.out_features, dtype)
        elif type(module) is nn.Linear and not _hooked(module):
            outline.dense[name] = module
            stands_for[id(module)] = _Placeholder("Linear", [name], module.out_features, dtype)
        elif type(module) is nn.Embedding and not _hooked(module) and module.max_norm is None:
            outline.embeddings[name] = module
            stands_for[id(module)] = _Placeholder("Embedding", [name], module.embedding_dim, dtype)
    instead: dict[int, object] = dict(stands_for)
    persistent = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for module in model.modules():
        if id(module) in stands_for:
            continue
        for parameter in module._parameters.values():
            if parameter is not None:
                instead[id(parameter)] = nn.Parameter(_converted(parameter, dtype), requires_grad=False)
        for buffer in module._buffers.values():
            if buffer is not None:
                instead[id(buffer)] = _converted(buffer, dtype) if id(buffer) in persistent else buffer
    try:
        outline.model = copy.deepcopy(model, instead)
    except CANNOT_BE_COPIED as error:
        raise InputError(f"{type(model).__name__} cannot be copied ({error}), which an export needs to do") from error
    return outline


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring a tensor to the CPU, and to ``dtype`` if its numbers are floating point."""
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
