"""What is stored at a site, solved in the norm of its output."""

from __future__ import annotations

from torch import Tensor

from slimc.passes.solvers.candidates import can_be_tried
from slimc.passes.solvers.descent import descend
from slimc.passes.solvers.hessian import Metric
from slimc.passes.solvers.joint import solve_jointly
from slimc.passes.solvers.quantization import Quantized
from slimc.passes.work import SiteWork
from slimc.runtime.packing import NM


def solve_stored(work: SiteWork, weight: Tensor, metric: Metric) -> None:
    """Choose mask and codes anew for ``weight``, on a fresh grid.

    Args:
        work: the site; its pattern is kept, and so is a mask of another kind.
        weight: what base and input scale shall amount to, float32 ``[out_features, in_features]``.
        metric: of the unscaled input.

    Where some codes are signs, which have no code of zero, the mask stays and the codes are those of the quantiser.
    """
    weight, metric = _in_stored_coordinates(work, weight, metric)
    grid = work.grid_for(weight)
    pattern = _pattern(work)
    if has_signs(grid):
        work.base = weight if work.mask is None else weight * work.mask
        work.quantize()
    elif pattern is not None and can_be_tried(pattern):
        _take(work, *solve_jointly(weight, metric, grid, pattern=pattern))
    elif work.mask is None and grid is not None:
        width = 4 if weight.shape[1] % 4 == 0 else 1
        _take(work, solve_jointly(weight, metric, grid, pattern=(width, width))[0], None)
    else:
        work.base = weight if work.mask is None else weight * work.mask
        work.quantize()


def improve_stored(work: SiteWork, weight: Tensor, metric: Metric, sweeps: int) -> None:
    """Lower the output error of what is stored for ``weight`` by coordinate descent; it never rises.

    Where some codes are signs it stays as it is.

    Args:
        work: the site; an N:M mask may move, any other stays.
        weight: what base and input scale shall amount to, float32 ``[out_features, in_features]``.
        metric: of the unscaled input.
        sweeps: how often every column is visited.
    """
    if has_signs(work.quantized):
        return
    weight, metric = _in_stored_coordinates(work, weight, metric)
    start = work.base if work.quantized is None else work.quantized
    result, mask = descend(weight, metric, start, work.mask, pattern=_pattern(work), sweeps=sweeps)
    _take(work, result, mask)


def has_signs(quantized: Quantized | None) -> bool:
    """Tell whether some codes have 1 bit."""
    return quantized is not None and 1 in (quantized.group_widths() or ())


def _take(work: SiteWork, result: Tensor | Quantized, mask: Tensor | None) -> None:
    work.mask = mask
    if isinstance(result, Quantized):
        work.quantized, values = result, result.dequantize()
    else:
        values = result.to(work.dtype).float()
    work.base = values if mask is None else values * mask


def _pattern(work: SiteWork) -> tuple[int, int] | None:
    return (work.sparsity.n, work.sparsity.m) if isinstance(work.sparsity, NM) else None


def _in_stored_coordinates(work: SiteWork, weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
    """An input scale belongs to the inputs there, and its inverse to the weight."""
    if work.input_scale is None:
        return weight, metric
    return weight / work.input_scale, metric.scaled(work.input_scale)
