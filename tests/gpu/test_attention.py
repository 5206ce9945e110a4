"""Attention of a few queries: as near as roundings allow, whatever a mask hides and however a cache lies in memory."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from slimc.backends.cuda.attention import attend, refuses

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def random(*sizes: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(sizes))
    return torch.randn(*sizes, dtype=dtype, device="cuda", generator=generator)


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> None:
    assert refuses(q, k, v, mask) is None
    y = attend(q, k, v, mask, scale)
    assert torch.equal(y, attend(q, k, v, mask, scale))
    scores = scale * q.double() @ k.double().transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1).nan_to_num()
    exact = weights @ v.double()
    # The result is rounded once; scores are sums in float32, whose errors change weights in proportion.
    size = weights @ v.double().abs()
    error_of_scores = 2**-20 * (scale * q.double().abs() @ k.double().abs().transpose(-1, -2)).amax(-1, keepdim=True)
    bound = torch.finfo(q.dtype).eps / 2 * exact.abs() + (2 * error_of_scores + 2**-18) * size + 1e-7
    assert bool(((y.double() - exact).abs() <= bound).all())


@dtypes
@pytest.mark.parametrize("numbers", [64, 128])
@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("keys", [1, 15, 64, 65, 640, 5000])
def test_it_is_attention(dtype: torch.dtype, numbers: int, rows: int, keys: int) -> None:
    q, k, v = (random(2, 3, size, numbers, dtype=dtype) for size in (rows, keys, keys))
    scale = numbers**-0.5
    check(q, k, v, None, scale)
    filled = torch.arange(keys, device="cuda") < max(1, keys - 37)
    check(q, k, v, filled.expand(1, 1, 1, keys), scale)
    each = torch.rand(2, 1, rows, keys, device="cuda") < 0.5
    check(q, k, v, each, scale)


@dtypes
def test_who_sees_no_key_gets_zeros(dtype: torch.dtype) -> None:
    q, k, v = (random(2, 4, size, 128, dtype=dtype) for size in (2, 700, 700))
    mask = torch.ones(2, 1, 2, 700, dtype=torch.bool, device="cuda")
    mask[1, :, 0] = False
    y = attend(q, k, v, mask, 0.1)
    assert not y[1, :, 0].any()
    check(q, k, v, mask, 0.1)


def test_hidden_keys_may_hold_anything() -> None:
    q, k, v = (random(1, 2, size, 128, dtype=torch.bfloat16) for size in (1, 640, 640))
    mask = (torch.arange(640, device="cuda") < 100).view(1, 1, 1, 640)
    expected = attend(q, k, v, mask, 0.1)
    k[:, :, 128:], v[:, :, 128:] = torch.nan, torch.nan
    assert torch.equal(attend(q, k, v, mask, 0.1), expected)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (30 * random(1, 2, size, 64, dtype=torch.float16) for size in (1, 300, 300))
    check(q, k, v, None, 1.0)


def test_however_it_lies_in_memory() -> None:
    q = random(2, 1, 4, 128, dtype=torch.bfloat16).transpose(1, 2)
    k, v = (random(2, 200, 4, 128, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    check(q, k, v, None, 0.1)
    # Keys that do not begin at 16 bytes are left to PyTorch, which rounds elsewhere.
    shifted = torch.empty(k.numel() + 1, dtype=k.dtype, device="cuda")[1:].view(2, 4, 200, 128).copy_(k)
    assert torch.allclose(attend(q, shifted, v, None, 0.1), attend(q, k, v, None, 0.1), atol=0.02)


def test_replays_of_a_graph_follow_the_cache() -> None:
    q, k, v = (random(2, 8, size, 128, dtype=torch.bfloat16) for size in (1, 640, 640))
    mask = torch.zeros(1, 1, 1, 640, dtype=torch.bool, device="cuda")
    attend(q, k, v, mask, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = attend(q, k, v, mask, 0.1)
    for first, last in pairwise((0, 1, 300, 640)):
        mask[..., first:last] = True
        graph.replay()
        assert torch.equal(y, attend(q, k, v, mask, 0.1))
