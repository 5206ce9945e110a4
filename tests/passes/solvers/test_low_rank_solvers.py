"""Laws of the adapters: optimality, weighting, balance and rank arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimc.errors import InputError, NumericsError, RecipeError
from slimc.passes.solvers import plain_adapters, quantize_factor, resolve_rank, slim_adapters, truncated_svd

EPS = torch.finfo(torch.float32).eps


def matrix(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def remainder(target: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    return float((target.double() - factors[0].double() @ factors[1].double()).norm())


def optimal_remainder(target: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(target.double())[rank:].norm())


SHAPES = [(40, 70), (70, 40), (50, 50)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 39])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_truncated_svd_is_optimal(shape: tuple[int, int], rank: int, decay: float) -> None:
    # With decay the singular values span a range of about exp(12).
    rows, columns = shape
    target = matrix(rank, rows, columns) * torch.exp(-decay * torch.arange(columns))
    left, right = truncated_svd(target, rank)
    assert left.shape == (rows, rank)
    assert right.shape == (rank, columns)
    # The factors are rounded to float32: an error of EPS * |target| on top of the optimal tail.
    bound = optimal_remainder(target, rank) * (1 + 1e-5) + 2 * EPS * float(target.norm())
    assert remainder(target, (left, right)) <= bound
    values = torch.linalg.svdvals(target.double())[:rank]
    for norms in (left.norm(dim=0), right.norm(dim=1)):
        assert torch.allclose(norms.double().square(), values, rtol=1e-4, atol=1e-6 * float(values[0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exhausted_rank_leaves_nothing(shape: tuple[int, int]) -> None:
    target = matrix(0, *shape)
    rank = min(shape)
    saliency = matrix(1, 1, shape[1])[0].abs()
    for factors in (truncated_svd(target, rank), plain_adapters(target, rank), slim_adapters(target, saliency, rank)):
        # Two float32 factors of norm sqrt(s_i) each: every term is rounded by 2 * EPS / 2 of its size.
        assert remainder(target, factors) <= EPS * rank**0.5 * float(target.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_low_rank_is_reproduced(shape: tuple[int, int]) -> None:
    target = matrix(0, shape[0], 3) @ matrix(1, 3, shape[1])
    for rank in (3, 10):
        assert remainder(target, truncated_svd(target, rank)) <= 4 * EPS * float(target.norm())
    zeros = truncated_svd(torch.zeros(shape), 4)
    assert not zeros[0].any()
    assert not zeros[1].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("constant", [1e-8, 1.0, 1e8])
def test_constant_saliency_gives_the_plain_adapters(shape: tuple[int, int], constant: float) -> None:
    error = matrix(3, *shape)
    plain, slim = plain_adapters(error, 5), slim_adapters(error, torch.full((shape[1],), constant), 5)
    assert torch.allclose(plain[0] @ plain[1], slim[0] @ slim[1], atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**16), st.sampled_from(SHAPES), st.integers(1, 30))
def test_slim_adapters_are_the_papers(seed: int, shape: tuple[int, int], rank: int) -> None:
    error = matrix(seed, *shape)
    saliency = matrix(seed + 1, 1, shape[1])[0].abs() + 1e-3
    left, right = slim_adapters(error, saliency, rank)
    # Algorithm 2 word for word, in float64.
    shifted = saliency.double() + saliency.double().min()
    weighted = error.double() * shifted
    u, s, v = torch.linalg.svd(weighted, full_matrices=False)
    paper = (u[:, :rank] * s[:rank]) @ v[:rank] / shifted
    # Equal adapters leave equal weighted errors, and that error is the least that any adapter of this rank leaves.
    ours = ((error.double() - left.double() @ right.double()) * shifted).norm()
    theirs = ((error.double() - paper) * shifted).norm()
    assert float(ours) <= float(theirs) * (1 + 1e-6)
    gap = float((s[rank - 1] - s[rank]) / s[0])
    if gap > 1e-3:
        assert torch.allclose(left.double() @ right.double(), paper, atol=1e-3)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-4)


def test_dead_channels_count_least_but_stay_defined() -> None:
    error = matrix(0, 30, 20)
    saliency = torch.linspace(0.5, 2, 20)
    saliency[4:7] = 0
    left, right = slim_adapters(error, saliency, 6)
    assert bool(right.isfinite().all())
    # The shift by the least positive entry is what the docstring promises.
    weights = saliency + 0.5
    expected = optimal_remainder(error * weights, 6)
    assert float(((error - left @ right) * weights).norm()) == pytest.approx(expected, rel=1e-5)
    naive = plain_adapters(error, 6)
    assert float(((error - naive[0] @ naive[1]) * weights).norm()) > 1.001 * expected


def test_a_huge_range_of_saliency_loses_no_precision() -> None:
    error = matrix(0, 30, 20)
    saliency = torch.logspace(-30, 0, 20)
    left, right = slim_adapters(error, saliency, 8)
    assert bool(right.isfinite().all())
    # An orthogonal projection of the error can only shrink it.
    assert float((error - left @ right).norm()) <= float(error.norm())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 7, 64])
def test_factors_are_quantised_along_their_columns(bits: int, group: int | None) -> None:
    left, right = plain_adapters(matrix(0, 30, 200), 20)
    for factor in (left, right):
        quantized = quantize_factor(factor, bits, group, torch.bfloat16)
        size = factor.shape[1] if group is None else group
        assert quantized.scale.shape == (factor.shape[0], -(-factor.shape[1] // size))
        assert quantized.scale.dtype == torch.bfloat16
        # Half a step, and what the bfloat16 rounding of the scale (2^-9) takes off the end of the range.
        largest = factor.abs().max() / (2 ** (bits - 1) - 1)
        assert float((quantized.dequantize() - factor).abs().max()) <= float(largest / 2 + factor.abs().max() * 2**-8)


def test_rank_arithmetic() -> None:
    assert resolve_rank(0.1, 576, 1536) == 57
    assert resolve_rank(0.1, 1536, 192) == 19
    assert resolve_rank(0.29, 100, 100) == 29
    assert resolve_rank(0.001, 64, 64) == 1
    assert resolve_rank(1.0, 64, 32) == 32
    assert resolve_rank(1, 64, 32) == 1
    assert resolve_rank(32, 64, 32) == 32


def test_refusals_say_what_to_do() -> None:
    error = matrix(0, 8, 6)
    for rank in (0, 7, -1):
        with pytest.raises(RecipeError, match=rf"rank {rank} does not fit a 8 x 6 weight; give 1 to 6, or a share"):
            resolve_rank(rank, 8, 6)
    for share in (0.0, 1.5, float("nan"), True):
        with pytest.raises(RecipeError, match="neither a whole number of at least 1 nor a share"):
            resolve_rank(share, 8, 6)
    with pytest.raises(RecipeError, match="rank 7 does not fit"):
        truncated_svd(error, 7)
    with pytest.raises(InputError, match=r"'saliency' has shape \(8,\) where \(6,\) is needed"):
        slim_adapters(error, torch.ones(8), 2)
    with pytest.raises(InputError, match="'saliency' has negative entries"):
        slim_adapters(error, -torch.ones(6), 2)
    with pytest.raises(NumericsError, match="every input channel has saliency 0"):
        slim_adapters(error, torch.zeros(6), 2)
    for call in (
        lambda: truncated_svd(error * torch.nan, 2),
        lambda: plain_adapters(error * torch.inf, 2),
        lambda: slim_adapters(error, torch.full((6,), torch.nan), 2),
        lambda: quantize_factor(error * torch.nan, 4),
    ):
        with pytest.raises(NumericsError, match="NaN or Inf"):
            call()
