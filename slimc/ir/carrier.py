"""The second carrier of a compression: the user's own module, with :class:`SlimLinear` set where its linears were.

A module is replaced only if the graph shows that it is exactly one linear. Otherwise its weight is refused, with the reason.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

import torch
from torch import fx, nn

from slimc.ir.program import Program, Site
from slimc.ir.text import operator_name
from slimc.runtime.modules import SlimLinear

aten = torch.ops.aten

_SHAPE_PLUMBING = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.sym_size.int,
    aten.t.default,
    aten.transpose.int,
}


class CarrierCheck:
    """Decides whether the modules that hold a weight can be replaced by a :class:`SlimLinear`."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model = model
        self.nodes: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_function":
                self.nodes.setdefault(innermost_module(node), []).append(node)

    def refusal(self, site: Site) -> str | None:
        """Say why a module that holds the site's weight cannot be replaced, or return ``None``."""
        if not site.weight_name.endswith("weight") or site.weight_name.rpartition(".")[2] != "weight":
            owner = type(self.model.get_submodule(site.weight_name.rpartition(".")[0])).__name__
            return f"is a parameter of {owner}, not the weight of a linear module"
        for use in site.uses:
            path = innermost_module(use.node)
            if path not in site.modules:
                return f"is read by the code of '{path or 'the model'}', not by the module that holds it"
        return next((reason for path in site.modules if (reason := self._module_refusal(path, site))), None)

    def _module_refusal(self, path: str, site: Site) -> str | None:
        module = self.model.get_submodule(path)
        products = {use.node for use in site.uses}
        extra = [
            node
            for node in self.nodes.get(path, [])
            if node not in products and node.target not in _SHAPE_PLUMBING and str(node.target)[:5] == "aten."
        ]
        if extra:
            return f"its module {type(module).__name__} does more than one linear (it also runs {operator_name(extra[0])})"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"its module {type(module).__name__} has forward hooks, which would be lost"
        biases = {None if use.bias is None else str(use.bias.target) for use in site.uses if innermost_module(use.node) == path}
        own_bias = getattr(module, "bias", None)
        if own_bias is not None and None in biases:
            return f"the bias of its module {type(module).__name__} is not added by the product"
        return None


def innermost_module(node: fx.Node) -> str:
    """Return the path of the module whose code made ``node``; repeated calls (``layer@1``) count as the same module."""
    stack = node.meta.get("nn_module_stack")
    return re.sub(r"@\d+", "", str(list(stack.values())[-1][0])) if stack else ""


def install(model: nn.Module, program: Program, *, inplace: bool) -> nn.Module:
    """Return ``model`` with a :class:`SlimLinear` in place of each site's modules.

    Without ``inplace`` the model is copied; the dense weights that are replaced are not.
    """
    replacements = _replacements(model, program)
    if "" in replacements:
        return replacements[""]
    if not inplace:
        memo: dict[int, object] = {id(model.get_submodule(path)): new for path, new in replacements.items()}
        model = copy.deepcopy(model, memo)
    for path, new in replacements.items():
        if model.get_submodule(path) is not new:
            model.set_submodule(path, new)
    return model


def _replacements(model: nn.Module, program: Program) -> Mapping[str, SlimLinear]:
    replacements: dict[str, SlimLinear] = {}
    for site in program.sites.values():
        if site.packed is None:
            continue
        by_bias: dict[int, SlimLinear] = {}
        for path in site.modules:
            bias = getattr(model.get_submodule(path), "bias", None)
            new = by_bias.setdefault(id(bias), SlimLinear(site.packed, None if bias is None else bias.detach().clone()))
            new.train(model.get_submodule(path).training)
            replacements[path] = new
    return replacements
