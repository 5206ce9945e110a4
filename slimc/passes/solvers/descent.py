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

from slimc.passes.solvers.candidates import NO_GRID, Candidates, can_be_tried, columns_of, grid_of, rounded_candidates
from slimc.passes.solvers.checks import require_finite, require_matrix, require_pattern, require_shape
from slimc.passes.solvers.quantization import Quantized
from slimc.passes.solvers.replay import replay
from slimc.passes.solvers.step_search import storable


@overload
def descend(
    weight: Tensor,
    gram: Tensor,
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
    gram: Tensor,
    start: Tensor,
    mask: Tensor | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    sweeps: int = 1,
    block: int = 128,
) -> tuple[Tensor, Tensor | None]: ...


def descend(
    weight: Tensor,
    gram: Tensor,
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
        gram: ``X^T X`` of the inputs, damped (any positive scaling), ``[columns, columns]``.
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
    require_shape("descend", (columns, columns), gram=gram)
    require_shape("descend", (rows, columns), start=start.codes if isinstance(start, Quantized) else start, mask=mask)
    require_finite("descend", weight=weight, gram=gram)
    if pattern is not None:
        require_pattern("descend", *pattern, (rows, columns))
    # Where every value stays, four at once are four times fewer steps.
    kept, width = (4, 4) if mask is None and columns % 4 == 0 else (1, 1)
    if pattern is not None and mask is not None and can_be_tried(pattern):
        kept, width = pattern
    gram = (gram / gram.diagonal().mean()).to(torch.float32)
    state = _State(weight.to(torch.float32), gram, start, mask)
    moves = _Moves(gram, kept, width) if width > 1 else None
    block = max(block // width, 1) * width
    for _ in range(sweeps):
        for first in range(0, columns, block):
            state.visit(moves, slice(first, min(first + block, columns)))
        state.fit_scales()
    return state.stored(), state.mask


class _Moves(Candidates):
    """What the blocks of a Gram matrix can become; ``inverses`` are those of ``B``, ``[blocks, width, width]``."""

    def __init__(self, gram: Tensor, kept: int, width: int) -> None:
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
    inverses: Tensor,
    members: Tensor,
    masks: Tensor,
    places: Tensor,
    squares: Tensor,
    optimum: Tensor,
    onward: Tensor,
) -> tuple[Tensor, ...]:
    """Return the values, and the mask if there is one, of some columns after one visit of each of their blocks.

    ``values``, ``mask``, ``step``, ``lowest`` and ``highest`` (the signed codes) are ``[rows, columns]``, the last
    three ``None`` for values that are not rounded. ``gradient`` is ``E H`` of the columns, ``inner`` their part of
    ``H``. What follows are the tables of :class:`_Moves`.
    """
    values, gradient = values.clone(), gradient.clone()
    mask = None if mask is None else mask.clone()
    width = masks.shape[1]
    for index in range(len(squares)):
        here = slice(index * width, (index + 1) * width)
        now, slope = values[:, here].clone(), gradient[:, here]
        grid = None if step is None else columns_of((step, lowest, highest), here)
        wanted = torch.addmm(now, slope, inverses[index], alpha=-1)
        change = rounded_candidates(wanted, grid, members, places, optimum[index], onward[index]) - now[:, None]
        gain, chosen = torch.linalg.vecdot(change @ squares[index] + 2 * slope[:, None], change).min(1)
        better = (gain < 0)[:, None]
        taken = change.gather(1, chosen[:, None, None].expand(-1, 1, width)).squeeze(1)
        taken = torch.where(better, taken, 0.0)
        if mask is not None:
            mask[:, here] = torch.where(better, masks[chosen], mask[:, here])
        values[:, here] = now + taken
        # The columns before are visited again in the next sweep only.
        gradient[:, here.start :].addmm_(taken, inner[here, here.start :])
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
    for at in range(values.shape[1]):
        here = slice(at, at + 1)
        now, slope, curve = values[:, here], gradient[:, here], inner[here, here]
        wanted = now - slope / curve
        if step is not None:
            size, least, most = columns_of((step, lowest, highest), here)
            wanted = torch.clamp((wanted / size).round_(), least, most) * size
        if mask is not None:
            wanted = wanted * mask[:, here]
        change = wanted - now
        change = torch.where((change * curve + 2 * slope) * change < 0, change, 0.0)
        values[:, here] = now + change
        gradient[:, at:].addmm_(change, inner[here, at:])
    return (values,)


class _State:
    """The stored weight while it changes; ``error`` is ``values - weight``, all float32 ``[rows, columns]``."""

    def __init__(self, weight: Tensor, gram: Tensor, start: Quantized | Tensor, mask: Tensor | None) -> None:
        self.weight, self.gram = weight, gram
        self.mask = None if mask is None else mask.clone()
        self.grid = start if isinstance(start, Quantized) else None
        self.entries = None if self.grid is None else grid_of(self.grid)
        self.step: Tensor | None = None if self.entries is None else self.entries[0]
        values = start.dequantize() if isinstance(start, Quantized) else start.to(torch.float32)
        self.values = values.clone() if mask is None else values * mask
        self.error = self.values - weight

    def visit(self, moves: _Moves | None, part: slice) -> None:
        """Improve some columns; those that are visited later see the change."""
        grid = NO_GRID if self.entries is None else columns_of(self.entries, part)
        mask = None if self.mask is None else self.mask[:, part]
        sloped = (self.error @ self.gram[:, part], self.gram[part, part])
        if moves is None:
            found: tuple[Tensor, ...] = replay(_visit_columns, self.values[:, part], mask, *grid, *sloped)
        else:
            inverses = moves.inverses[part.start // moves.width : part.stop // moves.width]
            tables = (inverses, *moves.of(part))
            found = replay(_visit_blocks, self.values[:, part], mask, *grid, *sloped, *tables)
            if self.mask is not None:
                self.mask[:, part] = found[1]
        values = found[0]
        self.values[:, part] = values
        self.error[:, part] = values - self.weight[:, part]

    def fit_scales(self) -> None:
        """Give every scale the value that minimises f for the codes, one group after another.

        f is a parabola in one scale, so of the values that can be stored the one nearest to its lowest point is best.
        """
        if self.grid is None or self.step is None:
            return
        columns = self.values.shape[1]
        size = self.grid.group if isinstance(self.grid.group, int) else columns
        for first in range(0, columns, size):
            part = slice(first, min(first + size, columns))
            # A value is exactly the product of its code and step.
            codes = (self.values[:, part] / self.step[:, part]).round_()
            slope = ((self.error @ self.gram[:, part]) * codes).sum(1, keepdim=True)
            curve = (codes @ self.gram[part, part] * codes).sum(1, keepdim=True)
            if self.grid.group is None:
                slope, curve = slope.sum().view(1, 1), curve.sum().view(1, 1)
            step = self.step[: len(slope), first : first + 1]
            wanted = step - slope / curve
            fitted = storable(torch.where((curve > 0) & (wanted > 0), wanted, step), self.grid.scale.dtype)
            change = fitted - step
            self.step[:, part] = torch.where((change * curve + 2 * slope) * change < 0, fitted, step)
            self.values[:, part] = codes * self.step[:, part]
            self.error[:, part] = self.values[:, part] - self.weight[:, part]

    def stored(self) -> Quantized | Tensor:
        """Return what is stored, in the form in which it came."""
        if self.grid is None or self.step is None or self.entries is None:
            return self.values
        rows, groups = self.grid.scale.shape
        columns = self.values.shape[1]
        size = self.grid.group if isinstance(self.grid.group, int) else columns
        codes = ((self.values / self.step).round_() - self.entries[1]).to(torch.uint8)
        scale = self.step[:rows, ::size][:, :groups].to(self.grid.scale.dtype)
        return replace(self.grid, codes=codes, scale=scale.contiguous())
