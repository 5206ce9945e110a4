"""What operators do to the axes of values: which of them stay one index from operand to result.

An operator that is not in the table here proves nothing, so whatever runs through it has to stay in its order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from slimc.ir.axes import Tie, sizes
from slimc.ir.match import arguments
from slimc.ir.text import operator_name

aten = torch.ops.aten


@dataclass
class Relation:
    """What one operator says of its operands and its result.

    Attributes:
        ties: axes that are one index; an axis without any may be reordered by itself (a sum over it, a size of 1).
        fixed: axes whose order matters, each with the reason.
    """

    ties: list[Tie] = field(default_factory=list)
    fixed: list[tuple[fx.Node, int, str]] = field(default_factory=list)


def relation(node: fx.Node) -> Relation:
    """Return what the operator of ``node`` does to axes."""
    if node.target in IGNORED:
        return Relation()
    rule = _RULES.get(node.target) if node.op == "call_function" else None
    found = None
    if rule is not None:
        found = rule(node)
    elif _is_pointwise(node):
        found = _pointwise(node)
    return _opaque(node) if found is None else found


IGNORED = frozenset({aten._assert_tensor_metadata.default, aten.sym_size.int})
"""Operators that read a value's form and none of its elements."""


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags and not target._schema.is_mutable


def _opaque(node: fx.Node) -> Relation:
    """Nothing is known of the operator: everything that it reads or writes stays in its order."""
    reason = f"%{node.name} ({operator_name(node)}) reads them in their order"
    touched = [*node.all_input_nodes, node]
    return Relation(fixed=[(one, axis, reason) for one in touched for axis in range(rank(one))])


def rank(node: fx.Node) -> int:
    """Return the number of axes of a value; of one that is no tensor, none."""
    value = node.meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else 0


def _same(node: fx.Node, operand: fx.Node) -> list[Tie]:
    """Tie an operand to the result of equal or larger shape; where it is repeated it has no index."""
    shift = rank(node) - rank(operand)
    ours, theirs = sizes(node), sizes(operand)
    return [
        Tie(operand, (axis,), node, (axis + shift,))
        for axis in range(rank(operand))
        if axis + shift >= 0 and theirs[axis] != 1 and theirs[axis] == ours[axis + shift]
    ]


def _pointwise(node: fx.Node) -> Relation:
    return Relation([tie for operand in node.all_input_nodes if rank(operand) for tie in _same(node, operand)])


def _first_operand(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _identity(node: fx.Node) -> Relation:
    return Relation(_same(node, _first_operand(node)))


def _inactive_dropout(node: fx.Node) -> Relation:
    return _identity(node) if not arguments(node)["train"] else _opaque(node)


def _reshape(node: fx.Node) -> Relation:
    """Axes that both shapes begin or end with are the same; what lies between is, as a product, the same."""
    operand = _first_operand(node)
    before = [str(size) for size in operand.meta["val"].shape]
    after = [str(size) for size in node.meta["val"].shape]
    start = 0
    while start < min(len(before), len(after)) and before[start] == after[start]:
        start += 1
    end = 0
    while end < min(len(before), len(after)) - start and before[-1 - end] == after[-1 - end]:
        end += 1
    ties = [Tie(operand, (axis,), node, (axis,)) for axis in range(start)]
    ties += [Tie(operand, (len(before) - axis,), node, (len(after) - axis,)) for axis in range(1, end + 1)]
    middle = tuple(range(start, len(before) - end)), tuple(range(start, len(after) - end))
    if any(middle):
        ties.append(Tie(operand, middle[0], node, middle[1]))
    return Relation(ties)


def _reordered(order: Callable[[fx.Node, int], list[int]]) -> Callable[[fx.Node], Relation]:
    """Return the rule of an operator whose result has the axes of its operand in another order."""

    def rule(node: fx.Node) -> Relation:
        operand = _first_operand(node)
        sources = order(node, rank(operand))
        return Relation([Tie(operand, (source,), node, (axis,)) for axis, source in enumerate(sources)])

    return rule


def _transposed(node: fx.Node, count: int) -> list[int]:
    given = arguments(node)
    order = list(range(count))
    first, second = given["dim0"] % count, given["dim1"] % count
    order[first], order[second] = second, first
    return order


def _unsqueeze(node: fx.Node) -> Relation:
    operand = _first_operand(node)
    added = arguments(node)["dim"] % rank(node)
    kept = [axis for axis in range(rank(node)) if axis != added]
    return Relation([Tie(operand, (source,), node, (axis,)) for source, axis in enumerate(kept)])


def _slice(node: fx.Node) -> Relation | None:
    """A slice that leaves an axis out of nothing is the value itself."""
    operand = _first_operand(node)
    return Relation(_same(node, operand)) if _shape(operand) == _shape(node) else None


def _shape(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _reduction(node: fx.Node) -> Relation | None:
    """A sum over all of an axis does not depend on its order; the other axes stay."""
    operand, given = _first_operand(node), arguments(node)
    if not given.get("dim"):  # neither is any: all axes are summed over
        return Relation()
    reduced = {axis % rank(operand) for axis in given["dim"]}
    kept = [axis for axis in range(rank(operand)) if axis not in reduced]
    places = kept if given.get("keepdim") else range(len(kept))
    return Relation([Tie(operand, (axis,), node, (place,)) for axis, place in zip(kept, places, strict=True)])


def _norm(node: fx.Node) -> Relation:
    """A norm over the last axes is the same in any order of them, its weight and bias taken along."""
    given = arguments(node)
    operands = [node.args[0], given.get("weight"), given.get("bias")]
    return Relation([tie for one in operands if isinstance(one, fx.Node) for tie in _same(node, one)])


def _attention(node: fx.Node) -> Relation:
    """Each head and each feature of the values goes its own way; what selects tokens reads heads in their order."""
    given = arguments(node)
    value = given["value"]
    count = rank(node)
    if rank(value) != count:
        return _opaque(node)
    batch = range(count - 2)
    ties = [Tie(value, (count - 1,), node, (count - 1,))]
    heads = f"%{node.name} has a query for each of them"
    if given.get("enable_gqa"):
        # Neighbouring queries share a head of the values.
        ties += [Tie(value, (axis,), node, (axis,)) for axis in batch[:-1]]
    else:
        ties += [Tie(value, (axis,), node, (axis,)) for axis in batch]
    fixed = [(node, axis, heads) for axis in batch]
    fixed += [(value, axis, heads) for axis in (*batch, count - 2)]
    reason = f"%{node.name} multiplies them by each other"
    others = [one for one in node.all_input_nodes if one is not value]
    fixed += [(one, axis, reason) for one in others for axis in range(rank(one))]
    return Relation(ties, fixed)


def _product(node: fx.Node) -> Relation | None:
    """``a @ b``: a row of the result is of a, a column of b; what is summed over, and batches, keep their order."""
    left, right = node.args[0], node.args[1]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or not rank(left) == rank(right) == rank(node):
        return None
    count = rank(node)
    batch = range(count - 2)
    ties = [Tie(right, (count - 1,), node, (count - 1,)), Tie(left, (count - 2,), node, (count - 2,))]
    ties += [tie for one in (left, right) for tie in _same(node, one) if tie.first_axes[0] < count - 2]
    reason = f"%{node.name} multiplies them by each other"
    fixed = [(left, count - 1, reason), (right, count - 2, reason)]
    fixed += [(one, axis, reason) for one in (left, right, node) for axis in batch]
    return Relation(ties, fixed)


_RULES: Mapping[Any, Callable[[fx.Node], Relation | None]] = {
    **dict.fromkeys(
        (
            aten.to.dtype,
            aten.to.device,
            aten.to.dtype_layout,
            aten._to_copy.default,
            aten.contiguous.default,
            aten.alias.default,
            aten.detach.default,
            aten.expand.default,
            aten.softmax.int,
            aten._softmax.default,
        ),
        _identity,
    ),
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
        ),
        _reshape,
    ),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default), _reduction),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), _norm),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _product),
    aten.dropout.default: _inactive_dropout,
    aten.transpose.int: _reordered(_transposed),
    aten.permute.default: _reordered(lambda node, count: [axis % count for axis in arguments(node)["dims"]]),
    aten.t.default: _reordered(lambda _, count: list(range(count))[::-1]),
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _slice,
    aten.scaled_dot_product_attention.default: _attention,
}


