"""Rewrites of a traced decoder into ONNX Runtime's own operators, each of which computes exactly what it replaces.

The attention needs none: it is traced as one node already (`slimc.backends.onnx.attention`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from onnx import ModelProto, helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from slimc.backends.onnx.initializers import Initializer, of_tensor
from slimc.backends.onnx.rotations import POSITION_IDS, Rotation, let_attention_rotate
from slimc.backends.onnx.weights import MICROSOFT

__all__ = ["fuse_for_onnxruntime", "keep_rotations_apart", "pack_projections"]

_PRODUCTS = {"MatMul", "MatMulNBits", "linear"}
"""What ONNX Runtime takes for a projection, and what becomes one of these when it inlines functions."""

_SAME_SHAPE = "attention.values.shape"
"""The name of a constant by which a reshape changes nothing."""


def fuse_for_onnxruntime(model: ir.Model, positions: int | None = None) -> dict[str, int]:
    """Apply all rewrites to ``model``; return how often each was.

    Args:
        model: traced, with placeholders; changed in place.
        positions: how many the model has; where that is known, attention may rotate by a table of all.
    """
    rotations = _fuse_rotations(model)
    counts = {
        "RotaryEmbedding": len(rotations),
        "Reshape": _remove_idle_moves(model),
        "SkipSimplifiedLayerNormalization": _fuse_norms(model),
        "GroupQueryAttention": 0 if positions is None else let_attention_rotate(model, rotations, positions),
    }
    RemoveUnusedNodesPass()(model)
    for value in [value for value in model.graph.inputs if value.name == POSITION_IDS and not value.uses()]:
        model.graph.inputs.remove(value)
    return counts


def _remove_idle_moves(model: ir.Model) -> int:
    """``Transpose(Transpose(x)) -> x`` and ``Reshape(...Reshape(x)) -> x`` where the result is x again."""
    removed = 0
    for node in _nodes(model, "Transpose"):
        earlier = _producer(node.inputs[0], "Transpose")
        if earlier is None or earlier.inputs[0] is None or len(_perm(node)) != len(_perm(earlier)):
            continue
        if [_perm(earlier)[axis] for axis in _perm(node)] == list(range(len(_perm(node)))):
            node.outputs[0].replace_all_uses_with(earlier.inputs[0], replace_graph_outputs=True)
            removed += 1
    for node in _nodes(model, "Reshape"):
        source = node.inputs[0]
        while (earlier := _producer(source, "Reshape")) is not None:
            source = earlier.inputs[0]
        result = node.outputs[0]
        if source is not None and source is not node.inputs[0] and _same_shape(source, result):
            result.replace_all_uses_with(source, replace_graph_outputs=True)
            removed += 1
    return removed


# ------------------------------------------------------------------------------------------------- rotary positions


def _fuse_rotations(model: ir.Model) -> list[Rotation]:
    """``x * cos + rotate_half(x) * sin -> RotaryEmbedding(x, positions, cos, sin)``.

    The operator looks cosines up in a table by position. The table is what the graph computes for the tokens of this
    call, and each token's position its own row in it: so every kind of rotary position fuses, and none has a longest.
    Where the heads were moved to the front only to be rotated, they stay where they are.
    """
    fused: list[Rotation] = []
    tables: dict[tuple[int, int], tuple[ir.Value, ir.Value, ir.Value]] = {}
    for node in _nodes(model, "Add"):
        found = _rotation(node)
        if found is None:
            continue
        x, cosines, sines = found
        key = (id(cosines), id(sines))
        if key not in tables:
            tables[key] = _tables(model, cosines, sines)
        positions, *table = tables[key]
        heads = x.shape[1] if x.shape is not None and _rank(x) == 4 else None
        flat = _flat_heads(x)
        target, rotated = _merged_heads(node.outputs[0]), x
        attributes: dict[str, int] = {}
        if flat is not None and target is not None and isinstance(heads, int):
            rotated, attributes = flat, {"num_heads": heads}
        else:
            target = node.outputs[0]
        fresh = ir.node("RotaryEmbedding", [rotated, positions, *table], attributes=attributes, domain=MICROSOFT)
        _stand_in(fresh, target)
        fused.append(Rotation(fresh, cosines, sines))
    return fused


def _rotation(add: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Return x, and cosines and sines of half the width before a head axis was added, if ``add`` rotates x."""
    for plain, turned in (add.inputs, reversed(add.inputs)):
        straight, across = _producer(plain, "Mul"), _producer(turned, "Mul")
        if straight is None or across is None:
            continue
        for x, cosines in (straight.inputs, reversed(straight.inputs)):
            for half_turned, sines in (across.inputs, reversed(across.inputs)):
                if x is None or not _is_rotated_half(half_turned, x):
                    continue
                cos, sin = _angles(cosines, "Cos"), _angles(sines, "Sin")
                if cos is not None and sin is not None and _width(cos) == _width(sin) == _width(x):
                    return x, cos, sin
    return None


