"""Laws of scores and masks: exact counts, what is kept, and how ties fall."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimc.errors import InputError, NumericsError, RecipeError
from slimc.passes.solvers import magnitude_scores, nm_mask, unstructured_mask, wanda_scores


def scores_of(seed: int, rows: int, columns: int) -> Tensor:
    """Few distinct values, so that ties are everywhere."""
    return torch.randint(0, 5, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.data())
def test_nm_keeps_exactly_the_n_highest(seed: int, rows: int, blocks: int, m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m))
    scores = scores_of(seed, rows, blocks * m)
    mask = nm_mask(scores, n, m)
    for block, kept in zip(scores.view(-1, m).tolist(), mask.view(-1, m).tolist(), strict=True):
        expected = sorted(range(m), key=lambda column: (-block[column], column))[:n]
        assert [column for column in range(m) if kept[column]] == sorted(expected)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 40), st.floats(0, 0.99))
def test_unstructured_drops_exactly_the_lowest(seed: int, rows: int, columns: int, ratio: float) -> None:
    scores = scores_of(seed, rows, columns)
    by_row = unstructured_mask(scores, ratio)
    dropped = math.floor(ratio * columns + 1e-9)
    assert bool(((~by_row).sum(dim=1) == dropped).all())
    for row, kept in zip(scores.tolist(), by_row.tolist(), strict=True):
        expected = sorted(range(columns), key=lambda column: (-row[column], column))[: columns - dropped]
        assert [column for column in range(columns) if kept[column]] == sorted(expected)
    whole = unstructured_mask(scores, ratio, per="tensor")
    assert int((~whole).sum()) == math.floor(ratio * rows * columns + 1e-9)
    assert torch.equal(whole.flatten(), unstructured_mask(scores.view(1, -1), ratio)[0])


def test_ratios_mean_what_they_say_in_decimal() -> None:
    # In binary 0.29 * 100 is 28.999999999999996.
    assert int((~unstructured_mask(torch.rand(1, 100), 0.29)).sum()) == 29


def test_scores_are_as_published() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.0]]).bfloat16()
    sum_squares = torch.tensor([9.0, 16.0])
    assert torch.equal(magnitude_scores(weight), weight.abs().float())
    assert wanda_scores(weight, sum_squares).tolist() == [[3.0, 8.0], [1.5, 0.0]]
    assert wanda_scores(weight, sum_squares, 4).tolist() == [[1.5, 4.0], [0.75, 0.0]]
    assert wanda_scores(weight, sum_squares).dtype == torch.float32


def test_refusals_say_what_to_do() -> None:
    weight = torch.ones(3, 6)
    with pytest.raises(RecipeError, match=r"2:4 does not divide a matrix of shape \(3, 6\): 6 columns .* choose an m"):
        nm_mask(weight, 2, 4)
    with pytest.raises(RecipeError, match=r"the pattern 3:2 keeps 3 of every 2; give 1 <= n <= m"):
        nm_mask(weight, 3, 2)
    with pytest.raises(RecipeError, match=r"the sparsity ratio 1.0 is not valid; give a share to drop"):
        unstructured_mask(weight, 1.0)
    with pytest.raises(RecipeError, match=r"per='column' is not known; choose 'row' or 'tensor'"):
        unstructured_mask(weight, 0.5, per="column")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"'sum_squares' has shape \(5,\) where \(6,\) is needed"):
        wanda_scores(weight, torch.ones(5))
    with pytest.raises(InputError, match="no sum of squares may be negative"):
        wanda_scores(weight, -torch.ones(6))
    calls: list[Callable[[], Tensor]] = [
        lambda: nm_mask(weight * torch.nan, 1, 2),
        lambda: unstructured_mask(weight * torch.nan, 0.5),
        lambda: magnitude_scores(weight * torch.inf),
        lambda: wanda_scores(weight, torch.full((6,), torch.inf)),
    ]
    for call in calls:
        with pytest.raises(NumericsError, match="NaN or Inf"):
            call()
