"""GPTQ: rounding to a grid, with the error of each column made good by the columns after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from slimc.errors import RecipeError
from slimc.passes.solvers.checks import require_finite, require_matrix, require_shape
from slimc.passes.solvers.error_feedback import feed_back, inverse_factor, visiting_order
from slimc.passes.solvers.quantization import SCALE_DTYPES, Group, Quantized, nearest_codes
from slimc.passes.solvers.ranges import RangeSearch, solve_range

Order = Literal["columns", "groups"] | None
"""What comes first: the columns with the largest inputs, the groups with them, or (``None``) the leftmost column."""

WIDTHS = range(1, 9)
"""The widths that a code can have here."""


class GridWriter:
    """Writes the codes of columns on a grid, while they are visited in some order.

    Args:
        grid: where to round to; its codes are not read.
        order: the column that is visited at each place, int64 ``[columns]``.
    """

    def __init__(self, grid: Quantized, order: Tensor) -> None:
        """Start with no codes."""
        self._grid = grid
        self._order = order
        self._step, self._zero = (entry[:, order] for entry in grid.grid())
        self._highest = torch.exp2(grid.column_widths())[order] - 1
        self._codes = torch.empty_like(self._step)

    def write(self, at: int, weight: Tensor) -> Tensor:
        """Write down the codes of the column visited at place ``at``; return what they stand for, ``[rows]``."""
        step, zero = self._step[:, at], self._zero[:, at]
        codes = nearest_codes(weight / step, zero, self._highest[at])
        self._codes[:, at] = codes
        return (codes - zero) * step

    def finish(self) -> Quantized:
        """Return the grid with its codes."""
        return replace(self._grid, codes=self._codes[:, self._order.argsort()].to(torch.uint8))

    def regrid(self, places: slice, grid: Quantized) -> None:
        """Take another grid for the columns visited at ``places``, which are those of ``grid``."""
        self._step[:, places], self._zero[:, places] = grid.grid()


def gptq(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group: Group = None,
    widths: Sequence[int] | None = None,
    symmetric: bool = False,
    search: RangeSearch | None = None,
    order: Order = None,
    static_groups: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    block: int = 128,
    damping: float = 0.01,
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
        widths: of the codes of each group of columns, each 1 to 8; needs ``group`` to be a number.
        symmetric: whether the grid has no zero point.
        search: over the ranges of groups; ``None`` takes their extremes.
        order: in which columns are visited. ``"columns"`` (activation order) scatters groups, so that
            they need to be static; ``"groups"`` visits whole groups by falling energy, and the paper's is ``None``.
        static_groups: choose all grids on the original weights.
        scale_dtype: float32, float16 or bfloat16.
        mask: bool ``[rows, columns]``, true where the weight is kept; other entries are zero and stay so.
        block: how many columns are updated before the rest of the matrix is; changes nothing but the speed. Groups
            chosen on the way are never split by it.
        damping: what is added to the diagonal, as a share of its mean; multiplied by ten, up to 1, until the matrix
            can be factored.

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
    chosen = _checked_widths(widths, bits, group, count)
    if scale_dtype not in SCALE_DTYPES:
        raise RecipeError(f"gptq: scales cannot be stored as {scale_dtype}; choose float32, float16 or bfloat16")
    if block < 1 or not 0 < damping <= 1:
        raise RecipeError(f"gptq: block={block} must be at least 1 and damping={damping} above 0, at most 1")
    if order == "columns" and count > 1 and not static_groups:
        raise RecipeError(
            "gptq: order='columns' visits columns of all groups in turn, so no group is ever reached as a whole; set "
            "static_groups=true, or order='groups'"
        )
    if order not in (None, "groups", "columns"):
        raise RecipeError(f"gptq: order={order!r} is not known; choose 'columns', 'groups' or null")

    places = torch.arange(columns, device=gram.device)
    if order is not None:
        places = visiting_order(gram, 1 if order == "columns" else size)
    gram = gram[places][:, places]
    dead = gram.diagonal() <= 0
    factor = inverse_factor("gptq", gram, dead, damping)
    curvature = torch.empty(columns, device=gram.device)
    curvature[places] = torch.where(dead, 0.0, factor.diagonal().reciprocal().square())
    weight = weight.to(torch.float32) if mask is None else torch.where(mask, weight.to(torch.float32), 0.0)
    left = weight[:, places]
    kept = None if mask is None else mask[:, places]
    grid = _empty_grid(weight, group, chosen, max(chosen), symmetric, scale_dtype, widths)

    def choose_grid(index: int, values: Tensor) -> None:
        inside = slice(index * size, min((index + 1) * size, columns))
        shared, weights = values, curvature[inside]
        if group is None:
            shared, weights = values.reshape(1, -1), weights.repeat(rows)
        scale, zero = solve_range(
            shared, chosen[index], symmetric=symmetric, scale_dtype=scale_dtype, search=search, curvature=weights
        )
        grid.scale[:, index] = scale.to(scale_dtype)
        if grid.zero_point is not None and zero is not None:
            grid.zero_point[:, index] = zero.to(torch.uint8)

    static = static_groups or count == 1
    if static:
        for index in range(count):
            choose_grid(index, weight[:, index * size : (index + 1) * size])
    writer = GridWriter(grid, places)
    # Known before the loop, since asking the device in it would wait for the device.
    groups = (places // size).tolist()

    def settle(at: int, now: Tensor) -> Tensor:
        if not static and (at == 0 or groups[at] != groups[at - 1]):
            ahead = slice(at, min(at + size, columns))
            choose_grid(groups[at], left[:, ahead])
            writer.regrid(ahead, _one_group(grid, groups[at], left[:, ahead], chosen[groups[at]]))
        if kept is None:
            return writer.write(at, now)
        now = torch.where(kept[:, at], now, 0.0)
        return torch.where(kept[:, at], writer.write(at, now), 0.0)

    feed_back(left, factor, settle, block=block if static else max(block // size, 1) * size)
    return writer.finish()


def _checked_widths(widths: Sequence[int] | None, bits: int, group: Group, count: int) -> list[int]:
    """Return the width of each group."""
    chosen = [bits] * count if widths is None else list(widths)
    if any(width not in WIDTHS for width in chosen):
        raise RecipeError(f"gptq: codes of {sorted(set(chosen))} bits were asked for; 1 to 8 are possible")
    if widths is not None and (not isinstance(group, int) or len(chosen) != count):
        raise RecipeError(f"gptq: {len(chosen)} widths were given for {count} groups of columns (group={group!r})")
    return chosen


def _empty_grid(
    weight: Tensor,
    group: Group,
    widths: Sequence[int],
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    given: Sequence[int] | None,
) -> Quantized:
    """Return a grid of the right shape with neither scales nor codes."""
    rows = weight.shape[0]
    shape = (1, 1) if group is None else (rows, len(widths))
    return Quantized(
        codes=torch.empty(weight.shape, dtype=torch.uint8, device="meta"),
        scale=torch.ones(shape, dtype=scale_dtype, device=weight.device),
        zero_point=None if symmetric else torch.zeros(shape, dtype=torch.uint8, device=weight.device),
        bits=bits,
        group=group,
        widths=None if given is None else tuple(given),
    )


def _one_group(grid: Quantized, index: int, values: Tensor, width: int) -> Quantized:
    """Return the grid of one group of columns, as one of whole rows."""
    return Quantized(
        codes=torch.empty(values.shape, dtype=torch.uint8, device="meta"),
        scale=grid.scale[:, index : index + 1],
        zero_point=None if grid.zero_point is None else grid.zero_point[:, index : index + 1],
        bits=width,
        group="channel",
    )
