"""Rewrites into ONNX Runtime's operators: what they compute, and what they leave alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from slimc.backends.onnx.fusions import fuse_for_onnxruntime, keep_rotations_apart, pack_projections
from slimc.backends.onnx.initializers import Initializer, of_tensor

Runtime = Callable[[bytes, Mapping[str, np.ndarray]], list[np.ndarray]]

ROTATION = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
graph (float[2,3,16] states, float[2,3,4] {first}, float[2,3,4] other) => (float[2,3,16] result)
<int64[4] split = {{2, 3, 2, 8}}, int64[3] merge = {{2, 3, 16}}, int64[1] heads = {{1}}, int64[1] zero = {{0}},
 int64[1] half = {{{half}}}, int64[1] end = {{9223372036854775807}}, int64[1] last = {{3}}>
{{
    angles = Concat <axis = -1> ({first}, {second})
    cos = Cos(angles)
    sin = Sin(angles)
    cosines = Unsqueeze(cos, heads)
    sines = Unsqueeze(sin, heads)
    apart = Reshape(states, split)
    x = Transpose <perm = [0, 2, 1, 3]> (apart)
    lower = Slice(x, zero, half, last)
    upper = Slice(x, half, end, last)
    negative = Neg(upper)
    turned = Concat <axis = -1> (negative, lower)
    straight = Mul(x, cosines)
    across = Mul(turned, sines)
    rotated = Add(straight, across)
    back = Transpose <perm = [0, 2, 1, 3]> (rotated)
    result = Reshape(back, merge)
}}
"""

NORM = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
graph (float[2,3,4] a, float[{shape}] b) => (float[2,3,4] sum, float[2,3,4] result)
<float[4] weight = {{1.0, 2.0, 3.0, 4.0}}, float[1] two = {{{exponent}}}, int64[1] last = {{{axis}}},
 float[1] epsilon = {{0.01}}>
{{
    sum = Add(a, b)
    square = Pow(sum, two)
    mean = ReduceMean <keepdims = 1> (square, last)
    shifted = Add(mean, epsilon)
    root = Sqrt(shifted)
    inverse = Reciprocal(root)
    scaled = Mul(sum, inverse)
    result = Mul(weight, scaled)
}}
"""


def fused(text: str) -> tuple[onnx.ModelProto, onnx.ModelProto, Counter[str]]:
    """Return a model with the shapes of all values, what it is rewritten to, and the operators in that."""
    before = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = ir.from_proto(before)
    fuse_for_onnxruntime(model)
    return before, ir.to_proto(model), Counter(node.op_type for node in model.graph)


def assert_equal_results(before: onnx.ModelProto, after: onnx.ModelProto, in_runtime: Runtime) -> None:
    random = np.random.default_rng(0)
    shapes = {one.name: [size.dim_value for size in one.type.tensor_type.shape.dim] for one in before.graph.input}
    inputs = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    expected = in_runtime(before.SerializeToString(), inputs)
    found = in_runtime(after.SerializeToString(), inputs)
    for one, other in zip(found, expected, strict=True):
        # Fewer than 16 roundings of numbers below 16.
        np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-16)


def test_a_rotation_reads_angles_of_this_call_as_its_table(in_runtime: Runtime) -> None:
    before, after, operators = fused(ROTATION.format(first="one", second="one", half=4))
    assert operators["RotaryEmbedding"] == 1
    assert not operators["Neg"] + operators["Transpose"] + operators["Unsqueeze"]
    assert_equal_results(before, after, in_runtime)


@pytest.mark.parametrize(
    "change", [{"second": "other"}, {"half": 2}], ids=["halves of other angles", "halves of other sizes"]
)
def test_other_rotations_stay(change: dict[str, object]) -> None:
    _, _, operators = fused(ROTATION.format(**({"first": "one", "second": "one", "half": 4} | change)))
    assert not operators["RotaryEmbedding"]
    assert operators["Neg"] == 1


def test_a_sum_and_its_norm_become_one(in_runtime: Runtime) -> None:
    before, after, operators = fused(NORM.format(shape="2,3,4", exponent=2.0, axis=-1))
    assert operators == {"SkipSimplifiedLayerNormalization": 1}
    assert_equal_results(before, after, in_runtime)


@pytest.mark.parametrize(
    "change",
    [{"shape": "4"}, {"exponent": 3.0}, {"axis": 1}],
    ids=["a broadcast sum", "another power", "another axis"],
)
def test_other_norms_stay(change: dict[str, object]) -> None:
    _, _, operators = fused(NORM.format(**({"shape": "2,3,4", "exponent": 2.0, "axis": -1} | change)))
    assert operators["Reciprocal"] == 1
    assert not operators["SkipSimplifiedLayerNormalization"]


def test_a_second_run_changes_nothing() -> None:
    for text in (ROTATION.format(first="one", second="one", half=4), NORM.format(shape="2,3,4", exponent=2.0, axis=-1)):
        _, after, _ = fused(text)
        model = ir.from_proto(after)
        assert not any(fuse_for_onnxruntime(model).values())


def test_moves_that_lead_back_are_dropped_and_others_kept() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    graph (float[2,3,4] x) => (float[2,3,4] same, float[2,6,2] other)
    <int64[2] flat = {6, 4}, int64[3] whole = {2, 3, 4}, int64[3] else = {2, 6, 2}>
    {
        a = Reshape(x, flat)
        b = Reshape(a, whole)
        same = Neg(b)
        c = Reshape(a, else)
        other = Neg(c)
    }
    """
    _, _, operators = fused(text)
    assert operators == {"Neg": 2, "Reshape": 2}


