r"""Block coordinate descent on what is stored: mask, codes and scales, in the norm of the layer's output.

With the Gram matrix ``H = X^T X`` the squared output error of ``Q`` for the weight ``W`` is

    f(Q) = |X (Q - W)^T|^2 = trace(E H E^T),     E = Q - W.

Change the ``m`` columns of one block, and leave the rest: with ``B`` the block's part of ``H`` and ``g`` the block's
columns of ``E H``, a change ``d`` of a row of the block changes ``f`` by ``d B d^T + 2 g d^T``. The rows are
independent, ``B`` is the same for all of them and small, so every mask that the pattern allows is tried in every row:
for the survivors the real minimiser, rounded one after another, each with the error of those before it made
good (Babai's nearest plane). A change is made only where it lowers ``f``; hence ``f`` never rises, whatever it
starts from. That is what the alternation with the adapters needs, and what solving anew from left to right (SparseGPT)
does not give.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from slimc.passes.solvers.checks import require_finite, require_matrix, require_pattern, require_shape
from slimc.passes.solvers.quantization import Quantized
from slimc.passes.solvers.step_search import storable

MOST_CANDIDATES = 128
"""A pattern that allows more masks in a block than this keeps the mask that it has."""

GAIN = 1e-6
"""A change must lower the error by this share of what it moves, or it is taken for rounding noise."""


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
    movable = pattern is not None and mask is not None
    if pattern is not None:
        require_pattern("descend", *pattern, (rows, columns))
        movable = movable and math.comb(pattern[1], pattern[0]) <= MOST_CANDIDATES
    kept, width = pattern if movable and pattern is not None else (1, 1)
    gram = (gram / gram.diagonal().mean()).to(torch.float32)
    state = _State(weight.to(torch.float32), gram, start, mask)
    moves = _Moves(gram, kept, width)
    block = max(block // width, 1) * width
    for _ in range(sweeps):
        for first in range(0, columns, block):
            state.visit(moves, first, min(first + block, columns), movable)
        state.fit_scales()
    return state.stored(), state.mask


class _Moves:
    """What the blocks of ``width`` columns need to find the best ``kept`` values of each.

    Attributes:
        members: ``[candidates, kept]``, the columns of each candidate, in the order in which they are rounded.
        optimum: ``[blocks, width, candidates * kept]``: the change that minimises f for a block is ``-g B^-1``; from
            ``t = q - g B^-1``, this gives the minimisers among those that are zero outside each candidate.
        onward: for each but the last member, ``[blocks, candidates, later members]``: what its rounding error adds to
            the optimum of the later ones.
    """

    def __init__(self, gram: Tensor, kept: int, width: int) -> None:
        blocks = len(gram) // width
        position = torch.arange(blocks, device=gram.device)
        squares = gram.view(blocks, width, blocks, width)[position, :, position].double()
        self.width, self.kept = width, kept
        self.squares = squares.float()
        self.inverses = torch.linalg.inv(squares).float()
        chosen = list(itertools.combinations(range(width), kept))
        # The order of rounding matters little, but both ends are worth a try, as long as there are few.
        if kept > 1 and 2 * len(chosen) <= MOST_CANDIDATES:
            chosen += [members[::-1] for members in chosen]
        self.members = torch.tensor(chosen, device=gram.device)
        inner = squares[:, self.members[:, :, None], self.members[:, None, :]]
        toward = squares[:, :, self.members].permute(0, 2, 1, 3)
        self.optimum = (toward @ torch.linalg.inv(inner)).permute(0, 2, 1, 3).reshape(blocks, width, -1).float()
        self.onward = []
        for at in range(kept - 1):
            later = inner[:, :, at + 1 :, at + 1 :]
            row = inner[:, :, at : at + 1, at + 1 :]
            self.onward.append((row @ torch.linalg.inv(later)).squeeze(2).float())


class _State:
    """The stored weight while it changes; ``error`` is ``values - weight``, all float32 ``[rows, columns]``."""

    def __init__(self, weight: Tensor, gram: Tensor, start: Quantized | Tensor, mask: Tensor | None) -> None:
        self.weight, self.gram = weight, gram
        self.mask = None if mask is None else mask.clone()
        self.grid = start if isinstance(start, Quantized) else None
        if self.grid is not None:
            step, zero = self.grid.grid()
            self.step = step.contiguous()
            self.zero = zero
            self.codes = self.grid.codes.to(torch.float32) - zero
            if self.mask is not None:
                self.codes = self.codes * self.mask
            self.values = self.codes * self.step
        else:
            values = start if isinstance(start, Tensor) else start.dequantize()
            self.values = values.to(torch.float32, copy=True)
            if self.mask is not None:
                self.values *= self.mask
        self.error = self.values - weight

    def visit(self, moves: _Moves, first: int, stop: int, movable: bool) -> None:
        """Improve the blocks of some columns; what they change is spread to the columns after them at once."""
        part = slice(first, stop)
        gradient = self.error @ self.gram[:, part]
        inner = self.gram[part, part]
        for at in range(0, stop - first, moves.width):
            here = slice(first + at, first + at + moves.width)
            slope = gradient[:, at : at + moves.width]
            change = self._best_change(moves, (first + at) // moves.width, here, slope, movable)
            self.error[:, here] += change
            # The columns before are visited again in the next sweep only.
            gradient[:, at:] += change @ inner[at : at + moves.width, at:]

    def _best_change(self, moves: _Moves, index: int, here: slice, slope: Tensor, movable: bool) -> Tensor:
        now = self.values[:, here]
        square = moves.squares[index]
        target = now - slope @ moves.inverses[index]
        if not movable:
            return self._move_column(here, now, target, slope, square)
        rows, candidates = len(now), len(moves.members)
        best = (target @ moves.optimum[index]).view(rows, candidates, moves.kept)
        codes = torch.empty_like(best)
        for at in range(moves.kept):
            value, codes[:, :, at] = self._round(best[:, :, at], here, moves.members[:, at])
            if at + 1 < moves.kept:
                best[:, :, at + 1 :] += (best[:, :, at] - value)[:, :, None] * moves.onward[at][index]
            best[:, :, at] = value
        whole = now.new_zeros(rows, candidates, moves.width)
        places = moves.members.expand(rows, -1, -1)
        change = whole.scatter(2, places, best) - now[:, None]
        moved = (change @ square * change).sum(2)
        gain = moved + 2 * (change @ slope[:, :, None]).squeeze(2)
        chosen = gain.argmin(1)
        row = torch.arange(rows, device=now.device)
        better = (gain[row, chosen] < -GAIN * moved[row, chosen])[:, None]
        change = torch.where(better, change[row, chosen], 0.0)
        members = moves.members[chosen]
        if self.grid is not None:
            fresh = torch.zeros_like(now).scatter(1, members, codes[row, chosen])
            self.codes[:, here] = torch.where(better, fresh, self.codes[:, here])
        if self.mask is not None:
            fresh_mask = torch.zeros_like(now, dtype=torch.bool).scatter(1, members, True)
            self.mask[:, here] = torch.where(better, fresh_mask, self.mask[:, here])
        self.values[:, here] = now + change
        return change

    def _move_column(self, here: slice, now: Tensor, target: Tensor, slope: Tensor, square: Tensor) -> Tensor:
        """Move single values on their own, the mask as it is."""
        value = target
        code = None
        if self.grid is not None:
            value, code = self._round(target, here, torch.zeros(1, dtype=torch.long, device=now.device))
        if self.mask is not None:
            value = value * self.mask[:, here]
        change = value - now
        moved = change.square() * square
        better = moved + 2 * change * slope < -GAIN * moved
        change = torch.where(better, change, 0.0)
        if code is not None:
            if self.mask is not None:
                code = code * self.mask[:, here]
            self.codes[:, here] = torch.where(better, code, self.codes[:, here])
        self.values[:, here] = now + change
        return change

    def _round(self, wanted: Tensor, here: slice, members: Tensor) -> tuple[Tensor, Tensor]:
        """Round to the grid of the columns ``members`` of a block; return values and signed codes."""
        if self.grid is None:
            return wanted, wanted
        step, zero = self.step[:, here][:, members], self.zero[:, here][:, members]
        code = (wanted / step).round_()
        code = torch.maximum(torch.minimum(code, 2**self.grid.bits - 1 - zero), -zero)
        return code * step, code

    def fit_scales(self) -> None:
        """Give every scale the value that minimises f for the codes, one group after another.

        f is a parabola in one scale, so of the values that can be stored the one nearest to its lowest point is best.
        """
        if self.grid is None:
            return
        columns = self.codes.shape[1]
        size = self.grid.group if isinstance(self.grid.group, int) else columns
        dtype = self.grid.scale.dtype
        for first in range(0, columns, size):
            part = slice(first, min(first + size, columns))
            codes = self.codes[:, part]
            slope = ((self.error @ self.gram[:, part]) * codes).sum(1, keepdim=True)
            curve = (codes @ self.gram[part, part] * codes).sum(1, keepdim=True)
            if self.grid.group is None:
                slope, curve = slope.sum().view(1, 1), curve.sum().view(1, 1)
            step = self.step[: len(slope), first : first + 1]
            wanted = step - slope / curve
            fitted = torch.where((curve > 0) & (wanted > 0), wanted, step)
            fitted = storable(fitted, dtype)
            change = fitted - step
            better = change.square() * curve + 2 * change * slope < 0
            step = torch.where(better, fitted, step)
            self.step[:, part] = step
            self.values[:, part] = codes * self.step[:, part]
            self.error[:, part] = self.values[:, part] - self.weight[:, part]

    def stored(self) -> Quantized | Tensor:
        """Return what is stored, in the form in which it came."""
        if self.grid is None:
            return self.values
        rows, groups = self.grid.scale.shape
        size = self.grid.group if isinstance(self.grid.group, int) else self.codes.shape[1]
        scale = self.step[:rows, ::size][:, :groups]
        codes = (self.codes + self.zero).to(torch.uint8)
        return replace(self.grid, codes=codes, scale=scale.to(self.grid.scale.dtype).contiguous())