def _is_rotated_half(value: ir.Value | None, x: ir.Value) -> bool:
    """Tell whether ``value`` is ``concat(-x[half:], x[:half])`` along the last axis."""
    joined = _producer(value, "Concat")
    width = _width(x)
    if joined is None or len(joined.inputs) != 2 or width is None:
        return False
    negative = _producer(joined.inputs[0], "Neg")
    upper = _producer(negative.inputs[0], "Slice") if negative is not None else None
    lower = _producer(joined.inputs[1], "Slice")
    if upper is None or lower is None or upper.inputs[0] is not x or lower.inputs[0] is not x:
        return False
    return _bounds(lower) == (0, width // 2) and _bounds(upper) == (width // 2, width)


def _bounds(node: ir.Node) -> tuple[int, int] | None:
    """Return from where to where a Slice goes along the last axis, None if it is not of that kind."""
    source = node.inputs[0]
    constants = [_constant(value) for value in node.inputs[1:]]
    width = _width(source)
    if width is None or len(constants) < 3 or any(one is None or one.size != 1 for one in constants):
        return None
    start, end, axis, *step = (int(one.reshape(())) for one in constants if one is not None)
    if axis not in (-1, _rank(source) - 1) or step not in ([], [1]):
        return None
    return start % width if start < 0 else start, min(end, width) if end >= 0 else end + width


def _angles(value: ir.Value | None, function: str) -> ir.Value | None:
    """Return [batch, new, width] if ``value`` is that with a head axis, and both of its halves are equal."""
    added = _producer(value, "Unsqueeze")
    if added is None or _constant_ints(added.inputs[1]) != [1]:
        return None
    angles = below = added.inputs[0]
    while True:
        node = below.producer() if below is not None else None
        if node is None:
            return None
        if node.op_type == function:
            break
        if node.op_type == "Cast":
            below = node.inputs[0]
        elif node.op_type == "Mul":
            scaled = [one for one in node.inputs if _constant(one) is None]
            constants = [_constant(one) for one in node.inputs]
            if len(scaled) != 1 or any(one is not None and one.size != 1 for one in constants):
                return None
            below = scaled[0]
        else:
            return None
    joined = _producer(node.inputs[0], "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.inputs[0] is not joined.inputs[1]:
        return None
    return angles


def _tables(model: ir.Model, cosines: ir.Value, sines: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Make the operator's tables of the angles of this call, a row a token, and the number of each token's row."""
    latest = _latest(model.graph, [cosines, sines])
    half = (_width(cosines) or 0) // 2
    added: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        added.append(node)
        return node.outputs[0]

    def whole(name: str, values: list[int] | int) -> ir.Value:
        value = ir.Value(name=f"rotary.{name}.{cosines.name}", const_value=ir.tensor(np.array(values, dtype=np.int64)))
        model.graph.register_initializer(value)
        return value

    first, last = whole("first", [0]), whole("half", [half])
    axis, rows = whole("axis", [2]), whole("rows", [-1, half])
    halves = [add("Reshape", [add("Slice", [one, first, last, axis]), rows]) for one in (cosines, sines)]
    shape = add("Shape", [cosines], start=0, end=2)
    # Counted from the tables themselves: a Range is computed on the processor, and a GPU would have to copy it.
    corner = add("Slice", [halves[0], first, whole("single", [1]), whole("columns", [1])])
    zeros = add("Mul", [add("Cast", [corner], to=int(ir.DataType.INT64)), whole("zero", 0)])
    numbers = add("CumSum", [add("Add", [zeros, whole("one", 1)]), whole("rows_first", 0)], exclusive=1)
    positions = add("Reshape", [numbers, shape])
    model.graph.insert_after(latest, added)
    return positions, halves[0], halves[1]


def _flat_heads(x: ir.Value) -> ir.Value | None:
    """Return [batch, new, heads * size] if x is that, split into heads that were moved to the front."""
    moved = _producer(x, "Transpose")
    split = _producer(moved.inputs[0], "Reshape") if moved is not None and _perm(moved) == [0, 2, 1, 3] else None
    flat = split.inputs[0] if split is not None else None
    return flat if _rank(flat) == 3 else None


def _merged_heads(value: ir.Value) -> ir.Value | None:
    """Return the only use of ``value`` if that is to move the heads back and put them side by side."""
    for op_type in ("Transpose", "Reshape"):
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != op_type or value.is_graph_output():
            return None
        if op_type == "Transpose" and _perm(uses[0].node) != [0, 2, 1, 3]:
            return None
        value = uses[0].node.outputs[0]
    return value if _rank(value) == 3 else None


# ----------------------------------------------------------------------------------------------------------- norms


def _fuse_norms(model: ir.Model) -> int:
    """``s = a + b; rms_norm(s) * weight -> SkipSimplifiedLayerNormalization(a, b, weight)``, which gives s as well."""
    fused = 0
    for node in _nodes(model, "Mul"):
        found = _norm(node)
        if found is None:
            continue
        total, weight, epsilon = found
        add = _producer(total, "Add")
        if add is None or not all(_same_shape(one, total) for one in add.inputs):
            continue
        # Readers of the sum may come before the norm; the fused node stands where the sum was.
        fresh = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, weight],
            attributes={"epsilon": epsilon},
            num_outputs=4,
            domain=MICROSOFT,
        )
        for unused in fresh.outputs[1:3]:
            unused.name = ""
        add.graph.insert_after(add, fresh)  # type: ignore[union-attr]
        _take_place(fresh.outputs[0], node.outputs[0])
        _take_place(fresh.outputs[3], total)
        fused += 1
    return fused


def _norm(node: ir.Node) -> tuple[ir.Value, ir.Value, float] | None:
    """Return what is normalised, the weight and epsilon, if ``node`` is the last of a root mean square norm."""
    for weight, scaled in (node.inputs, reversed(node.inputs)):
        if weight is None or _constant(weight) is None or _rank(weight) != 1:
            continue
        product = _producer(_uncast(scaled), "Mul")
        if product is None:
            continue
        for x, reciprocal in (product.inputs, reversed(product.inputs)):
            inverse = _producer(reciprocal, "Reciprocal")
            root = _producer(inverse.inputs[0], "Sqrt") if inverse is not None else None
            shifted = _producer(root.inputs[0], "Add") if root is not None else None
            mean = _producer(shifted.inputs[0], "ReduceMean") if shifted is not None else None
            square = _producer(mean.inputs[0], "Pow") if mean is not None else None
            if shifted is None or mean is None or square is None or square.inputs[0] is not x:
                continue
            epsilon, exponent = _constant(shifted.inputs[1]), _constant(square.inputs[1])
            source = _uncast(x)
            if (
                source is not None
                and epsilon is not None
                and epsilon.size == 1
                and exponent is not None
                and exponent.size == 1
                and float(exponent.reshape(())) == 2
                and _constant_ints(mean.inputs[1]) == [-1]
                and source.dtype == weight.dtype
            ):
                return source, weight, float(epsilon.reshape(()))
    return None


def _uncast(value: ir.Value | None) -> ir.Value | None:
    node = _producer(value, "Cast")
    return node.inputs[0] if node is not None else value


# ------------------------------------------------------------------------------------------------------- attention


def pack_projections(model: ModelProto, constants: dict[str, Initializer]) -> int:
    """``GroupQueryAttention(Split(qkv), ...) -> GroupQueryAttention(qkv, ...)``; return how often that was done.

    Args:
        model: a decoder whose layers are in place; changed in place.
        constants: those of the graph; the sizes of parts that nobody splits any more are dropped.
    """
    graph = model.graph
    splits = {tuple(node.output): node for node in graph.node if node.op_type == "Split" and len(node.output) == 3}
    uses = Counter(name for node in graph.node for name in node.input)
    packed = set()
    for node in graph.node:
        parts = tuple(node.input[:3])
        if node.op_type == "GroupQueryAttention" and parts in splits and all(uses[name] == 1 for name in parts):
            node.input[0], node.input[1], node.input[2] = splits[parts].input[0], "", ""
            packed.add(parts)
    nodes = [node for node in graph.node if tuple(node.output) not in packed]
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    for parts in packed:
        for sizes in splits[parts].input[1:]:
            if sizes not in read:
                constants.pop(sizes, None)
    return len(packed)


def keep_rotations_apart(model: ModelProto, constants: dict[str, Initializer]) -> int:
    """Keep ONNX Runtime from moving rotations into an attention; return for how many that was necessary.

    Where products lead to queries and keys through RotaryEmbedding and to values directly, ONNX Runtime's CUDA provider
    (``GroupQueryAttentionFusion``, up to 1.32 at least) makes one product of them and lets GroupQueryAttention rotate.
    It then drops the positions and takes the cosines for a table of every position from the first on. Those of
    `_fuse_rotations` are of this call, so the attention refuses them, or rotates by angles of other tokens. A reshape
    to the same shape between a product and its attention moves nothing and is not looked through.

    Args:
        model: a decoder whose layers are in place; changed in place.
        constants: those of the graph, which may become one more.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    nodes, found = [], 0
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            kinds = [producers[name].op_type if name in producers else "" for name in node.input[:3]]
            if kinds[:2] == ["RotaryEmbedding"] * 2 and kinds[2] in _PRODUCTS:
                values = f"{node.input[2]}.values"
                nodes.append(helper.make_node("Reshape", [node.input[2], _SAME_SHAPE], [values], name=values))
                node.input[2] = values
                found += 1
        nodes.append(node)
    if found:
        del graph.node[:]
        graph.node.extend(nodes)
        constants[_SAME_SHAPE] = of_tensor(torch.tensor([0, 0, -1]))
    return found


# ---------------------------------------------------------------------------------------------------------- graphs


def _nodes(model: ir.Model, op_type: str) -> Iterator[ir.Node]:
    """Yield the standard operators of a type; the graph may change meanwhile."""
    for node in list(model.graph):
        if node.op_type == op_type and node.domain == "" and node.graph is not None:
            yield node


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes.get_ints("perm", []))


def _constant(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _constant_ints(value: ir.Value | None) -> list[int] | None:
    found = _constant(value)
    return None if found is None else [int(one) for one in found.reshape(-1)]


def _rank(value: ir.Value | None) -> int:
    """Return the number of axes, -1 if it is not known."""
    return -1 if value is None or value.shape is None else len(value.shape)


def _width(value: ir.Value | None) -> int | None:
    """Return the size of the last axis, None if it is not known."""
    size = value.shape[-1] if value is not None and value.shape is not None and len(value.shape) else None
    return size if isinstance(size, int) else None


def _same_shape(one: ir.Value | None, other: ir.Value) -> bool:
    return one is not None and one.shape is not None and other.shape is not None and one.shape == other.shape


def _latest(graph: ir.Graph, values: list[ir.Value]) -> ir.Node:
    """Return that of the producers which comes last."""
    producers = {id(value.producer()) for value in values}
    return [node for node in graph if id(node) in producers][-1]


def _take_place(fresh: ir.Value, old: ir.Value) -> None:
    """Let every reader of ``old`` read ``fresh``, under its name and shape."""
    fresh.shape, fresh.type = old.shape, old.type
    name, old.name = old.name, f"{old.name}.unfused"
    old.replace_all_uses_with(fresh, replace_graph_outputs=True)
    fresh.name = name


def _stand_in(fresh: ir.Node, old: ir.Value) -> None:
    """Put a node where ``old`` is computed, and let it be read in its place."""
    producer = old.producer()
    if producer is None or producer.graph is None:
        raise ValueError(f"{old.name} is not computed in the graph")
    producer.graph.insert_before(producer, fresh)
    _take_place(fresh.outputs[0], old)