ATTENTION = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
graph (float[b,n,16] x, int64[b,n] positions, float[n,4] cos, float[n,4] sin, float[b,2,p,8] keys,
       float[b,2,p,8] values, int32[b] lengths, int32 total)
    => (float[b,n,16] result, float[b,2,t,8] k, float[b,2,t,8] v)
<float[16,16] wq, float[16,16] wk, float[16,16] wv>
{{
    q = MatMul(x, wq)
    k0 = MatMul(x, wk)
    v0 = {product}
    q1 = {rotation}(q, positions, cos, sin)
    k1 = {rotation}(k0, positions, cos, sin)
    result, k, v = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2>
        (q1, k1, v0, keys, values, lengths, total)
}}
"""
ROTARY = "com.microsoft.RotaryEmbedding <num_heads = 2>"


def attention(product: str = "MatMul(x, wv)", rotation: str = ROTARY) -> onnx.ModelProto:
    return onnx.parser.parse_model(ATTENTION.format(product=product, rotation=rotation))


def test_values_of_rotated_attention_do_not_come_straight_from_their_product(in_runtime: Runtime) -> None:
    """What ONNX Runtime would move the rotations into, with a table of all positions in the place of this call's."""
    before, after = attention(), attention()
    constants: dict[str, Initializer] = {}
    assert keep_rotations_apart(after, constants) == 1
    (node,) = [one for one in after.graph.node if one.op_type == "GroupQueryAttention"]
    producers = {one.output[0]: one for one in after.graph.node}
    reshape = producers[node.input[2]]
    assert (reshape.op_type, producers[reshape.input[0]].op_type) == ("Reshape", "MatMul")
    random = np.random.default_rng(0)
    for model in (before, after):
        del model.graph.initializer[:]
        for name in ("wq", "wk", "wv"):
            weight = np.random.default_rng(len(name) + ord(name[1])).standard_normal((16, 16)).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    after.graph.initializer.extend(constant.proto(name) for name, constant in constants.items())
    inputs = {
        "x": random.standard_normal((2, 3, 16)).astype(np.float32),
        "positions": np.tile(np.arange(3), (2, 1)),
        "cos": random.standard_normal((3, 4)).astype(np.float32),
        "sin": random.standard_normal((3, 4)).astype(np.float32),
        "keys": np.zeros((2, 2, 0, 8), dtype=np.float32),
        "values": np.zeros((2, 2, 0, 8), dtype=np.float32),
        "lengths": np.array([2, 2], dtype=np.int32),
        "total": np.array(3, dtype=np.int32),
    }
    expected = in_runtime(before.SerializeToString(), inputs)
    found = in_runtime(after.SerializeToString(), inputs)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert keep_rotations_apart(after, constants) == 0, "once is enough"


@pytest.mark.parametrize(
    "change", [{"product": "Neg(x)"}, {"rotation": "com.microsoft.Rotated"}], ids=["no product", "no rotation"]
)
def test_other_attention_stays(change: dict[str, str]) -> None:
    model = attention(**change)
    nodes = len(model.graph.node)
    assert keep_rotations_apart(model, {}) == 0
    assert len(model.graph.node) == nodes


def test_onnx_runtime_leaves_the_reshape_where_it_is(tmp_path: Path) -> None:
    """No optimisation may look through it, or the product would reach its attention after all."""
    model = attention()
    constants: dict[str, Initializer] = {}
    keep_rotations_apart(model, constants)
    for name in ("wq", "wk", "wv"):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(16, dtype=np.float32), name))
    model.graph.initializer.extend(constant.proto(name) for name, constant in constants.items())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    assert sum(node.op_type == "Reshape" for node in optimised.graph.node) == 1


ROTATED = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
graph (int64[2,3] position_ids, float[2,3,32] q, float[2,3,32] k, float[2,3,32] v, float[2,2,0,16] keys,
       float[2,2,0,16] values, int32[2] lengths, int32 total)
    => (float[2,3,32] result, float[2,2,3,16] new_keys, float[2,2,3,16] new_values)
