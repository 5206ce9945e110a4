"""What is stored at a site, solved in the norm of its output."""

from __future__ import annotations

from torch import Tensor

from slimc.passes.solvers.descent import descend
from slimc.passes.solvers.quantization import Quantized
from slimc.passes.solvers.sparsegpt import sparsegpt
from slimc.passes.work import SiteWork
from slimc.runtime.packing import NM

_DAMPED_ALREADY = 1e-6


def solve_stored(work: SiteWork, weight: Tensor, hessian: Tensor) -> None:
    """Choose mask and codes anew for ``weight``, column by column with error feedback, on a fresh grid.

    Args:
        work: the site; its pattern is kept, and so is an unstructured mask.
        weight: what base and input scale shall amount to, float32 ``[out_features, in_features]``.
        hessian: damped, of the unscaled input, ``[in_features, in_features]``.
    """
    weight, hessian = _in_stored_coordinates(work, weight, hessian)
    pattern = _pattern(work)
    grid = None if work.quantizer is None else work.quantizer(weight, None)
    if pattern is None and (work.mask is not None or grid is None):
        work.base = weight if work.mask is None else weight * work.mask
        work.quantize()
        return
    result, mask = sparsegpt(weight, hessian, sparsity=pattern or 0.0, grid=grid, damping=_DAMPED_ALREADY)
    _take(work, result, None if pattern is None else mask)


def improve_stored(work: SiteWork, weight: Tensor, hessian: Tensor, sweeps: int) -> None:
    """Lower the output error of what is stored for ``weight`` by coordinate descent; it never rises.

    Args:
        work: the site; an N:M mask may move, any other stays.
        weight: what base and input scale shall amount to, float32 ``[out_features, in_features]``.
        hessian: damped, of the unscaled input, ``[in_features, in_features]``.
        sweeps: how often every column is visited.
    """
    weight, hessian = _in_stored_coordinates(work, weight, hessian)
    start = work.base if work.quantized is None else work.quantized
    result, mask = descend(weight, hessian, start, work.mask, pattern=_pattern(work), sweeps=sweeps)
    _take(work, result, mask)


def _take(work: SiteWork, result: Tensor | Quantized, mask: Tensor | None) -> None:
    work.mask = mask
    if isinstance(result, Quantized):
        work.quantized, values = result, result.dequantize()
    else:
        values = result.to(work.dtype).float()
    work.base = values if mask is None else values * mask


def _pattern(work: SiteWork) -> tuple[int, int] | None:
    return (work.sparsity.n, work.sparsity.m) if isinstance(work.sparsity, NM) else None


def _in_stored_coordinates(work: SiteWork, weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """An input scale belongs to the inputs there, and its inverse to the weight."""
    if work.input_scale is None:
        return weight, hessian
    scale = work.input_scale.to(hessian.dtype)
    return weight / work.input_scale, hessian * scale[:, None] * scale
