"""From what every choice costs to a plan: one choice a site, and the recipe that carries it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from slimc.errors import FormatError, InputError, RecipeError
from slimc.passes.journal import digest
from slimc.passes.report import aligned
from slimc.planning import knapsack
from slimc.planning.budget import Budget
from slimc.planning.menu import DENSE, Menu
from slimc.planning.record import SensitivitiesRecord
from slimc.planning.sensitivity import Choice, SiteChoices
from slimc.progress import counted, printable
from slimc.recipes import Recipe
from slimc.runtime.files import check_writable, make_parents, write_bytes
from slimc.runtime.formats import LinearFormat

SIZE = "size"
"""The target of plans that only count bytes."""

Times = Mapping[LinearFormat, float]
"""Microseconds of one call, by form."""


def refuse_tied(sites: Mapping[str, str]) -> None:
    """Refuse to count bytes that no choice can save.

    Args:
        sites: those whose weight is the table of an embedding, with the name of that.

    Raises:
        RecipeError: there are some.
    """
    for site, embedding in sites.items():
        raise RecipeError(
            f"'{site}' shares its weight with the embedding '{embedding}', which stays as it is: any other form of it "
            "would be stored besides, and no budget of bytes is met by that. Leave it out, or plan for time (--target "
            "decode with a budget such as 0.5x)."
        )


def weights_digest(model: nn.Module) -> str:
    """Return a digest of the parameters of ``model``: names, shapes, dtypes and first rows, read in a moment."""
    named = sorted((name, tensor) for name, tensor in model.named_parameters(remove_duplicate=False) if tensor.dim())
    return digest((f"{name} {tuple(tensor.shape)}", tensor[:1]) for name, tensor in named)


def _check_choices(sites: Sequence[SiteChoices], menu: Menu) -> None:
    """Refuse what no measurement leads to.

    Raises:
        FormatError: it is there.
    """
    known = {DENSE, *menu.expressions}
    for name, count in Counter(site.name for site in sites).items():
        if count > 1:
            raise FormatError(f"'{name}' is there twice")
    for site in sites:
        names = [choice.name for choice in site.choices]
        if names[0] != DENSE or len(names) != len(set(names)) or not known.issuperset(names):
            raise FormatError(f"the choices at '{site.name}' are not '{DENSE}' first, then expressions of the menu")
        for choice in site.choices:
            if (choice.format.weight.rows, choice.format.weight.columns) != site.shape:
                raise FormatError(f"the form of '{choice.name}' at '{site.name}' is not of its shape")


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
        target: what counts: ``"size"``, or ``"decode@h100"``.
        sites: in data-flow order.
        recipe: carries it out; :func:`slimc.compile` and ``slimc compress --recipe`` take its file.
        gap: by what share the predicted damage may lie above the least possible within the budget, at most.
        microseconds: that one call of all sites takes, if the target is a card.
        refused: expressions that could not be had at some sites, at how many, and why.
        measured: the damage that was measured when the plan was carried out on trial; ``None``: it was not.
    """

    budget: Budget
    target: str
    sites: tuple[PlannedSite, ...]
    recipe: Recipe
    gap: float
    microseconds: float | None = None
    refused: tuple[str, ...] = ()
    measured: float | None = None

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
        """Write the recipe as a YAML file, in folders that are made as needed.

        Raises:
            InputError: it cannot be written.
        """
        target = Path(path)
        check_writable(target)
        make_parents(target)
        write_bytes(target, self.recipe.to_yaml().encode())

    def counts(self) -> dict[str, int]:
        """Return how many sites get each expression, the most frequent first."""
        return dict(Counter(site.choice.name for site in self.sites).most_common())

    def summary(self) -> str:
        """Return the totals in two sentences."""
        used = ", ".join(f"{name} x {count}" for name, count in self.counts().items())
        time = "" if self.microseconds is None else f" and {self.microseconds:,.0f} us"
        tried = "" if self.measured is None else f", measured {self.measured:.4g}"
        return (
            f"{counted(len(self.sites), 'layer')}, {self.nbytes / 1e6:.3f} MB, {self.bits_per_weight:.3f} bits a "
            f"weight{time} (budget {self.budget}), predicted damage {self.damage:.4g}{tried}.\n{used}."
        )

    def __str__(self) -> str:
        """Return a row a site and the totals."""
        rows = [["layer", "shape", "choice", "bits", "bytes", "output error", "predicted damage"]]
        for site in self.sites:
            choice = site.choice
            numbers = [f"{site.bits:.3f}", f"{choice.nbytes:,}", f"{choice.output_error:.4f}", f"{choice.damage:.3g}"]
            rows.append([printable(site.name), f"{site.shape[0]} x {site.shape[1]}", choice.name, *numbers])
        return "\n".join([*aligned(rows), "", self.summary(), *self.refused])