<float[8] frequencies = {{1.0, 0.5, 0.25, 0.125, 0.1, 0.05, 0.02, 0.01}}, int64[4] split = {{2, 3, 2, 16}},
 int64[3] merge = {{2, 3, 32}}, int64[1] heads = {{1}}, int64[1] zero = {{0}}, int64[1] half = {{8}},
 int64[1] end = {{9223372036854775807}}, int64[1] last = {{3}}, int64[1] two = {{2}}, float one = {{1.0}}>
{{
    numbers = Cast <to = 1> (position_ids)
    column = Unsqueeze(numbers, two)
    products = Mul(column, frequencies)
    halves = {angles}
    angles = Concat <axis = -1> (halves, halves)
    cos = Cos(angles)
    sin = Sin(angles)
    cosines = Unsqueeze(cos, heads)
    sines = Unsqueeze(sin, heads)
    {q}
    {k}
    result, new_keys, new_values = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2>
        (q_result, k_result, v, keys, values, lengths, total)
}}
"""
ROTATED_PART = """
    {x}_apart = Reshape({x}, split)
    {x}_moved = Transpose <perm = [0, 2, 1, 3]> ({x}_apart)
    {x}_lower = Slice({x}_moved, zero, half, last)
    {x}_upper = Slice({x}_moved, half, end, last)
    {x}_negative = Neg({x}_upper)
    {x}_turned = Concat <axis = -1> ({x}_negative, {x}_lower)
    {x}_straight = Mul({x}_moved, cosines)
    {x}_across = Mul({x}_turned, sines)
    {x}_rotated = Add({x}_straight, {x}_across)
    {x}_back = Transpose <perm = [0, 2, 1, 3]> ({x}_rotated)
    {x}_result = Reshape({x}_back, merge)
"""


def rotated(angles: str) -> onnx.ModelProto:
    q, k = (ROTATED_PART.format(x=x) for x in "qk")
    return onnx.shape_inference.infer_shapes(onnx.parser.parse_model(ROTATED.format(angles=angles, q=q, k=k)))


def test_attention_rotates_where_angles_are_proportional_to_the_position(in_runtime: Runtime) -> None:
    before = rotated("Mul(products, one)")
    model = ir.from_proto(before)
    assert fuse_for_onnxruntime(model, 40)["GroupQueryAttention"] == 1
    after = ir.to_proto(model)
    assert "position_ids" not in [one.name for one in after.graph.input]
    assert not sum(node.op_type in ("RotaryEmbedding", "Neg") for node in after.graph.node)
    random = np.random.default_rng(0)
    inputs = {x: random.standard_normal((2, 3, 32)).astype(np.float32) for x in "qkv"} | {
        "keys": np.zeros((2, 2, 0, 16), dtype=np.float32),
        "values": np.zeros((2, 2, 0, 16), dtype=np.float32),
        "lengths": np.array([2, 2], dtype=np.int32),
        "total": np.array(3, dtype=np.int32),
    }
    expected = in_runtime(before.SerializeToString(), inputs | {"position_ids": np.tile(np.arange(3), (2, 1))})
    found = in_runtime(after.SerializeToString(), inputs)
    for one, other in zip(found, expected, strict=True):
        # Fewer than 16 roundings of numbers below 16.
        np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-16)


@pytest.mark.parametrize("positions", [1, 40, (1 << 17) + 1])
def test_other_angles_are_rotated_outside_of_the_attention(positions: int) -> None:
    model = ir.from_proto(rotated("Mul(products, products)" if positions == 40 else "Mul(products, one)"))
    counts = fuse_for_onnxruntime(model, positions)
    assert (counts["RotaryEmbedding"], counts["GroupQueryAttention"]) == (2, 0)
    assert "position_ids" in [value.name for value in model.graph.inputs]


def test_attention_reads_queries_keys_and_values_that_are_one_product_as_one() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        graph (float[b,n,48] qkv, float[b,n,48] other, int64[3] sizes, int64[3] shared, float[b,1,p,16] keys,
               float[b,1,p,16] values, int32[b] lengths, int32 total)
            => (float[b,n,16] first, float[b,n,16] second, float[b,n,16] z)
        {
            q, k, v = Split <axis = -1> (qkv, sizes)
            first = com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1>
                (q, k, v, keys, values, lengths, total)
            x, y, z = Split <axis = -1> (other, shared)
            second = com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1>
                (x, z, y, keys, values, lengths, total)
        }"""
    )
    constants = {name: of_tensor(torch.tensor([16, 16, 16])) for name in ("sizes", "shared")}
    assert pack_projections(model, constants) == 1
    assert set(constants) == {"shared"}, "what nobody splits by is not stored"
    attentions = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert [list(node.input[:3]) for node in attentions] == [["qkv", "", ""], ["x", "z", "y"]]
    assert pack_projections(model, constants) == 0
