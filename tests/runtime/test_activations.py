"""Rounding tokens to 8 bits: the codes by their definition, the error by its bound, and each token by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slimc.errors import FormatError
from slimc.runtime.activations import LARGEST, quantize_tokens, refuses_codes, round_tokens
from slimc.runtime.formats import ACTIVATIONS
from slimc.runtime.ops import apply_packed
from slimc.runtime.packing import NM, PackedLinear

kinds = pytest.mark.parametrize("kind", ACTIVATIONS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@st.composite
def activations(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens of very different sizes with an outlier here and there, as language models have them."""
    tokens, columns = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x *= torch.tensor([draw(st.floats(-20, 12)) for _ in range(tokens)], dtype=torch.float64).exp2()[:, None]
    if draw(st.booleans()):
        x[:, 0] *= 50
    if draw(st.booleans()):
        x[0, : columns // 2] = 0
    return x.clamp(-60000, 60000).to(dtype)


def exact_bound(kind: str, x: Tensor, scale: Tensor) -> Tensor:
    """Half a step of int8, 1/16 of the value in float8 (1/1024 of a step for its subnormals), and float32's own."""
    own = (x.double().abs() + scale.double()) * 2.0**-21
    if kind == "int8":
        return scale.double() / 2 + own
    return torch.maximum(x.double().abs() / 16, scale.double() / 1024) + own


@kinds
@given(x=st.sampled_from(DTYPES).flatmap(activations))
def test_codes_and_scales_are_within_half_a_step(kind: str, x: Tensor) -> None:
    codes, scale = quantize_tokens(x, kind)
    assert (codes.dtype, scale.dtype) == (getattr(torch, kind), torch.float32)
    assert codes.shape == x.shape
    assert scale.shape == (len(x), 1)
    assert float(codes.float().abs().max()) <= LARGEST[kind]
    error = (scale.double() * codes.double() - x.double()).abs()
    assert bool((error <= exact_bound(kind, x, scale)).all())
    # The largest magnitude of a token has the largest code.
    largest = x.float().abs().amax(-1, keepdim=True)
    assert torch.equal(codes.float().abs().amax(-1, keepdim=True) == LARGEST[kind], largest > 0)


@kinds
@given(x=activations())
def test_scales_and_quotients_are_correctly_rounded(kind: str, x: Tensor) -> None:
    codes, scale = quantize_tokens(x, kind)
    values = x.numpy()
    expected = np.abs(values).max(-1, keepdims=True) / np.float32(LARGEST[kind])
    expected[expected == 0] = 1
    assert np.array_equal(scale.numpy(), expected)
    quotient = (values / expected).clip(-LARGEST[kind], LARGEST[kind])
    if kind == "int8":
        assert np.array_equal(codes.numpy(), np.rint(quotient))
    else:
        assert torch.equal(codes.float(), torch.from_numpy(quotient).to(codes.dtype).float())


@kinds
@given(x=st.sampled_from(DTYPES).flatmap(activations))
def test_rounding_back_is_one_more_rounding(kind: str, x: Tensor) -> None:
    codes, scale = quantize_tokens(x, kind)
    rounded = round_tokens(x, kind)
    assert rounded.dtype == x.dtype
    exact = scale.double() * codes.double()
    unit = torch.finfo(x.dtype).eps / 2 + 2.0**-24
    tiny = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    assert bool(((rounded.double() - exact).abs() <= unit * exact.abs() + tiny).all())


@kinds
@given(x=activations(torch.bfloat16))
def test_every_token_is_rounded_by_itself(kind: str, x: Tensor) -> None:
    together = round_tokens(x, kind)
    assert torch.equal(together, torch.stack([round_tokens(token, kind) for token in x]))
    assert torch.equal(together.view(1, *x.shape), round_tokens(x.view(1, *x.shape), kind))


def test_int8_rounds_half_to_even_and_never_uses_minus_128() -> None:
    codes, scale = quantize_tokens(torch.tensor([-127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]), "int8")
    assert float(scale) == 1
    assert codes.tolist() == [-127, 0, 2, 2, 0, -2, 126]


def test_float8_keeps_small_values_that_int8_loses() -> None:
    x = torch.tensor([448.0, -448.0, 1.0, 17.0, 2.0**-9, 2.0**-11])
    assert round_tokens(x, "float8_e4m3fn").tolist() == [448, -448, 1, 16, 2.0**-9, 0]
    assert round_tokens(x, "int8")[2:].tolist() == pytest.approx([0, 5 * 448 / 127, 0, 0])


@kinds
def test_zeros_stay_zeros_and_get_the_scale_one(kind: str) -> None:
    x = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [3.0, -1.0]])
    codes, scale = quantize_tokens(x, kind)
    assert scale[:2].tolist() == [[1.0], [1.0]]
    assert not codes[:2].float().any()
    assert round_tokens(x, kind)[0].tolist() == [0.0, 0.0]
    assert round_tokens(x[:0], kind).shape == (0, 2)


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_own_token_only(kind: str, bad: float) -> None:
    rounded = round_tokens(torch.tensor([[1.0, bad, 2.0], [1.0, -2.0, 2.0]]), kind)
    assert bool(rounded[0].isnan().all())
    assert bool(rounded[1].isfinite().all())


