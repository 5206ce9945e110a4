"""Rotations of queries and keys inside the attention, by a table of all positions.

    GroupQueryAttention(RotaryEmbedding(q), RotaryEmbedding(k), v, ...) -> GroupQueryAttention(q, k, v, ..., cos, sin)

The operator rotates a token by its place among those that count, as the mask has it, which is its position: padding
follows a prompt. So the graph needs no positions, and a step two nodes a layer less. The table holds what the traced
graph computes, cos(position * frequency) and sin; runtimes fold it when they load the model, and the file has the
frequencies alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import GraphProto, ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from slimc.backends.onnx.replay import CAPACITY_MULTIPLE
from slimc.backends.onnx.weights import MICROSOFT

__all__ = ["POSITION_IDS", "Rotation", "let_attention_rotate"]

POSITION_IDS = "position_ids"

_LONGEST_TABLE = 1 << 17
"""Positions up to which a table is made, whose memory grows with them."""

_HEAD_MULTIPLE = 16
"""ONNX Runtime's attention rotates heads whose size is a multiple of it."""

_WITHIN = {ir.DataType.FLOAT: 2.0**-20, ir.DataType.FLOAT16: 2.0**-10}
"""How far an entry of a table may be from that of the traced graph: a rounding or two."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rotation:
    """A RotaryEmbedding, and what the traced graph computes for it.

    Attributes:
        node: the operator.
        cosines: [batch, new, head size], both halves equal.
        sines: like ``cosines``.
    """

    node: ir.Node
    cosines: ir.Value
    sines: ir.Value


@dataclass(frozen=True)
class _Angles:
    """What a table is made of: ``scale * cos(position * frequencies)``, and the same of sin."""

    frequencies: npt.NDArray[np.float32]
    scale: float


def let_attention_rotate(model: ir.Model, rotations: Sequence[Rotation], positions: int) -> int:
    """Move rotations into the attention that reads them; return how many attentions rotate then.

    Args:
        model: changed in place; an input ``position_ids`` that nobody reads is removed.
        rotations: those of its nodes.
        positions: how many the model has.
    """
    graph = model.graph
    by_result = {id(one.node.outputs[0]): one for one in rotations}
    angles: dict[int, _Angles | None] = {}
    tables: dict[tuple[bytes, float, ir.DataType], tuple[ir.Value, ir.Value]] = {}
    moved = 0
    for node in [node for node in graph if node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT]:
        query, key = (by_result.get(id(value)) for value in node.inputs[:2])
        if query is None or key is None or positions > _LONGEST_TABLE or not _can_be_moved(node, query, key):
            continue
        if id(query.cosines) not in angles:
            angles[id(query.cosines)] = _angles(query, positions)
        found, dtype = angles[id(query.cosines)], query.cosines.dtype
        if found is None or dtype is None:
            continue
        kind = (found.frequencies.tobytes(), found.scale, dtype)
        if kind not in tables:
            tables[kind] = _table(graph, found, positions, dtype, f"rotary.{len(tables)}")
        for index, rotation in enumerate((query, key)):
            node.replace_input_with(index, rotation.node.inputs[0])
        node.resize_inputs(len(node.inputs) + 2)
        for index, value in zip((-2, -1), tables[kind], strict=True):
            node.replace_input_with(len(node.inputs) + index, value)
        node.attributes.add(ir.AttrInt64("do_rotary", 1))
        moved += 1
    return moved


def _can_be_moved(attention: ir.Node, query: Rotation, key: Rotation) -> bool:
    """Tell whether both are rotated by the same angles, whole heads that lie side by side."""
    width = query.cosines.shape[-1] if query.cosines.shape is not None else None
    heads = [one.node.attributes.get_int("num_heads", 0) for one in (query, key)]
    expected = [attention.attributes.get_int(name, -1) for name in ("num_heads", "kv_num_heads")]
    return (
        query.cosines is key.cosines
        and query.sines is key.sines
        and isinstance(width, int)
        and width % _HEAD_MULTIPLE == 0
        and heads == expected
    )


def _angles(rotation: Rotation, positions: int) -> _Angles | None:
    """Return of what the angles of a rotation are made, None if they are not proportional to the position."""
    tried = np.unique(np.minimum(np.array([0, 1, 2, 3, 17, 1000, positions // 2, positions - 1]), positions - 1))
    function, scale = _function(rotation.cosines)
    limit = _WITHIN.get(rotation.cosines.dtype or ir.DataType.UNDEFINED)
    if function is None or limit is None or 1 not in tried:
        return None
    values = _evaluated([rotation.cosines, rotation.sines, function.inputs[0]], tried)
    if values is None:
        return None
    cosines, sines, products = values
    half = cosines.shape[-1] // 2
    # The angle of position 1 is the frequency itself.
    frequencies = products[0, tried.tolist().index(1), :half].astype(np.float32)
    exact = (tried[:, None].astype(np.float32) * frequencies).astype(np.float64)
    for found, expected in ((cosines, np.cos(exact)), (sines, np.sin(exact))):
        if np.abs(found[0, :, :half] - scale * expected).max() > limit * abs(scale):
            return None
    return _Angles(frequencies, scale)


def _function(cosines: ir.Value) -> tuple[ir.Node | None, float]:
    """Return the Cos behind casts and scales, None if there is none, and the product of the scales."""
    node, scale = cosines.producer(), 1.0
    while node is not None and node.op_type in ("Cast", "Mul"):
        below = None
        for value in node.inputs:
            if value is not None and value.const_value is not None:
                scale *= float(value.const_value.numpy().reshape(()))
            else:
                below = value
        node = below.producer() if below is not None else None
    return (node if node is not None and node.op_type == "Cos" else None), scale


def _evaluated(values: Sequence[ir.Value | None], positions: npt.NDArray[np.int64]) -> list[Array] | None:
    """Compute values of the graph for tokens at ``positions``, None if they depend on anything else."""
    nodes: dict[int, ir.Node] = {}
    constants: dict[str, TensorProto] = {}
    inputs: set[str] = set()

    def need(value: ir.Value | None) -> None:
        node = value.producer() if value is not None else None
        if value is None or (node is not None and id(node) in nodes):
            return
        if node is not None:
            for one in node.inputs:
                need(one)
            nodes[id(node)] = node
        elif value.const_value is not None:
            constants[str(value.name)] = ir.to_proto(value.const_value)
            constants[str(value.name)].name = str(value.name)
        else:
            inputs.add(str(value.name))

    for value in values:
        need(value)
    if not inputs <= {"input_ids", POSITION_IDS}:
        return None
    graph = GraphProto(name="angles")
    graph.node.extend(ir.to_proto(node) for node in nodes.values())
    graph.initializer.extend(constants.values())
    graph.input.extend(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "new"]) for name in inputs)
    graph.output.extend(helper.make_empty_tensor_value_info(str(value.name)) for value in values if value is not None)
    owner = next(iter(nodes.values())).graph
    opset = helper.make_opsetid("", (owner.opset_imports if owner is not None else {}).get("", 21))
    evaluator = ReferenceEvaluator(ModelProto(ir_version=10, graph=graph, opset_import=[opset]))
    given = {POSITION_IDS: positions[None].astype(np.int64), "input_ids": np.zeros((1, len(positions)), dtype=np.int64)}
    found = evaluator.run(None, {name: given[name] for name in inputs})
    return [np.asarray(one, dtype=np.float64) for one in found]


def _table(
    graph: ir.Graph, angles: _Angles, positions: int, dtype: ir.DataType, name: str
) -> tuple[ir.Value, ir.Value]:
    """Compute cosines and sines [positions, head size / 2] from constants, at the beginning of the graph."""
    added: list[ir.Node] = []

    def constant(part: str, array: npt.NDArray[np.generic]) -> ir.Value:
        value = ir.Value(name=f"{name}.{part}", const_value=ir.tensor(array))
        graph.register_initializer(value)
        return value

    def add(op_type: str, inputs: list[ir.Value], part: str, **attributes: int) -> ir.Value:
        added.append(ir.node(op_type, inputs, attributes=attributes, name=f"{name}.{part}"))
        added[-1].outputs[0].name = f"{name}.{part}"
        return added[-1].outputs[0]

    # A cache whose room was rounded up asks for as many rows.
    rows = positions + -positions % CAPACITY_MULTIPLE
    bounds = [
        constant(part, np.array(value, dtype=np.float32)) for part, value in (("first", 0), ("end", rows), ("step", 1))
    ]
    column = constant("column", np.array([rows, 1], dtype=np.int64))
    places = add("Reshape", [add("Range", bounds, "places"), column], "places.column")
    products = add("Mul", [places, constant("frequencies", angles.frequencies[None])], "angles")
    results = []
    for function in ("Cos", "Sin"):
        value = add(function, [products], function.lower())
        if angles.scale != 1:
            scale = constant(f"{function.lower()}.scale", np.array(angles.scale, dtype=np.float32))
            value = add("Mul", [value, scale], f"{function.lower()}.scaled")
        if dtype != ir.DataType.FLOAT:
            value = add("Cast", [value], f"{function.lower()}.cast", to=int(dtype))
        results.append(value)
    graph.insert_before(graph[0], added)
    return results[0], results[1]
