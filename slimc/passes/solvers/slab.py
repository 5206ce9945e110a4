"""SLaB (Li, Ma, Kang, arXiv 2604.04493): a weight as a sparse matrix plus signs with a magnitude of low rank.

``W ~ S + L (.) B`` with B in {-1, +1}: the signs carry those of what S leaves, the low-rank L its magnitude. The text
of the paper was not available here; where summaries of it leave a choice, it is an option.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimc.errors import InputError, RecipeError
from slimc.passes.solvers.checks import require_finite, require_matrix, require_shape
from slimc.passes.solvers.low_rank import resolve_rank, truncated_svd
from slimc.passes.solvers.pruning import keep_highest, nm_mask

Pattern = tuple[int, int] | None
"""N and M, or ``None`` where any entry of a row may be kept."""

Weighting = Literal["none", "activations"]

VALUE_BITS = 16
"""Bits of a value in the published accounting."""

POWER_STEPS = 8
"""Steps of power iteration a round.

The magnitude of a residual is a matrix of positive entries, whose first singular value is far above its second (12
times for normal entries of 576 x 576), so each step gains two digits, and the next round goes on from there.
"""


STORED_ROUNDS = 3
"""Rounds that know of the rounding of S, where there is one.

From the start, rounding errors would settle the signs of what S keeps. A layer with heavy tails, 2:4 and 4 bits in
groups, of 20 rounds: output error 0.158 if none knows, 0.150 with the last two to five, 0.149 with ten, 0.153 with all.
"""


@dataclass(frozen=True, eq=False)
class Decomposition:
    """``W ~ sparse + (left @ right) (.) B``.

    Attributes:
        sparse: what S holds at ``mask``, float32 ``[rows, columns]``, zero elsewhere; not yet rounded for storage.
        mask: which entries S keeps, bool ``[rows, columns]``.
        negative: where B is -1, bool ``[rows, columns]``.
        left: ``[rows, rank]``, float32 numbers that the dtype asked for can hold.
        right: ``[rank, columns]``, the same.
        errors: what each round left, ``|(W - S - L (.) B) diag(norms)|`` relative to ``|W diag(norms)|``.
    """

    sparse: Tensor
    mask: Tensor
    negative: Tensor
    left: Tensor
    right: Tensor
    errors: tuple[float, ...]

    def binary(self) -> Tensor:
        """Return ``L (.) B``, float32 ``[rows, columns]``."""
        return _signed(self.left @ self.right, self.negative)


def kept_share(ratio: float, rows: int, columns: int, rank: int) -> float:
    """Return the share of entries that S may keep at a published compression ratio.

    ``ratio = 1 - (k b + rows columns + rank b (rows + columns)) / (b rows columns)`` with k entries of ``b = 16`` bits:
    values, signs and factors count, where the entries are does not, as in the papers of Wanda and SparseGPT.
    """
    return 1 - ratio - 1 / VALUE_BITS - rank * (rows + columns) / (rows * columns)


def compression_ratio(kept: int, rows: int, columns: int, rank: int) -> float:
    """Return the published compression ratio of ``kept`` entries beside a binary part, see :func:`kept_share`."""
    return kept_share(kept / (rows * columns), rows, columns, rank)


def kept_in_row(ratio: float, rows: int, columns: int, rank: int, pattern: Pattern = None) -> int:
    """Return how many entries each row keeps to reach ``ratio``.

    Raises:
        RecipeError: if nothing would be left for S, or the pattern cannot keep as many.
    """
    share = kept_share(ratio, rows, columns, rank)
    kept = int(share * columns + 1e-9)
    most = columns if pattern is None else columns // pattern[1] * pattern[0]
    highest = kept_share(1 / columns, rows, columns, rank)
    if kept < 1:
        raise RecipeError(
            f"a compression ratio of {ratio} cannot be met: the signs and factors of rank {rank} of a {rows} x "
            f"{columns} weight take {1 - kept_share(0, rows, columns, rank):.4f} of its 16 bits; ask for at most "
            f"{max(highest, 0):.4f}, or a lower rank"
        )
    if kept > most:
        lowest = kept_share(most / columns, rows, columns, rank)
        limit = f"the pattern {pattern[0]}:{pattern[1]} keeps" if pattern else "there are"
        raise RecipeError(
            f"a compression ratio of {ratio} cannot be met: a row of {columns} would keep {kept} entries, but {limit} "
            f"{most}, which is a ratio of {lowest:.4f}; ask for at least that"
        )
    return kept


def slab(
    weight: Tensor,
    norms: Tensor | None,
    keep: int,
    pattern: Pattern = None,
    *,
    rank: int = 1,
    rounds: int = 20,
    weighting: Weighting = "none",
    dtype: torch.dtype = torch.float32,
    stored: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Decomposition:
    """Decompose a weight by alternation, from ``L = 0`` on; the round that leaves the least error counts.

    Each round takes ``R = W - S``, then ``B = sign(R)`` (that of W where R is 0), then L as the best approximation of
    ``|R|`` of its rank, which for rank 1 is exact for the pair, because then L has no negative entry; and keeps in S
    the entries of ``Y = W - L (.) B`` with the highest ``|Y_ij| * norms_j`` of each row, where no error is left then.

    Args:
        weight: ``[rows, columns]``.
        norms: of the input channels, ``|x_j|_2`` up to a common factor, ``[columns]``; ``None`` if all count alike.
        keep: entries that each row keeps.
        pattern: N and M: at most N of every M consecutive columns are kept, the highest scores first.
        rank: of L, 1 to ``min(rows, columns)``. Above 1 the entries of L may be negative, and the alternation is a
            heuristic.
        rounds: at least 1; the paper takes 20.
        weighting: ``"activations"`` approximates ``|R| diag(norms)``, so that L errs least where inputs are large;
            ``"none"`` approximates ``|R|`` itself.
        dtype: of the factors as they are stored: S makes good at its entries what their rounding changes.
        stored: what becomes of S when it is stored, given Y and the mask; the last `STORED_ROUNDS` work against that.

    Raises:
        RecipeError: if the rank, ``keep``, the pattern or the number of rounds does not fit.
        InputError: if a shape is wrong or a norm is negative.
        NumericsError: if an argument holds NaN or Inf.
    """
    require_matrix("slab", weight=weight)
    rows, columns = weight.shape
    require_shape("slab", (columns,), norms=norms)
    require_finite("slab", weight=weight, norms=norms)
    resolve_rank(rank, rows, columns)
    if norms is not None and bool((norms < 0).any()):
        raise InputError("slab: argument 'norms' has negative entries; give the norms of the input channels")
    if not 1 <= keep <= columns:
        raise RecipeError(f"slab: keep={keep} of {columns} entries of a row is not possible; give 1 to {columns}")
    if rounds < 1:
        raise RecipeError(f"slab: rounds={rounds} makes no decomposition; give 1 or more")
    exact = weight.float()
    scores = torch.ones(columns, device=weight.device) if norms is None else norms.float()
    solver = _Magnitude(rank, scores if weighting == "activations" else None)
    size = float(torch.linalg.vector_norm(exact * scores, dtype=torch.float64)) or 1.0

    def choose(target: Tensor) -> Tensor:
        return _choose(target.abs() * scores, keep, pattern)

    errors: list[float] = []
    least = float("inf")
    exact_rounds = 0 if stored is None else max(rounds - STORED_ROUNDS, 0)
    sparse = exact * choose(exact)
    for finished in range(rounds):
        residual = exact - sparse
        # Where S holds a weight exactly, its own sign lets the entry go should another be worth more; +1 for all of
        # them would hold on to the negative ones. (2:4, 20 rounds, a layer with heavy tails: error 0.121, not 0.127.)
        negative = torch.where(residual == 0, exact < 0, residual < 0)
        left, right = solver.solve(residual.abs_())
        target = exact - _signed(left @ right, negative)
        mask = choose(target)
        sparse = (target if stored is None or finished < exact_rounds else stored(target, mask)) * mask
        errors.append(float(torch.linalg.vector_norm((target - sparse) * scores, dtype=torch.float64)) / size)
        if finished >= exact_rounds and errors[-1] < least:
            least, best = errors[-1], (left, right, negative)
    left, right, negative = best
    left, right = _balanced(left, right)
    left, right = left.to(dtype).float(), right.to(dtype).float()
    target = exact - _signed(left @ right, negative)
    mask = choose(target)
    return Decomposition(target * mask, mask, negative, left, right, tuple(errors))


class _Magnitude:
    """Approximates matrices of magnitudes that change little from one to the next."""

    def __init__(self, rank: int, weights: Tensor | None) -> None:
        self.rank = rank
        # A channel that no input reached must not decide anything, and its factor must stay finite.
        self.weights = None if weights is None else weights.clamp(min=float(weights.max()) * 1e-4 or 1.0)
        self._right: Tensor | None = None

    def solve(self, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``left [rows, rank]`` and ``right [rank, columns]``."""
        matrix = magnitude if self.weights is None else magnitude * self.weights
        left, right = self._first(matrix) if self.rank == 1 else truncated_svd(matrix, self.rank)
        return left, right if self.weights is None else right / self.weights

    def _first(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first singular triple, the singular value in ``left``."""
        right = matrix.sum(0) if self._right is None else self._right
        tiny = torch.finfo(matrix.dtype).tiny
        for _ in range(POWER_STEPS):
            left = matrix @ right
            right = left @ matrix
            right = right / right.norm().clamp(min=tiny)
        self._right = right
        return (matrix @ right)[:, None], right[None]


def _choose(scores: Tensor, keep: int, pattern: Pattern) -> Tensor:
    """Return the mask of the ``keep`` highest scores of each row that the pattern allows."""
    if pattern is None:
        return keep_highest(scores, keep)
    n, m = pattern
    allowed = nm_mask(scores, n, m)
    if keep >= scores.shape[1] // m * n:
        return allowed
    # Below every score, so that what the pattern refuses comes last even among zeros.
    return keep_highest(torch.where(allowed, scores, -1.0), keep)


def _signed(magnitude: Tensor, negative: Tensor) -> Tensor:
    return torch.where(negative, -magnitude, magnitude)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Give each row of ``right`` a root mean square of 1: inputs multiplied by it keep their size, in any dtype."""
    size = right.norm(dim=1) / right.shape[1] ** 0.5
    size = torch.where(size > 0, size, 1.0)
    return left * size, right / size[:, None]
