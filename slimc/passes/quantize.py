"""Quantize: express a weight as codes on a uniform grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from slimc.errors import RecipeError
from slimc.passes.base import Pass, SitePass, Statistic, real_number, whole_number
from slimc.passes.solvers.quantization import (
    BITS,
    Quantized,
    activation_aware_scales,
    quantize_absmax,
    quantize_slim,
    round_to_grid,
)
from slimc.passes.work import SiteWork
from slimc.runtime.formats import MAX_SIDE

MAX_FACTOR = 256
"""More than this would push every other channel of an 8-bit grid to zero."""


@dataclass(frozen=True)
class Quantize(SitePass):
    """``w = dequant(codes, scale)``: codes of ``bits`` bits on a grid with one scale a tensor, channel or group.

    Attributes:
        method: ``"slim"`` takes the step that minimises the squared weight error on the real grid (SLiM-Quant, paper
            section 3.1); ``"absmax"`` takes the largest magnitude.
        bits: 2, 3, 4, 5, 6 or 8.
        group: ``None`` for one scale a tensor, ``"channel"`` for one a row, or the number of columns that share one
            (it need not divide the width).
        symmetric: the grid has no zero point; ``False`` needs the method ``"absmax"``.
        activation_aware: SLiM-Quant^O (paper section 3.1): the most salient input channels are stored larger by
            ``factor``, and the graph scales the input back. One input scale serves all sites that share the input.
        fraction: share of the channels that counts as salient.
        factor: by how much they are enlarged.
    """

    name: ClassVar[str] = "quantize"

    method: Literal["slim", "absmax"] = "slim"
    bits: int = 4
    group: int | Literal["channel"] | None = None
    symmetric: bool = True
    activation_aware: bool = False
    fraction: float = 0.01
    factor: float = 2.0

    def __post_init__(self) -> None:
        """Check the options."""
        self._require(self.method in ("slim", "absmax"), f"method must be 'slim' or 'absmax', not {self.method!r}")
        self._require(
            whole_number(self.bits) and self.bits in BITS, f"bits must be 2, 3, 4, 5, 6 or 8, not {self.bits!r}"
        )
        group_is_valid = self.group in (None, "channel") or (whole_number(self.group) and 2 <= self.group <= MAX_SIDE)
        self._require(
            group_is_valid, f"group must be a number of columns (2 or more), 'channel' or null, not {self.group!r}"
        )
        for option in ("symmetric", "activation_aware"):
            value = getattr(self, option)
            self._require(isinstance(value, bool), f"{option} must be true or false, not {value!r}")
        self._require(
            self.symmetric or self.method == "absmax",
            "method 'slim' is symmetric by definition; symmetric=false needs method 'absmax'",
        )
        self._require(
            not self.activation_aware or self.method == "slim",
            "activation_aware belongs to method 'slim' (SLiM-Quant^O)",
        )
        fraction_is_valid = real_number(self.fraction) and 0 < self.fraction <= 1
        self._require(fraction_is_valid, f"fraction must lie in (0, 1], not {self.fraction!r}")
        factor_is_valid = real_number(self.factor) and 1 < self.factor <= MAX_FACTOR
        self._require(factor_is_valid, f"factor must lie in (1, {MAX_FACTOR}], not {self.factor!r}")

    def statistics(self) -> frozenset[Statistic]:
        """SLiM-Quant^O needs the mean magnitude of each input channel."""
        return frozenset({"activations"}) if self.activation_aware else frozenset()

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """A weight is quantised once, and before its adapters are solved."""
        names = [one.name for one in earlier]
        if self.name in names:
            raise RecipeError("quantize appears twice: a weight has one grid. Remove one of the two.")
        if "low_rank" in names:
            raise RecipeError(
                "quantize comes after low_rank, so the adapters could not correct the error that it makes. Put "
                "quantize before low_rank (LowRank(rounds=1) quantises once more after the adapters are known)."
            )

    def apply(self, work: SiteWork) -> None:
        """Put the site's weight on a grid."""
        if self.activation_aware:
            self._apply_activation_aware(work)
            return
        # Not the work itself: a cycle would keep each site's matrices until the garbage collector comes by.
        dtype = work.scale_dtype
        work.quantizer = lambda weight, mask: self._solve(weight, mask, dtype)
        work.quantize()

    def _apply_activation_aware(self, work: SiteWork) -> None:
        """Find the step on the plain weight, then round the enlarged channels on that grid (the cap stays).

        What is stored is enlarged by the exact inverse of the input scale *as it is stored*, so that its rounding to
        16 bits adds no error.
        """
        mean_abs = work.require_statistics(self.name).mean_abs
        enlarge = activation_aware_scales(mean_abs, work.siblings(), fraction=self.fraction, factor=self.factor)
        work.input_scale = (1 / enlarge).to(work.dtype).float()
        enlarge = 1 / work.input_scale
        dtype = work.scale_dtype

        def quantizer(weight: Tensor, mask: Tensor | None) -> Quantized:
            return round_to_grid(weight, self._solve(weight / enlarge, mask, dtype))

        work.base = work.base * enlarge
        work.quantizer = quantizer
        work.quantize()

    def _solve(self, weight: Tensor, mask: Tensor | None, scale_dtype: torch.dtype) -> Quantized:
        if self.method == "slim":
            return quantize_slim(weight, self.bits, self.group, scale_dtype=scale_dtype, mask=mask)
        return quantize_absmax(
            weight, self.bits, self.group, symmetric=self.symmetric, scale_dtype=scale_dtype, mask=mask
        )
