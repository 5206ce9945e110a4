"""Adapters in the norm of the output: the closed form against a plain SVD and against any perturbation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimc.errors import InputError, NumericsError, RecipeError
from slimc.passes.solvers import (
    covariance_adapters,
    damped,
    factored,
    plain_adapters,
    quantize_factor,
    quantized_covariance_adapters,
    regression,
    slim_adapters,
)


def layer(seed: int, rows: int, columns: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    inputs = inputs * torch.randn(columns, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def left_over(error: Tensor, gram: Tensor, left: Tensor, right: Tensor) -> float:
    rest = error.double() - left.double() @ right.double()
    return float(((rest @ gram.double()) * rest).sum())


@pytest.mark.parametrize(("rows", "columns"), [(20, 36), (36, 20), (24, 24)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_error_is_that_of_the_truncated_svd_of_the_outputs(rows: int, columns: int, rank: int) -> None:
    error, gram = layer(rank, rows, columns)
    root = torch.linalg.cholesky(gram.double())
    discarded = torch.linalg.svdvals(error.double() @ root)[rank:].square().sum()
    left, right = covariance_adapters(error, gram, rank)
    assert left.shape == (rows, rank)
    assert right.shape == (rank, columns)
    assert left.dtype == right.dtype == torch.float32
    whole = left_over(error, gram, left * 0, right)
    # Factors are rounded to float32, and a damping of 1e-6 of the mean diagonal moves the optimum by as much.
    assert left_over(error, gram, left, right) <= float(discarded) + 2e-6 * whole


@pytest.mark.parametrize(("rows", "columns"), [(20, 36), (36, 20)])
def test_no_perturbation_lowers_the_error(rows: int, columns: int) -> None:
    error, gram = layer(7, rows, columns)
    left, right = covariance_adapters(error, gram, 6)
    least = left_over(error, gram, left, right)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            other_left = left + size * left.std() * torch.randn(left.shape, generator=generator)
            other_right = right + size * right.std() * torch.randn(right.shape, generator=generator)
            assert left_over(error, gram, other_left, other_right) >= least * (1 - 1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(90, 140), (140, 90)])
def test_large_layers_are_solved_nearly_as_well(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    error, gram = layer(7, rows, columns)
    least = left_over(error, gram, *covariance_adapters(error, gram, 12))
    monkeypatch.setattr("slimc.passes.solvers.covariance.LARGEST_EXACT", 16)
    found = covariance_adapters(error, gram, 12)
    assert least * (1 - 1e-5) <= left_over(error, gram, *found) <= least * 1.002
    again = covariance_adapters(error, gram, 12)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_uncorrelated_equal_inputs_give_the_plain_svd() -> None:
    error, _ = layer(1, 20, 32)
    left, right = covariance_adapters(error, 3 * torch.eye(32), 4)
    plain_left, plain_right = plain_adapters(error, 4)
    assert torch.allclose(left @ right, plain_left @ plain_right, atol=1e-4)


def test_it_is_never_worse_than_the_diagonal() -> None:
    for seed in range(5):
        error, gram = layer(seed, 24, 40)
        diagonal = slim_adapters(error, gram.diagonal().sqrt(), 5)
        full = covariance_adapters(error, gram, 5)
        assert left_over(error, gram, *full) < left_over(error, gram, *diagonal)


@pytest.mark.parametrize(("rows", "columns"), [(12, 40), (60, 40)])
def test_fewer_tokens_than_columns_are_enough(rows: int, columns: int) -> None:
    """The Gram matrix has rank 10 then, so adapters of rank 10 can make good all that the tokens show."""
    error, gram = layer(2, rows, columns, tokens=10)
    left, right = covariance_adapters(error, gram, 10)
    assert bool(left.isfinite().all())
    assert bool(right.isfinite().all())
    assert left_over(error, gram, left, right) <= 1e-4 * left_over(error, gram, left * 0, right)


def test_an_error_of_zero_gives_adapters_of_zero() -> None:
    _, gram = layer(0, 8, 16)
    left, right = covariance_adapters(torch.zeros(8, 16), gram, 3)
    assert bool((left @ right == 0).all())


@pytest.mark.parametrize("seed", range(4))
def test_feedback_makes_good_most_of_what_rounding_the_factors_costs(seed: int) -> None:
    error, gram = layer(seed, 40, 64)
    exact = covariance_adapters(error, gram, 8)
    plain = [quantize_factor(factor, 4, 16).dequantize() for factor in exact]
    left, right = quantized_covariance_adapters(error, damped(gram, 1e-4), 8, 4, 16)
    least, rounded = left_over(error, gram, *exact), left_over(error, gram, *plain)
    found = left_over(error, gram, left.dequantize(), right.dequantize())
    assert least < found < least + 0.6 * (rounded - least)


def test_regression_solves_the_normal_equations() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs, outputs = torch.randn(50, 12, generator=generator), torch.randn(50, 5, generator=generator)
    gram, cross = inputs.T @ inputs, outputs.T @ inputs
    found = regression(gram, cross, 0.01)
    ridge = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(12)
    assert torch.allclose(found @ ridge, cross.double(), rtol=1e-5, atol=1e-5)


def test_a_damped_matrix_can_be_factored_whatever_the_tokens() -> None:
    _, gram = layer(4, 4, 30, tokens=3)
    hessian = damped(gram, 0.01)
    assert float(hessian.diagonal().mean()) == pytest.approx(1.01)
    lower = factored(gram, 0.01)
    assert torch.allclose(lower @ lower.T, hessian)
    assert torch.equal(damped(torch.zeros(3, 3), 0.5), 1.5 * torch.eye(3, dtype=torch.float64))


def test_what_cannot_be() -> None:
    error, gram = layer(0, 8, 16)
    with pytest.raises(RecipeError, match="rank 9 does not fit"):
        covariance_adapters(error, gram, 9)
    with pytest.raises(InputError, match="'gram'"):
        covariance_adapters(error, gram[:4, :4], 2)
    with pytest.raises(NumericsError, match="'error'.*NaN"):
        covariance_adapters(error * torch.nan, gram, 2)
    with pytest.raises(NumericsError, match="negative diagonal"):
        damped(-gram, 0.01)
    with pytest.raises(NumericsError, match="not X.T X of any input"):
        factored(torch.ones(4, 4) - 9 * (torch.ones(4, 4) - torch.eye(4)), 0.01)
    with pytest.raises(RecipeError, match="damping=0 must be above 0"):
        damped(gram, 0)
