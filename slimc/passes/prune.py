"""Prune: keep N of every M weights, or a share of each row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from slimc.errors import RecipeError
from slimc.passes.allocate_bits import AllocateBits
from slimc.passes.base import Pass, SitePass, Statistic, real_number, whole_number
from slimc.passes.quantize import Quantize
from slimc.passes.solvers.candidates import can_be_tried
from slimc.passes.solvers.pruning import magnitude_scores, nm_mask, unstructured_mask, wanda_scores
from slimc.passes.solvers.quantization import Quantized
from slimc.passes.solvers.sparsegpt import sparsegpt
from slimc.passes.stored import has_signs, improve_stored, solve_stored
from slimc.passes.work import SiteWork
from slimc.runtime.packing import NM, Unstructured


@dataclass(frozen=True)
class Prune(SitePass):
    """``w = dequant_nm(values, pattern, scale)``: store only what is kept.

    After ``Quantize``, the codes that are kept keep their values; before it, the grid is fitted to what is kept.

    Attributes:
        pattern: ``"n:m"`` keeps n of every m weights along the input; a number is the share of weights to drop.
        method: ``"wanda"`` scores ``|w| * |x|`` (Sun et al.), by row; ``"magnitude"`` scores ``|w|``; ``"sparsegpt"``
            also corrects the weights that stay for the ones that go (Frantar & Alistarh), on the grid if there is one;
            ``"joint"`` compares all masks of an N:M block by what they cost once the others have absorbed the error,
            rounding included.
            Where some codes are signs, ``"sparsegpt"`` takes its place. Where calibration saw no input but zeros, all
            of them choose by magnitude.
        damping: of the Gram matrix, as a share of its mean diagonal, for ``"sparsegpt"``, ``"joint"`` and ``sweeps``.
        sweeps: how often coordinate descent then visits all columns, to choose mask, codes and scales anew given the
            rest. The output error on the calibration inputs falls with every sweep.
    """

    name: ClassVar[str] = "prune"

    pattern: str | float = "2:4"
    method: Literal["wanda", "magnitude", "sparsegpt", "joint"] = "wanda"
    damping: float = 0.01
    sweeps: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        self._require(
            self.method in ("wanda", "magnitude", "sparsegpt", "joint"),
            f"method must be 'wanda', 'magnitude', 'sparsegpt' or 'joint', not {self.method!r}",
        )
        damping_is_valid = real_number(self.damping) and 0 < self.damping <= 1
        self._require(damping_is_valid, f"damping must lie in (0, 1], not {self.damping!r}")
        self._require(whole_number(self.sweeps) and self.sweeps >= 0, f"sweeps must be 0 or more, not {self.sweeps!r}")
        if isinstance(self.pattern, str):
            matched = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", self.pattern)
            self._require(
                matched is not None and 1 <= int(matched[1]) < int(matched[2]),
                f"pattern must be 'n:m' with 1 <= n < m (such as '2:4') or a share to drop, not {self.pattern!r}",
            )
        else:
            self._require(
                real_number(self.pattern) and 0 < self.pattern < 1,
                f"pattern must be 'n:m' or a share to drop strictly between 0 and 1, not {self.pattern!r}",
            )

        sparsity = self.sparsity
        few = isinstance(sparsity, NM) and can_be_tried((sparsity.n, sparsity.m))
        self._require(
            self.method != "joint" or few,
            f"method 'joint' tries all masks of an N:M block and {self.pattern} has too many (or none); use a pattern "
            "such as 2:4, or method 'sparsegpt'",
        )

    @property
    def sparsity(self) -> NM | Unstructured:
        """The pattern as a value."""
        if isinstance(self.pattern, str):
            kept, of = self.pattern.split(":")
            return NM(int(kept), int(of))
        return Unstructured()

    def statistics(self) -> frozenset[Statistic]:
        """Wanda needs channel norms, SparseGPT and coordinate descent the Gram matrix."""
        if self.sweeps or self.method in ("sparsegpt", "joint"):
            return frozenset({"activations", "gram"})
        return frozenset({"activations"} if self.method == "wanda" else ())

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """A weight is pruned once, and before its adapters are solved."""
        names = [one.name for one in earlier]
        if "decompose" in names:
            raise RecipeError(
                "prune comes after decompose, which has chosen what is kept. Remove prune, and give decompose the "
                "pattern= or ratio= that you want."
            )
        if self.name in names:
            raise RecipeError("prune appears twice: a weight has one mask. Remove one of the two.")
        if "low_rank" in names:
            raise RecipeError(
                "prune comes after low_rank, so the adapters could not correct the error that it makes. "
                "Put prune before low_rank."
            )

        for one in earlier:
            if isinstance(one, AllocateBits | Quantize):
                self.check_groups(one)

    def check_groups(self, other: AllocateBits | Quantize) -> None:
        """Groups of columns with widths of their own must keep as many weights in every row.

        Raises:
            RecipeError: they would not.
        """
        signs = isinstance(other, Quantize) and other.bits == 1
        if not signs and not isinstance(other, AllocateBits):
            return
        if not isinstance(self.pattern, str):
            raise RecipeError(
                f"prune: a share of weights does not go with {other.name}, which gives groups of columns widths of "
                "their own: each must store as many weights in every row. Use a pattern such as '2:4'."
            )
        _, of = self.pattern.split(":")
        if isinstance(other.group, int) and other.group % int(of):
            raise RecipeError(
                f"prune: the pattern {self.pattern} does not divide the groups of {other.group} columns of "
                f"{other.name}. Use a pattern whose second number divides them."
            )

    def check_site(self, name: str, shape: tuple[int, int]) -> None:
        """The pattern must divide the width."""
        sparsity = self.sparsity
        if isinstance(sparsity, NM) and shape[1] % sparsity.m:
            raise RecipeError(
                f"prune: the pattern {self.pattern} does not divide the width {shape[1]} of '{name}'. Use a pattern "
                f"whose second number divides it, a share such as 0.5, or leave the site out with exclude=['{name}']."
            )

    def apply(self, work: SiteWork) -> None:
        """Choose the site's mask, and with SparseGPT its values."""
        work.sparsity = self.sparsity
        if self.method != "magnitude" and not work.reached:
            work.note("calibration saw no input but zeros: entries were chosen by their magnitude")
        jointly = self.method == "joint" and not has_signs(work.quantized)
        if jointly and work.reached:
            solve_stored(work, work.target, work.require_metric(self.name, self.damping))
        elif self.method in ("sparsegpt", "joint") and work.reached:
            self._apply_sparsegpt(work)
        else:
            work.mask = self._mask(self._scores(work))
            work.base = work.base * work.mask
        if self.sweeps and work.reached:
            improve_stored(work, work.target, work.require_metric(self.name, self.damping), self.sweeps)

    def _scores(self, work: SiteWork) -> Tensor:
        """Score the exact weight: the ties that a coarse grid makes would be broken blindly."""
        if self.method == "magnitude" or not work.reached:
            return magnitude_scores(work.target)
        statistics = work.require_statistics(self.name)
        return wanda_scores(work.target, statistics.sum_squares, statistics.count)

    def _mask(self, scores: Tensor) -> Tensor:
        sparsity = self.sparsity
        if isinstance(sparsity, NM):
            return nm_mask(scores, sparsity.n, sparsity.m)
        return unstructured_mask(scores, float(self.pattern), per="row" if self.method == "wanda" else "tensor")

    def _apply_sparsegpt(self, work: SiteWork) -> None:
        """Prune in the coordinates that are stored: an input scale belongs to the Gram matrix there."""
        gram = work.require_gram(self.name)
        weight = work.target
        if work.input_scale is not None:
            gram = gram * work.input_scale[:, None] * work.input_scale
            weight = weight / work.input_scale
        sparsity = self.sparsity
        pattern = (sparsity.n, sparsity.m) if isinstance(sparsity, NM) else float(self.pattern)
        result, work.mask = sparsegpt(
            weight, gram, sparsity=pattern, grid=work.quantized, damping=self.damping, note=work.note
        )
        if isinstance(result, Quantized):
            work.quantized, result = result, result.dequantize()
        work.base = result * work.mask
