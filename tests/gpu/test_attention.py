"""Attention of a new token: as near as roundings allow, whatever a mask hides and however a cache lies in memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends.cuda.attention import attend_next, refuses
from slimc.bench.unwritten import into_nans

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])

Case = tuple[Any, ...]


def random(*sizes: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(sizes))
    return torch.randn(*sizes, dtype=dtype, device="cuda", generator=generator)


def make_case(
    batch: int, heads: int, rows: int, length: int, numbers: int, position: int, dtype: torch.dtype = torch.bfloat16
) -> Case:
    # As a product of a stack and a cache hold them: the heads of a token side by side, the tokens of a head.
    stacked = random(batch, (rows + 2) * heads * numbers, dtype=dtype)
    parts = stacked.split([rows * heads * numbers, heads * numbers, heads * numbers], -1)
    q, k, v = (part.view(batch, 1, -1, numbers).transpose(1, 2) for part in parts)
    angle = torch.rand(1, 1, 1, numbers // 2, device="cuda") * 6
    cos, sin = (torch.cat((one, one), -1).to(dtype) for one in (angle.cos(), angle.sin()))
    keys, values = (random(batch, heads, length, numbers, dtype=dtype) for _ in range(2))
    values += 0.5
    mask = (torch.arange(length, device="cuda") <= position).view(1, 1, 1, length)
    return q, k, v, cos, sin, keys, values, torch.tensor(position, device="cuda"), mask, numbers**-0.5


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.double().chunk(2, -1)
    return x.double() * cos.double() + torch.cat((-second, first), -1) * sin.double()


def check(case: Case) -> Tensor:
    q, k, v, cos, sin, keys, values, position, mask, scale = case
    assert refuses(case[:7], mask) is None
    again = keys.clone(), values.clone()
    before = keys.clone(), values.clone()
    y = into_nans(attend_next, *case)
    assert torch.equal(y, attend_next(q, k, v, cos, sin, *again, position, mask, scale))
    assert torch.equal(again[0], keys)
    assert torch.equal(again[1], values)
    where = int(position)
    unit = torch.finfo(q.dtype).eps / 2
    turned = turn(k, cos, sin)
    spread = turn(k.abs(), cos.abs(), sin.abs()).abs() + 2 * k.double().abs()
    assert bool(((keys[:, :, where : where + 1] - turned).abs() <= unit * turned.abs() + 2**-22 * spread).all())
    assert torch.equal(values[:, :, where : where + 1], v)
    for cache, old in zip((keys, values), before, strict=True):
        cache = cache.clone()
        cache[:, :, where] = old[:, :, where]
        assert torch.equal(cache, old)
    # Queries are rounded once they are turned; the cache holds what was rounded.
    rows = q.shape[1] // k.shape[1]
    every, of_all = (one.double().repeat_interleave(rows, 1) for one in (keys, values))
    scores = scale * turn(q, cos, sin) @ every.transpose(-1, -2)
    size = scale * turn(q, cos, sin).abs() @ every.transpose(-1, -2).abs()
    if mask is not None:
        scores, size = scores.masked_fill(~mask, -math.inf), size.masked_fill(~mask, 0)
    weights = scores.softmax(-1).nan_to_num()
    exact, most = weights @ of_all, weights @ of_all.abs()
    # An error of a score changes its weight in proportion; that of a query's rounding is the largest.
    error_of_scores = (unit + 2**-20) * size.amax(-1, keepdim=True)
    bound = unit * exact.abs() + (2 * error_of_scores + 2**-18) * most + 1e-7
    assert bool(((y.double() - exact).abs() <= bound).all())
    return y


@dtypes
@pytest.mark.parametrize("numbers", [64, 128])
@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize(("length", "position"), [(1, 0), (15, 14), (64, 3), (65, 64), (640, 530), (5000, 4096)])
def test_it_is_attention(dtype: torch.dtype, numbers: int, rows: int, length: int, position: int) -> None:
    case = make_case(2, 3, rows, length, numbers, position, dtype)
    check(case)
    check((*case[:8], None, case[9]))
    each = torch.rand(2, 1, 1, length, device="cuda") < 0.5
    check((*case[:8], each, case[9]))
    of_heads = torch.rand(2, 3 * rows, 1, length, device="cuda") < 0.5
    check((*case[:8], of_heads, case[9]))


@pytest.mark.parametrize("batch", [1, 16, 40])
def test_however_many_blocks_share_a_head(batch: int) -> None:
    check(make_case(batch, 32, 1, 640, 128, 512))


def test_who_sees_no_key_gets_zeros() -> None:
    case = make_case(2, 4, 2, 700, 128, 9)
    mask = torch.ones(2, 1, 1, 700, dtype=torch.bool, device="cuda")
    mask[1] = False
    y = check((*case[:8], mask, case[9]))
    assert not y[1].any()


def test_hidden_keys_may_hold_anything() -> None:
    case = make_case(1, 2, 1, 640, 128, 99)
    expected = attend_next(*case)
    case[5][:, :, 100:], case[6][:, :, 100:] = torch.nan, torch.nan
    assert torch.equal(attend_next(*case), expected)


def test_large_scores_do_not_overflow() -> None:
    case = make_case(1, 2, 1, 300, 64, 200, torch.float16)
    check((30 * case[0], *case[1:5], 30 * case[5], *case[6:9], 1.0))


def test_what_it_cannot_read_is_left_to_pytorch() -> None:
    case = make_case(2, 4, 1, 200, 128, 77)
    odd = torch.empty(case[5].numel() + 1, dtype=torch.bfloat16, device="cuda")[1:].view_as(case[5]).copy_(case[5])
    y = attend_next(*case[:5], odd, case[6].clone(), *case[7:])
    assert torch.allclose(y, attend_next(*case), atol=0.02)
    assert torch.allclose(odd, case[5], atol=0.04)


def test_replays_of_a_graph_follow_the_position() -> None:
    case = make_case(2, 8, 1, 640, 128, 0)
    attend_next(*case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = attend_next(*case)
    for position in (1, 17, 300, 639):
        case[7].fill_(position)
        case[8].copy_(torch.arange(640, device="cuda") <= position)
        graph.replay()
        found = y.clone()
        assert torch.equal(found, attend_next(*case))
