"""Turning a dense module into the compressed one that it became: modules replaced, tensors tied, dtypes restored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from slimc.runtime.modules import SlimLinear


def linear_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of the weight of a dense or compressed linear, ``None`` if it has no single weight."""
    if isinstance(module, SlimLinear):
        return (module.format.rows, module.format.columns)
    weight = module._parameters.get("weight")
    return None if weight is None else tuple(weight.shape)


def owner(name: str) -> str:
    """Return the name of the module that holds the tensor called ``name``."""
    return name.rpartition(".")[0]


def names_of(model: nn.Module, sites: Iterable[str]) -> set[str]:
    """Return all names of the modules called ``sites``, which may be used in several places."""
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {id(modules[site]) for site in sites}
    return {name for name, module in modules.items() if id(module) in chosen}


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Put each replacement wherever the module of that name is used; return the model, which may be one of them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    by_identity = {id(modules[name]): module for name, module in replacements.items()}
    for name, module in modules.items():
        replacement = by_identity.get(id(module))
        if replacement is None:
            continue
        if not name:
            return replacement
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, replacement)
    return model


def tie(model: nn.Module, alias: str, name: str) -> None:
    """Make the parameter called ``alias`` the very parameter called ``name``."""
    module, leaf = find(model, alias)
    source, source_leaf = find(model, name)
    if leaf in module._parameters and source_leaf in source._parameters:
        module._parameters[leaf] = source._parameters[source_leaf]


def cast_buffer(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Give a buffer that the model made for itself the dtype it had when it was saved, if it still has one."""
    modules = dict(model.named_modules(remove_duplicate=False))
    holder, _, leaf = name.rpartition(".")
    buffer = modules[holder]._buffers.get(leaf) if holder in modules else None
    if buffer is not None:
        modules[holder]._buffers[leaf] = buffer.to(dtype)


def find(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a tensor, and the tensor's name in it."""
    holder, _, leaf = name.rpartition(".")
    return model.get_submodule(holder), leaf


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers."""
    yield from model.named_parameters()
    yield from model.named_buffers()
