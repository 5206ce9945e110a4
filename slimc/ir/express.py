"""Write a site's compressed form into the graph, as storage ops before its product and adapters after it.

    w = slim.dequant_nm(values, pattern, scale){bits=4, n=2, m=4}
    y = aten.linear(x, w, b) + slim.low_rank(x, l, r)

The product stays a product until ``fuse``; every stage runs in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimc.ir.program import Program, Site, Use
from slimc.runtime import ops  # noqa: F401 - registers the slim:: ops
from slimc.runtime.packing import NM, PackedLinear, PackedWeight

__all__ = ["buffer_prefix", "express"]

aten = torch.ops.aten
slim = torch.ops.slim


def express(program: Program, site: Site, packed: PackedLinear) -> None:
    """Replace the present form of ``site`` in the graph by ``packed``. A second call with the same form changes nothing."""
    _erase(program, site)
    site.packed = packed
    prefix = _register(program.module, site, packed)
    with _recording(program.graph, site):
        first = site.uses[0].node
        with program.graph.inserting_before(first):
            weight = _decoded(program.graph, prefix, packed.weight, first)
            left, right = _factors(program.graph, prefix, packed, first)
            scale = None if packed.input_scale is None else _get(program.graph, f"{prefix}input_scale", packed.input_scale, first)
        for use in site.uses:
            _rewrite_use(program.graph, use, weight, scale, left, right)

def buffer_prefix(module: nn.Module, site: Site) -> str:
    """Return what the names of the site's packed tensors begin with: ``"layers.0.q_proj."``."""
    owners = {name for name, _ in module.named_modules()}
    return f"{site.name}." if site.name in owners else f"{site.name}_"


@contextmanager
def _recording(graph: fx.Graph, site: Site) -> Iterator[None]:
    before = set(graph.nodes)
    yield
    site.written = [node for node in graph.nodes if node not in before]


def _erase(program: Program, site: Site) -> None:
    """Put the captured operands back and remove what an earlier call wrote."""
    if not site.written:
        return
    for use in site.uses:
        for node in [node for node in use.node.users if node in site.written and node.target is aten.add.Tensor]:
            node.replace_all_uses_with(use.node)
        _set_operands(use, use.input, use.weight)
    for node in reversed(site.written):
        program.graph.erase_node(node)
    site.written = []


def _register(module: fx.GraphModule, site: Site, packed: PackedLinear) -> str:
    prefix = buffer_prefix(module, site)
    owner_path, _, start = prefix.rpartition(".")
    owner = module.get_submodule(owner_path)
    stale = [name for name in owner._buffers if name in {f"{start}{key}" for key in _TENSOR_NAMES}]
    for name in stale:
        del owner._buffers[name]
    for name, tensor in packed.tensors().items():
        owner.register_buffer(f"{start}{name}", tensor)
    return prefix


_TENSOR_NAMES = (
    *("values", "pattern", "scale", "zero_point", "input_scale"),
    *(f"{side}_{name}" for side in ("left", "right") for name in ("values", "scale", "zero_point")),
)


def _factors(
    graph: fx.Graph, prefix: str, packed: PackedLinear, like: fx.Node
) -> tuple[fx.Node, fx.Node] | tuple[None, None]:
    if packed.left is None or packed.right is None:
        return None, None
    return _decoded(graph, f"{prefix}left_", packed.left, like), _decoded(graph, f"{prefix}right_", packed.right, like)


def _decoded(graph: fx.Graph, prefix: str, packed: PackedWeight, like: fx.Node) -> fx.Node:
    """Insert the storage op of ``packed``; plain values need none."""
    form = packed.format
    values = _get(graph, f"{prefix}values", packed.values, like)
    if form.bits is None and form.sparsity is None:
        return values
    optional = [
        None if tensor is None else _get(graph, f"{prefix}{name}", tensor, like)
        for name, tensor in (("pattern", packed.pattern), ("scale", packed.scale), ("zero_point", packed.zero_point))
    ]
    attributes: dict[str, Any] = {"bits": form.bits or 0, "columns": form.columns, "group": form.group or 0}
    if form.sparsity is None:
        return _call(graph, slim.dequant.default, (values, *optional[1:]), attributes, like)
    if isinstance(form.sparsity, NM):
        attributes |= {"n": form.sparsity.n, "m": form.sparsity.m}
        return _call(graph, slim.dequant_nm.default, (values, *optional), attributes, like)
    return _call(graph, slim.dequant_mask.default, (values, *optional), attributes, like)


def _rewrite_use(
    graph: fx.Graph, use: Use, weight: fx.Node, scale: fx.Node | None, left: fx.Node | None, right: fx.Node | None
) -> None:
    product = use.node
    operand, activation = weight, use.input
    with graph.inserting_before(product):
        if scale is not None:
            activation = graph.call_function(aten.mul.Tensor, (activation, scale))
            _describe(activation, product, use.input.meta.get("val"))
        if use.product_reads_transposed:
            operand = graph.call_function(aten.t.default, (weight,))
            value = weight.meta.get("val")
            _describe(operand, product, None if value is None else value.t())
    _set_operands(use, activation, operand)
    if left is None or right is None:
        return
    with graph.inserting_after(product):
        correction = graph.call_function(slim.low_rank.default, (use.input, left, right))
        _describe(correction, product, product.meta.get("val"))
    with graph.inserting_after(correction):
        total = graph.call_function(aten.add.Tensor, (product, correction))
        _describe(total, product, product.meta.get("val"))
    product.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _set_operands(use: Use, activation: fx.Node, weight: fx.Node) -> None:
    arguments = list(use.node.args)
    arguments[use.input_position], arguments[use.input_position + 1] = activation, weight
    use.node.args = tuple(arguments)


def _get(graph: fx.Graph, name: str, tensor: Tensor, like: fx.Node) -> fx.Node:
    node = graph.get_attr(name)
    _describe(node, like, _fake(like, tensor))
    return node


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], attributes: dict[str, Any], like: fx.Node) -> fx.Node:
    node = graph.call_function(target, args, attributes)
    mode = getattr(like.meta.get("val"), "fake_mode", None)
    if mode is not None:
        with mode:
            value = target(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args), **attributes)
        _describe(node, like, value)
    return node


def _fake(like: fx.Node, tensor: Tensor) -> Any:
    mode = getattr(like.meta.get("val"), "fake_mode", None)
    return None if mode is None else mode.from_tensor(tensor, static_shapes=True)


def _describe(node: fx.Node, like: fx.Node, value: Any) -> None:
    """Give a new node the origin of the node that it serves."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    if value is not None:
        node.meta["val"] = value
