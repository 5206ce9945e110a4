"""The rules that hold between passes. A program that breaks one is a bug in the pass that ran last."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from slimc.errors import SlimError, VerifyError
from slimc.ir.program import Program, Site, attribute
from slimc.ir.text import operator_name

aten = torch.ops.aten


def verify(program: Program) -> None:
    """Check the whole program.

    Raises:
        VerifyError: naming the rule and the node or site that breaks it.
    """
    try:
        program.graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise VerifyError(f"The graph is not well formed: {error}") from error
    for node in program.graph.nodes:
        for rule in _NODE_RULES:
            rule(program, node)
    for site in program.sites.values():
        _check_site(program, site)


def _attributes_exist(program: Program, node: fx.Node) -> None:
    if node.op != "get_attr":
        return
    try:
        attribute(program.module, str(node.target))
    except AttributeError as error:
        raise VerifyError(f"The node %{node.name} reads '{node.target}', which the module does not have.") from error


def _slim_ops_infer(program: Program, node: fx.Node) -> None:
    """The recorded value of a slim op is what its fake kernel computes from its operands."""
    if node.op != "call_function" or getattr(node.target, "namespace", "") != "slim":
        return
    value = node.meta.get("val")
    operands = [source.meta.get("val") for source in node.all_input_nodes]
    if not isinstance(value, Tensor) or any(operand is None for operand in operands):
        return
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        return
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: source.meta["val"])
    try:
        with mode:
            inferred = node.target(*args, **kwargs)  # type: ignore[operator]
    except RuntimeError as error:
        raise VerifyError(f"The operands of %{node.name} do not fit {operator_name(node)}: {error}") from error
    if inferred.dtype != value.dtype or inferred.ndim != value.ndim:
        raise VerifyError(
            f"%{node.name} is recorded as {value.dtype}{list(value.shape)}, but {operator_name(node)} gives "
            f"{inferred.dtype}{list(inferred.shape)}."
        )


_NODE_RULES: tuple[Callable[[Program, fx.Node], None], ...] = (_attributes_exist, _slim_ops_infer)


def _check_site(program: Program, site: Site) -> None:
    """A compressed site's dense weight is read by nobody, and its packed tensors are what its format promises."""
    if site.packed is None:
        return
    live = [
        node
        for node in program.graph.nodes
        if node.op == "get_attr" and node.target == site.weight_name and _is_read(node)
    ]
    if live:
        readers = ", ".join(f"%{user.name}" for user in live[0].users)
        raise VerifyError(f"'{site.name}' is compressed, but its dense weight is still read by {readers}.")
    for name, (shape, dtype) in site.packed.format.tensor_specs().items():
        tensor = site.packed.tensors().get(name)
        if tensor is None or tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            raise VerifyError(f"'{site.name}': the tensor '{name}' is not the {dtype}{list(shape)} that its format promises.")
    _reject_slim_errors(site)


def _reject_slim_errors(site: Site) -> None:
    if site.packed is None:
        return
    try:
        site.packed.from_tensors(site.packed.format, site.packed.tensors())
    except SlimError as error:
        raise VerifyError(f"'{site.name}': {error}") from error


def _is_read(node: fx.Node) -> bool:
    """Whether a value reaches anything but captured transpositions that nobody reads any more."""
    return any(user.op == "output" or user.users and _is_read(user) or user.is_impure() for user in node.users)
