"""``torch.compile(model, backend="slim")``: layers that read one input run as one, and Inductor compiles the rest.

Dynamo hands over a graph in which a compressed layer is one ``slim::prepared_linear`` of its input, its handle and its
bias (`slimc.runtime.prepared`). Siblings, such as q, k and v, become one ``slim::sibling_linears`` where their kernel
can run them in one launch; biases are added outside, where Inductor fuses them with what follows. What a decoder does
between its linears becomes launches of slimc's own, where it is found (`attention_pass`, `between_pass`). Nothing is
kept here: kernels' states belong to the layers, and a compiled graph finds them by the handles that it is called with.

The function is found by name through an entry point of the package; nothing has to be imported. It takes the ``mode``
and the ``options`` of ``torch.compile``, as Inductor does.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from slimc.backends.attention_pass import attend_fast
from slimc.backends.between_pass import join_what_is_between
from slimc.errors import InputError, closest
from slimc.runtime import calls
from slimc.runtime.prepared import prepared_layer, sibling_layers

__all__ = ["slim"]


WITHOUT_LAYERS = (
    "a graph without compressed layers; compress the model first (slimc.compile or slimc.load). If it is compressed, a "
    "graph break cut off this part of it, which TORCH_LOGS=graph_breaks explains"
)
WITH_GRADIENTS = "compressed layers with gradients, which kernels have not; run the model under torch.no_grad()"


def slim(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_others: Any,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured.

    Args:
        graph: the captured graph; its weights are inputs.
        example_inputs: real tensors, and integers for symbolic sizes.
        mode: ``"reduce-overhead"`` and the others of Inductor.
        options: settings of Inductor, such as ``{"triton.cudagraphs": True}``; they overrule those of ``mode``.

    Returns:
        What Dynamo calls in place of the graph.

    Raises:
        InputError: Inductor knows no such mode or setting.
    """
    settings = _settings(mode, options)
    placeholders = {node: index for index, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    layers = graph.graph.find_nodes(op="call_function", target=calls.prepared_linear)
    if not layers:
        differentiable = graph.graph.find_nodes(op="call_function", target=torch.ops.slim.linear.default)
        _warn_once(WITH_GRADIENTS if differentiable else WITHOUT_LAYERS)
    families = []
    for siblings in _siblings(layers):
        if not all(_handle(node) in placeholders for node in siblings):
            continue
        positions = [placeholders[_handle(node)] for node in siblings]
        if _run_as_one([example_inputs[position] for position in positions]):
            _merge(graph.graph, siblings)
            families.append(positions)
    families.extend([placeholders[_handle(node)]] for node in layers if _handle(node) in placeholders)
    if layers and not torch.is_grad_enabled():
        attend_fast(graph.graph)
        join_what_is_between(graph.graph)
    graph.recompile()
    return _prepare_first(_inductor(graph, example_inputs, settings), families, example_inputs)


def _inductor(graph: fx.GraphModule, example_inputs: Sequence[Any], settings: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    if hasattr(config.triton, "enable_pdl"):
        # Its kernels would begin while several of slimc's still run, and wait only for the last of them.
        settings = settings | {"triton.enable_pdl": False}
    compiled: Callable[..., Any] = compile_fx(graph, example_inputs, config_patches=settings)  # type: ignore[assignment]
    return compiled


def _reset() -> None:
    """Forget captured CUDA graphs, as ``torch._dynamo.reset()`` asks of every backend."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


slim.reset = _reset  # type: ignore[attr-defined]


def _settings(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings of Inductor that ``mode`` and ``options`` stand for."""
    from torch._inductor import config, list_mode_options

    modes: dict[str, dict[str, Any]] = list_mode_options()
    if mode is not None and mode not in modes:
        raise InputError(f"there is no mode {mode!r}; use one of {', '.join(modes)}{closest(mode, modes)}")
    known = config.get_config_copy()
    given = {name.replace("-", "_"): value for name, value in (options or {}).items()}
    for name in given:
        if name not in known:
            raise InputError(f"Inductor has no option {name!r}{closest(name, known)}; see torch._inductor.config")
    return (modes[mode] if mode else {}) | given


@functools.cache
def _warn_once(what: str) -> None:
    warnings.warn(f'backend="slim" was given, and leaves to Inductor, {what}', stacklevel=2)


def _handle(node: fx.Node) -> fx.Node:
    handle: fx.Node = node.args[1]  # type: ignore[assignment]
    return handle


MOST_SIBLINGS = 8
"""Layers that are computed as one; of more that read one input, as many at a time."""


def _siblings(layers: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Return the layers that read one input, two or more of them, and may be computed where the first of them is."""
    readers: dict[Any, list[fx.Node]] = {}
    for node in layers:
        readers.setdefault(node.args[0], []).append(node)
    found: list[list[fx.Node]] = []
    for nodes in readers.values():
        families = [[nodes[0]]]
        for node in nodes[1:]:
            # The input may have been written to since: Dynamo's graph is as the program was.
            full = len(families[-1]) == MOST_SIBLINGS
            if full or any(_may_write(between) for between in _between(families[-1][-1], node)):
                families.append([])
            families[-1].append(node)
        found.extend(family for family in families if len(family) > 1)
    return found


def _between(first: fx.Node, last: fx.Node) -> Iterable[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


_WRITING_OPERATORS = frozenset(
    getattr(operator, name)
    for name in (
        *("setitem", "delitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("ilshift", "irshift", "iand", "ior", "ixor", "iconcat"),
    )
)


def _may_write(node: fx.Node) -> bool:
    """Return whether a node may write to a tensor that it did not make; what is not known may."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_module" or "out" in node.kwargs or node.kwargs.get("inplace"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    name = getattr(node.target, "__name__", "_")
    return node.target in _WRITING_OPERATORS or name.endswith("_")


def _run_as_one(handles: Sequence[Tensor]) -> bool:
    """Put the states of siblings together, if their kernel can run them as one."""
    if not all(type(handle) is Tensor for handle in handles):
        return False
    return sibling_layers(handles).prepare()


def _merge(graph: fx.Graph, siblings: Sequence[fx.Node]) -> None:
    """Replace the calls of siblings by one call and a part of its result for each."""
    x = siblings[0].args[0]
    rows = [int(node.kwargs["rows"]) for node in siblings]  # type: ignore[arg-type]
    with graph.inserting_before(siblings[0]):
        joint = graph.call_function(
            calls.sibling_linears,
            (x, [_handle(node) for node in siblings]),
            {"rows": sum(rows), "columns": siblings[0].kwargs["columns"]},
        )
        start = 0
        for node, count in zip(siblings, rows, strict=True):
            part = graph.call_function(torch.narrow, (joint, -1, start, count))
            bias = node.args[2]
            if bias is None:
                # What follows was traced with a result of its own; Inductor makes no copy where it need not.
                part = graph.call_method("contiguous", (part,))
            else:
                # A bias of another dtype must not change that of the result.
                part = graph.call_function(torch.add, (part, graph.call_method("type_as", (bias, part))))
            part.meta.update(node.meta)
            node.replace_all_uses_with(part)
            start += count
    for node in siblings:
        graph.erase_node(node)


def _prepare_first(
    compiled: Callable[..., Any], families: Sequence[Sequence[int]], example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Return ``compiled`` behind a look at its handles: layers that are new to it are prepared before it runs.

    Inside they might be met while a CUDA graph is captured, where nothing can be prepared.
    """
    positions = [index for family in families for index in family]
    if not any(isinstance(example_inputs[index], Tensor) and example_inputs[index].is_cuda for index in positions):
        return compiled
    seen: list[Tensor] = []

    def run(*inputs: Any) -> Any:
        handles = [inputs[index] for index in positions]
        if len(seen) != len(handles) or not all(map(operator.is_, seen, handles)):
            for family in families:
                if len(family) > 1:
                    sibling_layers([inputs[index] for index in family]).prepare()
                else:
                    prepared_layer(inputs[family[0]]).prepare()
            seen[:] = handles
        return compiled(*inputs)

    return run