def part_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Say which value's last axis this one's is a piece of, and where it begins; ``None`` if it is none.

    Pieces are what ``split``, ``chunk`` and ``slice`` cut out.
    """
    if node.op != "call_function":
        return None
    if node.target is aten.slice.Tensor:
        given, whole = arguments(node), _first_operand(node)
        last = given["dim"] % rank(whole) == rank(whole) - 1
        length = sizes(whole)[-1]
        start = 0 if given["start"] is None else given["start"]
        if not last or given["step"] != 1 or length is None or not isinstance(start, int):
            return None
        return whole, start % length if start < 0 else start
    if getattr(node.target, "__name__", "") != "getitem" or not isinstance(node.args[0], fx.Node):
        return None
    cut, number = node.args[0], node.args[1]
    if cut.target not in _CUTS or not isinstance(number, int):
        return None
    whole = _first_operand(cut)
    if arguments(cut)["dim"] % rank(whole) != rank(whole) - 1:
        return None
    lengths = [int(piece.shape[-1]) for piece in cut.meta["val"]]
    return whole, sum(lengths[: number % len(lengths)])


_CUTS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})


def is_cut(node: fx.Node) -> bool:
    """Tell whether ``node`` cuts a value into a list of pieces."""
    return node.target in _CUTS


def scaled_operands(node: fx.Node) -> list[list[fx.Node]]:
    """Return which operands have to be multiplied by something for the result to be; several choices, or none.

    An operator is here if it is linear in the operands of a choice together, or at least keeps positive factors.
    """
    given = arguments(node)
    operands = [one for one in node.all_input_nodes if rank(one)]
    if node.target in _PASSES_FACTORS or (node.target is aten.dropout.default and not given["train"]):
        return [operands[:1]]
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        # What is stored rather than what is computed.
        return [[one] for one in sorted(operands, key=lambda one: one.op != "get_attr")]
    if node.target in (aten.div.Tensor, aten.div.Scalar):
        return [[node.args[0]]] if isinstance(node.args[0], fx.Node) else []
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        return [operands] if isinstance(given["other"], fx.Node) else []
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        factors = [given.get("weight"), given.get("bias")]
        return [[one for one in factors if isinstance(one, fx.Node)]] if isinstance(factors[0], fx.Node) else []
    if node.target is aten.scaled_dot_product_attention.default:
        return [[given["value"]]]
    if node.target in (aten.matmul.default, aten.bmm.default):
        return [[node.args[1]]] if isinstance(node.args[1], fx.Node) else []
    return []


_PASSES_FACTORS = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.expand.default,
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.transpose.int,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.slice.Tensor,
        aten.neg.default,
        aten.relu.default,
    }
)
"""Operators whose result is larger by a positive factor where their operand is."""
