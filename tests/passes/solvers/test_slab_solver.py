"""Laws of SLaB: budgets that are met, what is exact, that the alternation pays, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slimc.errors import InputError, NumericsError, RecipeError, SlimError
from slimc.passes.solvers import (
    compression_ratio,
    kept_in_row,
    quantize_slim,
    slab,
    sparsegpt,
    truncated_svd,
    unstructured_mask,
    wanda_scores,
)


def layer(seed: int, rows: int = 48, columns: int = 64) -> tuple[Tensor, Tensor]:
    """Return a weight with heavy tails and inputs whose channels are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(400, columns, generator=generator) @ mix
    weight = torch.randn(rows, columns, generator=generator)
    return weight * weight.abs().sqrt(), inputs * torch.rand(columns, generator=generator).mul(2).exp()


def norms(inputs: Tensor) -> Tensor:
    return inputs.square().mean(0).sqrt()


def output_error(inputs: Tensor, weight: Tensor, approximation: Tensor) -> float:
    return float((inputs @ (approximation - weight).T).norm() / (inputs @ weight.T).norm())


@given(
    ratio=st.floats(0.45, 0.8),
    rows=st.integers(100, 5000),
    columns=st.integers(100, 5000),
    rank=st.integers(1, 4),
)
def test_as_much_is_kept_as_the_ratio_allows(ratio: float, rows: int, columns: int, rank: int) -> None:
    kept = kept_in_row(ratio, rows, columns, rank)
    # The definition, in bits, of the summary of the paper.
    bits = 16 * rows * kept + rows * columns + 16 * rank * (rows + columns)
    assert 1 - bits / (16 * rows * columns) >= ratio - 1e-9
    assert 1 - (bits + 16 * rows) / (16 * rows * columns) < ratio
    assert compression_ratio(rows * kept, rows, columns, rank) == pytest.approx(1 - bits / (16 * rows * columns))


def test_the_share_of_the_paper() -> None:
    assert kept_in_row(0.5, 4096, 4096, 1) / 4096 == pytest.approx(0.437, abs=5e-4)
    assert kept_in_row(0.8, 4096, 4096, 1) / 4096 == pytest.approx(0.137, abs=5e-4)


