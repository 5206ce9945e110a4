"""What a decoder does ahead of its linears, found in Dynamo's graph and put into one operator with them.

A residual and a norm become a part of ``slim::normed_linears``, a gate one of ``slim::gated_linears``:

    total = x + residual;  linears(weight * (total.to(float32) * rsqrt(mean(total.to(float32)^2) + epsilon)).to(dtype))
    linears(silu(gate) * up)

Anything that differs is left as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from slimc.backends.cuda.between import gated_linears, normed_linears, refuses
from slimc.backends.dynamo_match import MismatchError, as_node, example_of, is_call, is_method, require
from slimc.runtime import calls

__all__ = ["join_what_is_between"]


def join_what_is_between(graph: fx.Graph) -> int:
    """Replace what is found in a graph whose values have no gradients, and return how often something was."""
    layers = [
        node for node in graph.nodes if is_call(node, calls.prepared_linear) or is_call(node, calls.sibling_linears)
    ]
    joined = 0
    for layer in layers:
        for join in (_join_norm, _join_gate):
            try:
                join(graph, layer)
            except MismatchError:
                continue
            joined += 1
            break
    return joined


def _join_norm(graph: fx.Graph, layer: fx.Node) -> None:
    normed, handles = _input_and_handles(layer)
    require(is_call(normed, operator.mul))
    weight, rounded = normed.args
    require(as_node(weight).op == "placeholder" and is_method(rounded, "to"))
    scaled = as_node(rounded).args[0]
    require(is_call(scaled, operator.mul))
    exact, factor = as_node(scaled).args
    require(is_call(factor, torch.rsqrt))
    shifted = as_node(factor).args[0]
    require(is_call(shifted, operator.add))
    mean, epsilon = as_node(shifted).args
    require(is_method(mean, "mean", -1) and as_node(mean).kwargs.get("keepdim") is True and isinstance(epsilon, float))
    squares = as_node(mean).args[0]
    require(is_method(squares, "pow", 2) and as_node(squares).args[0] is exact)
    require(is_method(exact, "to", torch.float32))
    total = as_node(as_node(exact).args[0])
    require(is_call(total, operator.add))
    residual, x = (as_node(node) for node in total.args)
    shown = example_of(normed)
    require(all(example_of(node).shape == shown.shape for node in (total, residual, x)))
    require(all(example_of(node).dtype == shown.dtype for node in (total, residual, x, weight)))
    require(example_of(weight).shape == shown.shape[-1:])
    require(refuses(shown, layer.kwargs["columns"]) is None)  # type: ignore[arg-type]
    order = {node: index for index, node in enumerate(graph.nodes)}
    others = [user for user in total.users if user is not exact]
    require(all(order[user] > order[layer] for user in others))
    with graph.inserting_before(layer):
        both = graph.call_function(normed_linears, (x, residual, weight, epsilon, handles), dict(layer.kwargs))
        joint = graph.call_function(operator.getitem, (both, 0))
        result = graph.call_function(operator.getitem, (both, 1))
    joint.meta.update(total.meta)
    result.meta.update(layer.meta)
    layer.replace_all_uses_with(result)
    graph.erase_node(layer)
    total.replace_all_uses_with(joint, delete_user_cb=lambda user: user is not exact)


def _join_gate(graph: fx.Graph, layer: fx.Node) -> None:
    gated, handles = _input_and_handles(layer)
    require(is_call(gated, operator.mul))
    activated, up = (as_node(node) for node in gated.args)
    require(is_call(activated, functional.silu) and not activated.kwargs.get("inplace", False))
    gate = as_node(activated.args[0])
    shown = example_of(gated)
    require(all(example_of(node).shape == shown.shape for node in (gate, up)))
    require(all(example_of(node).dtype == shown.dtype for node in (gate, up)))
    require(refuses(shown, layer.kwargs["columns"]) is None)  # type: ignore[arg-type]
    with graph.inserting_before(layer):
        parts = (_without_copy(gate), _without_copy(up))
        result = graph.call_function(gated_linears, (*parts, handles), dict(layer.kwargs))
    result.meta.update(layer.meta)
    layer.replace_all_uses_with(result)
    graph.erase_node(layer)


def _input_and_handles(layer: fx.Node) -> tuple[fx.Node, Any]:
    """Return the input of a layer, which nobody else reads, and the handles."""
    x = as_node(layer.args[0])
    require(len(x.users) == 1)
    if is_call(layer, calls.sibling_linears):
        return x, layer.args[1]
    require(layer.args[2] is None)
    return x, [layer.args[1]]


def _without_copy(part: fx.Node) -> Any:
    """Return a part of the result of siblings as it lies there."""
    if is_method(part, "contiguous") and is_call(part.args[0], torch.narrow):
        return part.args[0]
    return part
