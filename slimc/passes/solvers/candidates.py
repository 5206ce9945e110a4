r"""The best values for a few columns at once: every mask that a pattern allows, and the grid, tried together.

A block of ``m`` columns has, in each row, real numbers ``t`` that would be best, and values ``q`` in their place cost
``(q - t) B (q - t)^T`` with one small ``B`` for all rows. For each set of survivors the real minimiser is
known in closed form; it is rounded one value after another, each with the error of those before it made good
(Babai's nearest plane). What costs least is taken.

The cost is a sum of squares, a term for each pruned column and one for each rounded value. With the survivors at their
real minimiser it is ``t_p S t_p^T``, where ``S`` is the Schur complement of the survivors and ``t_p`` what the pruned
columns should have been; and an error ``e`` of a rounded value, made good by those after it, adds ``e^2`` times a Schur
complement of its own. So a block is a small product and a few operations on rows, all of them side by side: matrices
here are ``[columns, rows]``, so that each operation reads memory in order.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from slimc.passes.solvers.quantization import Quantized

Grid = tuple[Any, Any, Any]
"""The step, the lowest and the highest signed code of every entry, ``[columns, rows]``; codes may be one for all."""

NO_GRID: Grid = (None, None, None)
"""Of values that are not rounded."""

MOST_CANDIDATES = 128
"""A pattern that allows more masks in a block than this is not tried out."""


class Candidates:
    """Tables for blocks of ``width`` columns of which ``kept`` have a value, one block after another.

    Attributes:
        members: ``[kept, candidates]``, the columns of each candidate, in the order in which they are rounded.
        masks: bool ``[width, candidates]``, the same as masks.
        squares: ``[blocks, width, width]``, what ``B`` is for each block.
        forms: ``[blocks, width * candidates, width]``: of ``forms @ t`` the first ``kept * candidates`` are the
            minimisers among what is zero outside each candidate; the squares of the others add up to their costs.
        onward: ``[blocks, kept, kept, candidates, 1]``: what the rounding error of one member adds to the optimum of
            each later one.
        curvature: ``[blocks, kept, candidates, 1]``: what the square of a member's rounding error costs then.
    """

    def __init__(self, squares: Tensor, kept: int) -> None:
        """Build the tables from ``squares``, float64 ``[blocks, width, width]``, positive definite."""
        blocks, width, _ = squares.shape
        device = squares.device
        # Rounding in the other order, too, was tried: it lowers the error by less than 0.1 %.
        chosen = list(itertools.combinations(range(width), kept))
        candidates = torch.tensor(chosen, device=device)
        others = torch.tensor([sorted(set(range(width)) - set(one)) for one in chosen], device=device, dtype=torch.long)
        count = len(candidates)
        self.width = width
        self.members = candidates.T.contiguous()
        self.masks = torch.zeros(width, count, dtype=torch.bool, device=device).scatter_(0, self.members, True)
        self.squares = squares.float()
        inner = _parts(squares, candidates, candidates)
        across = _parts(squares, candidates, others)
        identity = torch.eye(width, dtype=squares.dtype, device=device)
        # The survivors make good what the pruned columns lack: t_c + B_cc^-1 B_cp t_p.
        settled = torch.linalg.solve(inner, across)
        optimum = identity[candidates] + settled @ identity[others]
        schur = _parts(squares, others, others) - across.transpose(2, 3) @ settled
        costs = torch.linalg.cholesky(schur).transpose(2, 3) @ identity[others]
        self.forms = torch.cat([optimum, costs], 2).transpose(1, 2).reshape(blocks, width * count, width).float()
        self.onward = torch.zeros(blocks, kept, kept, count, 1, device=device)
        self.curvature = torch.zeros(blocks, kept, count, 1, device=device)
        for at in range(kept):
            later = inner[:, :, at + 1 :, at : at + 1]
            made_good = torch.linalg.solve(inner[:, :, at + 1 :, at + 1 :], later)
            self.onward[:, at, at + 1 :] = made_good.transpose(1, 2).float()
            least = inner[:, :, at : at + 1, at : at + 1] - later.transpose(2, 3) @ made_good
            self.curvature[:, at] = least.squeeze(3).float()

    def of(self, part: slice) -> tuple[Tensor, ...]:
        """Return the tables of the blocks in some columns, in the order of the attributes."""
        blocks = slice(part.start // self.width, part.stop // self.width)
        tables = (self.squares[blocks], self.forms[blocks], self.onward[blocks], self.curvature[blocks])
        return (self.members, self.masks, *tables)


def can_be_tried(pattern: tuple[int, int]) -> bool:
    """Tell whether ``pattern``, n of every m, allows few enough masks."""
    return math.comb(pattern[1], pattern[0]) <= MOST_CANDIDATES


def best_candidate(
    wanted: Tensor, grid: Grid | None, members: Tensor, forms: Tensor, onward: Tensor, curvature: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return what a block shall store, ``[width, rows]``, and the candidate that was taken in each row, ``[rows]``.

    Args:
        wanted: ``t``, ``[width, rows]``.
        grid: of the entries, ``[width, rows]``, or ``[1, rows]`` where the columns share it; ``None``: not rounded.
        members: and what follows, as in :class:`Candidates`, for this block.
        forms: see there.
        onward: see there.
        curvature: see there.

    Where there is one candidate only, none is named.
    """
    width, rows = wanted.shape
    kept, count = members.shape
    found = forms @ wanted
    best = found[: kept * count].view(kept, count, rows)
    cost = found[kept * count :].view(width - kept, count, rows).square_().sum(0)
    if grid is not None:
        is_shared = len(grid[0]) == 1
        step, lowest, highest = grid
        for at in range(kept):
            if not is_shared:
                step, lowest, highest = (_of_members(one, members[at]) for one in grid)
            rounded = torch.clamp(torch.div(best[at], step).round_(), lowest, highest).mul_(step)
            missed = best[at] - rounded
            if at + 1 < kept:
                best[at + 1 :].addcmul_(missed, onward[at, at + 1 :])
            if count > 1:
                cost.addcmul_(missed * curvature[at], missed)
            best[at] = rounded
    if count == 1:
        return wanted.new_zeros(width, rows).index_copy_(0, members[:, 0], best[:, 0]), None
    chosen = cost.min(0).indices
    taken = best.gather(1, chosen.expand(kept, 1, rows)).squeeze(1)
    return wanted.new_zeros(width, rows).scatter_(0, members[:, chosen], taken), chosen


