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
from slimc.passes.solvers.hessian import Metric, factored
from slimc.passes.solvers.quantization import Quantized
from slimc.passes.solvers.replay import replay

_LEAST_DAMPING = 1e-6

BLOCK = 128
"""Columns that are updated before the rest of the matrix is."""


def solve_jointly(
    weight: Tensor, gram: Tensor | Metric, grid: Quantized | None, *, pattern: tuple[int, int], block: int = BLOCK
) -> tuple[Quantized | Tensor, Tensor]:
    """Return what to store for ``weight``: an N:M mask and codes (or values) for a small output error.

    Blocks are visited by falling energy of their inputs, so that most others are left to absorb the errors that matter.

    Args:
        weight: ``[rows, columns]``.
        gram: ``X^T X`` of the inputs, damped, ``[columns, columns]``; as a metric it keeps its factor.
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
    metric = Metric.of(gram)
    require_shape("solve_jointly", (columns, columns), gram=metric.gram)
    require_finite("solve_jointly", weight=weight, gram=metric.gram)
    require_pattern("solve_jointly", *pattern, (rows, columns))
    if not can_be_tried(pattern):
        raise RecipeError(
            f"solve_jointly: {pattern[0]}:{pattern[1]} allows too many masks in a block to try them all; use a smaller "
            "block, such as 2:4 or 4:8, or sparsegpt"
        )
    kept, width = pattern
    # Columns that all keep a value may stand in any block.
    plan = metric.derive(_Plan, kept, width)
    order = plan.order
    left = weight.T[order].to(torch.float32)
    carried = torch.zeros_like(left)
    entries, shared = None, False
    if grid is not None:
        require_shape("solve_jointly", (rows, columns), grid=grid.codes)
        entries = columns_of(grid_of(grid), order)
        shared = shares_grid(entries, width)
    mask = torch.empty_like(left, dtype=torch.bool)
    block = max(block // width, 1) * width
    for first in range(0, columns, block):
        part = slice(first, min(first + block, columns))
        inside = NO_GRID if entries is None else columns_of(entries, part)
        values, mask[part] = replay(
            _settle_blocks, left[part], carried[part], *inside, shared, plan.factor[part, part], *plan.of(part)
        )
        carried[part.stop :].addmm_(plan.factor[part, part.stop :].T, values - left[part])
        left[part] = values
    back = order.argsort()
    if grid is not None and entries is not None:
        step, lowest, _ = entries
        codes = (left / step).round_().sub_(lowest)
        return replace(grid, codes=transposed(codes[back].to(torch.uint8))), transposed(mask[back])
    return transposed(left[back]), transposed(mask[back])


class _Plan(Candidates):
    """The order in which the blocks of a metric are visited, its factor, and the tables of the blocks, in that order.

    Attributes:
        order: of the columns, int64 ``[columns]``.
        factor: ``R``, upper triangular, float32 ``[columns, columns]``.
        inverted: ``R_bb^-T`` of each block, float32 ``[blocks, width, width]``.
    """

    def __init__(self, gram: Tensor, kept: int, width: int) -> None:
        """Factor ``gram``, float32 ``[columns, columns]``."""
        # Columns that all keep a value may stand in any block.
        self.order = _visiting_order(gram, width if kept < width else 1)
        reversed_order = self.order.flip(0)
        factor = factored(gram[reversed_order][:, reversed_order], _LEAST_DAMPING)
        self.factor = factor.to(torch.float32).flip(0, 1)
        blocks = len(gram) // width
        position = torch.arange(blocks, device=gram.device)
        # The blocks of the flipped factor, in the order of the blocks that are visited.
        corner = factor.view(blocks, width, blocks, width)[position, :, position].flip(0, 1, 2)
        super().__init__(corner @ corner.transpose(1, 2), kept)
        self.inverted = torch.linalg.inv(corner).transpose(1, 2).to(torch.float32).contiguous()

    def of(self, part: slice) -> tuple[Tensor, ...]:
        """Return the tables of the blocks in some columns: the inverses first, then those of the candidates."""
        return (self.inverted[part.start // self.width : part.stop // self.width], *super().of(part))


def _settle_blocks(
    weight: Tensor,
    carried: Tensor,
    step: Tensor | None,
    lowest: Tensor | float | None,
    highest: Tensor | float | None,
    shared: bool,
    factor: Tensor,
    inverted: Tensor,
    members: Tensor,
    masks: Tensor,
    squares: Tensor,
    forms: Tensor,
    onward: Tensor,
    curvature: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the values and the mask of some columns, settled block by block.

    ``weight``, ``carried`` (the part of ``E R`` that the columns before have left) and the grid are
    ``[columns, rows]``, ``factor`` is ``R`` within the columns, ``inverted`` the ``R_bb^-T``, and what follows the
    tables of :class:`Candidates`. ``shared`` says that the columns of a block have one grid.
    """
    carried = carried.clone()
    values, mask = torch.empty_like(weight), torch.ones_like(weight, dtype=torch.bool)
    width = masks.shape[0]
    for index in range(len(squares)):
        here = slice(index * width, (index + 1) * width)
        now = weight[here]
        wanted = torch.addmm(now, inverted[index], carried[here], alpha=-1)
        entries = slice(here.start, here.start + 1) if shared else here
        grid = None if step is None else columns_of((step, lowest, highest), entries)
        taken, chosen = best_candidate(wanted, grid, members, forms[index], onward[index], curvature[index])
        carried[here.stop :].addmm_(factor[here, here.stop :].T, taken - now)
        values[here] = taken
        if chosen is not None:
            mask[here] = masks[:, chosen]
    return values, mask


def _visiting_order(gram: Tensor, width: int) -> Tensor:
    """Return the columns, whole blocks of ``width`` by falling energy."""
    blocks = gram.diagonal().view(-1, width).sum(1).argsort(descending=True, stable=True)
    return (blocks[:, None] * width + torch.arange(width, device=gram.device)).flatten()
