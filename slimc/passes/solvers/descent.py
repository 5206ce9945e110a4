r"""Block coordinate descent on what is stored: mask, codes and scales, in the norm of the layer's output.

With the Gram matrix ``H = X^T X`` the squared output error of ``Q`` for the weight ``W`` is

    f(Q) = |X (Q - W)^T|^2 = trace(E H E^T),     E = Q - W.

Change the ``m`` columns of one block, and leave the rest: with ``B`` the block's part of ``H`` and ``g`` the block's
columns of ``E H``, a change ``d`` of a row of the block changes ``f`` by ``d B d^T + 2 g d^T``. The rows are
independent, ``B`` is the same for all of them and small, so every mask that the pattern allows is tried in every row
(:mod:`slimc.passes.solvers.candidates`). A change is made only where it lowers ``f``; hence ``f`` never rises, whatever
it starts from. That is what the alternation with the adapters needs, and what solving anew from left to right
(SparseGPT) does not give.
"""

from __future__ import annotations

from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from slimc.passes.solvers.candidates import (
    NO_GRID,
    Candidates,
    best_candidate,
    can_be_tried,
    columns_of,
    grid_of,
    shares_grid,
    transposed,
)
from slimc.passes.solvers.checks import require_finite, require_matrix, require_pattern, require_shape
from slimc.passes.solvers.hessian import Metric
from slimc.passes.solvers.quantization import Quantized
from slimc.passes.solvers.replay import replay
from slimc.passes.solvers.step_search import storable


@overload
def descend(
    weight: Tensor,
    gram: Tensor | Metric,
    start: Quantized,
    mask: Tensor | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    sweeps: int = 1,
    block: int = 128,
) -> tuple[Quantized, Tensor | None]: ...


@overload
def descend(
    weight: Tensor,
    gram: Tensor | Metric,
    start: Tensor,
    mask: Tensor | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    sweeps: int = 1,
    block: int = 128,
) -> tuple[Tensor, Tensor | None]: ...