def columns_of(grid: Grid, part: slice | Tensor) -> Grid:
    """Return the grid of some columns."""
    step, lowest, highest = (one[part] if isinstance(one, Tensor) else one for one in grid)
    return step, lowest, highest


def grid_of(quantized: Quantized) -> Grid:
    """Return the grid of a quantised weight, none of whose codes are signs: these are no whole number of steps."""
    step, zero = quantized.grid()
    step = step.T.contiguous()
    if quantized.group_widths() is not None:
        zero = zero.T.contiguous()
        return step, -zero, torch.exp2(quantized.column_widths())[:, None] - 1 - zero
    highest = 2**quantized.bits - 1
    if quantized.zero_point is None:
        middle = 2 ** (quantized.bits - 1)
        return step, float(-middle), float(highest - middle)
    zero = zero.T.contiguous()
    return step, -zero, highest - zero


def transposed(matrix: Tensor) -> Tensor:
    """Return ``[rows, columns]`` of ``[columns, rows]``, or the reverse, always with the strides of its shape.

    (``contiguous()`` leaves those of a single column as they are, and bytes of a tensor are viewed by its last stride.)
    """
    return matrix.T.clone(memory_format=torch.contiguous_format)


def shares_grid(grid: Grid, width: int) -> bool:
    """Tell whether the columns of every block have one grid."""
    spread = [one for one in grid if isinstance(one, Tensor)]
    blocks = [one.view(len(one) // width, width, one.shape[1]) for one in spread]
    return all(bool((one == one[:, :1]).all()) for one in blocks)


def _parts(squares: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the parts of every block that each candidate names, ``[blocks, candidates, rows, columns]``."""
    return squares[:, rows[:, :, None], columns[:, None, :]]


def _of_members(one: Any, members: Tensor) -> Any:
    return one.index_select(0, members) if isinstance(one, Tensor) else one
