"""Pruning scores and the masks that they choose.

A mask is bool, shaped like the weight, and true where the weight is kept. Of equal scores the one in the lower column
(in the lower row first, for a whole tensor) is kept, on every device.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from slimc.errors import InputError, RecipeError
from slimc.passes.solvers.checks import require_finite, require_matrix, require_pattern, require_shape, share_of


def magnitude_scores(weight: Tensor) -> Tensor:
    """Return ``|W|``, float32 ``[rows, columns]``.

    Raises:
        NumericsError: if the weight holds NaN or Inf.
    """
    require_matrix("magnitude_scores", weight=weight)
    require_finite("magnitude_scores", weight=weight)
    return weight.to(torch.float32).abs()


def wanda_scores(weight: Tensor, sum_squares: Tensor, count: int = 1) -> Tensor:
    """Return Wanda's ``|W_ij| * ||x_j||_2`` (Sun et al. 2024, equation 1), float32 ``[rows, columns]``.

    SLiM's paper prunes the quantised weight and does not say which weight is scored; its code scores the *original* one
    and masks the quantised. Give the original one here too: rounding ties scores that were apart, and the error is
    lower without that on all of the seeded layers of the tests.

    Args:
        weight: ``[rows, columns]``.
        sum_squares: the sum of ``x_j^2`` over the calibration tokens, ``[columns]``.
        count: divides ``sum_squares``. The published score has 1; the number of tokens gives the root mean square,
            which scales all scores alike and so chooses the same mask.

    Raises:
        InputError: if a shape is wrong, or ``count`` or a sum of squares is negative.
        NumericsError: if an argument holds NaN or Inf.
    """
    require_matrix("wanda_scores", weight=weight)
    require_shape("wanda_scores", (weight.shape[1],), sum_squares=sum_squares)
    require_finite("wanda_scores", weight=weight, sum_squares=sum_squares)
    if count < 1 or bool((sum_squares < 0).any()):
        raise InputError("wanda_scores: 'count' must be at least 1 and no sum of squares may be negative")
    return weight.to(torch.float32).abs() * (sum_squares.to(torch.float32) / count).sqrt()


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the ``n`` highest scores of every ``m`` consecutive columns.

    Args:
        scores: ``[rows, columns]``.
        n: how many are kept, 1 to ``m``.
        m: the length of a block; it must divide the columns.

    Returns:
        bool ``[rows, columns]`` with exactly ``n`` of every ``m`` true.

    Raises:
        RecipeError: if the pattern is not valid or does not divide the columns.
        NumericsError: if a score is NaN or Inf.
    """
    require_matrix("nm_mask", scores=scores)
    require_pattern("nm_mask", n, m, tuple(scores.shape))
    require_finite("nm_mask", scores=scores)
    return keep_highest(scores.reshape(-1, m), n).view(scores.shape)


def unstructured_mask(scores: Tensor, ratio: float, per: Literal["row", "tensor"] = "row") -> Tensor:
    """Drop the lowest scores.

    Args:
        scores: ``[rows, columns]``.
        ratio: the share to drop, 0 to below 1.
        per: ``"row"`` drops ``floor(ratio * columns)`` in each row, as Wanda does; ``"tensor"`` drops
            ``floor(ratio * rows * columns)`` wherever they are.

    Returns:
        bool ``[rows, columns]``.

    Raises:
        RecipeError: if ``ratio`` or ``per`` is not valid.
        NumericsError: if a score is NaN or Inf.
    """
    require_matrix("unstructured_mask", scores=scores)
    require_ratio("unstructured_mask", ratio)
    if per not in ("row", "tensor"):
        raise RecipeError(f"unstructured_mask: per={per!r} is not known; choose 'row' or 'tensor'")
    require_finite("unstructured_mask", scores=scores)
    ranked = scores if per == "row" else scores.reshape(1, -1)
    size = ranked.shape[1]
    return keep_highest(ranked, size - share_of(ratio, size)).view(scores.shape)


def require_ratio(caller: str, ratio: float) -> None:
    """Raise :class:`RecipeError` unless ``ratio`` is a share of weights that can be dropped."""
    if not 0 <= ratio < 1:
        raise RecipeError(f"{caller}: the sparsity ratio {ratio} is not valid; give a share to drop, 0 <= ratio < 1")


SHORT_ROW = 8
"""Rows up to this length are ranked by comparing all pairs: sorting so many takes longer."""


def keep_highest(scores: Tensor, keep: int) -> Tensor:
    """Return a mask of the ``keep`` highest entries of each row; the lower column is kept of equal ones."""
    columns = scores.shape[1]
    if columns <= SHORT_ROW:
        return _highest_of_few(scores, keep)
    if 0 < keep < columns:
        mask = scores >= scores.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
        if bool((mask.sum(1) == keep).all()):
            return mask
    # Only a stable sort settles ties by position.
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, order, True)


def _highest_of_few(scores: Tensor, keep: int) -> Tensor:
    by_column = scores.t().contiguous()
    better = torch.zeros(by_column.shape, dtype=torch.uint8, device=scores.device)
    for column in range(len(by_column)):
        for earlier in range(column):
            wins = by_column[earlier] >= by_column[column]
            better[column] += wins
            better[earlier] += ~wins
    return (better < keep).t().contiguous()
