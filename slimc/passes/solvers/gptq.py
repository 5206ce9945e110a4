"""GPTQ: rounding to a grid, with the error of each column made good by the columns after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from slimc.errors import RecipeError
from slimc.passes.solvers.checks import require_finite, require_matrix, require_shape
from slimc.passes.solvers.clipping import LearnedClipping, learn_grids
from slimc.passes.solvers.error_feedback import Note, by_columns, feed_back, inverse_factor, visiting_order
from slimc.passes.solvers.quantization import SCALE_DTYPES, Group, Quantized, quantize_on
from slimc.passes.solvers.ranges import RangeSearch, group_grids, solve_range

Order = Literal["columns", "groups"] | None
"""What comes first: the columns with the largest inputs, the groups with them, or (``None``) the leftmost column."""

ChooseWidths = Callable[[Tensor, Tensor, bool, RangeSearch | None], Sequence[int]]
"""Chooses the width of each group of columns for a float32 ``[rows, columns]`` weight, given ``1 / U_jj^2``, float32
``[columns]``, and how grids are chosen: whether they are symmetric, and what search finds their ranges."""

WIDTHS = range(1, 9)
"""The widths that a code can have here."""


class ColumnRounder:
    """Rounds columns to a grid, one at a time, in the order in which they are visited.

    Args:
        grid: where to round to; its codes are not read.
        order: the column that is visited at each place, int64 ``[columns]``.
    """

    def __init__(self, grid: Quantized, order: Tensor) -> None:
        """Lay the grid out by columns, which on a device saves most of the time of the small operations on them."""
        self._grid = grid
        self._order = order
        widths = grid.column_widths()[order]
        self._signs = (widths == 1).tolist()
        self._highest = (torch.exp2(widths) - 1)[:, None]
        step, zero = (entry[:, order].t().contiguous() for entry in grid.grid())
        self._step, self._zero = step, zero
        self._low, self._high = torch.empty_like(step), torch.empty_like(step)
        self._set_limits(slice(None))

    def _set_limits(self, places: slice) -> None:
        """Set the least and the greatest number of steps."""
        whole = self._zero[places].floor()
        self._low[places] = -whole
        self._high[places] = self._highest[places] - whole

    def regrid(self, places: slice, grid: Quantized) -> None:
        """Take another grid for the columns visited at ``places``, which are those of ``grid``."""
        step, zero = grid.grid()
        self._step[places], self._zero[places] = step.t(), zero.t()
        self._set_limits(places)

    def round(self, at: int, weight: Tensor) -> Tensor:
        """Return the nearest points of the grid for the column visited at place ``at``, ``[rows]``."""
        step = self._step[at]
        steps = weight / step
        if self._signs[at]:
            # Zero lies half way between the two codes.
            return steps.add_(0.5).round_().clamp_(0, 1).sub_(0.5).mul_(step)
        return steps.round_().clamp_(self._low[at], self._high[at]).mul_(step)

    def finish(self, rounded: Tensor) -> Quantized:
        """Return the grid with the codes of ``rounded``: all columns as they were visited, each on the grid."""
        codes = (rounded / self._step.t()).add_(self._zero.t()).round_().clamp_(min=0)
        codes = torch.minimum(codes, self._highest.t()).to(torch.uint8)
        return replace(self._grid, codes=codes[:, self._order.argsort()])


def gptq(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group: Group = None,
    widths: Sequence[int] | ChooseWidths | None = None,
    symmetric: bool = False,
    search: RangeSearch | LearnedClipping | None = None,
    order: Order = None,
    static_groups: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    block: int = 128,
    damping: float = 0.01,
    note: Note | None = None,
) -> Quantized:
    """Round to a grid while the columns not yet visited absorb the error (Frantar et al. 2023, algorithm 1).

    The grid of a group is chosen when its first column is reached, on weights that hold the errors of the groups
    before it (SliM-LLM, algorithm 1), or with ``static_groups`` beforehand.

    A dead input channel (zero on the diagonal of ``gram``) absorbs nothing and its error moves nowhere: its weight is
    rounded as it is, in case the channel is alive in use.

    Args:
        weight: ``[rows, columns]``.
        gram: ``X^T X`` of the calibration inputs (any positive scaling), ``[columns, columns]``.
        bits: 1 to 8; not read where there are ``widths``.
        group: what shares a scale.
        widths: of the codes of each group of columns, each 1 to 8, or what chooses them; needs ``group`` to be a
            number.
        symmetric: whether the grid has no zero point.
        search: over the ranges of groups; ``None`` takes their extremes. Learned ones are static, and ``group`` must be
            a number.
        order: in which columns are visited. ``"columns"`` (activation order) scatters groups, so that
            they need to be static; ``"groups"`` visits whole groups by falling energy, and the paper's is ``None``.
        static_groups: choose all grids on the original weights.
        scale_dtype: float32, float16 or bfloat16.
        mask: bool ``[rows, columns]``, true where the weight is kept; other entries are zero and stay so.
        block: how many columns are updated before the rest of the matrix is; changes nothing but the speed. Groups
            chosen on the way are never split by it.
        damping: what is added to the diagonal, as a share of its mean; multiplied by ten, up to 1, until the matrix
            can be factored.
        note: told of a damping that had to be raised.

    Raises:
        RecipeError: if an option is not valid, or two do not go together.
        InputError: if a shape is wrong.
        NumericsError: if an argument holds NaN or Inf, or ``gram`` is not a positive semi-definite matrix.
    """
    require_matrix("gptq", weight=weight)
    rows, columns = weight.shape
    require_shape("gptq", (columns, columns), gram=gram)
    require_shape("gptq", (rows, columns), mask=mask)
    require_finite("gptq", weight=weight, gram=gram)
    if group is not None and group != "channel" and (isinstance(group, bool) or group < 1):
        raise RecipeError(f"gptq: the group {group!r} is not valid; give None, 'channel' or a number of columns")
    size = min(group, columns) if isinstance(group, int) else columns
    count = -(-columns // size)
    if scale_dtype not in SCALE_DTYPES:
        raise RecipeError(f"gptq: scales cannot be stored as {scale_dtype}; choose float32, float16 or bfloat16")
    if block < 1 or not 0 < damping <= 1:
        raise RecipeError(f"gptq: block={block} must be at least 1 and damping={damping} above 0, at most 1")
    if order == "columns" and count > 1 and not static_groups and not isinstance(search, LearnedClipping):
        raise RecipeError(
            "gptq: order='columns' visits columns of all groups in turn, so no group is ever reached as a whole; set "
            "static_groups=true, or order='groups'"
        )
    if order not in (None, "groups", "columns"):
        raise RecipeError(f"gptq: order={order!r} is not known; choose 'columns', 'groups' or null")

    learned = search if isinstance(search, LearnedClipping) else None
    if learned is not None and not isinstance(group, int):
        raise RecipeError(f"gptq: clipping is learned for groups of columns, not for group={group!r}")

    places = torch.arange(columns, device=gram.device)
    if order is not None:
        places = visiting_order(gram, 1 if order == "columns" else size)
    own, gram = gram, gram[places][:, places]
    dead = gram.diagonal() <= 0
    factor = inverse_factor("gptq", gram, dead, damping, note)
    curvature = torch.empty(columns, device=gram.device)
    curvature[places] = torch.where(dead, 0.0, factor.diagonal().reciprocal().square())
    weight = weight.to(torch.float32) if mask is None else torch.where(mask, weight.to(torch.float32), 0.0)
    ranges = search if isinstance(search, RangeSearch) else None
    if callable(widths):
        widths = widths(weight, curvature, symmetric, ranges)
    chosen = _checked_widths(widths, bits, group, count)

    static = static_groups or count == 1 or learned is not None
    if learned is not None:
        options: dict[str, Any] = {"symmetric": symmetric, "scale_dtype": scale_dtype, "options": learned}
        grid = learn_grids(weight, own.to(torch.float32), chosen, size, **options)
    elif static:
        grid = _first_grid(weight, group, chosen, symmetric, scale_dtype, ranges, curvature)
    else:
        grid = _first_grid(weight, group, [8] * count, symmetric, scale_dtype, None, curvature)
    grid = replace(grid, bits=max(chosen), widths=None if widths is None else tuple(chosen))
    rounder = ColumnRounder(grid, places)
    left = by_columns(weight[:, places])
    kept = None if mask is None else mask[:, places]
    # Known before the loop, since asking the device in it would wait for the device.
    groups = (places // size).tolist()

    def reach_group(at: int) -> None:
        index = groups[at]
        ahead = slice(at, min(at + size, columns))
        values = left[:, ahead].contiguous()
        scale, zero = solve_range(
            values,
            chosen[index],
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            search=ranges,
            curvature=curvature[index * size : (index + 1) * size],
        )
        grid.scale[:, index] = scale.to(scale_dtype)
        if grid.zero_point is not None and zero is not None:
            grid.zero_point[:, index] = zero.to(torch.uint8)
        rounder.regrid(ahead, _one_group(grid, index, values, chosen[index]))

    def settle(at: int, now: Tensor) -> Tensor:
        if not static and (at == 0 or groups[at] != groups[at - 1]):
            reach_group(at)
        if kept is None:
            return rounder.round(at, now)
        return torch.where(kept[:, at], rounder.round(at, torch.where(kept[:, at], now, 0.0)), 0.0)

    feed_back(left, factor, settle, block=block if static else max(block // size, 1) * size)
    return rounder.finish(left)


def _checked_widths(widths: Sequence[int] | None, bits: int, group: Group, count: int) -> list[int]:
    """Return the width of each group."""
    chosen = [bits] * count if widths is None else list(widths)
    if any(width not in WIDTHS for width in chosen):
        raise RecipeError(f"gptq: codes of {sorted(set(chosen))} bits were asked for; 1 to 8 are possible")
    if widths is not None and (not isinstance(group, int) or len(chosen) != count):
        raise RecipeError(f"gptq: {len(chosen)} widths were given for {count} groups of columns (group={group!r})")
    return chosen


def _first_grid(
    weight: Tensor,
    group: Group,
    widths: Sequence[int],
    symmetric: bool,
    scale_dtype: torch.dtype,
    search: RangeSearch | None,
    curvature: Tensor,
) -> Quantized:
    """Return the grids of the weight as it is."""
    options: dict[str, Any] = {"symmetric": symmetric, "scale_dtype": scale_dtype, "search": search}
    if isinstance(group, int):
        return group_grids(weight, widths, group, **options, curvature=curvature)
    shared, weights = weight, curvature
    if group is None:
        shared, weights = weight.reshape(1, -1), curvature.repeat(len(weight))
    scale, zero = solve_range(shared, widths[0], **options, curvature=weights)
    zero_point = None if zero is None else zero[:, None].to(torch.uint8)
    return quantize_on(weight, scale[:, None].to(scale_dtype), zero_point, bits=widths[0], group=group)


def _one_group(grid: Quantized, index: int, values: Tensor, width: int) -> Quantized:
    """Return the grid of one group of columns, as one of whole rows."""
    return Quantized(
        codes=torch.empty(values.shape, dtype=torch.uint8, device="meta"),
        scale=grid.scale[:, index : index + 1],
        zero_point=None if grid.zero_point is None else grid.zero_point[:, index : index + 1],
        bits=width,
        group="channel",
    )
