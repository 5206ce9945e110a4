"""The range of a group of weights: its extremes, or the one that a search over narrower and wider ranges finds best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimc.passes.solvers.quantization import Quantized, quantize_on
from slimc.passes.solvers.step_search import storable


@dataclass(frozen=True)
class RangeSearch:
    """Salience-weighted calibration of a quantiser (SQC; SliM-LLM, section 3.3).

    The range ``[min, max]`` of a group is scaled by each ``tau`` and the one is kept with the least
    ``sum_i weight_i |w_i - Q_tau(w_i)|^power``; scale and zero point are those of the scaled range.

    Attributes:
        lowest: the smallest tau.
        highest: the largest tau.
        candidates: how many are tried, evenly spaced.
        salient: which weights count as salient: those outside ``mean +- threshold * deviation`` of the weights of their
            row and group (``"weight"``), or of the saliences ``w^2 / U_jj^2`` of their group (``"salience"``);
            ``None`` makes no difference between weights.
        threshold: in standard deviations.
        emphasis: the weight of a salient entry; 1 makes the search an ordinary one.
        power: of the error.
        by_column: multiplies the weight of an entry by ``1 / U_jj^2``, the output error that error feedback makes of
            a unit of its squared rounding error.
        shift: zero points up to so many codes from that of the range are tried, too.
    """

    lowest: float = 0.9
    highest: float = 1.1
    candidates: int = 100
    salient: Literal["weight", "salience"] | None = "weight"
    threshold: float = 3.0
    emphasis: float = 1.0
    power: float = 2.0
    by_column: bool = False
    shift: int = 0


PRESETS: Mapping[str, RangeSearch] = {
    "paper": RangeSearch(),
    "reference": RangeSearch(salient="salience", threshold=2.0, power=2.4),
    "output": RangeSearch(lowest=0.4, highest=1.1, candidates=18, salient=None, by_column=True, shift=1),
}
"""Searches by name: equation 5 of the paper as printed; what the authors' code does; and the one of slimc.

In both of the former salient weights have the weight 1, which is what the paper's equation says and the code's default.
"""

_CHUNK = 2**22
"""Entries looked at together in a search, on a CPU; a GPU takes 16 times as many."""


def solve_range(
    values: Tensor,
    bits: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
    search: RangeSearch | None,
    curvature: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point of each row of ``values``, which shares them.

    Without a search they are those of :func:`slimc.passes.solvers.quantization.quantize_absmax`. Signs (1 bit) have
    the scale of least (weighted) squared error, the mean magnitude, and no range to search.

    Args:
        values: float32 ``[..., rows, columns]``: of one group of columns, or of several.
        bits: 1 to 8.
        symmetric: whether there is no zero point.
        scale_dtype: what the scale must be representable in.
        search: over ranges.
        curvature: ``1 / U_jj^2``, float32 ``[..., columns]``; 0 where a channel is dead.

    Returns:
        float32 ``[..., rows]``, positive; and float32 ``[..., rows]``, whole numbers, or ``None``.
    """
    if bits == 1:
        scale = _mean_magnitude(values, curvature if search is not None and search.by_column else None)
        return storable(torch.where(scale > 0, scale, 1.0), scale_dtype), None if symmetric else torch.zeros_like(scale)
    levels = 2**bits - 1
    lowest, highest = values.amin(dim=-1).clamp(max=0), values.amax(dim=-1).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-lowest, highest) / (2 ** (bits - 1) - 1)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        # Divided one by one, since the difference of two large numbers may overflow.
        scale = highest / levels - lowest / levels
        # The zero point of the scale that is stored, where no other one is looked for.
        stored = scale if search is not None else storable(scale, scale_dtype)
        zero = torch.where(scale > 0, -lowest / stored, 0.0).round().clamp_(0, levels)
    scale = torch.where(scale > 0, scale, 1.0)
    if search is None:
        scale = storable(scale, scale_dtype)
    else:
        shift = 0 if symmetric else search.shift
        scale, zero = _searched(values, scale, zero, levels, scale_dtype, search, curvature, shift)
    return scale, None if symmetric else zero


