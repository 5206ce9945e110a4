"""Attention of a new token over a static cache, found in Dynamo's graph and made one ``slim::attend_next``.

What is looked for is what transformers' decoders with rotary positions trace to, whatever the model is called:

    position = arange(1) + length;  length.add_(1)
    keys.index_copy_(2, position, k * cos + turned(k) * sin);  values.index_copy_(2, position, v)
    scaled_dot_product_attention(q * cos + turned(q) * sin, keys, values, mask)

where ``turned(x)`` is ``cat((-x[..., half:], x[..., :half]), -1)``, and keys and values may be repeated for groups of
queries. Anything that differs is left as it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from slimc.backends.cuda.attention import attend_next, keep, refuses
from slimc.backends.dynamo_match import MismatchError, as_node, example_of, is_call, is_method, require

__all__ = ["attend_fast"]

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass
class _Turned:
    x: fx.Node
    cos: fx.Node
    sin: fx.Node


@dataclass
class _Found:
    """One attention, and all of the graph that it takes the place of."""

    attention: fx.Node
    q: _Turned
    k: _Turned
    v: fx.Node
    keys: fx.Node
    values: fx.Node
    copies: list[fx.Node]
    length: fx.Node
    step: fx.Node
    mask: fx.Node | None
    scale: float


def attend_fast(graph: fx.Graph) -> int:
    """Replace what is found in a graph whose values have no gradients, and return how many were."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    found = []
    for node in graph.find_nodes(op="call_function", target=functional.scaled_dot_product_attention):
        try:
            found.append(_match(node, order))
        except MismatchError:
            continue
    kept: dict[fx.Node, fx.Node] = {}
    for one in found:
        _replace(graph, one, kept)
    _step_together(graph, [one.step for one in found])
    return len(found)


def _match(attention: fx.Node, order: dict[fx.Node, int]) -> _Found:
    given: dict[str, Any] = {**dict(zip(_ARGUMENTS, attention.args, strict=False)), **attention.kwargs}
    require(not given.get("dropout_p") and not given.get("is_causal"))
    keys, values = _unrepeated(given["key"]), _unrepeated(given["value"])
    require(keys.op == values.op == "placeholder")
    copies = [_only_copy(cache, attention) for cache in (keys, values)]
    (_, _, position, new_key), (_, _, other, v) = (copy.args for copy in copies)
    require(position is other)
    v = as_node(v)
    length, step = _counted(position)
    q, k = _turned(given["query"]), _turned(new_key)
    require(k.cos is q.cos and k.sin is q.sin)
    mask = given.get("attn_mask")
    shown = [example_of(node) for node in (q.x, k.x, v, q.cos, q.sin, keys, values)]
    shown_mask = None if mask is None else example_of(mask)
    require(refuses(shown, shown_mask) is None)
    scale = given.get("scale")
    scale = shown[0].shape[-1] ** -0.5 if scale is None else scale
    require(isinstance(scale, float))
    # It is computed where the length still is that of before.
    ready = (q.x, k.x, v, q.cos, q.sin, *(() if mask is None else (mask,)))
    require(all(order[node] < order[step] for node in ready))
    return _Found(attention, q, k, v, keys, values, copies, length, step, mask, scale)


def _replace(graph: fx.Graph, found: _Found, kept: dict[fx.Node, fx.Node]) -> None:
    with graph.inserting_before(found.step):
        q, k, v = (_without_copy(graph, node) for node in (found.q.x, found.k.x, found.v))
        cos, sin = (_kept(graph, node, kept) for node in (found.q.cos, found.q.sin))
        mask = None if found.mask is None else _kept(graph, found.mask, kept)
        y = graph.call_function(
            attend_next,
            (q, k, v, cos, sin, found.keys, found.values, found.length, mask, found.scale),
        )
    found.attention.replace_all_uses_with(y)
    graph.erase_node(found.attention)
    for copy in found.copies:
        graph.erase_node(copy)


