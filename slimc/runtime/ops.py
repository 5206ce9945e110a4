"""The slim operators: one record each, registered with ``torch.library`` from the table `OPS`.

A record holds the signature, the reference (plain PyTorch, any device: the meaning of the op and the oracle of
every kernel) and the shape inference, which becomes the fake kernel and raises the same messages in eager mode,
``torch.export`` and ``torch.compile``.

Attributes are integers, and 0 stands for "absent": ``bits`` 0 means floating point values, ``group`` 0 one group
of all columns, ``m`` 0 no N:M pattern, ``rank`` 0 no adapters, ``activation`` 0 no rounding of the inputs (1: int8,
2: float8_e4m3fn). ``widths`` is the list of bits of each group of columns, where they differ; ``bits`` is the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slimc.runtime.activations import ACTIVATION_NAMES, round_inputs, round_tokens
from slimc.runtime.bits import stream_bytes
from slimc.runtime.decode import dequantize, group_counts, unpack_signs
from slimc.runtime.formats import ACTIVATIONS, NM, LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear

__all__ = ["OPS", "Op", "apply_packed", "decoded_linear", "linear_attributes", "weight_attributes"]


@dataclass(frozen=True)
class Op:
    """One operator.

    Attributes:
        name: Qualified name, ``slim::dequant``.
        inputs: Tensor arguments in order; a trailing ``?`` marks one that may be None.
        attributes: Integer arguments, keyword-only; a trailing ``[]`` marks a list, which is empty unless given.
        reference: What the op computes, in plain PyTorch.
        infer: Returns an empty tensor of the result's shape and dtype; raises on inputs that do not fit.
        gradients: For ``reference``'s result, the gradients of the tensor arguments (None for a frozen one):
            called with the incoming gradient, a tuple saying which inputs need one, and the op's arguments.
    """

    name: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    reference: Callable[..., Tensor]
    infer: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor | None, ...]] | None = None

    @property
    def doc(self) -> str:
        """What the op computes, for people."""
        return self.reference.__doc__ or ""

    @property
    def schema(self) -> str:
        """The signature in PyTorch's schema language."""
        tensors = [f"Tensor? {name[:-1]}" if name.endswith("?") else f"Tensor {name}" for name in self.inputs]
        integers = [f"int[] {name[:-2]}=[]" if name.endswith("[]") else f"int {name}" for name in self.attributes]
        return f"({', '.join(tensors + (['*'] if integers else []) + integers)}) -> Tensor"


def weight_attributes(spec: WeightFormat) -> dict[str, Any]:
    """Return what the dequant ops need to know of a weight: bits, columns, group, n, m, and widths if it has any."""
    pattern = spec.sparsity if isinstance(spec.sparsity, NM) else None
    widths = {} if spec.widths is None else {"widths": list(spec.widths)}
    return widths | {
        "bits": spec.bits or 0,
        "columns": spec.columns,
        "group": spec.group or 0,
        "n": pattern.n if pattern else 0,
        "m": pattern.m if pattern else 0,
    }


def linear_attributes(spec: LinearFormat) -> dict[str, Any]:
    """Return the attributes of ``slim::linear`` for a layer of this format."""
    left, right = spec.left, spec.right
    return weight_attributes(spec.weight) | {
        "rank": spec.rank,
        "left_bits": (left.bits or 0) if left else 0,
        "left_group": (left.group or 0) if left else 0,
        "right_bits": (right.bits or 0) if right else 0,
        "right_group": (right.group or 0) if right else 0,
        "activation": ACTIVATIONS[spec.activation] if spec.activation else 0,
    }


