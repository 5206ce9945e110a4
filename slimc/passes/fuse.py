"""Fuse: one op for everything that happens at a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slimc.errors import RecipeError
from slimc.ir.fusion import FUSION_RULES
from slimc.ir.program import Program
from slimc.ir.rules import apply_rules
from slimc.passes.base import Pass, SitePass


@dataclass(frozen=True)
class Fuse(Pass):
    """``y = slim.linear(x, values, pattern, scale, l, r, signs, bias)``: storage forms and all become one launch."""

    name: ClassVar[str] = "fuse"

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """There must be a compressed form to fuse, and nothing may change a weight afterwards."""
        names = [one.name for one in earlier]
        if not any(isinstance(one, SitePass) and one.compresses for one in earlier):
            raise RecipeError("fuse has nothing to fuse: put quantize, prune or decompose before it.")
        if self.name in names:
            raise RecipeError("fuse appears twice; one is enough.")

    def rewrite(self, program: Program) -> int:
        """Apply the fusion rules until none matches; return how many applications there were."""
        return apply_rules(program, FUSION_RULES)