def test_other_kinds_are_refused() -> None:
    with pytest.raises(FormatError, match="inputs cannot be rounded to 'int4': use one of int8, float8_e4m3fn"):
        quantize_tokens(torch.ones(2), "int4")


@pytest.mark.parametrize(
    ("bits", "asymmetric", "kind", "reason"),
    [
        (4, False, "int8", None),
        (8, False, "int8", None),
        (4, True, "int8", None),
        (8, True, "int8", "codes of its weight go up to 255, but int8 is exact up to 128 only"),
        (None, False, "int8", "its weight has no codes, so no product of 8 bits is to be had"),
        (5, False, "float8_e4m3fn", None),
        (4, True, "float8_e4m3fn", None),
        (8, False, "float8_e4m3fn", "codes of its weight go up to 128, but float8_e4m3fn is exact up to 16 only"),
    ],
)
def test_weights_whose_codes_do_not_fit_are_refused(
    bits: int | None, asymmetric: bool, kind: str, reason: str | None
) -> None:
    assert refuses_codes(bits, asymmetric, kind) == reason
    if bits is not None and reason is None:
        low, high = (1 - 2**bits, 2**bits - 1) if asymmetric else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        codes = torch.arange(low, high + 1)
        assert torch.equal(codes.to(getattr(torch, kind)).long(), codes)


FORMS: dict[str, dict[str, Any]] = {
    "2:4 per tensor": {"bits": 4, "per_tensor": True, "sparsity": NM(2, 4)},
    "groups": {"bits": 3, "group": 16, "asymmetric": True},
    "int8": {"bits": 8},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@forms
@given(x=activations())
def test_the_error_of_a_product_is_half_a_step_times_the_sum_of_the_weights(
    make_linear: Callable[..., PackedLinear], form: dict[str, Any], x: Tensor
) -> None:
    packed = make_linear(6, 40, dtype=torch.float32, **form)
    x = torch.nn.functional.pad(x, (0, 40 - x.shape[1]))
    exact = apply_packed(x, packed).double()
    packed.activation = "int8"
    scale = x.abs().amax(1, keepdim=True).double() / 127
    total = packed.weight.decode().double().abs().sum(1)
    error = (apply_packed(x, packed).double() - exact).abs()
    rounding = x.double().abs().amax(1, keepdim=True) * total * 44 * 2.0**-24
    assert bool((error <= scale / 2 * total + 2 * rounding).all())


@forms
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_the_reference_keeps_to_the_bound_of_kernels(
    make_linear: Callable[..., PackedLinear],
    rounded_product: Callable[..., tuple[Tensor, Tensor]],
    form: dict[str, Any],
    kind: str,
    dtype: torch.dtype,
) -> None:
    packed = make_linear(6, 64, rank=3, scaled=True, dtype=dtype, **form)
    packed.activation = kind
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 50, 64, generator=generator).to(dtype)
    bias = torch.randn(6, generator=generator).to(dtype)
    ideal, bound = rounded_product(packed, x, bias)
    assert bool(((apply_packed(x, packed, bias).double() - ideal).abs() <= bound).all())
    # The bound is of use: it tells the other kind, and no rounding at all, apart.
    others = {None, *ACTIVATIONS} - {kind}
    for other in others if dtype == torch.float32 else ():
        packed.activation = other
        assert not bool(((apply_packed(x, packed, bias).double() - ideal).abs() <= bound).all())


def test_adapters_read_what_is_neither_scaled_nor_rounded(make_linear: Callable[..., PackedLinear]) -> None:
    packed = make_linear(6, 20, 4, rank=3, scaled=True)
    packed.activation = "int8"
    x = torch.randn(5, 20).bfloat16()
    product = torch.nn.functional.linear(round_tokens(x * packed.input_scale, "int8"), packed.weight.decode())
    correction = torch.ops.slim.low_rank(x, packed.left.decode(), packed.right.decode())
    assert torch.equal(apply_packed(x, packed), product + correction)