@pytest.mark.parametrize(
    ("ratio", "pattern", "message"),
    [
        (
            0.9,
            None,
            "0.9 cannot be met: .* rank 1 of a 64 x 64 weight take 0.0938 of its 16 bits; ask for at most 0.8906",
        ),
        (0.3, (2, 4), "would keep 38 entries, but the pattern 2:4 keeps 32, which is a ratio of 0.4062"),
    ],
)
def test_a_ratio_that_cannot_be_met(ratio: float, pattern: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        kept_in_row(ratio, 64, 64, 1, pattern)


def test_a_weight_of_one_magnitude_needs_nothing_sparse() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.where(torch.rand(24, 32, generator=generator) < 0.5, -1.0, 1.0)
    left, right = (torch.rand(sides, generator=generator) + 0.5 for sides in ((24, 1), (1, 32)))
    weight = left @ right * signs
    found = slab(weight, None, 8, rounds=40)
    assert torch.equal(found.negative, weight < 0)
    # Entries that S keeps count as if L were right there, so each round brings L nearer by the share they are not.
    assert found.errors[-1] < 1e-4
    assert torch.allclose(found.sparse + found.binary(), weight, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_one_round_is_the_best_magnitude_of_what_pruning_leaves(seed: int) -> None:
    weight, inputs = layer(seed)
    keep, size = 28, norms(inputs)
    found = slab(weight, size, keep, rounds=1)
    residual = weight * ~unstructured_mask(weight.abs() * size, 1 - keep / 64)
    left, right = truncated_svd(residual.abs(), 1)
    # The power iteration stops at some relative 1e-6 of the exact triple.
    assert torch.allclose(found.left @ found.right, left @ right, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.negative, weight < 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
def test_rounds_and_signs_pay(seed: int, pattern: Any) -> None:
    weight, inputs = layer(seed)
    size, keep = norms(inputs), 26
    found = slab(weight, size, keep, pattern)
    assert len(found.errors) == 20
    assert min(found.errors) <= found.errors[0] * 0.95
    assert bool((found.mask.sum(1) == keep).all())
    if pattern is not None:
        assert int(found.mask.unflatten(1, (-1, pattern[1])).sum(-1).max()) <= pattern[0]
    assert not bool(found.sparse[~found.mask].any())
    # What is kept is exact, and the error is that of the best round.
    approximation = found.sparse + found.binary()
    assert torch.allclose(approximation[found.mask], weight[found.mask], rtol=1e-5, atol=1e-6)
    error = float(((approximation - weight) * size).norm() / (weight * size).norm())
    assert error == pytest.approx(min(found.errors), rel=1e-4)
    # At the published ratio, pruning alone may keep the 16th part that the signs take, and more.
    pruned = weight * unstructured_mask(wanda_scores(weight, size.square()), 1 - (keep + 6) / 64)
    if pattern is None:
        assert output_error(inputs, weight, approximation) < output_error(inputs, weight, pruned)


def test_weighting_lowers_the_weighted_error() -> None:
    weight, inputs = layer(0)
    size = norms(inputs)
    plain, weighted = (slab(weight, size, 26, weighting=one) for one in ("none", "activations"))
    assert min(weighted.errors) < min(plain.errors)


def test_higher_ranks_leave_less_where_as_much_is_kept() -> None:
    weight, inputs = layer(1)
    errors = [min(slab(weight, norms(inputs), 26, rank=rank).errors) for rank in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)


def test_stored_codes_are_what_the_rounds_work_against() -> None:
    weight, inputs = layer(2)

    def stored(target: Tensor, mask: Tensor) -> Tensor:
        return quantize_slim(target, 4, 32, mask=mask).dequantize()

    def error(found: Any) -> float:
        return output_error(inputs, weight, stored(found.sparse, found.mask) * found.mask + found.binary())

    size = norms(inputs)
    assert error(slab(weight, size, 32, (2, 4), stored=stored)) < error(slab(weight, size, 32, (2, 4)))


def test_feedback_to_the_sparse_part_pays() -> None:
    weight, inputs = layer(3)
    found = slab(weight, norms(inputs), 32, (2, 4))
    sparse, _ = sparsegpt(weight - found.binary(), inputs.T @ inputs, sparsity=(2, 4))
    plain = output_error(inputs, weight, found.sparse + found.binary())
    assert output_error(inputs, weight, sparse + found.binary()) < 0.95 * plain


def test_factors_are_rounded_before_what_is_sparse_is_chosen() -> None:
    weight, inputs = layer(4)
    found = slab(weight, norms(inputs), 26, dtype=torch.bfloat16)
    for factor in (found.left, found.right):
        assert torch.equal(factor, factor.bfloat16().float())
    approximation = found.sparse + found.binary()
    assert torch.allclose(approximation[found.mask], weight[found.mask], rtol=1e-5, atol=1e-6)
    assert float(found.right.square().mean()) == pytest.approx(1, rel=2**-7)


def test_dead_channels_and_zeros_stay_finite() -> None:
    weight, inputs = layer(5)
    size = norms(inputs)
    size[:5] = 0
    found = slab(weight, size, 26, weighting="activations")
    assert all(bool(part.isfinite().all()) for part in (found.sparse, found.left, found.right))
    assert not bool(found.mask[:, :5].any())
    nothing = slab(torch.zeros(8, 16), None, 4)
    assert nothing.errors == (0.0,) * 20
    assert not bool((nothing.sparse + nothing.binary()).any())


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"weight": torch.zeros(0, 4)}, InputError, "non-empty matrix"),
        ({"weight": torch.full((8, 16), torch.nan)}, NumericsError, "argument 'weight'.*NaN or Inf"),
        ({"norms": torch.full((16,), torch.inf)}, NumericsError, "argument 'norms'.*NaN or Inf"),
        ({"norms": torch.full((16,), -1.0)}, InputError, "'norms' has negative entries"),
        ({"norms": torch.ones(15)}, InputError, r"shape \(15,\) where \(16,\)"),
        ({"keep": 0}, RecipeError, "keep=0 of 16 entries"),
        ({"keep": 17}, RecipeError, "keep=17 of 16 entries"),
        ({"pattern": (2, 5)}, RecipeError, "2:5 does not divide"),
        ({"rank": 9}, RecipeError, "rank 9 does not fit a 8 x 16 weight"),
        ({"rounds": 0}, RecipeError, "rounds=0 makes no decomposition"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], kind: type[SlimError], message: str) -> None:
    given = {"weight": torch.ones(8, 16), "norms": torch.ones(16), "keep": 4} | change
    with pytest.raises(kind, match=message):
        slab(**given)
