"""PerSite: not the same for all sites, but for each one of several named expressions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from slimc.errors import RecipeError, SlimError, closest
from slimc.ir.patterns import matches
from slimc.passes.base import Pass, SitePass, Statistic
from slimc.passes.work import SiteWork


@dataclass(frozen=True)
class PerSite(SitePass):
    """Express every site by the passes of its own expression; ``slimc plan`` chooses which.

    As a line of a recipe::

        - per_site:
            expressions:
              int3: [{quantize: {bits: 3, group: 64}}]
              int4: [{quantize: {bits: 4, group: 64}}, {low_rank: {rank: 0.05, bits: 4}}]
            sites:
              model.layers.0.mlp.down_proj: int4
              "*.v_proj": int4
            default: int3

    Attributes:
        expressions: the passes of each expression by its name, as recipe lines or as passes (kept as recipe lines).
        sites: which expression a site gets, by its name or a pattern (shell wildcards, or a regular expression after
            ``re:``). A name goes before all patterns. Of the patterns only one may match a site, for an order of lines
            that decides something is easily lost.
        default: the expression of sites that nothing in ``sites`` names; ``None``: there must be none.
    """

    name: ClassVar[str] = "per_site"

    expressions: Mapping[str, Sequence[Any]]
    sites: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None

    def __post_init__(self) -> None:
        """Check the options and build the passes of each expression."""
        expressions: Any = self.expressions
        valid = isinstance(expressions, Mapping) and all(_is_list(lines) for lines in expressions.values())
        self._require(valid and bool(expressions), "expressions must map names to lists of passes")
        built = {str(name): self._build(name, lines) for name, lines in expressions.items()}
        object.__setattr__(self, "_built", built)
        configs = {name: [one.to_config() for one in passes] for name, passes in built.items()}
        object.__setattr__(self, "expressions", configs)
        sites: Any = self.sites
        valid = isinstance(sites, Mapping) and all(isinstance(pattern, str) for pattern in sites)
        self._require(valid, "sites must map names or patterns of sites to names of expressions")
        for place, chosen in [*self.sites.items(), *([] if self.default is None else [("default", self.default)])]:
            if chosen not in built:
                raise RecipeError(
                    f"per_site: '{place}' has the expression '{chosen}', which is not there"
                    f"{closest(str(chosen), built)}; there are {', '.join(built)}. To leave a site dense, exclude it."
                )

    def _build(self, name: object, lines: Sequence[Any]) -> list[SitePass]:
        # The table of passes holds this one.
        from slimc.passes.pipeline import from_config

        try:
            passes = [one if isinstance(one, Pass) else from_config([one])[0] for one in lines]
        except RecipeError as error:
            raise RecipeError(f"per_site: in the expression '{name}': {error}") from error
        for one in passes:
            if isinstance(one, SitePass) and one.stacks:
                raise RecipeError(
                    f"per_site: in the expression '{name}': {one.name} solves siblings together, which may have "
                    "expressions of their own here. Leave shared out."
                )
        found: list[SitePass] = []
        for one in passes:
            if not isinstance(one, SitePass) or isinstance(one, PerSite):
                raise RecipeError(
                    f"per_site: the expression '{name}' has '{one.name}', which is not for a single site; put it "
                    "before or after per_site."
                )
            found.append(one)
        if not any(one.compresses for one in found):
            raise RecipeError(
                f"per_site: the expression '{name}' compresses nothing: it has neither quantize nor prune nor "
                "decompose. To leave sites dense, exclude them."
            )
        return found

    def statistics(self) -> frozenset[Statistic]:
        """All that any expression needs: siblings share their statistics, but perhaps not their expression."""
        return frozenset().union(*(one.statistics() for passes in self.built.values() for one in passes))

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """Each expression must be one that could stand here in full, and be the only one of its site."""
        if self.name in [one.name for one in earlier]:
            raise RecipeError("per_site appears twice: a site has one expression. Make one of the two.")
        for name, passes in self.built.items():
            for position, one in enumerate(passes):
                try:
                    one.check_after([*earlier, *passes[:position]])
                except RecipeError as error:
                    raise RecipeError(f"per_site: in the expression '{name}': {error}") from error

    def check_names(self, names: Sequence[str]) -> None:
        """Every name and pattern must be of some weight."""
        for pattern in self.sites:
            if not any(matches(pattern, name) for name in names):
                raise RecipeError(
                    f"per_site: '{pattern}' matches no weight{closest(pattern, names)}. Patterns are matched against "
                    "module paths such as 'model.layers.0.mlp.up_proj'; '*' stands for anything. The plan of another "
                    "model does not fit this one."
                )

    def check_site(self, name: str, shape: tuple[int, int]) -> None:
        """The site must have an expression, and its passes must be able to work on it."""
        for one in self.built[self.choice(name)]:
            one.check_site(name, shape)

    def choice(self, site: str) -> str:
        """Return the name of the expression of ``site``.

        Raises:
            RecipeError: it has none, or two patterns match it.
        """
        if site in self.sites:
            return self.sites[site]
        patterns = [pattern for pattern in self.sites if matches(pattern, site)]
        if len(patterns) > 1:
            raise RecipeError(
                f"per_site: both '{patterns[0]}' and '{patterns[1]}' match '{site}'. Make one of them narrower, or "
                "name the site itself."
            )
        chosen = self.sites[patterns[0]] if patterns else self.default
        if chosen is None:
            raise RecipeError(
                f"per_site: nothing says how '{site}' is to be expressed. Name it under sites, give a default, or "
                f"leave it dense with exclude=['{site}']. The plan of another model does not fit this one."
            )
        return chosen

    def apply(self, work: SiteWork) -> None:
        """Run the passes of the site's expression."""
        for one in self.built[self.choice(work.name)]:
            try:
                one.apply(work)
            except SlimError as error:
                raise type(error)(f"{one.name}: {error}") from error

    @property
    def built(self) -> Mapping[str, list[SitePass]]:
        """The passes of each expression."""
        built: Mapping[str, list[SitePass]] = vars(self)["_built"]
        return built


def _is_list(lines: object) -> bool:
    return isinstance(lines, Sequence) and not isinstance(lines, str)
