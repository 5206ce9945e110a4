"""A layer with a residual and a norm, or a gate, ahead of it: what they compute one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends import KERNELS
from slimc.backends.cuda.between import add_norm, gate_by, gated_linears, normed_linears, refuses
from slimc.bench.unwritten import into_nans
from slimc.runtime.modules import SlimLinear

ROWS = 512


@pytest.fixture(params=[512, 4096, 11008], ids=str)
def layers(request: Any, random_layer: Any) -> list[SlimLinear]:
    return [SlimLinear(random_layer(ROWS, request.param, 40), kernels=KERNELS).cuda() for _ in range(2)]


def near(found: Tensor, expected: Tensor) -> None:
    """Sums in another order round a few inputs elsewhere."""
    assert bool((found - expected).abs().max() <= 0.02 * expected.abs().max())


@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
def test_a_norm_ahead(layers: list[SlimLinear], tokens: int) -> None:
    columns = layers[0].in_features
    x, residual = torch.randn(2, 1, tokens, columns, dtype=torch.bfloat16, device="cuda").unbind()
    weight = 1 + torch.randn(columns, dtype=torch.bfloat16, device="cuda") / 4
    assert refuses(x, columns) is None
    handles = [layer._handle for layer in layers]
    total, y = normed_linears(x, residual, weight, 1e-6, handles, rows=2 * ROWS, columns=columns)
    assert torch.equal(total, x + residual)
    exact = total.float()
    normed = weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    near(y, torch.cat([layer(normed) for layer in layers], -1))
    again = normed_linears(x, residual, weight, 1e-6, handles, rows=2 * ROWS, columns=columns)
    assert torch.equal(again[1], y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [8, 512, 4096, 11008])
@pytest.mark.parametrize("tokens", [1, 17, 64, 65])
def test_norms_and_gates_are_written_whole(columns: int, tokens: int, dtype: torch.dtype) -> None:
    x, other = torch.randn(2, tokens, columns, dtype=dtype, device="cuda").unbind()
    weight = 1 + torch.randn(columns, dtype=dtype, device="cuda") / 4
    assert refuses(x, columns) is None
    total, normed = into_nans(lambda: torch.stack(add_norm(x, other, weight, 1e-6))).unbind()
    assert torch.equal(total, x + other)
    exact = total.double()
    near(normed, (weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6))).to(dtype))

    def gate() -> Tensor:
        y = gate_by(x, other)
        assert y is not None
        return y

    near(into_nans(gate), (functional.silu(x.double()) * other.double()).to(dtype))


@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
def test_a_gate_ahead(layers: list[SlimLinear], tokens: int) -> None:
    columns = layers[0].in_features
    both = torch.randn(tokens, 2 * columns, dtype=torch.bfloat16, device="cuda")
    gate, up = both.split(columns, -1)
    y = gated_linears(gate, up, [layers[0]._handle], rows=ROWS, columns=columns)
    near(y, layers[0](functional.silu(gate) * up))
    assert torch.equal(y, gated_linears(gate, up, [layers[0]._handle], rows=ROWS, columns=columns))
