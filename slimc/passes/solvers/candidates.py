r"""The best values for a few columns at once: every mask that a pattern allows, and the grid, tried together.

A block of ``m`` columns has, in each row, real numbers ``t`` that would be best, and values ``q`` in their place cost
``(q - t) B (q - t)^T`` with one small ``B`` for all rows. For each set of survivors the real minimiser is
known in closed form; it is rounded one value after another, each with the error of those before it made good
(Babai's nearest plane). What costs least is taken.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from slimc.passes.solvers.quantization import Quantized

Grid = tuple[Any, Any, Any]
"""The step, the lowest and the highest signed code of every entry, ``[rows, columns]``; codes may be one for all."""

NO_GRID: Grid = (None, None, None)
"""Of values that are not rounded."""

MOST_CANDIDATES = 128
"""A pattern that allows more masks in a block than this is not tried out."""


class Candidates:
    """Tables for blocks of ``width`` columns of which ``kept`` have a value, one block after another.

    Attributes:
        members: ``[kept, candidates]``, the columns of each candidate, in the order in which they are rounded.
        masks: bool ``[candidates, width]``, the same as masks.
        places: ``[candidates * width]``, where the value of each column is found in the values of the candidates,
            ``[kept * candidates]`` and a zero behind them.
        squares: ``[blocks, width, width]``, what ``B`` is for each block.
        optimum: ``[blocks, width, kept * candidates]``: ``t`` times this are the minimisers among what is zero outside
            each candidate.
        onward: ``[blocks, kept, kept, candidates]``: what the rounding error of one member adds to the optimum of
            each later one.
    """

    def __init__(self, squares: Tensor, kept: int) -> None:
        """Build the tables from ``squares``, float64 ``[blocks, width, width]``, positive definite."""
        blocks, width, _ = squares.shape
        device = squares.device
        # Rounding in the other order, too, was tried: it lowers the error by less than 0.1 %.
        candidates = torch.tensor(list(itertools.combinations(range(width), kept)), device=device)
        count = len(candidates)
        self.width = width
        self.members = candidates.T.contiguous()
        self.masks = torch.zeros(count, width, dtype=torch.bool, device=device).scatter_(1, candidates, True)
        behind = torch.full((count, width), kept * count, device=device)
        own = torch.arange(kept, device=device) * count + torch.arange(count, device=device)[:, None]
        self.places = behind.scatter_(1, candidates, own).flatten()
        self.squares = squares.float()
        inner = squares[:, candidates[:, :, None], candidates[:, None, :]]
        toward = squares[:, :, candidates].permute(0, 2, 1, 3)
        self.optimum = (toward @ torch.linalg.inv(inner)).permute(0, 2, 3, 1).reshape(blocks, width, -1).float()
        self.onward = torch.zeros(blocks, kept, kept, count, device=device)
        for at in range(kept - 1):
            row = inner[:, :, at : at + 1, at + 1 :] @ torch.linalg.inv(inner[:, :, at + 1 :, at + 1 :])
            self.onward[:, at, at + 1 :] = row.squeeze(2).transpose(1, 2).float()

    def of(self, part: slice) -> tuple[Tensor, ...]:
        """Return the tables of the blocks in some columns: members, masks, places, squares, optimum, onward."""
        blocks = slice(part.start // self.width, part.stop // self.width)
        tables = (self.squares[blocks], self.optimum[blocks], self.onward[blocks])
        return (self.members, self.masks, self.places, *tables)


def can_be_tried(pattern: tuple[int, int]) -> bool:
    """Tell whether ``pattern``, n of every m, allows few enough masks."""
    return math.comb(pattern[1], pattern[0]) <= MOST_CANDIDATES


def rounded_candidates(
    wanted: Tensor,
    grid: Grid | None,
    members: Tensor,
    places: Tensor,
    optimum: Tensor,
    onward: Tensor,
) -> Tensor:
    """Return what each candidate would store, ``[rows, candidates, width]``.

    Args:
        wanted: ``t``, ``[rows, width]``.
        grid: of the entries, ``[rows, width]``; ``None``: not rounded.
        members: and what follows, as in :class:`Candidates`, the last two for this block.
        places: see there.
        optimum: see there.
        onward: see there.
    """
    rows, width = wanted.shape
    kept, count = members.shape
    best = (wanted @ optimum).view(rows, kept, count)
    if grid is not None:
        for at in range(kept):
            step, lowest, highest = (_of_members(one, members[at]) for one in grid)
            rounded = torch.clamp((best[:, at] / step).round_(), lowest, highest) * step
            if at + 1 < kept:
                best[:, at + 1 :].addcmul_((best[:, at] - rounded)[:, None], onward[at, at + 1 :])
            best[:, at] = rounded
    values = torch.cat([best.flatten(1), wanted.new_zeros(rows, 1)], 1)
    return values.index_select(1, places).view(rows, count, width)


def columns_of(grid: Grid, part: slice | Tensor) -> Grid:
    """Return the grid of some columns."""
    step, lowest, highest = (one[:, part] if isinstance(one, Tensor) else one for one in grid)
    return step, lowest, highest


def grid_of(quantized: Quantized) -> Grid:
    """Return the grid of a quantised weight, none of whose codes are signs: these are no whole number of steps."""
    step, zero = quantized.grid()
    if quantized.group_widths() is not None:
        zero = zero.contiguous()
        return step.contiguous(), -zero, torch.exp2(quantized.column_widths()) - 1 - zero
    highest = 2**quantized.bits - 1
    if quantized.zero_point is None:
        middle = 2 ** (quantized.bits - 1)
        return step.contiguous(), float(-middle), float(highest - middle)
    return step.contiguous(), -zero, highest - zero


def _of_members(one: Any, members: Tensor) -> Any:
    return one.index_select(1, members) if isinstance(one, Tensor) else one
