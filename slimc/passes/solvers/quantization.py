"""Uniform weight quantisation: absmax, SLiM-Quant and rounding to a grid that is already there.

A quantised weight holds unsigned codes ``u`` in ``0 .. 2^bits - 1`` and stands for ``w = (u - zero_point) * scale``.
On a symmetric grid the zero point is not stored and equals ``2^(bits - 1)``, so that the signed codes are
``-2^(bits - 1) .. 2^(bits - 1) - 1``: the negative side has one level more. One scale serves the whole tensor
(``group=None``), a row (``"channel"``) or each run of ``group`` columns of a row, the last of which may be short.

Each group of columns may have a width of its own, shared by all rows (``widths``). A code of 1 bit is a sign: it stands
for ``(2 u - 1) * scale`` and has no zero point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from slimc.errors import InputError, RecipeError
from slimc.passes.solvers.checks import require_finite, require_matrix, require_shape, share_of
from slimc.passes.solvers.step_search import optimal_steps, storable

Group = int | Literal["channel"] | None
"""What shares a scale: that many columns of a row, a whole row, or (``None``) the tensor."""

BITS = (2, 3, 4, 5, 6, 8)
"""The supported widths of a code."""

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What a scale may be stored in."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantised matrix, not packed.

    Attributes:
        codes: uint8 ``[rows, columns]``.
        scale: ``[1, 1]``, ``[rows, 1]`` or ``[rows, ceil(columns / group)]``, positive, in the dtype it is stored in.
        zero_point: uint8, shaped like ``scale``; ``None`` on a symmetric grid, where it is ``2^(bits - 1)``.
        bits: the width of a code; the largest one where groups have ``widths``.
        group: what shares a scale.
        widths: of the codes of each group of columns, for ``group`` columns a group; ``None`` if all have ``bits``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group: Group
    widths: tuple[int, ...] | None = None

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return the step and the zero code of every entry, float32 ``[rows, columns]`` (perhaps expanded views).

        Signs are a grid, too: their step is twice their scale, and zero lies half way between their codes.
        """
        rows, columns = self.codes.shape
        scale = _spread(self.scale.to(torch.float32), rows, columns, self.group)
        if self.zero_point is None:
            zero = torch.full_like(scale[:1, :1], 2 ** (self.bits - 1)).expand(rows, columns)
        else:
            zero = _spread(self.zero_point.to(torch.float32), rows, columns, self.group)
        if self.widths is None and self.bits > 1:
            return scale, zero
        width = self.column_widths()
        if self.zero_point is None:
            zero = torch.exp2(width - 1).expand(rows, columns)
        return torch.where(width == 1, 2 * scale, scale), torch.where(width == 1, 0.5, zero)

    def rows(self, rows: slice) -> Quantized:
        """Return some of the rows; one scale for all stays theirs."""

        def part(values: Tensor) -> Tensor:
            return values if values.shape[0] == 1 < self.codes.shape[0] else values[rows]

        zero_point = None if self.zero_point is None else part(self.zero_point)
        return replace(self, codes=self.codes[rows], scale=part(self.scale), zero_point=zero_point)

    def group_widths(self) -> tuple[int, ...] | None:
        """Return the width of each group where they may differ, or are 1; signs have groups."""
        if self.widths is None and self.bits == 1:
            return (1,) * self.scale.shape[1]
        return self.widths

    def column_widths(self) -> Tensor:
        """Return the width of the codes of each column, float32 ``[columns]``, on the device of the scales."""
        columns = self.codes.shape[1]
        if self.widths is None or not isinstance(self.group, int):
            return torch.full((columns,), float(self.bits), device=self.scale.device)
        width = torch.tensor(self.widths, dtype=torch.float32, device=self.scale.device)
        return width.repeat_interleave(self.group)[:columns]

    def dequantize(self) -> Tensor:
        """Return what the codes stand for, float32 ``[rows, columns]``."""
        scale, zero = self.grid()
        return (self.codes.to(torch.float32) - zero) * scale


