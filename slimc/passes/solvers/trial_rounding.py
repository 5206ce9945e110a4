"""Rounding to a grid whose steps are good, not best: for choices that are tried many times."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from slimc.passes.solvers.quantization import Group

SHARES = tuple(2.0 ** (-third / 3) for third in range(10))
"""Of the largest magnitude, how much the grid spans; what is larger is cut off."""


def round_for_trial(weight: Tensor, bits: int, group: Group) -> Tensor:
    """Return ``weight`` on a symmetric grid, with the step of least squared error out of ten for each scale.

    Args:
        weight: float32 ``[rows, columns]``.
        bits: of a code.
        group: columns that share a scale, ``"channel"`` for a row, ``None`` for all.

    Returns:
        float32 ``[rows, columns]``.
    """
    rows, columns = weight.shape
    if group is None:
        parts = weight.reshape(1, -1)
    elif group == "channel":
        parts = weight
    else:
        width = int(group)
        parts = functional.pad(weight, (0, -columns % width)).reshape(-1, width)
    most = 2 ** (bits - 1)
    largest = parts.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    best, least = torch.zeros_like(parts), torch.full_like(largest, torch.inf)
    for share in SHARES:
        step = largest * (share / (most - 1))
        rounded = (parts / step).round().clamp(-most, most - 1) * step
        error = (rounded - parts).square().sum(1, keepdim=True)
        best = torch.where(error < least, rounded, best)
        least = torch.minimum(error, least)
    return best.reshape(rows, -1)[:, :columns] if isinstance(group, int) else best.reshape(rows, columns)
