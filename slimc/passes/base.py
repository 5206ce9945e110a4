"""The grammar that all passes share: a frozen dataclass with a name, options, and rules about order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeGuard

from slimc.errors import RecipeError, closest
from slimc.passes.work import SiteWork

Statistic = str
"""``"activations"`` (mean absolute input, sum of squares) or ``"gram"`` (X^T X)."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """One step of a recipe.

    A pass is a value: its repr, its recipe line and its JSON are one grammar. It says which passes it may follow;
    the pipeline asks before any work starts.
    """

    name: ClassVar[str]

    def statistics(self) -> frozenset[Statistic]:
        """Return what must be known about a site's input before this pass can run."""
        return frozenset()

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """Raise ``RecipeError`` if this pass cannot follow ``earlier``."""

    def options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        return {
            option.name: getattr(self, option.name)
            for option in dataclasses.fields(self)
            if option.default is dataclasses.MISSING or getattr(self, option.name) != option.default
        }

    def to_config(self) -> dict[str, Any]:
        """Return the recipe line of this pass, ``{"quantize": {"bits": 4}}``."""
        return {self.name: self.options()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build the pass from the options of a recipe line.

        Raises:
            RecipeError: an option is unknown, missing or out of range.
        """
        known = [option.name for option in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                raise RecipeError(f"The pass '{cls.name}' has no option '{key}'{closest(str(key), known)}; it takes {', '.join(known)}.")
        try:
            return cls(**options)
        except TypeError as error:
            raise RecipeError(f"The pass '{cls.name}' cannot be built from {dict(options)}: {error}.") from error

    def _require(self, condition: bool, what: str) -> None:
        if not condition:
            raise RecipeError(f"{self.name}: {what}.")


class SitePass(Pass):
    """A pass that works on one site at a time, inside the sweep."""

    def apply(self, work: SiteWork) -> None:
        """Change how ``work`` expresses its weight."""
        raise TypeError(f"{type(self).__name__} does not say what it does at a site")


def whole_number(value: object) -> TypeGuard[int]:
    """Tell whether ``value`` is an ``int`` and not a ``bool``."""
    return isinstance(value, int) and not isinstance(value, bool)
