"""Write a site's compressed form into the graph, as storage ops before its product and adapters after it.

    w = slim.dequant_nm(values, pattern, scale){bits=4, n=2, m=4}
    q = slim.round_activations(x){activation=1}
    y = aten.linear(q, w, b) + slim.low_rank(q, l, r) + slim.sign_low_rank(x, signs, u, v)

Adapters read x if inputs are scaled before they are rounded. The product stays a product until ``fuse``; every stage
runs in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from slimc.errors import VerifyError
from slimc.ir.program import Program, Site, Use
from slimc.runtime import ops  # noqa: F401 - registers the slim:: ops
from slimc.runtime.formats import ACTIVATIONS
from slimc.runtime.packing import NM, PackedLinear, PackedWeight

aten = torch.ops.aten
slim = torch.ops.slim


def express(program: Program, site: Site, packed: PackedLinear) -> None:
    """Replace the present form of ``site`` in the graph by ``packed``; a second call changes nothing.

    Raises:
        VerifyError: the site's products are gone, because they have been fused.
    """
    if any(use.node._erased for use in site.uses):
        raise VerifyError(f"'{site.name}' has been fused; its compressed form cannot be replaced any more.")
    _erase(program, site)
    site.packed = packed
    prefix = _register(program.module, site, packed)
    before = set(program.graph.nodes)
    first = site.uses[0].node
    with program.graph.inserting_before(first):
        weight = _decoded(program.graph, prefix, packed.weight, first)
        factors = _factors(program.graph, prefix, packed, first)
        named = {} if packed.binary is None else packed.binary.tensors()
        binary = [_get(program.graph, f"{prefix}{name}", tensor, first) for name, tensor in named.items()]
        scale = packed.input_scale
        scaling = None if scale is None else _get(program.graph, f"{prefix}input_scale", scale, first)
    rounding = 0 if packed.activation is None else ACTIVATIONS[packed.activation]
    for use in site.uses:
        corrections = [(slim.low_rank.default, factors)] if factors else []
        corrections += [(slim.sign_low_rank.default, binary)] if binary else []
        _rewrite_use(program.graph, use, weight, scaling, rounding, corrections)
    site.written = [node for node in program.graph.nodes if node not in before]


def _erase(program: Program, site: Site) -> None:
    """Put the captured operands back and remove what an earlier call wrote."""
    written = set(site.written)
    for use in site.uses:
        total = _last_total(use.node, written)
        if total is not use.node:
            total.replace_all_uses_with(use.node)
        activation = _activation(use)
        while activation in written:
            activation = activation.all_input_nodes[0]
        _set_operands(use, activation, use.weight)
    for node in reversed(site.written):
        program.graph.erase_node(node)
        if node.op == "get_attr":
            _delete_buffer(program.module, str(node.target))
    site.written = []


def _last_total(product: fx.Node, written: set[fx.Node]) -> fx.Node:
    """Return the last of the sums that were written after a product, each of which adds to the one before."""
    total = product
    while sums := [user for user in total.users if user in written and user.target is aten.add.Tensor]:
        total = sums[0]
    return total


def _register(module: fx.GraphModule, site: Site, packed: PackedLinear) -> str:
    """Register the packed tensors beside the weight; return what their names begin with: ``"layers.0.q_proj."``."""
    tensors = packed.tensors()
    in_module = site.name in {name for name, _ in module.named_modules()}
    path, _, start = (f"{site.name}." if in_module else f"{site.name}_").rpartition(".")
    owner = module.get_submodule(path)
    while any(hasattr(owner, f"{start}{name}") for name in tensors):  # the module has a tensor of that name itself
        start = f"slim_{start}"
    for name, tensor in tensors.items():
        owner.register_buffer(f"{start}{name}", tensor)
    return f"{path}.{start}" if path else start


def _delete_buffer(module: fx.GraphModule, name: str) -> None:
    path, _, last = name.rpartition(".")
    del module.get_submodule(path)._buffers[last]


def _factors(graph: fx.Graph, prefix: str, packed: PackedLinear, like: fx.Node) -> list[fx.Node]:
    if packed.left is None or packed.right is None:
        return []
    return [
        _decoded(graph, f"{prefix}left_", packed.left, like),
        _decoded(graph, f"{prefix}right_", packed.right, like),
    ]


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
    if form.widths is not None:
        attributes["widths"] = list(form.widths)
    if form.sparsity is None:
        return _call(graph, slim.dequant.default, (values, *optional[1:]), attributes, like)
    if isinstance(form.sparsity, NM):
        attributes |= {"n": form.sparsity.n, "m": form.sparsity.m}
        return _call(graph, slim.dequant_nm.default, (values, *optional), attributes, like)
    return _call(graph, slim.dequant_mask.default, (values, *optional), attributes, like)


def _rewrite_use(
    graph: fx.Graph,
    use: Use,
    weight: fx.Node,
    scale: fx.Node | None,
    rounding: int,
    corrections: list[tuple[Any, list[fx.Node]]],
) -> None:
    """Let a product read the compressed weight, and add the corrections, ops with their operands but x, to it."""
    product = use.node
    unscaled = _activation(use)
    operand, activation = weight, unscaled
    with graph.inserting_before(product):
        if scale is not None:
            activation = graph.call_function(aten.mul.Tensor, (unscaled, scale))
            _describe(activation, product, unscaled.meta.get("val"))
        if rounding:
            activation = graph.call_function(slim.round_activations.default, (activation,), {"activation": rounding})
            _describe(activation, product, unscaled.meta.get("val"))
        if use.product_reads_transposed:
            operand = graph.call_function(aten.t.default, (weight,))
            value = weight.meta.get("val")
            _describe(operand, product, None if value is None else value.t())
    _set_operands(use, activation, operand)
    total, own = product, set[fx.Node]()
    for op, operands in corrections:
        rounded = op is slim.low_rank.default and scale is None
        with graph.inserting_after(total):
            correction = graph.call_function(op, (activation if rounded else unscaled, *operands))
            _describe(correction, product, product.meta.get("val"))
        with graph.inserting_after(correction):
            total = graph.call_function(aten.add.Tensor, (total, correction))
            _describe(total, product, product.meta.get("val"))
        own.add(total)
    if total is not product:
        product.replace_all_uses_with(total, delete_user_cb=lambda user: user not in own)


def _activation(use: Use) -> fx.Node:
    """Return what the product reads now: not ``use.input`` once that is a product with adapters of its own."""
    activation = use.node.args[use.input_position]
    if not isinstance(activation, fx.Node):
        raise VerifyError(f"%{use.node.name} reads {activation!r} where an activation belongs.")
    return activation


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