def descend(
    weight: Tensor,
    gram: Tensor | Metric,
    start: Quantized | Tensor,
    mask: Tensor | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    sweeps: int = 1,
    block: int = 128,
) -> tuple[Quantized | Tensor, Tensor | None]:
    """Lower the output error of a stored weight, without ever raising it.

    A sweep visits every block of columns once, in order, and then fits every scale to its codes, group by group.

    Args:
        weight: what is to be approximated, ``[rows, columns]``.
        gram: ``X^T X`` of the inputs, damped (any positive scaling), ``[columns, columns]``; as a metric it keeps the
            tables of its blocks for the next time.
        start: what is stored now: codes on a grid, or values; zero outside ``mask``.
        mask: bool ``[rows, columns]``, true where a value is stored; ``None`` stores all.
        pattern: ``(n, m)`` lets the mask change to another one that keeps n of every m columns; ``None`` leaves it.
        sweeps: how often all is visited.
        block: how many columns are updated before the rest of the matrix is; changes the speed only.

    Returns:
        What is stored then, like ``start``, and its mask.

    Raises:
        RecipeError: if the pattern does not divide the columns.
        InputError: if a shape is wrong.
        NumericsError: if an argument holds NaN or Inf.
    """
    require_matrix("descend", weight=weight)
    rows, columns = weight.shape
    metric = Metric.of(gram)
    require_shape("descend", (columns, columns), gram=metric.gram)
    require_shape("descend", (rows, columns), start=start.codes if isinstance(start, Quantized) else start, mask=mask)
    require_finite("descend", weight=weight, gram=metric.gram)
    if pattern is not None:
        require_pattern("descend", *pattern, (rows, columns))
    # Where every value stays, four at once are four times fewer steps.
    kept, width = (4, 4) if mask is None and columns % 4 == 0 else (1, 1)
    if pattern is not None and mask is not None and can_be_tried(pattern):
        kept, width = pattern
    gram = metric.derive(_normalised)
    moves = metric.derive(_Moves, kept, width) if width > 1 else None
    state = _State(weight.to(torch.float32), gram, start, mask, width)
    block = max(block // width, 1) * width
    for _ in range(sweeps):
        for first in range(0, columns, block):
            state.visit(moves, slice(first, min(first + block, columns)))
        state.fit_scales()
    return state.stored(), None if state.mask is None else transposed(state.mask)


def _normalised(gram: Tensor) -> Tensor:
    return gram / gram.diagonal().mean()


class _Moves(Candidates):
    """What the blocks of a Gram matrix can become; ``inverses`` are those of ``B``, ``[blocks, width, width]``."""

    def __init__(self, gram: Tensor, kept: int, width: int) -> None:
        gram = _normalised(gram)
        blocks = len(gram) // width
        position = torch.arange(blocks, device=gram.device)
        squares = gram.view(blocks, width, blocks, width)[position, :, position].double()
        super().__init__(squares, kept)
        self.inverses = torch.linalg.inv(squares).float()


def _visit_blocks(
    values: Tensor,
    mask: Tensor | None,
    step: Tensor | None,
    lowest: Tensor | float | None,
    highest: Tensor | float | None,
    gradient: Tensor,
    inner: Tensor,
    shared: bool,
    inverses: Tensor,
    members: Tensor,
    masks: Tensor,
    squares: Tensor,
    forms: Tensor,
    onward: Tensor,
    curvature: Tensor,
) -> tuple[Tensor, ...]:
    """Return the values, and the mask if there is one, of some columns after one visit of each of their blocks.

    ``values``, ``mask``, ``step``, ``lowest`` and ``highest`` (the signed codes) are ``[columns, rows]``, the last
    three ``None`` for values that are not rounded; ``shared`` says that the columns of a block have one grid.
    ``gradient`` is ``E H`` of the columns, ``inner`` their part of ``H``. What follows are the tables of
    :class:`_Moves`.
    """
    values, gradient = values.clone(), gradient.clone()
    mask = None if mask is None else mask.clone()
    width = masks.shape[0]
    for index in range(len(squares)):
        here = slice(index * width, (index + 1) * width)
        now, slope = values[here], gradient[here]
        entries = slice(here.start, here.start + 1) if shared else here
        grid = None if step is None else columns_of((step, lowest, highest), entries)
        wanted = torch.addmm(now, inverses[index], slope, alpha=-1)
        change, chosen = best_candidate(wanted, grid, members, forms[index], onward[index], curvature[index])
        change -= now
        better = torch.addmm(slope, squares[index], change, beta=2).mul_(change).sum(0) < 0
        change = torch.where(better, change, 0.0)
        if mask is not None and chosen is not None:
            mask[here] = torch.where(better, masks[:, chosen], mask[here])
        values[here] += change
        # The columns before are visited again in the next sweep only.
        gradient[here.start :].addmm_(inner[here, here.start :].T, change)
    return (values,) if mask is None else (values, mask)


def _visit_columns(
    values: Tensor,
    mask: Tensor | None,
    step: Tensor | None,
    lowest: Tensor | float | None,
    highest: Tensor | float | None,
    gradient: Tensor,
    inner: Tensor,
) -> tuple[Tensor]:
    """Return the values of some columns after each was moved on its own, the mask as it is; see _visit_blocks."""
    values, gradient = values.clone(), gradient.clone()
    for at in range(len(values)):
        here = slice(at, at + 1)
        now, slope, curve = values[here], gradient[here], inner[here, here]
        wanted = now - slope / curve
        if step is not None:
            size, least, most = columns_of((step, lowest, highest), here)
            wanted = torch.clamp((wanted / size).round_(), least, most) * size
        if mask is not None:
            wanted = wanted * mask[here]
        change = wanted - now
        change = torch.where((change * curve + 2 * slope) * change < 0, change, 0.0)
        values[here] = now + change
        gradient[at:].addmm_(inner[here, at:].T, change)
    return (values,)


class _State:
    """The stored weight while it changes; ``error`` is ``values - weight``, all float32 ``[columns, rows]``."""

    def __init__(
        self, weight: Tensor, gram: Tensor, start: Quantized | Tensor, mask: Tensor | None, width: int
    ) -> None:
        self.weight, self.gram = transposed(weight), gram
        self.mask = None if mask is None else transposed(mask)
        self.grid = start if isinstance(start, Quantized) else None
        self.entries = None if self.grid is None else grid_of(self.grid)
        self.step: Tensor | None = None if self.entries is None else self.entries[0]
        self.shared = self.entries is not None and len(self.weight) % width == 0 and shares_grid(self.entries, width)
        values = start.dequantize() if isinstance(start, Quantized) else start.to(torch.float32)
        values = transposed(values)
        self.values = values if self.mask is None else values * self.mask
        self.error = self.values - self.weight

    def visit(self, moves: _Moves | None, part: slice) -> None:
        """Improve some columns; those that are visited later see the change."""
        grid = NO_GRID if self.entries is None else columns_of(self.entries, part)
        mask = None if self.mask is None else self.mask[part]
        sloped = (self.gram[part] @ self.error, self.gram[part, part])
        if moves is None:
            found: tuple[Tensor, ...] = replay(_visit_columns, self.values[part], mask, *grid, *sloped)
        else:
            inverses = moves.inverses[part.start // moves.width : part.stop // moves.width]
            tables = (self.shared, inverses, *moves.of(part))
            found = replay(_visit_blocks, self.values[part], mask, *grid, *sloped, *tables)
            if self.mask is not None:
                self.mask[part] = found[1]
        values = found[0]
        self.values[part] = values
        self.error[part] = values - self.weight[part]

    def fit_scales(self) -> None:
        """Give every scale the value that minimises f for the codes, one group after another.

        f is a parabola in one scale, so of the values that can be stored the one nearest to its lowest point is best.
        """
        if self.grid is None or self.step is None:
            return
        columns = len(self.values)
        size = self.grid.group if isinstance(self.grid.group, int) else columns
        for first in range(0, columns, size):
            part = slice(first, min(first + size, columns))
            # A value is exactly the product of its code and step.
            codes = (self.values[part] / self.step[part]).round_()
            slope = (self.gram[part] @ self.error).mul_(codes).sum(0, keepdim=True)
            curve = (self.gram[part, part] @ codes).mul_(codes).sum(0, keepdim=True)
            if self.grid.group is None:
                slope, curve = slope.sum().view(1, 1), curve.sum().view(1, 1)
            step = self.step[first : first + 1, : slope.shape[1]]
            wanted = step - slope / curve
            fitted = storable(torch.where((curve > 0) & (wanted > 0), wanted, step), self.grid.scale.dtype)
            change = fitted - step
            self.step[part] = torch.where((change * curve + 2 * slope) * change < 0, fitted, step)
            self.values[part] = codes * self.step[part]
            self.error[part] = self.values[part] - self.weight[part]

    def stored(self) -> Quantized | Tensor:
        """Return what is stored, in the form in which it came."""
        if self.grid is None or self.step is None or self.entries is None:
            return transposed(self.values)
        rows, groups = self.grid.scale.shape
        size = self.grid.group if isinstance(self.grid.group, int) else len(self.values)
        codes = ((self.values / self.step).round_() - self.entries[1]).to(torch.uint8)
        scale = self.step[::size, :rows][:groups].to(self.grid.scale.dtype)
        return replace(self.grid, codes=transposed(codes), scale=transposed(scale))
