"""Learned clipping: the ranges of groups found by gradient descent on the output error (OmniQuant, SliM-LLM+)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slimc.passes.solvers.quantization import Quantized, quantize_on
from slimc.passes.solvers.step_search import storable

_START = 4.0
"""The sigmoid of it, 0.98, is where the factors of both ends of a range begin, as in OmniQuant."""


@dataclass(frozen=True)
class LearnedClipping:
    """Options of :func:`learn_grids`.

    Attributes:
        steps: of descent, each over all of the calibration inputs.
        rate: of Adam.
    """

    steps: int = 100
    rate: float = 0.1


def learn_grids(
    weight: Tensor,
    gram: Tensor,
    widths: Sequence[int],
    group: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
    options: LearnedClipping,
) -> Quantized:
    """Put each group of columns on a grid whose range is learned.

    Both ends of a range are multiplied by a sigmoid each, and the squared error of the outputs of plain rounding,
    ``tr((Q - W) gram (Q - W)^T)``, is lowered over them by Adam; rounding counts as the identity. A sign's scale is the
    mean magnitude times ``sigmoid + 0.5``. OmniQuant and SliM-LLM+ do this for a block of the model at a time, for the
    error of the block; here it is done for each matrix by itself. The best state is kept.

    Args:
        weight: float32 ``[rows, columns]``.
        gram: ``X^T X``, ``[columns, columns]``.
        widths: of each group.
        group: columns a group; the last one may be short.
        symmetric: whether there are no zero points.
        scale_dtype: what scales are stored in.
        options: of the descent.
    """
    rows, columns = weight.shape
    padded = functional.pad(weight, (0, len(widths) * group - columns)).view(rows, len(widths), group)
    width = torch.tensor(widths, dtype=torch.float32, device=weight.device)
    sizes = torch.tensor([min(group, columns - index * group) for index in range(len(widths))], device=weight.device)
    lowest, highest = padded.amin(dim=2).clamp(max=0), padded.amax(dim=2).clamp(min=0)
    magnitude = padded.abs().sum(dim=2) / sizes
    levels, signs = torch.exp2(width) - 1, width == 1
    energy = gram / gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)

    def grids(upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
        high, low = upper.sigmoid() * highest, lower.sigmoid() * lowest
        if symmetric:
            scale = torch.maximum(high, -low) / (torch.exp2(width - 1) - 1).clamp(min=1)
            zero = torch.exp2(width - 1).expand(scale.shape)
        else:
            scale = (high - low) / levels
            zero = _rounded(-low / torch.where(scale > 0, scale, 1.0)).clamp(max=levels)
        scale = torch.where(signs, magnitude * (upper.sigmoid() + 0.5), scale)
        return torch.where(scale > 0, scale, 1.0), zero

    def change(scale: Tensor, zero: Tensor) -> Tensor:
        """Return by how much rounding changes the weight."""
        step, middle = scale[:, :, None], zero[:, :, None]
        codes = torch.minimum((_rounded(padded / step) + middle).clamp(min=0), levels[:, None])
        values = torch.where(signs[:, None], torch.where(padded < 0, -step, step), (codes - middle) * step)
        return (values - padded).flatten(1)[:, :columns]

    with torch.enable_grad():
        start = torch.where(signs, 0.0, _START).expand(lowest.shape)
        factors = [start.clone().requires_grad_() for _ in range(2)]
        descent = torch.optim.Adam(factors, lr=options.rate)
        best, least = [factor.detach().clone() for factor in factors], torch.inf
        for _ in range(options.steps):
            difference = change(*grids(*factors))
            loss = ((difference @ energy) * difference).sum() / rows
            reached = float(loss.detach())
            if reached < least:
                best, least = [factor.detach().clone() for factor in factors], reached
            descent.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            descent.step()
    scale, zero = grids(*best)
    return quantize_on(
        weight,
        storable(scale, scale_dtype).to(scale_dtype),
        None if symmetric else torch.where(signs, 0.0, zero).to(torch.uint8),
        bits=max(widths),
        group=group,
        widths=tuple(widths),
    )


def _rounded(values: Tensor) -> Tensor:
    """Round to whole numbers; the gradient passes as if nothing had happened."""
    return values + (values.round() - values).detach()
