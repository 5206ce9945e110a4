"""Which group of columns gets how many bits: SliM-LLM's search (SBA), and the exact solution of an additive objective.

Both take a width for each group of consecutive columns, shared by all rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from slimc.errors import InputError, RecipeError
from slimc.passes.solvers.checks import require_finite, require_matrix, require_shape

Direction = Literal["forward", "reverse"]
"""``"forward"`` is ``KL(dense || quantised)``, the paper's formula; ``"reverse"`` what its authors' code computes."""


def group_saliences(weight: Tensor, curvature: Tensor, group: int) -> Tensor:
    """Return the mean of ``w_ij^2 / U_jj^2`` over each group of columns, float32 ``[groups]``.

    SliM-LLM's definition 3.1 divides by the squared diagonal of ``H^-1``, its algorithm and its code by that of the
    Cholesky factor ``U`` of ``H^-1 = U^T U``, as here: that is the output error which the loss of a weight costs once
    the columns after it have made up for what they can.

    Args:
        weight: ``[rows, columns]``.
        curvature: ``1 / U_jj^2``, ``[columns]``.
        group: columns a group; the last one may be short.
    """
    per_column = weight.float().square().mean(dim=0) * curvature
    starts = range(0, len(per_column), group)
    return torch.stack([per_column[start : start + group].mean() for start in starts])


def search_split(
    weight: Tensor,
    quantized: Sequence[Tensor],
    inputs: Tensor,
    saliences: Tensor,
    group: int,
    direction: Direction = "forward",
) -> int:
    """Return how many groups give up a bit to as many others (SBA; SliM-LLM, section 3.2).

    For each ``p`` from 0 to half of the groups the ``p`` least salient are taken with a bit less and the ``p`` most
    salient with a bit more; the ``p`` is kept for which the outputs, read as logits over the output features, are
    closest to those of the dense weight by Kullback-Leibler divergence, averaged over tokens. The paper's code tries
    neither 0 nor the full split. Of equal ``p`` the smallest is taken.

    Outputs of one ``p`` are those of the one before, and what two groups change, so the search costs about as
    much as three products with the whole weight.

    Args:
        weight: ``[rows, columns]``.
        quantized: the weight rounded with a bit less, with the bits asked for, and with a bit more.
        inputs: ``[tokens, columns]``.
        saliences: of the groups that may change, ``[groups]``; a short last group is left out.
        group: columns a group.
        direction: of the divergence.
    """
    exact = torch.log_softmax(inputs @ weight.t(), dim=1)
    fewer, plain, more = quantized
    outputs = inputs @ plain.t()
    order = saliences.argsort(stable=True).tolist()
    divergences = [_divergence(exact, outputs, direction)]
    for p in range(len(order) // 2):
        for index, chosen in ((order[p], fewer), (order[-1 - p], more)):
            columns = slice(index * group, (index + 1) * group)
            outputs = outputs + inputs[:, columns] @ (chosen - plain)[:, columns].t()
        divergences.append(_divergence(exact, outputs, direction))
    return int(torch.stack(divergences).argmin())


def split_widths(saliences: Tensor, p: int, bits: int, groups: int) -> tuple[int, ...]:
    """Return ``bits`` for each group, but one bit less for the ``p`` least salient and one more for the ``p`` most.

    Groups without a salience, at the end, keep ``bits``.
    """
    widths = [bits] * groups
    order = saliences.argsort(stable=True).tolist()
    for low, high in zip(order[:p], order[::-1][:p], strict=True):
        widths[low] -= 1
        widths[high] += 1
    return tuple(widths)


def _divergence(exact: Tensor, outputs: Tensor, direction: Direction) -> Tensor:
    found = torch.log_softmax(outputs, dim=1)
    first, second = (exact, found) if direction == "forward" else (found, exact)
    return (first.exp() * (first - second)).sum(dim=1, dtype=torch.float64).mean()


def cheapest_widths(errors: Tensor, widths: Sequence[int], sizes: Sequence[int], budget: int) -> tuple[int, ...]:
    """Return the widths of least total error that fit a budget: the exact optimum, by dynamic programming.

    Group by group, for each number of bits spent so far, the least error is kept with the width that gave it; no
    assumption is made about the errors. Budgets are counted in the greatest common divisor of the groups' sizes. Of
    equal choices the narrower width is taken, so that the result is the same on every machine.

    Args:
        errors: ``[groups, widths]``, what each group costs at each width.
        widths: ascending.
        sizes: columns of each group.
        budget: bits of all columns together: ``sum(width * size)`` may not exceed it.

    Raises:
        RecipeError: even the narrowest widths exceed the budget.
        InputError: a shape is wrong.
        NumericsError: an error is NaN or Inf.
    """
    require_matrix("cheapest_widths", errors=errors)
    require_shape("cheapest_widths", (len(sizes), len(widths)), errors=errors)
    require_finite("cheapest_widths", errors=errors)
    if list(widths) != sorted(set(widths)):
        raise InputError(f"cheapest_widths: the widths {list(widths)} are not in ascending order")
    needed = widths[0] * sum(sizes)
    if needed > budget:
        raise RecipeError(
            f"a budget of {budget / sum(sizes):g} bits a weight cannot be met: the narrowest codes have {widths[0]}"
        )
    unit = math.gcd(*sizes)
    units = min(budget, widths[-1] * sum(sizes)) // unit
    table = errors.to(device="cpu", dtype=torch.float64)
    least = torch.zeros(units + 1, dtype=torch.float64)
    choices = torch.empty(len(sizes), units + 1, dtype=torch.int64)
    for index, size in enumerate(sizes):
        # least[b] is the least error of the groups so far with at most b units.
        options = torch.full((len(widths), units + 1), torch.inf, dtype=torch.float64)
        for which, width in enumerate(widths):
            spent = width * size // unit
            if spent <= units:
                options[which, spent:] = least[: units + 1 - spent] + table[index, which]
        least, choices[index] = options.min(dim=0)
    chosen = []
    left = units
    for index in reversed(range(len(sizes))):
        which = int(choices[index, left])
        chosen.append(widths[which])
        left -= widths[which] * sizes[index] // unit
    return tuple(reversed(chosen))
