"""The grammar that all passes share: a frozen dataclass with a name, options, and rules about order."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeGuard

import torch

from slimc.errors import RecipeError, closest
from slimc.ir.program import Program
from slimc.passes.work import SiteWork
from slimc.progress import Progress

Statistic = str
"""``"activations"`` (mean absolute input, sum of squares), ``"gram"`` (X^T X), ``"cross_gram"`` (X_dense^T X) or
``"shortfall"`` (what is missing in the sum that the result is added to).

The last two have the sweep compute what the dense model does beside what the compressed one does.
"""


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

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ``RecipeError`` if this pass speaks of weights that are not among ``names``, all that the model has."""

    def check_site(self, name: str, shape: tuple[int, int]) -> None:
        """Raise ``RecipeError`` if this pass cannot work on a site of this name and shape ``(out, in)``.

        Asked for every site before any work starts, so that no run dies of it halfway.
        """

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
            RecipeError: an option is unknown, of the wrong type or out of range.
        """
        known = [option.name for option in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                raise RecipeError(f"The pass '{cls.name}' has no option '{key}'{closest(str(key), known)}; {takes}.")
        return cls(**options)

    def _require(self, condition: bool, what: str) -> None:
        if not condition:
            raise RecipeError(f"{self.name}: {what}.")


class SitePass(Pass, ABC):
    """A pass that works on one site at a time, inside the sweep."""

    compresses: ClassVar[bool] = True
    """Whether it stores the weight in another form, so that a recipe may consist of it alone."""

    @property
    def stacks(self) -> bool:
        """Whether it, and all before it, work on the sites that read one input as if they were one site."""
        return False

    @abstractmethod
    def apply(self, work: SiteWork) -> None:
        """Change how ``work`` expresses its weight."""


class ProgramPass(Pass, ABC):
    """A pass that stores the dense model in another way that computes the same, before any site is compressed."""

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """Nothing may be compressed, or aimed at, yet, and it is stored anew once."""
        if self.name in [one.name for one in earlier]:
            raise RecipeError(
                f"{self.name} appears twice: the second would choose anew on the first. Remove one of the two."
            )
        late = [one.name for one in earlier if isinstance(one, SitePass)]
        if late:
            raise RecipeError(
                f"{self.name} comes after {late[0]}, which works on the weights as they are stored. Put {self.name} "
                "right after calibrate."
            )

    @abstractmethod
    def run(
        self,
        program: Program,
        inputs: Sequence[Sequence[Any]],
        *,
        held_out: int,
        device: torch.device | None,
        progress: Progress,
    ) -> None:
        """Change the dense tensors of ``program``.

        Args:
            program: a captured model, nothing of which is compressed; the user's model stays as it is.
            inputs: flat calibration inputs by batch.
            held_out: how many of the last batches nothing is fitted to.
            device: where to compute, if not on the device of the model.
            progress: told what happens.

        Raises:
            NumericsError: NaN or Inf appeared in the activations.
        """


def whole_number(value: object) -> TypeGuard[int]:
    """Tell whether ``value`` is an ``int`` and not a ``bool``."""
    return isinstance(value, int) and not isinstance(value, bool)


def real_number(value: object) -> TypeGuard[float]:
    """Tell whether ``value`` is a finite number and not a ``bool``."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