def group_grids(
    weight: Tensor,
    widths: Sequence[int],
    group: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
    search: RangeSearch | None,
    curvature: Tensor,
) -> Quantized:
    """Put each group of columns on a grid of its own width and range; return the nearest codes.

    Args:
        weight: float32 ``[rows, columns]``.
        widths: of each group.
        group: columns a group; the last one may be short.
        symmetric: whether there are no zero points.
        scale_dtype: what scales are stored in.
        search: over ranges.
        curvature: ``1 / U_jj^2``, float32 ``[columns]``.
    """
    rows, columns = weight.shape
    scale = torch.ones(rows, len(widths), device=weight.device)
    zero_point = torch.zeros_like(scale)
    whole = columns // group
    grouped = weight[:, : whole * group].reshape(rows, whole, group).transpose(0, 1)
    shares = curvature[: whole * group].view(whole, group)
    for width in sorted(set(widths)):
        alike = [index for index in range(whole) if widths[index] == width]
        parts = [(alike, grouped[alike], shares[alike])] if alike else []
        if whole < len(widths) and widths[whole] == width:
            parts.append(([whole], weight[None, :, whole * group :], curvature[None, whole * group :]))
        for places, values, share in parts:
            found, zero = solve_range(
                values, width, symmetric=symmetric, scale_dtype=scale_dtype, search=search, curvature=share
            )
            scale[:, places] = found.t()
            if zero is not None:
                zero_point[:, places] = zero.t()
    return quantize_on(
        weight,
        scale.to(scale_dtype),
        None if symmetric else zero_point.to(torch.uint8),
        bits=max(widths),
        group=group,
        widths=tuple(widths),
    )


def _mean_magnitude(values: Tensor, curvature: Tensor | None) -> Tensor:
    magnitude = values.abs()
    if curvature is None:
        return magnitude.mean(dim=-1)
    total = curvature.sum(dim=-1, keepdim=True)
    # A group of dead channels only has nothing to weigh by.
    shares = torch.where(total > 0, curvature / total, 1 / curvature.shape[-1])
    return (magnitude * shares.unsqueeze(-2)).sum(dim=-1)


def _searched(
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: int,
    scale_dtype: torch.dtype,
    search: RangeSearch,
    curvature: Tensor,
    shift: int,
) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero point with the least weighted error; of equal ones the first."""
    weights = _weights(values, search, curvature)
    taus = torch.linspace(search.lowest, search.highest, search.candidates, device=values.device)
    scales = storable(taus.view(-1, *[1] * scale.dim()) * scale, scale_dtype)
    chunk = max(1, (_CHUNK if values.device.type == "cpu" else 16 * _CHUNK) // values.numel())
    least = torch.full_like(scale, torch.inf)
    best_scale, best_zero = scale, zero
    for moved in (zero if not by else (zero + by).clamp_(0, levels) for by in range(-shift, shift + 1)):
        low, high = -moved.unsqueeze(-1), levels - moved.unsqueeze(-1)
        errors = []
        for start in range(0, len(scales), chunk):
            step = scales[start : start + chunk].unsqueeze(-1)
            found = (values / step).round_().clamp_(low, high).mul_(step).sub_(values)
            found = found.square_() if search.power == 2 else found.abs_().pow_(search.power)
            errors.append(found.mul_(weights).sum(dim=-1))
        error, index = torch.cat(errors).min(dim=0)
        better = error < least
        least = torch.where(better, error, least)
        best_zero = torch.where(better, moved, best_zero)
        best_scale = torch.where(better, scales.gather(0, index.unsqueeze(0)).squeeze(0), best_scale)
    return best_scale, best_zero


def _weights(values: Tensor, search: RangeSearch, curvature: Tensor) -> Tensor:
    """Return what the error of each entry counts, broadcastable to ``values``."""
    weights = curvature.unsqueeze(-2) if search.by_column else torch.ones_like(curvature).unsqueeze(-2)
    if search.salient is None:
        return weights
    if search.salient == "weight":
        deviation, mean = torch.std_mean(values, dim=-1, keepdim=True, correction=0)
        salient = (values - mean).abs() > search.threshold * deviation
    else:
        salience = values.square() * curvature.unsqueeze(-2)
        deviation, mean = torch.std_mean(salience, dim=(-2, -1), keepdim=True, correction=0)
        salient = (salience - mean).abs() > search.threshold * deviation
    return torch.where(salient, search.emphasis, 1.0) * weights
