"""Compensate: aim at what the dense model puts out, so that a site makes good the errors of those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slimc.errors import RecipeError
from slimc.passes.base import Pass, SitePass, Statistic, real_number
from slimc.passes.solvers.hessian import regression
from slimc.passes.statistics import InputStatistics, Shortfall
from slimc.passes.work import SiteWork

LADDER = (1.0, 10.0, 100.0)
"""Multiples of the damping that are tried where held-out batches can tell which is best."""


@dataclass(frozen=True)
class Compensate(SitePass):
    """``W' = W + strength * (W (C - H) + D) (H + damping)^-1``: the target of the passes that follow.

    A compressed site reads ``X``, not the ``X_dense`` that the dense model has there. The weight that comes closest to
    the dense output, ``min |X W'^T - X_dense W^T|``, is ``W C H^-1`` with ``C = X_dense^T X`` and ``H = X^T X``; and as
    ``|X W''^T - X_dense W^T|^2`` is ``|X (W'' - W')^T|^2`` and a constant, all later passes need only approximate
    ``W'`` in place of ``W``. (GPTAQ, arXiv 2504.02691, corrects inside its column loop to the same end.)

    Where the result is added to another value and to nothing else (a residual connection), what *that* value lacks
    is compensated too: ``D`` is the sum of ``(r_dense - r)^T x`` over the tokens.

    Attributes:
        strength: how much of the correction is made, above 0, at most 1; all of it fits the calibration text at the
            cost of any other. With held-out batches it is the most that is made: the share of least error there is
            taken.
        damping: of the regression, as a share of the mean diagonal of H. With held-out batches the best of this, ten
            and a hundred times this (up to 1) is taken.
        residual: whether sums count.
    """

    name: ClassVar[str] = "compensate"
    compresses: ClassVar[bool] = False

    strength: float = 0.5
    damping: float = 0.01
    residual: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        for option in ("strength", "damping"):
            value = getattr(self, option)
            valid = real_number(value) and 0 < value <= 1
            self._require(valid, f"{option} must lie in (0, 1], not {value!r}")
        self._require(isinstance(self.residual, bool), f"residual must be true or false, not {self.residual!r}")

    def statistics(self) -> frozenset[Statistic]:
        """Both streams, and the Gram matrix of the one that is compressed."""
        return frozenset({"activations", "gram", "cross_gram"} | ({"shortfall"} if self.residual else set()))

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """The target must stand before anything approximates it."""
        names = [one.name for one in earlier]
        if self.name in names:
            raise RecipeError("compensate appears twice: a weight has one target. Remove one of the two.")
        late = [name for name in names if name in ("quantize", "prune", "decompose", "low_rank")]
        if late:
            raise RecipeError(
                f"compensate comes after {late[0]}, which has already approximated the weight. Put compensate right "
                "after calibrate."
            )

    def apply(self, work: SiteWork) -> None:
        """Move the site's target."""
        if not work.reached:
            return
        statistics = work.require_statistics(self.name)
        fitted = _lack(work.dense, statistics, work.shortfalls[0])
        gram = work.require_gram(self.name)
        held_out = work.held_out
        if held_out is None or held_out.gram is None:
            work.target = work.dense + self.strength * regression(gram, fitted, self.damping).float()
        else:
            wanted = _lack(work.dense, held_out, work.shortfalls[1]).double()
            seen = held_out.gram.double()
            best, least = work.dense, 0.0
            for factor in LADDER:
                step = regression(gram, fitted, min(self.damping * factor, 1.0))
                # The error on the held-out tokens is a parabola in the share of the step that is made.
                slope, curve = float((step * wanted).sum()), float(((step @ seen) * step).sum())
                share = min(max(slope / curve, 0.0), self.strength) if curve > 0 else 0.0
                if (error := share * share * curve - 2 * share * slope) < least:
                    best, least = work.dense + (share * step).to(torch.float32), error
            work.target = best
        work.base = work.target


def _lack(weight: Tensor, statistics: InputStatistics, shortfall: Shortfall | None) -> Tensor:
    """Return the cross matrix of what the output lacks and the input: ``W (C - H) + D``, ``[out, in]``."""
    if statistics.gram is None or statistics.cross_gram is None:
        raise RecipeError("compensate needs the statistics of both streams: put calibrate before it.")
    lack = weight @ (statistics.cross_gram - statistics.gram)
    return lack if shortfall is None else lack + shortfall.cross
