"""The operators: opcheck, a derived error bound, gradients, and one message for every misfit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.runtime.ops import (
    LINEAR_TENSORS,
    OPS,
    apply_packed,
    decoded_linear,
    linear_attributes,
    weight_attributes,
)
from slimc.runtime.packing import NM, PackedLinear, Unstructured

slim = torch.ops.slim

FORMS: dict[str, dict[str, Any]] = {
    "2:4 int4 per tensor": {"bits": 4, "per_tensor": True, "sparsity": NM(2, 4)},
    "int3 in short groups": {"bits": 3, "group": 16},
    "asymmetric unstructured": {"bits": 4, "group": 8, "asymmetric": True, "sparsity": Unstructured()},
    "asymmetric": {"bits": 2, "asymmetric": True},
    "widths of groups": {"bits": 7, "group": 8, "widths": (1, 7, 3)},
    "asymmetric 2:4 widths": {"bits": 4, "group": 8, "asymmetric": True, "sparsity": NM(2, 4), "widths": (4, 1, 2)},
    "1:2 int8": {"bits": 8, "sparsity": NM(1, 2)},
    "2:4 values": {"bits": None, "sparsity": NM(2, 4)},
    "values": {"bits": None},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def arguments(packed: PackedLinear, x: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = packed.tensors()
    return (x, *(tensors.get(name) for name in LINEAR_TENSORS), bias)


@forms
@dtypes
def test_linear_passes_opcheck(make_linear: Callable[..., PackedLinear], form: dict[str, Any], dtype) -> None:
    packed = make_linear(6, 20, rank=3, scaled=True, dtype=dtype, **form)
    x = torch.randn(2, 3, 20, dtype=dtype, requires_grad=True)
    inputs = arguments(packed, x, torch.randn(6, dtype=dtype))
    torch.library.opcheck(slim.linear.default, inputs, linear_attributes(packed.format))


def test_a_binary_part_passes_opcheck(make_linear: Callable[..., PackedLinear]) -> None:
    packed = make_linear(6, 20, 4, rank=3, signs=2, dtype=torch.float32)
    x = torch.randn(2, 3, 20, requires_grad=True)
    attributes = linear_attributes(packed.format)
    torch.library.opcheck(slim.linear.default, arguments(packed, x, torch.randn(6)), attributes)
    binary = packed.binary
    torch.library.opcheck(slim.sign_low_rank.default, (x, binary.signs, binary.left, binary.right))
    plain = replace(packed, binary=None)
    parts = apply_packed(x, plain) + slim.sign_low_rank(x, binary.signs, binary.left, binary.right)
    assert torch.equal(apply_packed(x, packed), parts)
    assert torch.equal(decoded_linear(packed)(x, None), parts)


def test_products_with_signs_are_those_with_the_decoded_matrix(make_linear: Callable[..., PackedLinear]) -> None:
    binary = make_linear(6, 20, 4, signs=2, dtype=torch.float64).binary
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    signs = torch.tensor([[1 - 2 * (int(byte) >> bit & 1) for byte in row for bit in range(8)] for row in binary.signs])
    exact = (binary.left @ binary.right) * signs[:, :20]
    y = slim.sign_low_rank(x, binary.signs, binary.left, binary.right)
    # Float64 sums of 20 terms, in another order, and a decoded matrix in float32.
    assert torch.allclose(y, x @ exact.T, rtol=0, atol=1e-12)
    assert torch.allclose(binary.decode().double(), exact, rtol=1e-6, atol=1e-6)
    left, right = (factor.clone().requires_grad_() for factor in (binary.left, binary.right))
    assert torch.autograd.gradcheck(
        lambda *given: slim.sign_low_rank(given[0], binary.signs, *given[1:]), (x, left, right)
    )


@pytest.mark.parametrize("activation", ["int8", "float8_e4m3fn"])
def test_rounded_inputs_pass_opcheck(make_linear: Callable[..., PackedLinear], activation: str) -> None:
    packed = make_linear(6, 20, 4, rank=3, scaled=True, dtype=torch.float32)
    packed.activation = activation
    attributes = linear_attributes(packed.format)
    x = torch.randn(2, 3, 20, requires_grad=True)
    torch.library.opcheck(slim.linear.default, arguments(packed, x, None), attributes)
    rounding = {"activation": attributes["activation"]}
    for one in (x, x.detach().bfloat16(), x.detach().transpose(0, 2)):
        torch.library.opcheck(slim.round_activations.default, (one,), rounding)


def test_gradients_pass_through_rounding_as_they_are(make_linear: Callable[..., PackedLinear]) -> None:
    packed = make_linear(6, 20, 4, rank=3, scaled=True, dtype=torch.float32)
    x = torch.randn(2, 20, requires_grad=True)
    (plain,) = torch.autograd.grad(apply_packed(x, packed).sum(), x)
    packed.activation = "int8"
    (rounded,) = torch.autograd.grad(apply_packed(x, packed).sum(), x)
    assert torch.equal(rounded, plain)
    upstream = torch.randn(2, 20)
    (own,) = torch.autograd.grad(slim.round_activations(x, activation=2), x, upstream)
    assert torch.equal(own, upstream)


@pytest.mark.parametrize("form", [form for form in FORMS.values() if form != {"bits": None}])
def test_weights_pass_opcheck_and_decode(make_weight, form: dict[str, Any]) -> None:
    packed = make_weight(6, 20, **form)
    tensors = (packed.values, packed.pattern, packed.scale, packed.zero_point)
    attributes = weight_attributes(packed.format)
    match packed.format.sparsity:
        case NM():
            op, inputs = slim.dequant_nm, tensors
        case Unstructured():
            op, inputs = slim.dequant_mask, tensors
        case None:
            op, inputs = slim.dequant, (packed.values, packed.scale, packed.zero_point)
    if op is not slim.dequant_nm:
        del attributes["n"], attributes["m"]
    torch.library.opcheck(op.default, inputs, attributes)
    assert torch.equal(op(*inputs, **attributes), packed.decode())


@forms
@dtypes
def test_linear_is_within_its_rounding_errors(make_linear, form: dict[str, Any], dtype) -> None:
    packed = make_linear(6, 20, rank=3, scaled=True, dtype=dtype, **form)
    x, bias = torch.randn(2, 3, 20, dtype=dtype), torch.randn(6, dtype=dtype)
    scale = packed.input_scale.double()
    base, left, right = (part.decode().double() for part in (packed.weight, packed.left, packed.right))
    exact = (x.double() * scale) @ base.t() + bias.double() + (x.double() @ right.t()) @ left.t()
    size = (x.double().abs() * scale) @ base.abs().t() + bias.double().abs()
    size = size + (x.double().abs() @ right.abs().t()) @ left.abs().t()
    # Three roundings on each way from an input to y (scaled input or inner product, product, sum), with one more
    # for their products with each other, and sums of at most 20 terms in float32.
    unit = torch.finfo(dtype).eps / 2
    bound = (4 * unit + 21 * 2.0**-24) * size
    y = apply_packed(x, packed, bias)
    assert y.dtype == dtype
    assert bool(((y.double() - exact).abs() <= bound).all())


def test_the_fused_op_equals_its_parts(make_linear) -> None:
    packed = make_linear(6, 20, 4, rank=3, scaled=True, sparsity=NM(2, 4))
    x, bias = torch.randn(5, 20).bfloat16(), torch.randn(6).bfloat16()
    product = torch.nn.functional.linear(x * packed.input_scale, packed.weight.decode(), bias)
    parts = product + slim.low_rank(x, packed.left.decode(), packed.right.decode())
    assert torch.equal(apply_packed(x, packed, bias), parts)


def test_low_rank_passes_opcheck_and_gradcheck() -> None:
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4, 5), (3, 2), (2, 5))]
    torch.library.opcheck(slim.low_rank.default, tuple(inputs))
    assert torch.autograd.gradcheck(slim.low_rank.default, inputs)


@forms
def test_the_gradient_reaches_input_and_bias(make_linear, form: dict[str, Any]) -> None:
    packed = make_linear(6, 20, rank=3, scaled=True, signs=2, dtype=torch.float64, **form)
    x = torch.randn(2, 20, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: apply_packed(x, packed, bias), (x, bias))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_dtype(make_linear, autocast: torch.dtype) -> None:
    packed = make_linear(6, 20, 4, rank=3, dtype=torch.float32)
    x = torch.randn(2, 20)
    with torch.autocast("cpu", dtype=autocast):
        y = apply_packed(x, packed)
        assert slim.low_rank(x, packed.left.decode(), packed.right.decode()).dtype == torch.float32
    assert torch.equal(y, apply_packed(x, packed))


def test_one_message_in_eager_mode_and_under_a_fake(make_linear) -> None:
    packed = make_linear(6, 20, 4, rank=3, signs=1, sparsity=NM(2, 4))
    good, attributes = arguments(packed, torch.randn(2, 20), None), linear_attributes(packed.format)

    def message(position: int | None = None, wrong: Tensor | None = None, **changes: int) -> str:
        inputs = list(good)
        if position is not None:
            inputs[position] = wrong
        messages = []
        for device in ("cpu", "meta"):
            moved = [None if tensor is None else tensor.to(device) for tensor in inputs]
            with pytest.raises(RuntimeError) as caught:
                slim.linear(*moved, **attributes | changes)
            messages.append(str(caught.value).splitlines()[0])
        assert messages[0] == messages[1]
        return messages[0]

    assert message(0, torch.randn(2, 19)) == "x must be [..., 20], not (2, 19)"
    assert message(0, torch.ones(2, 20, dtype=torch.int64)) == "x must be floating point, not torch.int64"
    assert message(1, good[1][:, :3]) == "values must have shape (6, 5), not (6, 3)"
    assert message(1, good[1].to(torch.int16)) == "values must be uint8 bit streams, not torch.int16"
    assert message(2, good[2].float()) == "pattern must be torch.uint8, not torch.float32"
    assert message(3, good[3][:2]) == "scale must have shape (6, 1), not (2, 1)"
    assert message(3, good[3].to(torch.uint8)) == "scale must be floating point, not torch.uint8"
    assert message(3, None) == "bits 4 needs a scale"
    assert message(5, torch.ones(3)) == "input_scale must have shape (20,), not (3,)"
    assert message(13, torch.ones(3)) == "bias must have shape (6,), not (3,)"
    assert message(10, good[10][:, :2]) == "signs must have shape (6, 3), not (6, 2)"
    assert message(10, None) == "signs, sign_left and sign_right belong together"
    assert message(11, good[11][:, :0]) == "left has the rank 0, right 1"
    assert message(12, good[12][:, :8]) == "x must be [..., 8], not (2, 20)"
    assert message(6, None) == "rank 3 needs both of left_values and right_values"
    assert message(m=3) == "2:3 sparsity does not fit 20 columns"
    assert message(bits=9) == "bits must be 0 or 2 to 8, not 9"
    assert message(activation=3) == "activation must be 0, 1 or 2, not 3"
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match="activation must be 1 .int8. or 2 .float8., not 0"):
            slim.round_activations(torch.ones(2, 3, device=device), activation=0)
        with pytest.raises(RuntimeError, match="x must be floating point .*columns., not torch.int64"):
            slim.round_activations(torch.ones(2, dtype=torch.int64, device=device), activation=1)


def test_the_table_documents_every_op() -> None:
    dequants = {"slim::dequant", "slim::dequant_nm", "slim::dequant_mask"}
    assert set(OPS) == dequants | {
        "slim::round_activations",
        "slim::low_rank",
        "slim::sign_low_rank",
        "slim::linear",
    }
    assert all(op.doc for op in OPS.values())
    assert OPS["slim::dequant"].schema == (
        "(Tensor values, Tensor scale, Tensor? zero_point, *, int bits, int columns, int group, "
        "int[] widths=[]) -> Tensor"
    )
