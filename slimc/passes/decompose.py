"""Decompose: a weight as what is sparse of it plus signs with a magnitude of low rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from slimc.errors import RecipeError
from slimc.passes.base import Pass, SitePass, Statistic, real_number, whole_number
from slimc.passes.solvers.low_rank import resolve_rank
from slimc.passes.solvers.quantization import BITS, Quantized, quantize_slim
from slimc.passes.solvers.slab import Pattern, Weighting, compression_ratio, kept_in_row, slab
from slimc.passes.solvers.sparsegpt import sparsegpt
from slimc.passes.work import Quantizer, SiteWork
from slimc.runtime.packing import NM, Unstructured


@dataclass(frozen=True)
class Decompose(SitePass):
    """``y = linear(x, s) + sign_low_rank(x, signs, u, v)``: SLaB, ``W ~ S + (u v) (.) B`` with B in {-1, +1}.

    ``ratio`` is the published compression ratio, which counts 16 bits for a value of S and of the factors, one for a
    sign, and nothing for where the values of S are (`slimc.passes.solvers.slab.kept_share`). The report shows it
    beside the true bits, which count everything.

    Attributes:
        method: ``"slab"``.
        ratio: 0.5 keeps about 43.7 % of the entries in S. ``None`` keeps all that the pattern keeps, which is what an
            N:M weight stores anyway: 2:4 is then a ratio of 0.437 for a wide weight.
        pattern: ``None`` keeps any entries of a row; ``"n:m"``, such as ``"2:4"`` or ``"4:8"``, at most n of every m.
        rank: of the magnitude; the paper has 1.
        rounds: of the alternation; the paper has 20, and most is gained in the first five.
        weighting: ``"none"`` approximates the magnitude alike everywhere; ``"activations"`` better where inputs are
            larger. The paper's text was not available to say which it means; the difference measures small.
        bits: ``None`` stores S in the weight's dtype; 4 (or 2, 3, 8) in codes on SLiM-Quant's grid, to which the
            alternation then works.
        group: columns of S that share a scale.
        feedback: SparseGPT chooses S for the final signs and magnitude, and corrects what stays for what goes. Not in
            the paper.
        damping: SparseGPT's, as a share of the mean diagonal of the Gram matrix.
    """

    name: ClassVar[str] = "decompose"

    method: Literal["slab"] = "slab"
    ratio: float | None = 0.5
    pattern: str | None = None
    rank: int = 1
    rounds: int = 20
    weighting: Weighting = "none"
    bits: int | None = None
    group: int = 64
    feedback: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Check the options."""
        self._require(self.method == "slab", f"method must be 'slab', not {self.method!r}")
        ratio_is_valid = self.ratio is None or (real_number(self.ratio) and 0 < self.ratio < 1)
        self._require(ratio_is_valid, f"ratio must lie strictly between 0 and 1, or be null, not {self.ratio!r}")
        matched = None if self.pattern is None else re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", str(self.pattern))
        self._require(
            self.pattern is None or (matched is not None and 1 <= int(matched[1]) < int(matched[2])),
            f"pattern must be null or 'n:m' with 1 <= n < m (such as '2:4'), not {self.pattern!r}",
        )
        self._require(
            self.ratio is not None or self.pattern is not None,
            "ratio=null keeps what a pattern keeps, but there is none; give a ratio such as 0.5, or a pattern",
        )
        for option in ("rank", "rounds"):
            value = getattr(self, option)
            valid = whole_number(value) and value >= 1
            self._require(valid, f"{option} must be a whole number of at least 1, not {value!r}")
        self._require(
            self.weighting in ("none", "activations"),
            f"weighting must be 'none' or 'activations', not {self.weighting!r}",
        )
        bits_are_valid = self.bits is None or (whole_number(self.bits) and self.bits in BITS)
        self._require(bits_are_valid, f"bits must be null, 2, 3, 4 or 8, not {self.bits!r}")
        group_is_valid = whole_number(self.group) and self.group >= 2
        self._require(group_is_valid, f"group must be 2 or more columns, not {self.group!r}")
        self._require(isinstance(self.feedback, bool), f"feedback must be true or false, not {self.feedback!r}")
        damping_is_valid = real_number(self.damping) and 0 < self.damping <= 1
        self._require(damping_is_valid, f"damping must lie in (0, 1], not {self.damping!r}")
        self._require(
            not self.feedback or self.pattern is None or self.ratio is None,
            "with feedback an N:M pattern is filled; use ratio=null with it, or feedback=false",
        )

    @property
    def nm(self) -> Pattern:
        """N and M, or ``None`` without a pattern."""
        if self.pattern is None:
            return None
        kept, of = self.pattern.split(":")
        return int(kept), int(of)

    def statistics(self) -> frozenset[Statistic]:
        """Scores need channel norms, feedback the Gram matrix."""
        return frozenset({"activations", "gram"} if self.feedback else {"activations"})

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """It decides alone what is kept of a weight and on which grid."""
        for other in (self.name, "allocate_bits", "prune", "quantize", "low_rank"):
            if other in [one.name for one in earlier]:
                reason = "twice" if other == self.name else f"after {other}"
                raise RecipeError(
                    f"decompose comes {reason}, but it starts from the whole weight and decides itself what is kept, "
                    "with pattern= and ratio=, and on which grid, with bits=. Remove the other; low_rank may follow."
                )

    def check_site(self, name: str, shape: tuple[int, int]) -> None:
        """The pattern must divide the width, the rank fit, and the ratio be possible."""
        nm = self.nm
        if nm is not None and shape[1] % nm[1]:
            raise RecipeError(
                f"decompose: the pattern {self.pattern} does not divide the width {shape[1]} of '{name}'. Use a "
                f"pattern whose second number divides it, none, or leave the site out with exclude=['{name}']."
            )
        try:
            resolve_rank(self.rank, *shape)
            self._kept(shape)
        except RecipeError as error:
            raise RecipeError(
                f"decompose: '{name}': {error}, or leave the site out with exclude=['{name}']."
            ) from error

    def apply(self, work: SiteWork) -> None:
        """Solve the sparse part, the signs and their magnitude."""
        shape = (work.dense.shape[0], work.dense.shape[1])
        statistics = work.require_statistics(self.name)
        norms: Tensor | None = None
        if work.reached:
            norms = (statistics.sum_squares / max(statistics.count, 1)).sqrt()
        else:
            work.note("calibration saw no input but zeros: entries were chosen by their magnitude")
        quantizer = self._quantizer(work)
        work.quantizer = quantizer
        found = slab(
            work.target,
            norms,
            self._kept(shape),
            self.nm,
            rank=self.rank,
            rounds=self.rounds,
            weighting=self.weighting if work.reached else "none",
            dtype=work.dtype,
            stored=None if quantizer is None else lambda target, mask: quantizer(target, mask).dequantize(),
        )
        work.binary = found.negative, found.left, found.right
        work.base, work.mask = found.sparse, found.mask
        work.sparsity = Unstructured() if self.nm is None else NM(*self.nm)
        work.quantize()
        if self.feedback and work.reached:
            self._feed_back(work)
        work.compression_ratio = compression_ratio(int(work.mask.sum()), *shape, self.rank)

    def _kept(self, shape: tuple[int, int]) -> int:
        """Return how many entries of each row S keeps."""
        if self.ratio is None and self.nm is not None:
            return shape[1] // self.nm[1] * self.nm[0]
        return kept_in_row(self.ratio or 0.0, *shape, self.rank, self.nm)

    def _quantizer(self, work: SiteWork) -> Quantizer | None:
        bits, group, dtype = self.bits, self.group, work.scale_dtype
        if bits is None:
            return None
        # Not the work itself: a cycle would keep each site's matrices until the garbage collector comes by.
        return lambda weight, mask: quantize_slim(weight, bits, group, scale_dtype=dtype, mask=mask)

    def _feed_back(self, work: SiteWork) -> None:
        """Choose S anew, each column's error made good by the columns after it."""
        share = 1 - self._kept((work.dense.shape[0], work.dense.shape[1])) / work.dense.shape[1]
        result, work.mask = sparsegpt(
            work.target - work.binary_part(),
            work.require_gram(self.name),
            sparsity=share if self.nm is None else self.nm,
            grid=work.quantized,
            damping=self.damping,
            note=work.note,
        )
        if isinstance(result, Quantized):
            work.quantized, result = result, result.dequantize()
        work.base = result * work.mask