@dataclass(frozen=True)
class _Option:
    """One choice for each site of a unit."""

    choices: tuple[Choice, ...]
    microseconds: float

    def is_called(self, name: str) -> bool:
        return self.choices[0].name == name

    @property
    def damage(self) -> float:
        return sum(choice.damage for choice in self.choices)

    @property
    def nbytes(self) -> float:
        return float(sum(choice.nbytes for choice in self.choices))


class _Unit:
    """Sites that get the same expression, and what they can get: the dense weights first.

    With ``times`` nothing is among them that is slower than the dense weights.
    """

    def __init__(self, sites: tuple[SiteChoices, ...], times: Times | None) -> None:
        self.sites = sites
        by_name = [{choice.name: choice for choice in site.choices} for site in sites]
        shared = [name for name in by_name[0] if all(name in choices for choices in by_name)]
        found = [tuple(choices[name] for choices in by_name) for name in shared]
        spent = [0.0 if times is None else sum(times[choice.format] for choice in choices) for choices in found]
        self.options = [
            _Option(choices, spends) for choices, spends in zip(found, spent, strict=True) if spends <= spent[0]
        ]


@dataclass(frozen=True)
class Sensitivities:
    """What every choice at every site costs; plans for any budget are made of it in a second.

    Attributes:
        sites: in data-flow order.
        menu: what was measured.
        include: patterns of weights that were taken in, those of the menu too.
        exclude: patterns of weights that were left out, those of the menu too.
        model: what it is called, for the recipe's description.
        weights: :func:`weights_digest` of the model that was measured; ``None``: not known.
    """

    sites: tuple[SiteChoices, ...]
    menu: Menu
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    model: str = "model"
    weights: str | None = None

    def save(self, path: str | Path) -> None:
        """Write them as a JSON file, for plans of later days.

        Raises:
            InputError: it cannot be written.
        """
        record = SensitivitiesRecord.of(
            model=self.model,
            weights=self.weights,
            menu=self.menu.recipe,
            include=self.include,
            exclude=self.exclude,
            sites=self.sites,
        )
        write_bytes(Path(path), record.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Sensitivities:
        """Read what :meth:`save` wrote.

        Raises:
            FormatError: it is no such file.
        """
        record = SensitivitiesRecord.read(Path(path))
        try:
            menu, sites = Menu.of(record.menu), record.choices()
            _check_choices(sites, menu)
        except (FormatError, RecipeError) as error:
            raise FormatError(f"{path}: {error}; the file is damaged or was edited, so measure again") from error
        return cls(sites, menu, tuple(record.include), tuple(record.exclude), record.model, record.weights)

    def require_measured_on(self, model: nn.Module) -> None:
        """Check that ``model`` is the one that was measured.

        Raises:
            InputError: it has not.
        """
        parameters = model.named_parameters(remove_duplicate=False)
        shapes = {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in parameters}
        for site in self.sites:
            found = shapes.get(site.name)
            if found not in (site.shape, site.shape[::-1]):
                rows, columns = site.shape
                raise InputError(
                    f"These sensitivities are of another model, a {self.model} whose '{site.name}' is {rows} x "
                    f"{columns}; {type(model).__name__} has {'no such layer' if found is None else f'{found} there'}. "
                    "Measure this one."
                )
        if self.weights not in (None, weights_digest(model)):
            raise InputError(
                f"These sensitivities are of another model, a {self.model} of other weights or in another dtype. "
                "Measure this one; or plan for the other, and carry that plan out on this one: a plan is a recipe."
            )

    def plan(self, budget: str | Budget, target: str = SIZE, *, times: Times | None = None) -> Plan:
        """Return the plan of least predicted damage within ``budget``.

        Args:
            budget: ``"3.2bpw"`` (bits a weight), ``"45MB"`` or ``"0.25x"`` (of what the dense weights take), for all
                sites together.
            target: ``"size"``, or what ``times`` are of. Then the budget may also be a time, ``"2ms"`` or ``"800us"``,
                of one call of all sites, ``"0.5x"`` is of the time that they take now, and sites that share an
                input get one expression, so that their kernels can run as one. If the budget is one of bytes, no
                expression is taken that is slower than the dense weight.
            times: microseconds by form, of all choices.

        Raises:
            RecipeError: the budget is none, or nothing on the menu is so small; the message tells the least.
            InputError: scipy is not installed.
        """
        budget = Budget.parse(budget) if isinstance(budget, str) else budget
        if times is None and target != SIZE:
            raise RecipeError(f"the target '{target}' needs times of layers; without them there is '{SIZE}'")
        if times is None and budget.is_time:
            raise RecipeError(
                f"the budget {budget} is a time, and the target '{SIZE}' counts bytes; see --target decode"
            )
        units = [_Unit((site,), times) for site in self.sites] if times is None else self._groups(times)
        costs, allowed = self._costs(budget, units, times)
        solution = knapsack.solve([[option.damage for option in unit.options] for unit in units], costs, allowed)
        return self._plan(budget, target, units, solution, times)

    def uniform(self, budget: str | Budget, target: str = SIZE, *, times: Times | None = None) -> Plan | None:
        """Return the plan that gives all sites one expression: of those within ``budget`` that of least damage.

        It takes no predictions on trust that errors of different sites add up, so it is what a plan is checked against.
        ``None``: no expression can be had at all sites in so little.

        The arguments and what is raised are those of :meth:`plan`.
        """
        budget = Budget.parse(budget) if isinstance(budget, str) else budget
        units = [_Unit((site,), times) for site in self.sites]
        costs, allowed = self._costs(budget, units, times)
        found: list[tuple[float, list[int]]] = []
        for name in self.menu.expressions:
            chosen = [next((at for at, one in enumerate(unit.options) if one.is_called(name)), None) for unit in units]
            everywhere = [option for option in chosen if option is not None]
            if len(everywhere) < len(units):
                continue
            if sum(options[option] for options, option in zip(costs, everywhere, strict=True)) <= allowed:
                damage = sum(unit.options[option].damage for unit, option in zip(units, everywhere, strict=True))
                found.append((damage, everywhere))
        if not found:
            return None
        return self._plan(budget, target, units, knapsack.Solution(min(found)[1], 1.0), times)

    def _plan(
        self, budget: Budget, target: str, units: Sequence[_Unit], solution: knapsack.Solution, times: Times | None
    ) -> Plan:
        choices = {
            site.name: choice
            for unit, option in zip(units, solution.chosen, strict=True)
            for site, choice in zip(unit.sites, unit.options[option].choices, strict=True)
        }
        sites = tuple(PlannedSite(site.name, site.shape, choices[site.name]) for site in self.sites)
        spent = None if times is None else sum(times[site.choice.format] for site in sites)
        plan = Plan(budget, target, sites, self._recipe(budget, sites), solution.gap, spent, self._refused())
        return replace(plan, recipe=plan.recipe.model_copy(update={"description": self._description(plan)}))

    def _costs(self, budget: Budget, units: Sequence[_Unit], times: Times | None) -> tuple[list[list[float]], float]:
        """Return what each option of each unit costs, and what all may, in the unit of the budget.

        Raises:
            RecipeError: it is one of bytes, and there are sites that can save none.
        """
        if times is not None and not budget.in_bytes:
            costs = [[option.microseconds for option in unit.options] for unit in units]
            return costs, self._allowed(budget, costs, in_time=True)
        refuse_tied({site.name: site.embedding for site in self.sites if site.embedding is not None})
        costs = [[option.nbytes for option in unit.options] for unit in units]
        return costs, self._allowed(budget, costs, in_time=False)

    def _refused(self) -> tuple[str, ...]:
        reasons: dict[str, list[str]] = {}
        for site in self.sites:
            for name, reason in site.refused.items():
                reasons.setdefault(name, []).append(reason)
        return tuple(
            f"Not to be had at {counted(len(all_reasons), 'layer')}: {name} ({all_reasons[0]})"
            for name, all_reasons in reasons.items()
        )

    def _groups(self, times: Times) -> list[_Unit]:
        """Return the sites that share an input together."""
        groups: dict[tuple[str, ...], list[SiteChoices]] = {}
        for site in self.sites:
            groups.setdefault(site.group, []).append(site)
        return [_Unit(tuple(sites), times) for sites in groups.values()]

    def _allowed(self, budget: Budget, costs: Sequence[Sequence[float]], *, in_time: bool) -> float:
        """Return the budget in the unit of ``costs``, whose first options are the dense ones; refuse one too small."""
        weights = sum(site.weights for site in self.sites)
        dense, least = sum(options[0] for options in costs), sum(map(min, costs))
        if in_time:
            allowed = budget.microseconds(dense)
            told = f"{allowed:.0f} us", f"{least:.0f} us, of {dense:.0f} us dense"
        else:
            allowed = budget.nbytes(weights, dense)
            told = f"{allowed / 1e6:.6g} MB", f"{least / 1e6:.6g} MB ({8 * least / weights:.3f} bits a weight)"
        if least > allowed:
            raise RecipeError(
                f"The budget {budget} is {told[0]}, and the least that the menu can reach is {told[1]}. Raise the "
                "budget, or put a smaller expression on the menu."
            )
        return allowed

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