def _kept(graph: fx.Graph, node: fx.Node, kept: dict[fx.Node, fx.Node]) -> fx.Node:
    """Return what all layers read, computed once."""
    source = as_node(node.args[0]) if is_method(node, "unsqueeze") else node
    if source.op == "placeholder":
        return node
    if source not in kept:
        with graph.inserting_after(source):
            kept[source] = graph.call_function(keep, (source,))
    return kept[source] if source is node else graph.call_method("unsqueeze", (kept[source], *node.args[1:]))


def _without_copy(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return heads [batch, heads, 1, numbers] as they lie in the product of a stack: of one token no copy is needed."""
    if not is_method(node, "transpose", 1, 2) or not is_method(node.args[0], "view"):
        return node
    view: Any = node.args[0]
    part = view.args[0]
    if not is_method(part, "contiguous") or part.args[0].target is not torch.narrow:
        return node
    split = graph.call_method("view", (part.args[0], *view.args[1:]))
    return graph.call_method("transpose", (split, 1, 2))


def _step_together(graph: fx.Graph, steps: list[fx.Node]) -> None:
    """Count the new token in all caches at once, at the end, where nobody looks at their lengths any more."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    lengths = []
    for step in steps:
        length: Any = step.args[0]
        if step.users or any(order[user] > order[step] for user in length.users):
            continue
        graph.erase_node(step)
        lengths.append(length)
    if lengths:
        with graph.inserting_before(next(iter(graph.find_nodes(op="output")))):
            graph.call_function(torch.ops.aten._foreach_add_.Scalar, (lengths, 1))


def _unrepeated(node: Any) -> fx.Node:
    """Return the cache of a ``repeat_kv``, or the node itself."""
    if not is_method(node, "reshape"):
        return as_node(node)
    expanded = node.args[0]
    require(is_method(expanded, "expand"))
    taken = expanded.args[0]
    whole = slice(None)
    require(is_call(taken, operator.getitem) and taken.args[1] == (whole, whole, None, whole, whole))
    cache = as_node(taken.args[0])
    # Heads that read the same keys come one after another.
    heads = example_of(cache).shape[1]
    batch, many, length, numbers = example_of(node).shape
    require(example_of(expanded).shape == (batch, heads, many // heads, length, numbers))
    return cache


def _only_copy(cache: fx.Node, attention: fx.Node) -> fx.Node:
    """Return the one ``index_copy_`` into a cache that nothing but an attention reads besides."""
    copies = [user for user in cache.users if is_method(user, "index_copy_")]
    readers = [user for user in cache.users if user not in copies]
    require(len(copies) == 1 and len(readers) == 1)
    (copy,) = copies
    require(len(copy.args) == 4 and copy.args[:2] == (cache, 2) and not copy.users)
    while readers[0] is not attention:
        require(len(readers[0].users) == 1)
        readers = list(readers[0].users)
    return copy


def _counted(position: Any) -> tuple[fx.Node, fx.Node]:
    """Return the length whose next place ``position`` is, an input, and where it grows."""
    require(is_call(position, operator.add) and len(position.args) == 2)
    counting, length = position.args
    require(is_call(counting, torch.arange) and counting.args == (1,))
    length = as_node(length)
    require(length.op == "placeholder" and example_of(length).dtype == torch.int64 and not example_of(length).dim())
    steps = [user for user in length.users if is_method(user, "add_", 1)]
    written = [user for user in length.users if user.op == "call_method" and str(user.target).endswith("_")]
    require(len(steps) == 1 and written == steps)
    return length, steps[0]


def _turned(node: Any) -> _Turned:
    require(is_call(node, operator.add) and len(node.args) == 2)
    straight, across = node.args
    require(is_call(straight, operator.mul) and is_call(across, operator.mul))
    (x, cos), (turned, sin) = straight.args, across.args
    require(is_call(turned, torch.cat) and turned.kwargs.get("dim", turned.args[-1]) == -1)
    negative, first = turned.args[0]
    require(is_call(negative, operator.neg))
    half = example_of(as_node(x)).shape[-1] // 2
    require(_is_part(negative.args[0], x, slice(half, None)) and _is_part(first, x, slice(None, half)))
    return _Turned(x, as_node(cos), as_node(sin))


def _is_part(node: Any, x: Any, part: slice) -> bool:
    return is_call(node, operator.getitem) and node.args[0] is x and node.args[1] == (..., part)
