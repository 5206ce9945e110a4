"""The rules that hold between passes. A program that breaks one is a bug in the pass that ran last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from slimc.errors import FormatError, VerifyError
from slimc.ir.program import EMBEDDINGS, Program, Site, attribute, memory
from slimc.ir.text import operator_name


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
        _check_attribute(program, node)
        _check_slim_op(node)
    readers = _constant_readers(program)
    for site in program.sites.values():
        _check_site(program, site, readers)


def _check_attribute(program: Program, node: fx.Node) -> None:
    if node.op != "get_attr":
        return
    try:
        attribute(program.module, str(node.target))
    except AttributeError as error:
        raise VerifyError(f"The node %{node.name} reads '{node.target}', which the module does not have.") from error


def _check_slim_op(node: fx.Node) -> None:
    """The recorded value of a slim op is what its fake kernel computes from its operands."""
    value = node.meta.get("val")
    mode = getattr(value, "fake_mode", None)
    if getattr(node.target, "namespace", "") != "slim" or not isinstance(value, Tensor) or mode is None:
        return
    if any("val" not in source.meta for source in node.all_input_nodes):
        return
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: source.meta["val"])
    try:
        with mode:
            inferred = node.target(*args, **kwargs)  # type: ignore[operator]
    except RuntimeError as error:
        raise VerifyError(f"The operands of %{node.name} do not fit {operator_name(node)}: {error}") from error
    if inferred.dtype != value.dtype or not _same_sizes(inferred, value):
        raise VerifyError(
            f"%{node.name} is recorded as {value.dtype}{list(value.shape)}, but {operator_name(node)} gives "
            f"{inferred.dtype}{list(inferred.shape)}."
        )


def _same_sizes(one: Tensor, other: Tensor) -> bool:
    """Compare shapes by name where they are symbolic: asking whether they are equal would fix their sizes."""
    return [str(size) for size in one.shape] == [str(size) for size in other.shape]


def _check_site(program: Program, site: Site, readers: Mapping[tuple[Any, ...], list[fx.Node]]) -> None:
    """Nothing computes with a compressed site's dense weight, and its tensors are what its format promises."""
    if site.packed is None:
        return
    reading = readers.get(memory(attribute(program.module, site.weight_name)), [])
    if reading:
        raise VerifyError(f"'{site.name}' is compressed, but its dense weight is still read by %{reading[0].name}.")
    try:
        site.packed.from_tensors(site.packed.format, site.packed.tensors())
    except FormatError as error:
        raise VerifyError(f"'{site.name}' is not in its storage form: {error}") from error


def _constant_readers(program: Program) -> dict[tuple[Any, ...], list[fx.Node]]:
    """Map each constant's memory to the nodes that compute with it: results that nobody reads do not count.

    An embedding lookup does not count either: a table stays dense when the product that shares it is compressed.
    """
    live: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op in ("output", "call_module") or node.is_impure() or any(user in live for user in node.users):
            live.add(node)
    readers: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in program.graph.nodes:
        value = attribute(program.module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(value, Tensor):
            used_by = [user for user in node.users if user in live and user.target not in EMBEDDINGS]
            readers.setdefault(memory(value), []).extend(used_by)
    return readers