def apply_packed(x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
    """Compute ``slim::linear`` of ``x`` [..., columns] and a packed weight; the result has x's dtype."""
    tensors = packed.tensors()
    operands = (tensors.get(name) for name in LINEAR_TENSORS)
    result: Tensor = torch.ops.slim.linear.default(x, *operands, bias, **linear_attributes(packed.format))
    return result


def decoded_linear(packed: PackedLinear) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Decode a packed weight once and return ``(x, bias) -> y``, equal to ``slim::linear`` bit for bit.

    For many calls in a row, where decoding at each would dominate.
    """
    weight = packed.weight.decode()
    left = None if packed.left is None else packed.left.decode()
    right = None if packed.right is None else packed.right.decode()
    binary = None if packed.binary is None else tuple(packed.binary.tensors().values())
    return lambda x, bias: _products(x, weight, packed.input_scale, left, right, binary, bias, packed.activation)


def dequant(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    bits: int,
    columns: int,
    group: int,
    widths: Sequence[int] = (),
) -> Tensor:
    """``(codes - zero_point) * scale``: the dense weight [rows, columns] in the scale's dtype."""
    return dequantize(values, None, scale, zero_point, bits=bits, columns=columns, group=group, widths=widths)


def dequant_nm(
    values: Tensor,
    pattern: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    *,
    bits: int,
    columns: int,
    group: int,
    n: int,
    m: int,
    widths: Sequence[int] = (),
) -> Tensor:
    """`dequant` of an N:M sparse weight; without a scale (``bits`` 0) the values are floating point."""
    shape = {"bits": bits, "columns": columns, "group": group, "n": n, "m": m}
    return dequantize(values, pattern, scale, zero_point, **shape, widths=widths)


def dequant_mask(
    values: Tensor,
    pattern: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    *,
    bits: int,
    columns: int,
    group: int,
) -> Tensor:
    """`dequant` of an unstructured sparse weight, whose values are one stream for the whole matrix."""
    return dequantize(values, pattern, scale, zero_point, bits=bits, columns=columns, group=group)


def round_activations(x: Tensor, *, activation: int) -> Tensor:
    """``s * q``: each token of x rounded to codes q of 8 bits with a scale s of its own, in x's dtype."""
    return round_tokens(x, ACTIVATION_NAMES[activation]).contiguous()


def low_rank(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``(x @ right^T) @ left^T``, computed in x's dtype."""
    return functional.linear(functional.linear(x, right.to(x.dtype)), left.to(x.dtype)).contiguous()


def sign_low_rank(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``sum_k ((x * right[k]) @ B^T) * left[:, k]`` in x's dtype; B is -1 where a bit of ``signs`` is set, else +1."""
    matrix = unpack_signs(signs, right.shape[1], x.dtype)
    pairs = zip(left.to(x.dtype).unbind(1), right.to(x.dtype).unbind(0), strict=True)
    terms = (functional.linear(x * row, matrix) * column for column, row in pairs)
    return reduce(torch.add, terms).contiguous()


def linear(
    x: Tensor,
    values: Tensor,
    pattern: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    left_values: Tensor | None,
    left_scale: Tensor | None,
    right_values: Tensor | None,
    right_scale: Tensor | None,
    signs: Tensor | None,
    sign_left: Tensor | None,
    sign_right: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    columns: int,
    group: int,
    n: int,
    m: int,
    rank: int,
    left_bits: int,
    left_group: int,
    right_bits: int,
    right_group: int,
    activation: int,
    widths: Sequence[int] = (),
) -> Tensor:
    """``q @ W^T + bias + (q @ right^T) @ left^T + sign_low_rank(x, ...)`` with ``q = round_activations(x)``.

    With an ``input_scale`` W reads ``round_activations(x * input_scale)``, and the adapters x as it came. Each step is
    rounded to x's dtype.
    """
    shape = {"bits": bits, "columns": columns, "group": group, "n": n, "m": m}
    weight = dequantize(values, pattern, scale, zero_point, **shape, widths=widths)
    left = right = None
    if left_values is not None and right_values is not None:
        left = dequantize(left_values, None, left_scale, None, bits=left_bits, columns=rank, group=left_group)
        right = dequantize(right_values, None, right_scale, None, bits=right_bits, columns=columns, group=right_group)
    binary = None
    if signs is not None and sign_left is not None and sign_right is not None:
        binary = signs, sign_left, sign_right
    return _products(x, weight, input_scale, left, right, binary, bias, ACTIVATION_NAMES.get(activation))


def _products(
    x: Tensor,
    weight: Tensor,
    input_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    binary: tuple[Tensor, ...] | None,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    operand = round_inputs(x if input_scale is None else x * input_scale.to(x.dtype), activation)
    y = functional.linear(operand, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if left is not None and right is not None:
        y = y + low_rank(operand if input_scale is None else x, left, right)
    if binary is not None:
        y = y + sign_low_rank(x, *binary)
    return y.contiguous()


LINEAR_TENSORS = (
    *("values", "pattern", "scale", "zero_point", "input_scale"),
    *("left_values", "left_scale", "right_values", "right_scale"),
    *("signs", "sign_left", "sign_right"),
)
"""The packed tensors among the inputs of ``slim::linear``, in order."""


def _infer_dequant(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    bits: int,
    columns: int,
    group: int,
    widths: Sequence[int] = (),
) -> Tensor:
    rows = _check_weight(values, None, scale, zero_point, bits=bits, columns=columns, group=group, widths=widths)
    return scale.new_empty(rows, columns)


def _infer_sparse(
    values: Tensor,
    pattern: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    *,
    bits: int,
    columns: int,
    group: int,
    n: int = 0,
    m: int = 0,
    widths: Sequence[int] = (),
) -> Tensor:
    shape = {"bits": bits, "columns": columns, "group": group, "n": n, "m": m}
    rows = _check_weight(values, pattern, scale, zero_point, **shape, widths=widths)
    return (values if scale is None else scale).new_empty(rows, columns)


def _check_weight(
    values: Tensor,
    pattern: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    *,
    bits: int,
    columns: int,
    group: int,
    n: int = 0,
    m: int = 0,
    widths: Sequence[int] = (),
) -> int:
    """Check the packed tensors of one matrix against the attributes; return the number of rows."""
    _require(columns > 0, lambda: f"columns must be positive, not {columns}")
    narrowest = 1 if widths else 2
    _require(bits == 0 or narrowest <= bits <= 8, lambda: f"bits must be 0 or {narrowest} to 8, not {bits}")
    _require(m == 0 or (0 < n < m and columns % m == 0), lambda: f"{n}:{m} sparsity does not fit {columns} columns")
    _require((scale is None) == (bits == 0), lambda: f"bits {bits} needs {'no' if bits == 0 else 'a'} scale")
    stored = columns // m * n if m else columns
    rows = values.shape[0] if pattern is None else pattern.shape[0]
    row_size = stream_bytes(stored, bits) if bits else stored
    if widths:
        _require(pattern is None or m > 0, lambda: "widths of groups do not go with unstructured sparsity")
        row_size = _mixed_row_bytes(widths, bits=bits, columns=columns, group=group, n=n, m=m)
    if pattern is None or m:
        _expect("values", values, (rows, row_size))
    else:
        _require(values.dim() == 1, lambda: f"values must be one stream, not of shape {tuple(values.shape)}")
    if pattern is not None:
        _expect("pattern", pattern, (rows, stream_bytes(columns, 1)), torch.uint8)
    if scale is None:
        _require(values.is_floating_point(), lambda: f"values without bits are floats, not {values.dtype}")
        return rows
    _require(values.dtype == torch.uint8, lambda: f"values must be uint8 bit streams, not {values.dtype}")
    _require(scale.is_floating_point(), lambda: f"scale must be floating point, not {scale.dtype}")
    groups = -(-columns // group) if group else 1
    expected = (1, 1) if group == 0 and scale.numel() == 1 else (rows, groups)
    _expect("scale", scale, expected)
    if zero_point is not None:
        _expect("zero_point", zero_point, expected, torch.uint8)
    return rows


def _mixed_row_bytes(widths: Sequence[int], *, bits: int, columns: int, group: int, n: int, m: int) -> int:
    """Check the widths of groups of columns; return the bytes of a row of codes."""
    groups = -(-columns // group) if group else 0
    _require(len(widths) == groups, lambda: f"{len(widths)} widths do not describe {groups} groups of columns")
    within = min(widths) >= 1 and max(widths) == bits
    _require(within, lambda: f"widths must be 1 to 8, the largest {bits}, not {list(widths)}")
    _require(m == 0 or group % m == 0, lambda: f"{n}:{m} sparsity does not divide groups of {group} columns")
    counts = group_counts(columns, group, n, m)
    return sum(stream_bytes(count, width) for count, width in zip(counts, widths, strict=True))


def _infer_round_activations(x: Tensor, *, activation: int) -> Tensor:
    _require(x.is_floating_point() and x.dim() > 0, lambda: f"x must be floating point [..., columns], not {x.dtype}")
    _require(activation in ACTIVATIONS.values(), lambda: f"activation must be 1 (int8) or 2 (float8), not {activation}")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _infer_low_rank(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    _require(left.dim() == 2 and right.dim() == 2, lambda: "left and right must be matrices")
    _expect_input(x, right.shape[1])
    _require(
        left.shape[1] == right.shape[0],
        lambda: f"left {tuple(left.shape)} and right {tuple(right.shape)} must share the rank",
    )
    return x.new_empty((*x.shape[:-1], left.shape[0]))


def _infer_sign_low_rank(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    _require(left.dim() == 2 and right.dim() == 2, lambda: "left and right must be matrices")
    rows, rank, columns = left.shape[0], left.shape[1], right.shape[1]
    _expect_input(x, columns)
    _require(rank > 0 and right.shape[0] == rank, lambda: f"left has the rank {rank}, right {right.shape[0]}")
    _expect("signs", signs, (rows, stream_bytes(columns, 1)), torch.uint8)
    return x.new_empty((*x.shape[:-1], rows))


def _infer_linear(
    x: Tensor,
    values: Tensor,
    pattern: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    left_values: Tensor | None,
    left_scale: Tensor | None,
    right_values: Tensor | None,
    right_scale: Tensor | None,
    signs: Tensor | None,
    sign_left: Tensor | None,
    sign_right: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    columns: int,
    group: int,
    n: int,
    m: int,
    rank: int,
    left_bits: int,
    left_group: int,
    right_bits: int,
    right_group: int,
    activation: int,
    widths: Sequence[int] = (),
) -> Tensor:
    shape = {"bits": bits, "columns": columns, "group": group, "n": n, "m": m}
    rows = _check_weight(values, pattern, scale, zero_point, **shape, widths=widths)
    _expect_input(x, columns)
    _require(0 <= activation <= len(ACTIVATIONS), lambda: f"activation must be 0, 1 or 2, not {activation}")
    if input_scale is not None:
        _expect("input_scale", input_scale, (columns,))
    if bias is not None:
        _expect("bias", bias, (rows,))
    _require(
        (left_values is None) == (right_values is None) == (rank == 0),
        lambda: f"rank {rank} needs {'neither' if rank == 0 else 'both'} of left_values and right_values",
    )
    if left_values is not None and right_values is not None:
        left = _check_weight(left_values, None, left_scale, None, bits=left_bits, columns=rank, group=left_group)
        right = _check_weight(
            right_values, None, right_scale, None, bits=right_bits, columns=columns, group=right_group
        )
        _require(left == rows, lambda: f"left has {left} rows, the weight {rows}")
        _require(right == rank, lambda: f"right has {right} rows, the rank is {rank}")
    _require(
        len({part is None for part in (signs, sign_left, sign_right)}) == 1,
        lambda: "signs, sign_left and sign_right belong together",
    )
    if signs is not None and sign_left is not None and sign_right is not None:
        _infer_sign_low_rank(x, signs, sign_left, sign_right)
        _require(sign_left.shape[0] == rows, lambda: f"sign_left has {sign_left.shape[0]} rows, the weight {rows}")
    return x.new_empty((*x.shape[:-1], rows))


def _require(condition: bool, message: Callable[[], str]) -> None:
    torch._check(condition, message)  # type: ignore[no-untyped-call]


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    _require(tuple(tensor.shape) == tuple(shape), lambda: f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    _require(dtype in (None, tensor.dtype), lambda: f"{name} must be {dtype}, not {tensor.dtype}")


def _expect_input(x: Tensor, columns: int) -> None:
    _require(x.is_floating_point(), lambda: f"x must be floating point, not {x.dtype}")
    _require(x.dim() > 0 and x.shape[-1] == columns, lambda: f"x must be [..., {columns}], not {tuple(x.shape)}")


def _decode_as_node(
    values: Tensor, pattern: Tensor | None, scale: Tensor | None, zero_point: Tensor | None, **attributes: Any
) -> Tensor:
    """`dequantize` through the ops, so that a traced backward holds one node a weight."""
    slim = torch.ops.slim
    n, m = attributes.pop("n", 0), attributes.pop("m", 0)
    dense: Tensor
    if pattern is not None and m:
        dense = slim.dequant_nm.default(values, pattern, scale, zero_point, **attributes, n=n, m=m)
    elif pattern is not None:
        dense = slim.dequant_mask.default(values, pattern, scale, zero_point, **attributes)
    elif scale is not None:
        dense = slim.dequant.default(values, scale, zero_point, **attributes)
    else:
        dense = values
    return dense


def _low_rank_gradients(
    gradient: Tensor, needed: tuple[bool, ...], x: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor | None, ...]:
    through_left = gradient @ left.to(gradient.dtype)
    rows, inner = gradient.flatten(0, -2), through_left.flatten(0, -2)
    inputs = x.flatten(0, -2)
    return (
        through_left @ right.to(gradient.dtype) if needed[0] else None,
        (rows.t() @ functional.linear(inputs, right.to(x.dtype))).to(left.dtype) if needed[1] else None,
        (inner.t() @ inputs).to(right.dtype) if needed[2] else None,
    )


def _through_signs(gradient: Tensor, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``sum_k ((gradient * left[:, k]) @ B) * right[k]``."""
    dtype = gradient.dtype
    terms = [
        (gradient * column) @ matrix * row
        for column, row in zip(left.to(dtype).unbind(1), right.to(dtype).unbind(0), strict=True)
    ]
    return torch.stack(terms).sum(0)


def _sign_low_rank_gradients(
    gradient: Tensor, needed: tuple[bool, ...], x: Tensor, signs: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the factors; signs are frozen."""
    matrix = unpack_signs(signs, right.shape[1], x.dtype)
    rows, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
    to_left = [(rows * functional.linear(inputs * row, matrix)).sum(0) for row in right.to(x.dtype).unbind(0)]
    to_right = [(inputs * ((rows * column) @ matrix)).sum(0) for column in left.to(x.dtype).unbind(1)]
    return (
        _through_signs(gradient, matrix, left, right) if needed[0] else None,
        None,
        torch.stack(to_left, 1).to(left.dtype) if needed[2] else None,
        torch.stack(to_right, 0).to(right.dtype) if needed[3] else None,
    )


def _linear_gradients(
    gradient: Tensor,
    needed: tuple[bool, ...],
    _x: Tensor,
    values: Tensor,
    pattern: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    left_values: Tensor | None,
    left_scale: Tensor | None,
    right_values: Tensor | None,
    right_scale: Tensor | None,
    signs: Tensor | None,
    sign_left: Tensor | None,
    sign_right: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    columns: int,
    group: int,
    n: int,
    m: int,
    rank: int,
    left_bits: int,
    left_group: int,
    right_bits: int,
    right_group: int,
    activation: int,  # noqa: ARG001 - rounding passes gradients on as they are
    widths: Sequence[int] = (),
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the bias; the packed tensors are frozen, and rounding counts as the identity."""
    to_input = to_bias = None
    dtype = gradient.dtype
    if needed[0]:
        shape: dict[str, Any] = {"bits": bits, "columns": columns, "group": group, "n": n, "m": m}
        if widths:
            shape["widths"] = list(widths)
        weight = _decode_as_node(values, pattern, scale, zero_point, **shape)
        to_input = gradient @ weight.to(dtype)
        if input_scale is not None:
            to_input = to_input * input_scale.to(dtype)
        if left_values is not None and right_values is not None:
            left = _decode_as_node(left_values, None, left_scale, None, bits=left_bits, columns=rank, group=left_group)
            right = _decode_as_node(
                right_values, None, right_scale, None, bits=right_bits, columns=columns, group=right_group
            )
            to_input = to_input + (gradient @ left.to(dtype)) @ right.to(dtype)
        if signs is not None and sign_left is not None and sign_right is not None:
            matrix = unpack_signs(signs, columns, dtype)
            to_input = to_input + _through_signs(gradient, matrix, sign_left, sign_right)
    if needed[len(LINEAR_TENSORS) + 1] and bias is not None:
        to_bias = gradient.flatten(0, -2).sum(0).to(bias.dtype)
    return (to_input, *(None for _ in LINEAR_TENSORS), to_bias)


def _round_gradients(gradient: Tensor, _needed: tuple[bool, ...], _x: Tensor, **_: int) -> tuple[Tensor]:
    """The straight-through estimator: the derivative of rounding is zero nearly everywhere and of no use."""
    return (gradient,)


_WEIGHT = ("bits", "columns", "group")

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("slim::dequant", ("values", "scale", "zero_point?"), (*_WEIGHT, "widths[]"), dequant, _infer_dequant),
        Op(
            "slim::dequant_nm",
            ("values", "pattern", "scale?", "zero_point?"),
            (*_WEIGHT, "n", "m", "widths[]"),
            dequant_nm,
            _infer_sparse,
        ),
        Op(
            "slim::dequant_mask",
            ("values", "pattern", "scale?", "zero_point?"),
            _WEIGHT,
            dequant_mask,
            _infer_sparse,
        ),
        Op(
            "slim::round_activations",
            ("x",),
            ("activation",),
            round_activations,
            _infer_round_activations,
            _round_gradients,
        ),
        Op("slim::low_rank", ("x", "left", "right"), (), low_rank, _infer_low_rank, _low_rank_gradients),
        Op(
            "slim::sign_low_rank",
            ("x", "signs", "left", "right"),
            (),
            sign_low_rank,
            _infer_sign_low_rank,
            _sign_low_rank_gradients,
        ),
        Op(
            "slim::linear",
            ("x", "values", *(f"{name}?" for name in LINEAR_TENSORS[1:]), "bias?"),
            (
                *(*_WEIGHT, "n", "m", "rank", "left_bits", "left_group", "right_bits", "right_group"),
                *("activation", "widths[]"),
            ),
            linear,
            _infer_linear,
            _linear_gradients,
        ),
    )
}
"""Every slim operator by its qualified name."""


def _checked(op: Op) -> Callable[..., Tensor]:
    """The reference behind the checks of the shape inference, and out of reach of autocast.

    Autocast would change the dtype of products inside the body, while the fake kernel promises the dtype of x.
    """

    def run(*inputs: Tensor | None, **attributes: Any) -> Tensor:
        op.infer(*inputs, **attributes)
        device = next(tensor.device.type for tensor in inputs if tensor is not None)
        if not torch.is_autocast_enabled(device):
            return op.reference(*inputs, **attributes)
        with torch.autocast(device, enabled=False):
            return op.reference(*inputs, **attributes)

    return run


def _register(op: Op) -> None:
    custom = torch.library.custom_op(op.name, _checked(op), mutates_args=(), schema=op.schema)
    custom.register_fake(op.infer)
    gradients = op.gradients
    if gradients is None:
        return

    def setup_context(
        ctx: Any,
        inputs: tuple[Tensor | None, ...],
        output: Tensor,  # noqa: ARG001 - passed by keyword
        keyword_only_inputs: dict[str, Any] | None = None,
    ) -> None:
        ctx.save_for_backward(*inputs)
        ctx.attributes = keyword_only_inputs or {}

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(gradient, ctx.needs_input_grad, *ctx.saved_tensors, **ctx.attributes)

    custom.register_autograd(backward, setup_context=setup_context)


for _op in OPS.values():
    _register(_op)
