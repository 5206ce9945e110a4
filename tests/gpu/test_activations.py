"""Rounded inputs on the GPU: the same codes as on the CPU, and products that keep to the bound of every kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimc.backends import KERNELS
from slimc.backends.cuda.rounding import round_inputs
from slimc.bench.unwritten import into_nans
from slimc.runtime.activations import quantize_tokens, round_tokens
from slimc.runtime.formats import ACTIVATIONS
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear

kinds = pytest.mark.parametrize("kind", ACTIVATIONS)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_the_cpu(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1000, generator=generator) * torch.linspace(-10, 10, 300).exp2()[:, None]
    x[0] = 0
    x = x.to(dtype)
    codes, scale = quantize_tokens(x, kind)
    found_codes, found_scale = quantize_tokens(x.cuda(), kind)
    assert torch.equal(found_scale.cpu(), scale)
    assert torch.equal(found_codes.cpu().view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(round_tokens(x.cuda(), kind).cpu(), round_tokens(x, kind))


@kinds
@dtypes
@pytest.mark.parametrize("columns", [8, 448, 4096, 11008, 40000])
@pytest.mark.parametrize("tokens", [1, 17, 200])
def test_one_launch_rounds_to_the_same_bits(kind: str, dtype: torch.dtype, columns: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(columns + tokens)
    exponents = torch.linspace(-14, 12, tokens)[:, None]
    x = (torch.randn(tokens, columns, generator=generator) * exponents.exp2()).to(dtype).cuda()
    expected = round_tokens(x, kind)
    assert torch.equal(into_nans(round_inputs, x, kind), expected)
    # A view that begins anywhere, and one whose tokens lie apart.
    shifted = torch.empty(x.numel() + 1, dtype=dtype, device="cuda")[1:].view_as(x).copy_(x)
    assert torch.equal(round_inputs(shifted, kind), expected)
    assert torch.equal(round_inputs(x.t().contiguous().t(), kind), expected)


@kinds
@dtypes
def test_one_launch_rounds_extremes_as_the_definition_does(kind: str, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0] = 0
    x[1] *= limits.tiny
    x[2] = limits.tiny * limits.eps
    x[3] = limits.max
    x[4, 5] = torch.inf
    x[5, 6] = torch.nan
    x[6, 7] = -limits.max
    x[7] = -0.0
    found, expected = round_inputs(x.cuda(), kind), round_tokens(x.cuda(), kind)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@kinds
@dtypes
@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_a_layer_keeps_to_the_bound(
    kind: str,
    dtype: torch.dtype,
    tokens: int,
    random_layer: Callable[..., PackedLinear],
    rounded_product: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    packed = replace(random_layer(272, 448, 27, dtype=dtype), activation=kind)
    bias = torch.randn(272, device="cuda").to(dtype)
    layer = SlimLinear(packed, bias, kernels=KERNELS).cuda()
    x = torch.randn(tokens, 448, generator=torch.Generator().manual_seed(tokens)).to(dtype).cuda()
    ideal, bound = rounded_product(packed, x, bias)
    assert bool(((layer(x).double() - ideal).abs() <= bound).all())
