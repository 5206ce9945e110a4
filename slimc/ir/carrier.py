"""The second carrier of a compression: the user's own module, with :class:`SlimLinear` set where its linears were.

A module is replaced only if the capture shows that it is exactly one linear. Otherwise its weight is refused, with the
reason.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimc.ir.program import Program, Site
from slimc.ir.text import innermost_module, operator_name
from slimc.runtime.modules import SlimLinear

aten = torch.ops.aten

_KEEPS_ROWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.contiguous.default,
    }
)
"""Operators that leave the elements in order: between two of them a product with ``[rows, columns]`` is a linear."""


@dataclass(frozen=True)
class ModuleCall:
    """How a module was called while it was traced; sizes are text, since symbolic ones must not be compared.

    Attributes:
        plain: one positional tensor went in, and one tensor came out.
        input: sizes of that tensor.
        output: sizes of the result.
    """

    plain: bool
    input: tuple[str, ...] = ()
    output: tuple[str, ...] = ()


class ModuleCalls:
    """The calls of each module of a model.

    The exporter calls a module that has several paths through a proxy, another object with the same ``__dict__``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._calls: dict[int, list[ModuleCall]] = {id(vars(module)): [] for module in model.modules()}

    def __getitem__(self, module: nn.Module) -> list[ModuleCall]:
        """Return the calls of one module, in order."""
        return self._calls[id(vars(module))]

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Add a call; those of foreign modules are ignored."""
        if id(vars(module)) not in self._calls:
            return
        plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(result, Tensor)
        self[module].append(ModuleCall(True, _sizes(args[0]), _sizes(result)) if plain else ModuleCall(False))


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[ModuleCalls]:
    """Record how the modules of ``model`` are called: the graph does not show arguments that are merely passed."""
    calls = ModuleCalls(model)
    # Not one global hook: PyTorch forgets to remove a trace of it, and torch.compile would warn about hooks for ever.
    handles = [module.register_forward_hook(calls.record, with_kwargs=True) for module in model.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _sizes(tensor: Tensor) -> tuple[str, ...]:
    return tuple(str(size) for size in tensor.shape)


class CarrierCheck:
    """Decides whether the modules that hold a weight can be replaced by a :class:`SlimLinear`.

    Args:
        model: the user's model.
        graph: what it was captured as.
        calls: how its modules were called meanwhile.
        canonical: the first name of each tensor, by all its names.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, calls: ModuleCalls, canonical: Mapping[str, str]) -> None:
        self.model = model
        self.calls = calls
        self.canonical = canonical
        self.nodes: dict[str, list[fx.Node]] = {}
        self.constants: list[fx.Node] = [node for node in graph.nodes if node.op == "get_attr" and node.users]
        for node in graph.nodes:
            if node.op == "call_function":
                self.nodes.setdefault(innermost_module(node), []).append(node)

    def refusal(self, site: Site, names: tuple[str, ...]) -> str | None:
        """Say why a module that holds the site's weight, under any of ``names``, stays; or return ``None``."""
        for name in names:
            path, _, last = name.rpartition(".")
            if last != "weight":
                owner = type(self.model.get_submodule(path)).__name__
                return f"is the parameter '{last}' of {owner}, not the weight of a linear module"
        for use in site.uses:
            path = innermost_module(use.node)
            if path not in site.modules:
                return f"is read by the code of '{path or 'the model'}', not by the module that holds it"
        return next((reason for path in site.modules if (reason := self._module_refusal(path, site))), None)

    def _module_refusal(self, path: str, site: Site) -> str | None:
        module = self.model.get_submodule(path)
        what = f"its module {type(module).__name__}"
        if not self.calls[module]:
            return f"{what} ('{path}') shares the weight, but is not called"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"{what} has hooks, which would be lost"
        if "forward" in vars(module):
            return f"{what} has had its forward() replaced, which would be lost"
        extra = self._extra_node(path, site)
        if extra is not None:
            return f"{what} does more than one linear (it also runs {operator_name(extra)})"
        return (
            self._call_refusal(what, module, site)
            or self._bias_refusal(what, path, site)
            or self._other_tensor_refusal(what, path)
        )

    def _extra_node(self, path: str, site: Site) -> fx.Node | None:
        """Return a node of the module, or of a module inside it, that computes something besides the product."""
        part_of_linear = {use.node for use in site.uses}
        part_of_linear |= {node for use in site.uses for node in _weight_path(use.weight)}
        inside = f"{path}." if path else ""
        for node in (node for owner, nodes in self.nodes.items() if f"{owner}.".startswith(inside) for node in nodes):
            if node not in part_of_linear and node.target not in _KEEPS_ROWS and _makes_tensors(node):
                return node
        return None

    def _call_refusal(self, what: str, module: nn.Module, site: Site) -> str | None:
        rows, columns = (str(size) for size in site.shape)
        calls = self.calls[module]
        if not all(call.plain for call in calls):
            return f"{what} is called with more than one positional tensor, or returns more than one"
        if any(call.input[-1:] != (columns,) or call.output != (*call.input[:-1], rows) for call in calls):
            return f"{what} changes the shape of its input or output"
        paths = [path for path, other in self.model.named_modules(remove_duplicate=False) if other is module]
        products = sum(innermost_module(use.node) in paths for use in site.uses)
        traces = max(len(self.calls[self.model]), 1)
        return f"{what} multiplies by it more than once in a call" if products * traces > len(calls) else None

    def _bias_refusal(self, what: str, path: str, site: Site) -> str | None:
        own = self.canonical.get(f"{path}.bias" if path else "bias")
        for use in site.uses:
            added = None if use.bias is None else self.canonical.get(str(use.bias.target), str(use.bias.target))
            if innermost_module(use.node) == path and added != own:
                return f"the product adds {added or 'no bias'}, but the bias of {what} is {own or 'absent'}"
        return None

    def _other_tensor_refusal(self, what: str, path: str) -> str | None:
        start = f"{path}." if path else ""
        for node in self.constants:
            name = str(node.target)
            if path and name.startswith(start) and name.removeprefix(start) not in ("weight", "bias"):
                return f"{what} also holds '{name.removeprefix(start)}', which the model reads"
        return None


