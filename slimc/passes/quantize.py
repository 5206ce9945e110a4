"""Quantize: express a weight as codes on a uniform grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from slimc.errors import RecipeError, closest
from slimc.passes.allocate_bits import AllocateBits
from slimc.passes.base import Pass, SitePass, Statistic, real_number, whole_number
from slimc.passes.solvers.clipping import LearnedClipping
from slimc.passes.solvers.gptq import WIDTHS, ChooseWidths, gptq
from slimc.passes.solvers.quantization import (
    BITS,
    Group,
    Quantized,
    activation_aware_scales,
    quantize_absmax,
    quantize_slim,
    round_to_grid,
)
from slimc.passes.solvers.ranges import PRESETS, RangeSearch, group_grids
from slimc.passes.work import SiteWork
from slimc.runtime.formats import MAX_SIDE

MAX_FACTOR = 256
"""More than this would push every other channel of an 8-bit grid to zero."""

_GPTQ_OPTIONS = ("calibrate", "preset", "order", "static_groups", "damping")


@dataclass(frozen=True)
class Quantize(SitePass):
    """``w = dequant(codes, scale)``: codes of ``bits`` bits on a grid with one scale a tensor, channel or group.

    Attributes:
        method: ``"slim"`` takes the step that minimises the squared weight error on the real grid (SLiM-Quant, paper
            section 3.1); ``"absmax"`` takes the extremes; ``"gptq"`` rounds column by column, and the columns not yet
            rounded make up for the error (Frantar et al.). Where calibration saw no input but zeros, GPTQ has nothing
            to go by: weights are rounded to the nearest code, and the report says so.
        bits: 2, 3, 4, 5, 6 or 8; with GPTQ 1 to 8.
        group: ``None`` for one scale a tensor, ``"channel"`` for one a row, or the number of columns that share one
            (it need not divide the width).
        symmetric: the grid has no zero point; ``None`` is what the method usually has: a zero point with GPTQ, none
            otherwise. ``False`` needs the method ``"absmax"`` or ``"gptq"``.
        activation_aware: SLiM-Quant^O (paper section 3.1): the most salient input channels are stored larger by
            ``factor``, and the graph scales the input back. One input scale serves all sites that share the input.
        fraction: share of the channels that counts as salient.
        factor: by how much they are enlarged.
        calibrate: of GPTQ: ``"range"`` puts the grid over the extremes of a group, ``"sqc"`` searches among
            narrower and wider ranges (SliM-LLM, section 3.3), ``"learned"`` finds them by gradient descent on the
            output error (learned weight clipping, as in SliM-LLM+), for all groups beforehand.
        preset: what that search weighs and how far it goes, a key of :data:`slimc.passes.solvers.ranges.PRESETS`:
            ``"paper"``, ``"reference"`` (the authors' code), or ``"output"``, by what error feedback makes of a
            column's error.
        order: in which GPTQ visits columns: ``null`` from left to right, ``"groups"`` those of the largest inputs
            first, ``"columns"`` likewise column by column (activation order), which needs ``static_groups``.
        static_groups: GPTQ chooses all grids on the original weights, not on what its corrections have made of them.
        damping: GPTQ's, as a share of the mean diagonal of the Gram matrix.
    """

    name: ClassVar[str] = "quantize"

    method: Literal["slim", "absmax", "gptq"] = "slim"
    bits: int = 4
    group: int | Literal["channel"] | None = None
    symmetric: bool | None = None
    activation_aware: bool = False
    fraction: float = 0.01
    factor: float = 2.0
    calibrate: Literal["range", "sqc", "learned"] = "range"
    preset: str = "paper"
    order: Literal["columns", "groups"] | None = None
    static_groups: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Check the options."""
        self._require(
            self.method in ("slim", "absmax", "gptq"),
            f"method must be 'slim', 'absmax' or 'gptq', not {self.method!r}",
        )
        widths = WIDTHS if self.method == "gptq" else BITS
        self._require(
            whole_number(self.bits) and self.bits in widths,
            f"bits must be 2, 3, 4, 5, 6 or 8 (with method 'gptq' 1 to 8), not {self.bits!r}",
        )
        group_is_valid = self.group in (None, "channel") or (whole_number(self.group) and 2 <= self.group <= MAX_SIDE)
        self._require(
            group_is_valid, f"group must be a number of columns (2 or more), 'channel' or null, not {self.group!r}"
        )
        for option in ("activation_aware", "static_groups"):
            value = getattr(self, option)
            self._require(isinstance(value, bool), f"{option} must be true or false, not {value!r}")
        self._require(
            self.symmetric is None or isinstance(self.symmetric, bool),
            f"symmetric must be true, false or null, not {self.symmetric!r}",
        )
        self._require(
            self.symmetric is not False or self.method != "slim",
            "method 'slim' is symmetric by definition; symmetric=false needs method 'absmax' or 'gptq'",
        )
        self._require(
            not self.activation_aware or self.method == "slim",
            "activation_aware belongs to method 'slim' (SLiM-Quant^O)",
        )
        fraction_is_valid = real_number(self.fraction) and 0 < self.fraction <= 1
        self._require(fraction_is_valid, f"fraction must lie in (0, 1], not {self.fraction!r}")
        factor_is_valid = real_number(self.factor) and 1 < self.factor <= MAX_FACTOR
        self._require(factor_is_valid, f"factor must lie in (1, {MAX_FACTOR}], not {self.factor!r}")
        self._check_gptq()

    def _check_gptq(self) -> None:
        self._require(
            self.calibrate in ("range", "sqc", "learned"),
            f"calibrate must be 'range', 'sqc' or 'learned', not {self.calibrate!r}",
        )
        self._require(
            self.preset in list(PRESETS),
            f"preset must be one of {', '.join(PRESETS)}, not {self.preset!r}{closest(str(self.preset), PRESETS)}",
        )
        self._require(
            self.order in (None, "groups", "columns"), f"order must be 'columns', 'groups' or null, not {self.order!r}"
        )
        damping_is_valid = real_number(self.damping) and 0 < self.damping <= 1
        self._require(damping_is_valid, f"damping must lie in (0, 1], not {self.damping!r}")
        defaults = {option.name: option.default for option in fields(self)}
        for option in _GPTQ_OPTIONS:
            self._require(
                self.method == "gptq" or getattr(self, option) == defaults[option],
                f"{option} belongs to method 'gptq', not to {self.method!r}",
            )
        self._require(
            self.bits != 1 or isinstance(self.group, int),
            "codes of 1 bit are signs, which need a scale for every group of columns: set group to a number of columns",
        )
        self._require(
            self.order != "columns"
            or self.static_groups
            or self.calibrate == "learned"
            or not isinstance(self.group, int),
            "order='columns' visits columns of all groups in turn, so that none is reached as a whole: set "
            "static_groups=true, or order='groups'",
        )

    def statistics(self) -> frozenset[Statistic]:
        """SLiM-Quant^O needs the mean magnitude of each input channel, GPTQ the Gram matrix."""
        if self.method == "gptq":
            return frozenset({"activations", "gram"})
        return frozenset({"activations"}) if self.activation_aware else frozenset()

    @property
    def _search(self) -> RangeSearch | LearnedClipping | None:
        if self.calibrate == "learned":
            return LearnedClipping()
        return PRESETS[self.preset] if self.calibrate == "sqc" else None

    @property
    def is_symmetric(self) -> bool:
        """Whether the grid has no zero point."""
        return self.method != "gptq" if self.symmetric is None else self.symmetric

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """A weight is quantised once, and before its adapters are solved."""
        names = [one.name for one in earlier]
        if "decompose" in names:
            raise RecipeError(
                "quantize comes after decompose, which stores its sparse part on a grid of its own. Remove quantize, "
                "and give decompose bits= and group=."
            )
        if self.calibrate == "learned" and "allocate_bits" not in names and not isinstance(self.group, int):
            raise RecipeError(
                f"quantize: calibrate='learned' needs groups of columns, not group={self.group!r}. Set group to a "
                "number of columns."
            )
        if self.name in names:
            raise RecipeError("quantize appears twice: a weight has one grid. Remove one of the two.")
        if "low_rank" in names:
            raise RecipeError(
                "quantize comes after low_rank, so the adapters could not correct the error that it makes. Put "
                "quantize before low_rank (LowRank(rounds=1) quantises once more after the adapters are known)."
            )

        shares = [one.options().get("pattern") for one in earlier if one.name == "prune"]
        if self.bits == 1 and any(isinstance(share, float) for share in shares):
            raise RecipeError(
                "quantize: signs do not go with a share of weights: each group of columns must store as many in every "
                "row. Prune to a pattern such as '2:4'."
            )
        for allocation in (one for one in earlier if isinstance(one, AllocateBits)):
            if self.method == "slim":
                raise RecipeError(
                    "quantize: method 'slim' has one width for all; after allocate_bits use method 'gptq' or 'absmax'."
                )
            if self.group not in (None, allocation.group):
                raise RecipeError(
                    f"quantize: group={self.group!r}, but allocate_bits chooses a width for every {allocation.group} "
                    "columns. Leave the group of quantize out, or make them the same."
                )
            if self.order == "columns" and not self.static_groups and self.calibrate != "learned":
                raise RecipeError("quantize: order='columns' after allocate_bits needs static_groups=true.")

    def apply(self, work: SiteWork) -> None:
        """Put the site's weight on a grid."""
        if self.activation_aware:
            self._apply_activation_aware(work)
            return
        # Not the work itself: a cycle would keep each site's matrices until the garbage collector comes by.
        dtype, choose, group = work.scale_dtype, work.choose_widths, work.width_group or self.group
        if self.method == "gptq":
            # Inputs that vary independently and alike make it plain rounding.
            gram = work.require_gram(self.name) if work.reached else torch.eye(work.dense.shape[1]).to(work.dense)
            work.quantizer = lambda weight, mask: self._solve_gptq(weight, gram, mask, dtype, group, choose)
            if not work.reached:
                nearest = "calibration saw no input but zeros here, so weights were rounded to the nearest codes"
                work.fallback = f"{work.fallback}; {nearest}" if work.fallback else nearest
        elif choose is not None and isinstance(group, int):
            energy = work.require_gram(self.name).diagonal()
            work.quantizer = lambda weight, mask: self._solve_widths(weight, energy, mask, dtype, group, choose)
        else:
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
            weight, self.bits, self.group, symmetric=self.is_symmetric, scale_dtype=scale_dtype, mask=mask
        )

    def _solve_widths(
        self,
        weight: Tensor,
        energy: Tensor,
        mask: Tensor | None,
        scale_dtype: torch.dtype,
        group: int,
        choose: ChooseWidths,
    ) -> Quantized:
        """Round to the nearest codes of the chosen widths; without feedback an error costs the energy of its input."""
        kept = weight if mask is None else torch.where(mask, weight, 0.0)
        return group_grids(
            kept,
            choose(kept, energy, self.is_symmetric, None),
            group,
            symmetric=self.is_symmetric,
            scale_dtype=scale_dtype,
            search=None,
            curvature=energy,
        )

    def _solve_gptq(
        self,
        weight: Tensor,
        gram: Tensor,
        mask: Tensor | None,
        scale_dtype: torch.dtype,
        group: Group,
        choose: ChooseWidths | None,
    ) -> Quantized:
        return gptq(
            weight,
            gram,
            bits=self.bits,
            group=group,
            widths=choose,
            symmetric=self.is_symmetric,
            search=self._search,
            order=self.order,
            static_groups=self.static_groups,
            scale_dtype=scale_dtype,
            mask=mask,
            damping=self.damping,
        )
