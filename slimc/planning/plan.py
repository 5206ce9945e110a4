"""From what every choice costs to a plan: one choice a site, and the recipe that carries it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slimc.errors import RecipeError
from slimc.passes.report import aligned
from slimc.planning import knapsack
from slimc.planning.budget import Budget
from slimc.planning.menu import DENSE, Menu
from slimc.planning.sensitivity import Choice, SiteChoices
from slimc.progress import counted, printable
from slimc.recipes import Recipe
from slimc.runtime.files import write_bytes

SIZE = "size"
"""The target of plans that only count bytes."""


@dataclass(frozen=True)
class PlannedSite:
    """A site and the choice for it."""

    name: str
    shape: tuple[int, int]
    choice: Choice

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.choice.nbytes / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class Plan:
    """One choice a site; ``str()`` of it is a table for people.

    Attributes:
        budget: that it keeps to.
        target: what the budget counts: ``"size"``.
        sites: in data-flow order.
        recipe: carries it out; :func:`slimc.compile` and ``slimc compress --recipe`` take its file.
        gap: by what share the predicted damage may lie above the least possible within the budget, at most.
    """

    budget: Budget
    target: str
    sites: tuple[PlannedSite, ...]
    recipe: Recipe
    gap: float

    @property
    def nbytes(self) -> int:
        """What all sites take together."""
        return sum(site.choice.nbytes for site in self.sites)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits a weight over all sites, those that stay dense included."""
        return 8 * self.nbytes / sum(site.shape[0] * site.shape[1] for site in self.sites)

    @property
    def damage(self) -> float:
        """The predicted damage of all choices together, in the unit of :class:`~slimc.planning.sensitivity.Choice`."""
        return sum(site.choice.damage for site in self.sites)

    def save(self, path: str | Path) -> None:
        """Write the recipe as a YAML file.

        Raises:
            InputError: it cannot be written.
        """
        write_bytes(Path(path), self.recipe.to_yaml().encode())

    def counts(self) -> dict[str, int]:
        """Return how many sites get each expression, the most frequent first."""
        return dict(Counter(site.choice.name for site in self.sites).most_common())

    def summary(self) -> str:
        """Return the totals in two sentences."""
        used = ", ".join(f"{name} x {count}" for name, count in self.counts().items())
        return (
            f"{counted(len(self.sites), 'layer')}, {self.nbytes / 1e6:.3f} MB, {self.bits_per_weight:.3f} bits a "
            f"weight (budget {self.budget}), predicted damage {self.damage:.4g}.\n{used}."
        )

    def __str__(self) -> str:
        """Return a row a site and the totals."""
        rows = [["layer", "shape", "choice", "bits", "bytes", "output error", "predicted damage"]]
        for site in self.sites:
            choice = site.choice
            numbers = [f"{site.bits:.3f}", f"{choice.nbytes:,}", f"{choice.output_error:.4f}", f"{choice.damage:.3g}"]
            rows.append([printable(site.name), f"{site.shape[0]} x {site.shape[1]}", choice.name, *numbers])
        return "\n".join([*aligned(rows), "", self.summary()])


@dataclass(frozen=True)
class Sensitivities:
    """What every choice at every site costs; plans for any budget are made of it in a second.

    Attributes:
        sites: in data-flow order.
        menu: what was measured.
        include: patterns of weights that were taken in, those of the menu too.
        exclude: patterns of weights that were left out, those of the menu too.
        model: what it is called, for the recipe's description.
    """

    sites: tuple[SiteChoices, ...]
    menu: Menu
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    model: str = "model"

    def plan(self, budget: str | Budget, target: str = SIZE) -> Plan:
        """Return the plan of least predicted damage within ``budget``.

        Args:
            budget: ``"3.2bpw"`` (bits a weight), ``"45MB"`` or ``"0.25x"`` (of what the dense weights take), for all
                sites together.
            target: ``"size"``.

        Raises:
            RecipeError: the budget is none, or nothing on the menu is so small; the message tells the least.
            InputError: scipy is not installed.
        """
        budget = Budget.parse(budget) if isinstance(budget, str) else budget
        if target != SIZE:
            raise RecipeError(f"there is no target '{target}'; there is 'size'")
        weights = sum(site.weights for site in self.sites)
        sizes = [[float(choice.nbytes) for choice in site.choices] for site in self.sites]
        allowed = budget.nbytes(weights, dense=sum(unit[0] for unit in sizes))
        least = sum(map(min, sizes))
        if least > allowed:
            raise RecipeError(
                f"The budget {budget} is {allowed / 1e6:.3f} MB, and the least that the menu can reach is "
                f"{least / 1e6:.3f} MB ({8 * least / weights:.3f} bits a weight). Raise the budget, or put a smaller "
                "expression on the menu."
            )
        damages = [[choice.damage for choice in site.choices] for site in self.sites]
        solution = knapsack.solve(damages, sizes, allowed)
        sites = tuple(
            PlannedSite(site.name, site.shape, site.choices[option])
            for site, option in zip(self.sites, solution.chosen, strict=True)
        )
        plan = Plan(budget, target, sites, self._recipe(budget, sites), solution.gap)
        return replace(plan, recipe=plan.recipe.model_copy(update={"description": self._description(plan)}))

    def _recipe(self, budget: Budget, sites: Sequence[PlannedSite]) -> Recipe:
        chosen = {site.name: site.choice.name for site in sites if site.choice.name != DENSE}
        if not chosen:
            raise RecipeError(f"The budget {budget} leaves all layers dense, so there is nothing to do; lower it.")
        return Recipe(
            name=f"plan-{budget}",
            passes=[one.to_config() if one.options() else one.name for one in self.menu.planned(chosen)],
            include=list(self.include),
            exclude=[*self.exclude, *(site.name for site in sites if site.choice.name == DENSE)],
        )

    def _description(self, plan: Plan) -> str:
        return (
            f"Planned by slimc for {self.model}: {plan.summary()}\n\nEdit it as you like: 'sites' says which of the "
            "'expressions' each layer gets; names may be\npatterns such as \"*.v_proj\"."
        )
