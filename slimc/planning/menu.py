"""The menu: the expressions among which a plan chooses, as a recipe in which the sites are still to be filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimc import recipes
from slimc.errors import RecipeError
from slimc.passes import (
    AllocateBits,
    Calibrate,
    Decompose,
    LowRank,
    Pass,
    PerSite,
    Prune,
    Quantize,
    SitePass,
    check_order,
)
from slimc.recipes import PassConfig, Recipe

DENSE = "dense"
"""The choice of leaving a site as it is; every menu has it."""

JUDGED = 0.25
"""The share of the calibration data by which choices are judged, if the menu's ``calibrate`` holds out none."""

PRESET = Path(__file__).with_name("menu.yaml")
"""What a plan chooses from by default."""


MenuSource = str | Path | Mapping[str, Sequence[Any]] | Sequence[Pass] | None
"""How people name a menu: a recipe file, expressions by name, or the passes of a whole recipe; ``None`` is the default.
"""


@dataclass(frozen=True)
class Menu:
    """Passes, one of which is a :class:`~slimc.passes.PerSite` with expressions to choose from.

    Attributes:
        passes: in order; the sites of ``per_site`` are what a plan fills in.
        include: patterns of weights that are planned although they are dense by default.
        exclude: patterns of weights that are left dense.
    """

    passes: tuple[Pass, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that there is something to choose from, and how to calibrate."""
        check_order(self.passes)
        count = sum(isinstance(one, PerSite) for one in self.passes)
        if count != 1:
            raise RecipeError(
                f"A menu has one per_site, whose expressions are what to choose from; this one has {count}. "
                f"See {PRESET.name} in slimc.planning for an example."
            )
        if not isinstance(self.passes[0], Calibrate):
            raise RecipeError("A menu starts with calibrate: choices are judged by what they do to the model on text.")
        beside = [
            one.name for one in self.passes if isinstance(one, Prune | Quantize | AllocateBits | Decompose | LowRank)
        ]
        if beside:
            raise RecipeError(
                f"A menu has '{beside[0]}' beside per_site, where nobody measures what it takes or does. Put it into "
                "the expressions that shall have it."
            )
        if DENSE in self.expressions:
            raise RecipeError(f"'{DENSE}' is on every menu already, as the choice to leave a site as it is.")

    @classmethod
    def load(cls, menu: Menu | MenuSource) -> Menu:
        """Return the menu that a user named.

        Raises:
            RecipeError: it cannot be read, or is no menu.
        """
        if isinstance(menu, Menu):
            return menu
        if isinstance(menu, Mapping):
            return cls.load(None)._with(PerSite(expressions=menu))
        if menu is None or isinstance(menu, str | Path):
            return cls.of(recipes.load(PRESET if menu is None else menu))
        return cls(tuple(menu))

    @classmethod
    def of(cls, recipe: Recipe) -> Menu:
        """Return the menu that a recipe is."""
        return cls(tuple(recipe.build()), tuple(recipe.include), tuple(recipe.exclude))

    @property
    def recipe(self) -> Recipe:
        """The menu as a recipe."""
        passes: list[PassConfig] = [one.to_config() for one in self.passes]
        return Recipe(name="menu", passes=passes, include=list(self.include), exclude=list(self.exclude))

    @property
    def calibrate(self) -> Calibrate:
        """How the recipe calibrates."""
        return next(one for one in self.passes if isinstance(one, Calibrate))

    @property
    def per_site(self) -> PerSite:
        """The pass with the expressions."""
        return next(one for one in self.passes if isinstance(one, PerSite))

    @property
    def expressions(self) -> Mapping[str, Sequence[SitePass]]:
        """The passes of each expression."""
        return self.per_site.built

    @property
    def measuring(self) -> Calibrate:
        """How choices are measured: fitted to most of the data, judged by the rest."""
        return replace(self.calibrate, held_out=self.calibrate.held_out or JUDGED)

    def calibrated(self, **options: int) -> Menu:
        """Return the menu with options of its ``calibrate`` changed."""
        return self._with(replace(self.calibrate, **options))

    def planned(self, sites: Mapping[str, str]) -> list[Pass]:
        """Return the passes with an expression for each site; expressions that no site has are left out."""
        used = {name: lines for name, lines in self.per_site.expressions.items() if name in sites.values()}
        return list(self._with(PerSite(used, sites)).passes)

    def _with(self, changed: Pass) -> Menu:
        return replace(self, passes=tuple(changed if isinstance(one, type(changed)) else one for one in self.passes))