def quantize_absmax(
    weight: Tensor,
    bits: int,
    group: Group = None,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
) -> Quantized:
    """Quantise with the range of each group.

    Symmetric: ``scale = max|w| / (2^(bits - 1) - 1)``, the convention of SLiM's code and of its peers, which leaves
    the lowest code unused. Asymmetric: ``scale = (max - min) / (2^bits - 1)`` over the group's values and 0, with the
    zero point ``round(-min / scale)``, so that 0 is represented exactly. A group of zeros gets the scale 1. The scale
    is rounded to ``scale_dtype`` before the codes are chosen.

    Args:
        weight: floating point ``[rows, columns]``.
        bits: 2, 3, 4, 5, 6 or 8.
        group: what shares a scale.
        symmetric: whether the grid has no zero point.
        scale_dtype: float32, float16 or bfloat16.
        mask: bool ``[rows, columns]``, true where the weight is kept; other entries do not touch the scale and get
            the code of zero.

    Raises:
        RecipeError: if ``bits``, ``group`` or ``scale_dtype`` is not supported.
        InputError: if a shape is wrong.
        NumericsError: if the weight holds NaN or Inf.
    """
    kept = _kept_weight("quantize_absmax", weight, bits, group, scale_dtype, mask)
    grouped = _grouped(kept, group)
    scale_shape = _scale_shape(kept, group)
    zero_point = None
    if symmetric:
        scale = grouped.abs().amax(dim=1) / (2 ** (bits - 1) - 1)
        scale = storable(torch.where(scale > 0, scale, 1.0), scale_dtype)
    else:
        lowest, highest = grouped.amin(dim=1).clamp(max=0), grouped.amax(dim=1).clamp(min=0)
        # Divided one by one, since the difference of two large numbers may overflow.
        scale = highest / (2**bits - 1) - lowest / (2**bits - 1)
        scale = storable(torch.where(scale > 0, scale, 1.0), scale_dtype)
        zero_point = (-lowest / scale).round().clamp(0, 2**bits - 1).to(torch.uint8).view(scale_shape)
    return quantize_on(kept, scale.view(scale_shape).to(scale_dtype), zero_point, bits=bits, group=group)


def quantize_slim(
    weight: Tensor,
    bits: int,
    group: Group = None,
    *,
    scale_dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
) -> Quantized:
    """Quantise with the symmetric grid of least squared error: SLiM-Quant^W (SLiM, section 3.1, algorithm 1).

    The paper minimises ``||Q(W) - W||^2`` over the clipping point with an integral over the histogram of ``|W|``. Here
    the same objective is solved on exactly the grid that is stored, ``scale * {-2^(bits - 1), ..., 2^(bits - 1) - 1}``
    with a positive scale: the paper counts ``2^(bits - 1)`` levels on the positive side, which has one less, and that
    costs it up to half of the error at 2 bits. :mod:`slimc.passes.solvers.step_search` says how the step is found. The
    published method has one scale a tensor; rows and groups are solved in the same way. A group of zeros gets the
    scale 1.

    Args:
        weight: floating point ``[rows, columns]``.
        bits: 2, 3, 4, 5, 6 or 8.
        group: what shares a scale.
        scale_dtype: float32, float16 or bfloat16; the best among the scales that it can store is taken.
        mask: bool ``[rows, columns]``, true where the weight is kept; other entries do not count in the objective and
            get the code of zero.

    Raises:
        RecipeError: if ``bits``, ``group`` or ``scale_dtype`` is not supported.
        InputError: if a shape is wrong.
        NumericsError: if the weight holds NaN or Inf.
    """
    kept = _kept_weight("quantize_slim", weight, bits, group, scale_dtype, mask)
    levels = 2 ** (bits - 1)
    steps = optimal_steps(_grouped(kept, group), -levels, levels - 1, scale_dtype)
    return quantize_on(kept, steps.view(_scale_shape(kept, group)).to(scale_dtype), None, bits=bits, group=group)


def round_to_grid(weight: Tensor, quantized: Quantized) -> Quantized:
    """Return ``weight`` on the scale and zero point of ``quantized``: the nearest codes, clipped to the grid.

    Args:
        weight: floating point, shaped like ``quantized.codes``.
        quantized: the grid; its codes are not read.

    Raises:
        InputError: if the shapes differ.
        NumericsError: if the weight holds NaN or Inf.
    """
    require_shape("round_to_grid", tuple(quantized.codes.shape), weight=weight)
    require_finite("round_to_grid", weight=weight)
    return replace(quantized, codes=_nearest(weight.to(torch.float32), quantized))


def important_channels(weight_saliency: Tensor, fraction: float) -> Tensor:
    """Return which input channels matter most: bool ``[columns]``, true for the top ``fraction``.

    ``floor(fraction * columns)`` channels are chosen, but at least one unless ``fraction`` is 0; of equal channels the
    lower one is taken.

    Args:
        weight_saliency: ``[columns]``.
        fraction: the share of channels, 0 to 1.

    Raises:
        RecipeError: if ``fraction`` is not a share.
    """
    if not 0 <= fraction <= 1:
        raise RecipeError(f"important_channels: the fraction {fraction} is no share of the channels; give 0 to 1")
    columns = weight_saliency.numel()
    count = max(1, share_of(fraction, columns)) if fraction > 0 else 0
    chosen = torch.zeros(columns, dtype=torch.bool, device=weight_saliency.device)
    chosen[weight_saliency.sort(descending=True, stable=True).indices[:count]] = True
    return chosen


