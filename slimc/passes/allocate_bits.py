"""AllocateBits: more bits for the groups of columns that matter, fewer for those that do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from slimc.errors import RecipeError
from slimc.passes.base import Pass, SitePass, Statistic, real_number, whole_number
from slimc.passes.solvers.allocation import cheapest_widths, group_saliences, search_split, split_widths
from slimc.passes.solvers.gptq import WIDTHS
from slimc.passes.solvers.ranges import RangeSearch, group_grids
from slimc.passes.work import SiteWork
from slimc.runtime.formats import MAX_SIDE

SAMPLE_ROWS = 256
"""Rows by which the errors of groups are compared; all rows of a group share its width, so that some speak for all.

Golden layers of 256 to 1024 rows, 3 bits: 256 rows choose as well as all, 128 up to 1.3 % worse.
"""


@dataclass(frozen=True)
class AllocateBits(SitePass):
    """``w = dequant(codes, scale){widths=[2, 4, 3, ...]}``: each group of columns gets a width of its own.

    The widths are chosen when the next ``Quantize`` rounds the site, for the grids that it makes and the order in
    which it visits columns; its own ``bits`` are not read.

    Attributes:
        bits: that codes take on average, at most; scales and zero points are not counted.
        group: columns that share a scale, and a width; the ones of ``Quantize`` may say the same.
        objective: ``"kl"`` is SliM-LLM's search (SBA, paper section 3.2): as many groups lose a bit, the least
            salient, as gain one, the most salient, and how many is decided by the divergence of the outputs read as
            logits; ``bits`` must be a whole number, and a short last group keeps it. ``"output"`` takes the widths that
            together cost the least output error, exactly, where the error of a group is the sum of its rounding
            errors, each weighed by what error feedback makes of it.
        direction: of the divergence: ``"forward"`` is ``KL(dense || quantised)``, the paper's, ``"reverse"`` what its
            code computes.
        narrowest: the least width that ``"output"`` may choose.
        widest: the largest one.
    """

    name: ClassVar[str] = "allocate_bits"
    compresses: ClassVar[bool] = False

    bits: float = 3
    group: int = 128
    objective: Literal["kl", "output"] = "kl"
    direction: Literal["forward", "reverse"] = "forward"
    narrowest: int = 1
    widest: int = 8

    def __post_init__(self) -> None:
        """Check the options."""
        for option in ("narrowest", "widest"):
            value = getattr(self, option)
            self._require(whole_number(value) and value in WIDTHS, f"{option} must be 1 to 8, not {value!r}")
        self._require(
            self.narrowest <= self.widest, f"narrowest={self.narrowest} must not be above widest={self.widest}"
        )
        self._require(self.objective in ("kl", "output"), f"objective must be 'kl' or 'output', not {self.objective!r}")
        self._require(
            self.direction in ("forward", "reverse"),
            f"direction must be 'forward' or 'reverse', not {self.direction!r}",
        )
        self._require(
            whole_number(self.group) and 2 <= self.group <= MAX_SIDE,
            f"group must be a number of columns (2 or more), not {self.group!r}",
        )
        self._require(
            real_number(self.bits) and self.narrowest <= self.bits <= self.widest,
            f"bits must lie between narrowest={self.narrowest} and widest={self.widest}, or the budget cannot be met; "
            f"found {self.bits!r}",
        )
        self._require(
            self.objective == "output" or (int(self.bits) == self.bits and 2 <= self.bits <= 7),
            "objective 'kl' searches among one bit less and one more, so that bits must be a whole number from 2 to 7, "
            f"not {self.bits!r}; objective 'output' takes any average",
        )

    def statistics(self) -> frozenset[Statistic]:
        """The Gram matrix says what an error costs, a sample of the inputs what the outputs are."""
        return frozenset({"activations", "gram"})

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """Widths are chosen once, before the weight is rounded."""
        names = [one.name for one in earlier]
        if self.name in names:
            raise RecipeError("allocate_bits appears twice: a weight has one set of widths. Remove one of the two.")
        for later in ("quantize", "prune"):
            if later in names:
                raise RecipeError(f"allocate_bits comes after {later}. Put allocate_bits before it.")

    def apply(self, work: SiteWork) -> None:
        """Have the site's quantiser ask for widths."""
        work.width_group = self.group
        if not work.reached:
            widths = (int(self.bits),) * -(-work.dense.shape[1] // self.group)
            work.note(f"calibration saw no input but zeros here, so all groups have {widths[0]} bits")
            work.choose_widths = lambda _weight, _curvature, _symmetric, _search: widths
            return
        # Not the work itself: a cycle would keep each site's matrices until the garbage collector comes by.
        sample = work.require_statistics(self.name).sample

        def choose(weight: Tensor, curvature: Tensor, symmetric: bool, search: RangeSearch | None) -> Sequence[int]:
            if self.objective == "kl":
                return self._search(weight, curvature, symmetric, sample)
            return self._solve(weight, curvature, symmetric, search)

        work.choose_widths = choose

    def _search(self, weight: Tensor, curvature: Tensor, symmetric: bool, sample: Tensor) -> Sequence[int]:
        bits, columns = int(self.bits), weight.shape[1]
        groups = -(-columns // self.group)
        saliences = group_saliences(weight, curvature, self.group)[: columns // self.group]
        rounded = [
            group_grids(
                weight,
                [width] * groups,
                self.group,
                symmetric=symmetric,
                scale_dtype=torch.float32,
                search=None,
                curvature=curvature,
            ).dequantize()
            for width in (bits - 1, bits, bits + 1)
        ]
        p = search_split(weight, rounded, sample, saliences, self.group, self.direction)
        return split_widths(saliences, p, bits, groups)

    def _solve(self, weight: Tensor, curvature: Tensor, symmetric: bool, search: RangeSearch | None) -> Sequence[int]:
        rows, columns = weight.shape
        chosen = torch.arange(min(rows, SAMPLE_ROWS), device=weight.device) * rows // min(rows, SAMPLE_ROWS)
        part = weight[chosen]
        starts = range(0, columns, self.group)
        widths = range(self.narrowest, self.widest + 1)
        errors = []
        for width in widths:
            rounded = group_grids(
                part,
                [width] * len(starts),
                self.group,
                symmetric=symmetric,
                scale_dtype=torch.float32,
                search=search,
                curvature=curvature,
            ).dequantize()
            by_column = (rounded - part).square().sum(dim=0, dtype=torch.float64) * curvature
            errors.append(torch.stack([by_column[start : start + self.group].sum() for start in starts]))
        sizes = [min(self.group, columns - start) for start in starts]
        budget = math.floor(self.bits * columns + 1e-6)
        return cheapest_widths(torch.stack(errors, dim=1), widths, sizes, budget)
