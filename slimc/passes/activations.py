"""Activations: round what the weights are multiplied by, so that both operands of a product have 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from slimc.errors import RecipeError
from slimc.passes.base import Pass, SitePass, whole_number
from slimc.passes.work import SiteWork

_STORED: Mapping[str, str] = {"int8": "int8", "fp8": "float8_e4m3fn"}


@dataclass(frozen=True)
class Activations(SitePass):
    """``q = round_activations(x); y = linear(q, w) + low_rank(q, l, r)``: each token rounded to 8 bits when it arrives.

    Every token has a scale of its own, from its largest magnitude (`slimc.runtime.activations`); nothing is calibrated
    and nothing stored. Adapters read what the weight reads; where inputs are scaled first, as for activation-aware
    quantisation, they read the input as it came, and signs always do. A site whose codes an 8-bit operand cannot hold
    exactly (or that has none) is left as it is, and its row in the report says why.

    The place in the recipe makes no difference to the rounding. What it costs at a site is noise that no weight could
    take back, so the statistics there stay those of the exact input; the sweep goes on with the product as it will be
    computed, so that later sites see the rounded outputs and are fitted to them. Passes that come after this one and
    judge a choice by its output error count the rounding in.

    Attributes:
        bits: 8.
        kind: ``"int8"``, evenly spaced, or ``"fp8"`` (e4m3), which spends its 8 bits on range: coarser for values near
            the largest of the token, finer for those below 1/16 of it.
    """

    name: ClassVar[str] = "activations"
    compresses: ClassVar[bool] = False

    bits: int = 8
    kind: Literal["int8", "fp8"] = "int8"

    def __post_init__(self) -> None:
        """Check the options."""
        self._require(whole_number(self.bits) and self.bits == 8, f"bits must be 8, not {self.bits!r}")
        self._require(self.kind in ("int8", "fp8"), f"kind must be 'int8' or 'fp8', not {self.kind!r}")

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """Activations are rounded once."""
        if self.name in [one.name for one in earlier]:
            raise RecipeError("activations appears twice: an input is rounded once. Remove one of the two.")

    def apply(self, work: SiteWork) -> None:
        """Have the site's product read rounded inputs."""
        work.activation = _STORED[self.kind]
