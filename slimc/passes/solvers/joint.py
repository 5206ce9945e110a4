r"""Mask and codes chosen together, block by block, with the whole second moment of the inputs.

SparseGPT and GPTQ visit columns one by one and let the later ones absorb what each has lost. Here a step is a whole N:M
block. With ``H = R R^T``, ``R`` upper triangular, and ``E = Q - W`` the output error is ``|E R|^2``, and the columns of
``E R`` in a block are ``E_b R_bb + S_b``, where ``S_b = sum E_a R_ab`` over the blocks before it is settled when the
block is reached. So the block costs ``(q - t) B (q - t)^T`` with ``t = w - S_b R_bb^-1`` and ``B = R_bb R_bb^T``, and
all masks that the pattern allows can be compared by what they cost *in the end, rounding included*, which the score
of single entries does not know. (The same updates as with the Cholesky factor of the inverse, as Chee et al. 2023 have
shown for GPTQ; but nothing is inverted.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slimc.errors import RecipeError
from slimc.passes.solvers.candidates import NO_GRID, Candidates, can_be_tried, columns_of, grid_of, rounded_candidates
from slimc.passes.solvers.checks import require_finite, require_matrix, require_pattern, require_shape
from slimc.passes.solvers.hessian import factored
from slimc.passes.solvers.quantization import Quantized
from slimc.passes.solvers.replay import replay

_LEAST_DAMPING = 1e-6


def solve_jointly(
    weight: Tensor, gram: Tensor, grid: Quantized | None, *, pattern: tuple[int, int], block: int = 128
) -> tuple[Quantized | Tensor, Tensor]:
    """Return what to store for ``weight``: an N:M mask and codes (or values) for a small output error.

    Blocks are visited by falling energy of their inputs, so that most others are left to absorb the errors that matter.

    Args:
        weight: ``[rows, columns]``.
        gram: ``X^T X`` of the inputs, damped, ``[columns, columns]``.
        grid: scales (and zero points) to round to; its codes are not read. ``None`` keeps real values.
        pattern: ``(n, m)`` keeps n of every m columns; ``(m, m)`` keeps all.
        block: how many columns are updated before the rest of the matrix is; changes the speed only.

    Returns:
        The codes on the grid, zero where pruned, or the values; and the mask, bool, true where kept.

    Raises:
        RecipeError: if the pattern does not divide the columns, or allows too many masks to try them all.
        InputError: if a shape is wrong.
        NumericsError: if an argument holds NaN or Inf, or ``gram`` is not a positive semi-definite matrix.
    """
    require_matrix("solve_jointly", weight=weight)
    rows, columns = weight.shape
    require_shape("solve_jointly", (columns, columns), gram=gram)
    require_finite("solve_jointly", weight=weight, gram=gram)
    require_pattern("solve_jointly", *pattern, (rows, columns))
    if not can_be_tried(pattern):
        raise RecipeError(
            f"solve_jointly: {pattern[0]}:{pattern[1]} allows too many masks in a block to try them all; use a smaller "
            "block, such as 2:4 or 4:8, or sparsegpt"
        )
    kept, width = pattern
    # Columns that all keep a value may stand in any block.
    order = _visiting_order(gram, width if kept < width else 1)
    left = weight[:, order].to(torch.float32)
    factor = factored(gram[order][:, order].flip(0, 1), _LEAST_DAMPING).flip(0, 1)
    blocks = columns // width
    position = torch.arange(blocks, device=gram.device)
    corner = factor.view(blocks, width, blocks, width)[position, :, position]
    candidates = Candidates(corner @ corner.transpose(1, 2), kept)
    inverted, factor = torch.linalg.inv(corner).float(), factor.float()
    carried = torch.zeros_like(left)
    entries = None
    if grid is not None:
        require_shape("solve_jointly", (rows, columns), grid=grid.codes)
        entries = columns_of(grid_of(grid), order)
    mask = torch.empty_like(left, dtype=torch.bool)
    block = max(block // width, 1) * width
    for first in range(0, columns, block):
        part = slice(first, min(first + block, columns))
        inside = NO_GRID if entries is None else columns_of(entries, part)
        tables = (inverted[part.start // width : part.stop // width], *candidates.of(part))
        values, mask[:, part] = replay(
            _settle_blocks, left[:, part], carried[:, part], *inside, factor[part, part], *tables
        )
        carried[:, part.stop :].addmm_(values - left[:, part], factor[part, part.stop :])
        left[:, part] = values
    back = order.argsort()
    if grid is not None and entries is not None:
        step, lowest, _ = entries
        codes = (left / step).round_().sub_(lowest)
        return replace(grid, codes=codes[:, back].to(torch.uint8)), mask[:, back]
    return left[:, back], mask[:, back]


def _settle_blocks(
    weight: Tensor,
    carried: Tensor,
    step: Tensor | None,
    lowest: Tensor | float | None,
    highest: Tensor | float | None,
    factor: Tensor,
    inverted: Tensor,
    members: Tensor,
    masks: Tensor,
    places: Tensor,
    squares: Tensor,
    optimum: Tensor,
    onward: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the values and the mask of some columns, settled block by block.

    ``weight``, ``carried`` (the part of ``E R`` that the columns before have left) and the grid are
    ``[rows, columns]``, ``factor`` is ``R`` within the columns, ``inverted`` the ``R_bb^-1``, and what follows the
    tables of :class:`Candidates`.
    """
    carried = carried.clone()
    values, mask = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
    width = masks.shape[1]
    for index in range(len(squares)):
        here = slice(index * width, (index + 1) * width)
        now = weight[:, here]
        wanted = torch.addmm(now, carried[:, here], inverted[index], alpha=-1)
        grid = None if step is None else columns_of((step, lowest, highest), here)
        found = rounded_candidates(wanted, grid, members, places, optimum[index], onward[index])
        change = found - wanted[:, None]
        chosen = torch.linalg.vecdot(change @ squares[index], change).min(1).indices
        taken = found.gather(1, chosen[:, None, None].expand(-1, 1, width)).squeeze(1)
        carried[:, here.stop :].addmm_(taken - now, factor[here, here.stop :])
        values[:, here] = taken
        mask[:, here] = masks[chosen]
    return values, mask


def _visiting_order(gram: Tensor, width: int) -> Tensor:
    """Return the columns, whole blocks of ``width`` by falling energy."""
    blocks = gram.diagonal().view(-1, width).sum(1).argsort(descending=True, stable=True)
    return (blocks[:, None] * width + torch.arange(width, device=gram.device)).flatten()
