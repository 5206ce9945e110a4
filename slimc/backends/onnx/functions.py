"""The domain ``slim``, version 1: each operator of slimc as an ONNX function, so that every runtime can run it.

A weight is held as [columns, rows], the way MatMul reads it, in codes of a width that ONNX has, and becomes numbers by
DequantizeLinear. ONNX Runtime puts the body in place of the node, finds DequantizeLinear before MatMul and runs both as
one kernel that reads the codes; had the body unpacked them by arithmetic, they would be folded to a dense weight when
the model is loaded. A runtime that has a kernel named ``slim::linear`` runs that instead.

What an operator leaves out is an empty input in its place, so that a kernel finds every input at the same position. A
body cannot ask whether an input is there: there is one function for each combination in use, told apart by the
``overload`` of node and function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from slimc.runtime.activations import LARGEST

__all__ = [
    "DOMAIN",
    "INPUTS",
    "VERSION",
    "LinearOverload",
    "dequant_function",
    "linear_function",
    "low_rank_function",
    "round_activations_function",
    "round_nodes",
    "sign_low_rank_function",
]

DOMAIN = "slim"
VERSION = 1

INPUTS = (
    *("x", "weight", "scale", "zero_point", "input_scale"),
    *("left", "left_scale", "right", "right_scale", "bias"),
    *("sign_right", "signs", "signs_scale", "sign_left"),
)
"""Inputs of ``slim::linear`` by position: weight [columns, rows], left [rank, rows], right [columns, rank].

