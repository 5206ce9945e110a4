"""The order of channels: never worse, the same every time, and as good as trying everything where that can be tried."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slimc.passes.solvers.permutation import best_order, kept_share


def scores(rows: int, channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, channels, generator=generator) * torch.randn(channels, generator=generator).exp()


@given(st.integers(1, 9), st.integers(1, 6), st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2)]), st.integers(0, 99))
def test_an_order_is_a_permutation_and_loses_nothing(
    rows: int, groups: int, pattern: tuple[int, int], seed: int
) -> None:
    n, m = pattern
    given_scores = scores(rows, groups * m, seed)
    order = best_order(given_scores, n, m)
    assert order.sort().values.equal(torch.arange(groups * m))
    assert order.equal(best_order(given_scores, n, m))
    # The sums are float32, a term a kept entry.
    slack = 1e-6 * rows * groups * m
    assert kept_share(given_scores[:, order], n, m) >= kept_share(given_scores, n, m) - slack


def test_no_exchange_of_two_channels_helps_any_more() -> None:
    given_scores = scores(3, 8, 5)
    order = best_order(given_scores, 2, 4)
    found = kept_share(given_scores[:, order], 2, 4)
    for first in range(4):
        for second in range(4, 8):
            exchanged = order.clone()
            exchanged[[first, second]] = exchanged[[second, first]]
            assert kept_share(given_scores[:, exchanged], 2, 4) <= found + 1e-6


def test_one_row_keeps_all_that_two_of_four_can_keep() -> None:
    """In one row the best half can always be spread two to a group."""
    row = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    assert kept_share(row, 2, 4) == pytest.approx(22 / 36)
    assert kept_share(row[:, best_order(row, 2, 4)], 2, 4) == pytest.approx(26 / 36)


def test_near_the_best_of_all_orders() -> None:
    for seed in range(3):
        given_scores = scores(2, 6, seed)
        best = max(kept_share(given_scores[:, list(order)], 1, 3) for order in permutations(range(6)))
        first = kept_share(given_scores, 1, 3)
        found = kept_share(given_scores[:, best_order(given_scores, 1, 3)], 1, 3)
        assert found - first >= 0.9 * (best - first)
