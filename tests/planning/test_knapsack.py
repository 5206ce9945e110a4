"""The knapsack against every combination that there is."""

from __future__ import annotations

import itertools
import random

import pytest

from slimc.errors import RecipeError
from slimc.planning import knapsack


def _total(table, chosen):
    return sum(options[option] for options, option in zip(table, chosen, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_no_combination_within_the_budget_is_better(seed):
    draw = random.Random(seed)
    units, options = draw.randint(1, 5), draw.randint(1, 5)
    costs = [[draw.randint(1, 10**6) for _ in range(options)] for _ in range(units)]
    # From damages that would vanish in a solver's tolerance to those that would drown the others.
    damages = [[10 ** draw.uniform(-9, 0) for _ in range(options)] for _ in range(units)]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = draw.randint(least, most)
    solution = knapsack.solve(damages, costs, budget)
    possible = itertools.product(range(options), repeat=units)
    best = min(_total(damages, one) for one in possible if _total(costs, one) <= budget)
    assert _total(costs, solution.chosen) <= budget
    assert _total(damages, solution.chosen) <= best * (1 + knapsack.GAP)


def test_a_budget_for_everything_takes_the_least_damage_everywhere():
    solution = knapsack.solve([[0.0, 3.0, 9.0]] * 4, [[16, 4, 2]] * 4, 64)
    assert solution == knapsack.Solution([0, 0, 0, 0], 0.0)


def test_the_least_budget_is_met_exactly():
    assert knapsack.solve([[0.0, 3.0, 9.0]] * 4, [[16, 4, 2]] * 4, 8).chosen == [2] * 4


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(RecipeError, match="costs less than 8, and the budget is 7.5"):
        knapsack.solve([[0.0, 3.0, 9.0]] * 4, [[16, 4, 2]] * 4, 7.5)