def activation_aware_scales(
    mean_abs_input: Tensor, weights: Sequence[Tensor], fraction: float = 0.01, factor: float = 2.0
) -> Tensor:
    """Return the input scale of SLiM-Quant^O (SLiM, section 3.1 and appendix C), float32 ``[columns]``.

    It is ``factor`` on the most salient input channels and 1 elsewhere. Weights are *multiplied* by it before they are
    rounded and activations are *divided* by it, so that the rounding error of those channels shrinks by ``factor``.
    The paper leaves the clipping point alone: solve the grid on the unscaled weight, then :func:`round_to_grid` the
    scaled one. A channel's saliency is its part of ``|diag(mean|x|) W|``, normalised to sum 1 over each matrix and
    added up over all the matrices that read this input (q, k and v), since they must share one scale.

    Args:
        mean_abs_input: mean ``|x|`` of every input channel over the calibration tokens, ``[columns]``.
        weights: the matrices that read the input, each ``[rows, columns]``.
        fraction: the share of channels to scale; the paper says about 1 %.
        factor: what to scale them by, above 0.

    Raises:
        RecipeError: if ``fraction`` or ``factor`` is out of range.
        InputError: if a shape is wrong or no weight is given.
        NumericsError: if an argument holds NaN or Inf.
    """
    if not 0 < factor < float("inf"):
        raise RecipeError(f"activation_aware_scales: the factor {factor} is not positive; 2 is usual")
    if not weights:
        raise InputError("activation_aware_scales: no weight was given; pass every matrix that reads the input")
    require_finite("activation_aware_scales", mean_abs_input=mean_abs_input)
    columns = mean_abs_input.numel()
    total = torch.zeros(columns, dtype=torch.float64, device=mean_abs_input.device)
    for weight in weights:
        require_matrix("activation_aware_scales", weights=weight)
        require_shape("activation_aware_scales", (weight.shape[0], columns), weights=weight)
        require_finite("activation_aware_scales", weights=weight)
        saliency = mean_abs_input.abs().double() * weight.abs().sum(dim=0, dtype=torch.float64)
        total += saliency / saliency.sum().clamp(min=torch.finfo(torch.float64).tiny)
    chosen = important_channels(total, fraction)
    return torch.where(chosen, factor, 1.0).to(torch.float32)


def _kept_weight(
    caller: str, weight: Tensor, bits: int, group: Group, scale_dtype: torch.dtype, mask: Tensor | None
) -> Tensor:
    """Check the arguments and return the weight in float32 with masked entries at zero."""
    if bits not in BITS:
        raise RecipeError(f"{caller}: {bits} bits are not supported; choose one of {', '.join(map(str, BITS))}")
    named = group is None or group == "channel"
    if not named and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
        raise RecipeError(f"{caller}: the group {group!r} is not valid; give None, 'channel' or a number of columns")
    if scale_dtype not in SCALE_DTYPES:
        raise RecipeError(f"{caller}: scales cannot be stored as {scale_dtype}; choose float32, float16 or bfloat16")
    require_matrix(caller, weight=weight)
    require_shape(caller, tuple(weight.shape), mask=mask)
    require_finite(caller, weight=weight)
    kept = weight.to(torch.float32)
    return kept if mask is None else torch.where(mask, kept, 0.0)


def _scale_shape(weight: Tensor, group: Group) -> tuple[int, int]:
    rows, columns = weight.shape
    if group is None:
        return 1, 1
    return rows, 1 if group == "channel" else -(-columns // group)


def _grouped(weight: Tensor, group: Group) -> Tensor:
    """Return ``[groups, n]``: a row for each scale. A short last group is filled up with zeros, which weigh nothing."""
    if group is None:
        return weight.reshape(1, -1)
    if group == "channel":
        return weight
    size = min(group, weight.shape[1])
    return functional.pad(weight, (0, -weight.shape[1] % size)).reshape(-1, size)


def _spread(per_group: Tensor, rows: int, columns: int, group: Group) -> Tensor:
    """Return the value of every entry's group, ``[rows, columns]``."""
    if isinstance(group, int) and group < columns:
        return per_group.repeat_interleave(group, dim=1)[:, :columns]
    return per_group.expand(rows, columns)


def quantize_on(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    bits: int,
    group: Group,
    widths: tuple[int, ...] | None = None,
) -> Quantized:
    """Return the nearest codes of a float32 ``[rows, columns]`` weight on the grid of these scales and zero points."""
    unread = torch.empty(weight.shape, dtype=torch.uint8, device="meta")
    grid = Quantized(unread, scale, zero_point, bits, group, widths)
    return replace(grid, codes=_nearest(weight, grid))


def _nearest(weight: Tensor, grid: Quantized) -> Tensor:
    """Return the nearest codes on the scale and zero point of ``grid``, uint8."""
    scale, zero = grid.grid()
    steps = weight / scale
    if grid.group_widths() is None:
        return steps.round_().add_(zero).clamp_(0, 2**grid.bits - 1).to(torch.uint8)
    # Where zero is a code and a half, it is a number of steps and a half that must be rounded.
    half = zero.frac()
    highest = torch.exp2(grid.column_widths()) - 1
    codes = steps.add_(half).round_().add_(zero - half).clamp_(min=0)
    return torch.minimum(codes, highest).to(torch.uint8)
