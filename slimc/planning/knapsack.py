"""The multiple-choice knapsack: of each unit's options exactly one, within budgets, at the least total damage.

    minimise  sum_u sum_o damage[u][o] x[u][o]   with   sum_o x[u][o] = 1,  sum_u sum_o cost[u][o] x[u][o] <= budget

with x 0 or 1. It is solved as the mixed-integer program that it is, by HiGHS through ``scipy.optimize.milp``:
maintained, free, exact up to a proven gap, and one function with a stable interface. (OR-tools solves it as well, with
more to learn; a heuristic of our own would have to be trusted.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimc.errors import InputError, RecipeError

GAP = 1e-4
"""The share of the least damage by which the solution may miss it."""

SECONDS = 60
"""How long the solver may look for a proof; what it has by then is taken, and its gap told."""

_RESCALE = 1e-2
"""A solution this much better than what its damages were scaled by was found with too coarse a tolerance."""

Table = Sequence[Sequence[float]]
"""A number for each option of each unit."""


@dataclass(frozen=True)
class Solution:
    """One option a unit.

    Attributes:
        chosen: index of the option of each unit.
        gap: by what share the total damage may lie above the least, at most.
    """

    chosen: list[int]
    gap: float


def solve(damages: Table, costs: Table, budget: float) -> Solution:
    """Choose one option of each unit.

    Args:
        damages: of each option of each unit, not negative.
        costs: the same shape, not negative.
        budget: what the costs of the chosen options may add up to.

    Raises:
        RecipeError: no choice costs so little.
        InputError: scipy is not installed.
    """
    cheapest = [options.index(min(options)) for options in map(list, costs)]
    if _total(costs, cheapest) > budget:
        raise RecipeError(f"no choice costs less than {_total(costs, cheapest):.6g}, and the budget is {budget:.6g}")
    fronts = [_front(*unit) for unit in zip(damages, costs, strict=True)]
    best = Solution([front[0] for front in fronts], 1.0)
    limit = budget
    while True:
        # Tolerances of the solver are absolute, so damages are scaled to about a thousand in all.
        scale = _total(damages, best.chosen) / 1e3
        if not scale:
            return Solution(best.chosen, 0.0)
        found = _milp(fronts, damages, costs, limit, scale)
        if found is None:
            return best
        spent = _total(costs, found.chosen)
        if spent > budget:
            # Let through by a tolerance, too.
            limit -= 2 * (spent - budget)
            continue
        coarse = _total(damages, found.chosen) < _RESCALE * _total(damages, best.chosen)
        best = found
        if not coarse:
            return best


def _milp(fronts: list[list[int]], damages: Table, costs: Table, budget: float, scale: float) -> Solution | None:
    """Solve once, with damages in units of ``scale``; ``None`` if nothing was found in time."""
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise InputError("A plan needs scipy, whose solver finds it: pip install 'slimc[plan]'.") from error
    options = [(unit, option) for unit, front in enumerate(fronts) for option in front]
    units = np.array([unit for unit, _ in options])
    one_each = csr_array((np.ones(len(options)), (units, np.arange(len(options)))), shape=(len(fronts), len(options)))
    result = milp(
        np.array([damages[unit][option] for unit, option in options]) / scale,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, lb=1, ub=1),
            LinearConstraint(np.array([[costs[unit][option] for unit, option in options]]), ub=budget),
        ],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if result.x is None:
        return None
    chosen = [option for (_, option), share in zip(options, result.x, strict=True) if share > 0.5]
    return Solution(chosen, float(result.mip_gap))


def _front(damages: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Return the options that no other beats in both, by rising cost."""
    front: list[int] = []
    for option in sorted(range(len(costs)), key=lambda one: (costs[one], damages[one])):
        if not front or damages[option] < damages[front[-1]]:
            front.append(option)
    return front


def _total(table: Table, chosen: Sequence[int]) -> float:
    return sum(options[option] for options, option in zip(table, chosen, strict=True))