Signs are codes [columns, rows] with a scale of [rows], sign_right is [columns] and there is no sign_left if their
magnitude is of rank 1; of other ranks they are [rank, columns] and [rank, rows].
"""


@dataclass(frozen=True)
class LinearOverload:
    """Which inputs a ``slim::linear`` has.

    Attributes:
        codes: the weight is codes with a scale, not numbers.
        zero_point: its codes have a zero point.
        input_scale: x is multiplied by one first.
        low_rank: there are left and right factors.
        left_codes: the left factor is codes with a scale.
        right_codes: the right factor is codes with a scale.
        bias: there is one.
        sign_ranks: rank of the signs' magnitude, 0 without signs.
        activation: what the input of the weight is rounded to, one of `slimc.runtime.formats.ACTIVATIONS`, or None.
    """

    codes: bool
    zero_point: bool = False
    input_scale: bool = False
    low_rank: bool = False
    left_codes: bool = False
    right_codes: bool = False
    bias: bool = False
    sign_ranks: int = 0
    activation: str | None = None

    @property
    def name(self) -> str:
        """The name of the overload, which lists what is there."""
        words = ["codes" if self.codes else "values"]
        words += [word for word in ("zero_point", "input_scale") if getattr(self, word)]
        if self.low_rank:
            words += ["left_codes" if self.left_codes else "left", "right_codes" if self.right_codes else "right"]
        words += [word for word in ("bias",) if self.bias]
        words += [sign_overload(several=self.sign_ranks > 1)] if self.sign_ranks else []
        return ".".join(words + ([self.activation] if self.activation else []))


def sign_overload(*, several: bool) -> str:
    """Return the name of an overload for signs whose magnitude is of rank 1, or of several ranks."""
    return "sign_ranks" if several else "signs"


def dequantize_node(codes: str, scale: str, zero_point: str | None, result: str, *, prefix: str) -> NodeProto:
    """Return a DequantizeLinear whose axis and block size are attributes of the function that it stands in."""
    inputs = [codes, scale] if zero_point is None else [codes, scale, zero_point]
    node = helper.make_node("DequantizeLinear", inputs, [result])
    for name in ("axis", "block_size"):
        reference = AttributeProto(name=name, ref_attr_name=f"{prefix}{name}", type=AttributeProto.INT)
        node.attribute.append(reference)
    return node


def round_nodes(x: str, result: str, kind: str, prefix: str) -> list[NodeProto]:
    """Return the nodes of ``slim::round_activations``: x rounded token by token as `slimc.runtime.activations` says.

    Args:
        x: name of the input, of any floating point type.
        result: name of the output, of the type of x.
        kind: ``"int8"`` or ``"float8_e4m3fn"``.
        prefix: what names of values in between begin with.
    """
    largest = LARGEST[kind]

    def named(name: str) -> str:
        return f"{prefix}{name}"

    def constant(name: str, value: float) -> NodeProto:
        return helper.make_node("Constant", [], [named(name)], value_float=value)

    quotient = [
        helper.make_node("Constant", [], [named("last_axis")], value_ints=[-1]),
        constant("largest", largest),
        constant("smallest", -largest),
        constant("zero", 0.0),
        constant("one", 1.0),
        helper.make_node("Cast", [x], [named("values")], to=TensorProto.FLOAT),
        helper.make_node("Abs", [named("values")], [named("magnitudes")]),
        helper.make_node("ReduceMax", [named("magnitudes"), named("last_axis")], [named("peak")], keepdims=1),
        helper.make_node("Div", [named("peak"), named("largest")], [named("step")]),
        helper.make_node("Equal", [named("step"), named("zero")], [named("is_zero")]),
        helper.make_node("Where", [named("is_zero"), named("one"), named("step")], [named("token_scale")]),
        helper.make_node("Div", [named("values"), named("token_scale")], [named("quotient")]),
        helper.make_node("Clip", [named("quotient"), named("smallest"), named("largest")], [named("clipped")]),
    ]
    if kind == "int8":
        codes = [helper.make_node("Round", [named("clipped")], [named("codes")])]
    else:
        codes = [
            helper.make_node("Cast", [named("clipped")], [named("codes8")], to=TensorProto.FLOAT8E4M3FN),
            helper.make_node("Cast", [named("codes8")], [named("codes")], to=TensorProto.FLOAT),
        ]
    return [
        *quotient,
        *codes,
        helper.make_node("Mul", [named("codes"), named("token_scale")], [named("rounded")]),
        helper.make_node("CastLike", [named("rounded"), x], [result]),
    ]


def linear_function(overload: LinearOverload, opset: int) -> FunctionProto:
    """Return ``slim::linear``: ``round(x) @ W + bias + (round(x) @ R) @ L + binary`` of weights [in, out].

    With an input scale W reads ``round(x * input_scale)`` and R reads x. ``binary`` is `sign_low_rank_function`.
    """
    nodes: list[NodeProto] = []
    attributes: list[str] = []

    def decoded(name: str, codes: bool, prefix: str, zero_point: bool = False) -> str:
        if not codes:
            return name
        scale = f"{prefix}scale"
        zero = "zero_point" if zero_point else None
        nodes.append(dequantize_node(name, scale, zero, f"{name}_decoded", prefix=prefix))
        attributes.extend((f"{prefix}axis", f"{prefix}block_size"))
        return f"{name}_decoded"

    operand = "x"
    if overload.input_scale:
        nodes.append(helper.make_node("Mul", [operand, "input_scale"], ["scaled"]))
        operand = "scaled"
    if overload.activation is not None:
        nodes += round_nodes(operand, "rounded_input", overload.activation, "round_")
        operand = "rounded_input"
    weight = decoded("weight", overload.codes, "", overload.zero_point)
    nodes.append(helper.make_node("MatMul", [operand, weight], ["product"]))
    total = "product"
    if overload.bias:
        nodes.append(helper.make_node("Add", ["product", "bias"], ["biased"]))
        total = "biased"
    if overload.low_rank:
        right = decoded("right", overload.right_codes, "right_")
        left = decoded("left", overload.left_codes, "left_")
        read = "x" if overload.input_scale else operand
        nodes.append(helper.make_node("MatMul", [read, right], ["inner"]))
        nodes.append(helper.make_node("MatMul", ["inner", left], ["correction"]))
        last = "corrected" if overload.sign_ranks else "y"
        nodes.append(helper.make_node("Add", [total, "correction"], [last]))
        total = last
    if overload.sign_ranks:
        signs = decoded("signs", True, "signs_")
        nodes += _sign_nodes(signs, "binary", several=overload.sign_ranks > 1)
        nodes.append(helper.make_node("Add", [total, "binary"], ["y"]))
        total = "y"
    if total != "y":
        nodes.append(helper.make_node("Identity", [total], ["y"]))
    return _function("linear", INPUTS, "y", nodes, attributes, overload.name, opset)


def dequant_function(name: str, *, codes: bool, zero_point: bool, opset: int) -> FunctionProto:
    """Return ``slim::dequant``, ``slim::dequant_nm`` or ``slim::dequant_mask``: a weight as numbers [columns, rows].

    Pruned positions hold the code of zero, so that the three have one body.
    """
    inputs = ("weight", "scale", "zero_point")
    if not codes:
        return _function(name, inputs, "w", [helper.make_node("Identity", ["weight"], ["w"])], [], "values", opset)
    node = dequantize_node("weight", "scale", "zero_point" if zero_point else None, "w", prefix="")
    overload = "codes.zero_point" if zero_point else "codes"
    return _function(name, inputs, "w", [node], ["axis", "block_size"], overload, opset)


def round_activations_function(kind: str, opset: int) -> FunctionProto:
    """Return ``slim::round_activations``; ``kind`` is the overload."""
    return _function("round_activations", ("x",), "y", round_nodes("x", "y", kind, ""), [], kind, opset)


def low_rank_function(opset: int) -> FunctionProto:
    """Return ``slim::low_rank``: ``(x @ right) @ left`` of factors held as [columns, rank] and [rank, rows]."""
    nodes = [
        helper.make_node("MatMul", ["x", "right"], ["inner"]),
        helper.make_node("MatMul", ["inner", "left"], ["y"]),
    ]
    return _function("low_rank", ("x", "left", "right"), "y", nodes, [], "", opset)


def sign_low_rank_function(opset: int, *, several: bool) -> FunctionProto:
    """Return ``slim::sign_low_rank``: ``sum_k ((x * right[k]) @ signs) * left[k]``; of rank 1 the scale is ``left``."""
    nodes = [dequantize_node("signs", "signs_scale", None, "signs_decoded", prefix="signs_")]
    nodes += _sign_nodes("signs_decoded", "y", several=several)
    inputs = ("x", "sign_right", "signs", "signs_scale", "sign_left")
    attributes = ["signs_axis", "signs_block_size"]
    return _function("sign_low_rank", inputs, "y", nodes, attributes, sign_overload(several=several), opset)


def _sign_nodes(signs: str, result: str, *, several: bool) -> list[NodeProto]:
    """Return the products by decoded signs; these are read once for all ranks, which are an axis of their own."""
    if not several:
        return [
            helper.make_node("Mul", ["x", "sign_right"], ["sign_input"]),
            helper.make_node("MatMul", ["sign_input", signs], [result]),
        ]
    return [
        helper.make_node("Constant", [], ["sign_axis"], value_ints=[-2]),
        helper.make_node("Unsqueeze", ["x", "sign_axis"], ["sign_x"]),
        helper.make_node("Mul", ["sign_x", "sign_right"], ["sign_input"]),
        helper.make_node("MatMul", ["sign_input", signs], ["sign_product"]),
        helper.make_node("Mul", ["sign_product", "sign_left"], ["sign_terms"]),
        helper.make_node("ReduceSum", ["sign_terms", "sign_axis"], [result], keepdims=0),
    ]


def _function(
    name: str,
    inputs: Sequence[str],
    output: str,
    nodes: list[NodeProto],
    attributes: list[str],
    overload: str,
    opset: int,
) -> FunctionProto:
    imports = [helper.make_opsetid("", opset)]
    made: FunctionProto = onnx.helper.make_function(
        DOMAIN, name, list(inputs), [output], nodes, imports, attributes=attributes, overload=overload
    )
    return made