def _weight_path(operand: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes from a product's weight operand back to the constant."""
    while operand.op == "call_function":
        yield operand
        operand = operand.all_input_nodes[0]


def _makes_tensors(node: fx.Node) -> bool:
    """Tell whether a node computes with tensors; arithmetic on sizes does not."""
    return isinstance(node.meta.get("val"), Tensor | list | tuple)


def install(model: nn.Module, program: Program, *, inplace: bool) -> nn.Module:
    """Return ``model`` with a :class:`SlimLinear` in place of each site's modules.

    Without ``inplace`` the model is copied; the dense weights that are replaced are not. A model that is itself one
    linear cannot be changed in place: its replacement is returned.
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
    _set_dense(model, program, set(replacements))
    return model


def _set_dense(model: nn.Module, program: Program, compressed: set[str]) -> None:
    """Take over the dense tensors of the program that differ from those of the model."""
    for name, tensor in program.replaced.items():
        path, _, last = name.rpartition(".")
        if path in compressed:
            continue
        owner = model.get_submodule(path)
        if last in owner._parameters:
            old = owner._parameters[last]
            owner._parameters[last] = nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad)
        else:
            owner._buffers[last] = tensor


def _replacements(model: nn.Module, program: Program) -> dict[str, SlimLinear]:
    """Return the new module for each path; modules of equal weight and bias become one, so that they stay equal."""
    replacements: dict[str, SlimLinear] = {}
    for site in program.sites.values():
        if site.packed is None:
            continue
        by_bias: dict[int, SlimLinear] = {}
        for path in site.modules:
            old = model.get_submodule(path)
            name = f"{path}.bias" if path else "bias"
            bias: Any = program.replaced.get(name, getattr(old, "bias", None))
            bias = bias if isinstance(bias, Tensor) else None
            if id(bias) not in by_bias:
                by_bias[id(bias)] = SlimLinear(site.packed, None if bias is None else bias.detach().clone())
                by_bias[id(bias)].train(old.training)
            replacements[path] = by_bias[id(bias)]
    return replacements
