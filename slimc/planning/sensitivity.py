"""What each choice at each site costs: bytes, and the damage to what the model says.

One sweep over the dense model tries every expression of the menu at every site on the inputs that the site has there.
The damage of a choice is ``1/2 E[(sum_t g_t . d_t)^2]``, with ``d_t`` the change of the site's output at a token and
``g_t`` the gradient there (`slimc.planning.gradients`). Damages of different sites are taken to add up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimc.errors import SlimError
from slimc.ir.program import EMBEDDINGS, Program, attribute, memory
from slimc.ir.text import innermost_module
from slimc.passes import SitePass
from slimc.passes.base import Statistic
from slimc.passes.sweep import Sweep
from slimc.passes.work import SiteWork
from slimc.planning.gradients import Sample, Samples
from slimc.planning.menu import DENSE
from slimc.progress import Progress
from slimc.runtime.formats import LinearFormat, WeightFormat

log = logging.getLogger(__name__)

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Choice:
    """One way to express one site.

    Attributes:
        name: of the expression on the menu.
        damage: what it does to the model's output: nats a token for a language model, else half the squared relative
            error of the output.
        output_error: relative, of the site's own output.
        format: the storage form.
    """

    name: str
    format: LinearFormat
    damage: float
    output_error: float

    @property
    def nbytes(self) -> int:
        """What it takes, adapters and scales included."""
        return self.format.nbytes()


@dataclass(frozen=True)
class SiteChoices:
    """All choices at one site.

    Attributes:
        name: of the site.
        shape: ``(out_features, in_features)``.
        group: names of the sites that read the same input, this one included.
        choices: the dense weight first.
        refused: expressions of the menu that cannot be had there, and why.
        embedding: the embedding whose table the weight is, too. The table stays whatever becomes of the site.
    """

    name: str
    shape: tuple[int, int]
    group: tuple[str, ...]
    choices: tuple[Choice, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    embedding: str | None = None

    @property
    def weights(self) -> int:
        """How many weights the site has."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Measure(SitePass):
    """Tries every expression of a menu at a site, and leaves the site as it is.

    Attributes:
        menu: the passes of each expression.
        samples: by site, what its choices are judged by.
        found: by site, what its choices cost; filled while the sweep runs.
        refused: by site, which expressions cannot be had there, and why; filled while the sweep runs.
    """

    name: ClassVar[str] = "measure"

    menu: Mapping[str, Sequence[SitePass]]
    samples: Mapping[str, Sample] = field(default_factory=dict)
    found: dict[str, tuple[Choice, ...]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)

    def statistics(self) -> frozenset[Statistic]:
        """All that any expression needs; the sample of inputs at least."""
        return frozenset({"activations"}).union(*(one.statistics() for passes in self.menu.values() for one in passes))

    def apply(self, work: SiteWork) -> None:
        """Measure the choices of one site."""
        rows, columns = work.dense.shape
        dense = Choice(DENSE, LinearFormat(WeightFormat(rows, columns, dtype=work.dtype)), 0.0, 0.0)
        choices = [dense, *(self._try(name, passes, work) for name, passes in self.menu.items())]
        self.found[work.name] = tuple(choice for choice in choices if choice is not None)

    def _try(self, name: str, passes: Sequence[SitePass], work: SiteWork) -> Choice | None:
        trial = SiteWork(
            name=work.name,
            dense=work.dense,
            dtype=work.dtype,
            statistics=work.statistics,
            held_out=work.held_out,
            siblings=work.siblings,
        )
        try:
            for one in passes:
                one.check_site(work.name, (work.dense.shape[0], work.dense.shape[1]))
                one.apply(trial)
            packed = trial.pack()
        except (SlimError, torch.OutOfMemoryError) as error:
            # A plan can do without one choice at one site; where too few are left, the budget cannot be met.
            self._refuse(name, work.name, str(error))
            return None
        damage, output_error = self.judge(name, trial, packed.decode().float())
        if not math.isfinite(damage):
            self._refuse(name, work.name, "its weight or outputs overflow")
            return None
        return Choice(name, packed.format, damage, output_error)

    def _refuse(self, name: str, site: str, reason: str) -> None:
        log.info("%s is not on the menu of %s: %s", name, site, reason)
        self.refused.setdefault(site, {})[name] = reason

    def judge(self, name: str, trial: SiteWork, weight: Tensor) -> tuple[float, float]:  # noqa: ARG002 - for ablations
        """Return the damage and the relative output error of ``weight``, to which the expression ``name`` has led.

        Where nothing arrives (an expert that was never chosen) nothing tells what the site does to the model: then its
        output is taken for the model's own, which leaves it rather too many bits.
        """
        sample = self.samples[trial.name]
        inputs = sample.inputs.float()
        if not bool(inputs.any()) or not bool(trial.dense.any()):
            # Nor is there a relative error of a weight of zeros, which every expression holds exactly.
            error = float((weight - trial.dense).norm() / trial.dense.norm().clamp(min=_TINY))
            return error**2 / 2, error
        statistics = trial.held_out or trial.require_statistics(self.name)
        output_error = trial.output_error(weight, statistics)
        return sample.damage(trial.output_difference(weight, inputs)), output_error or 0.0


def measure(
    program: Program,
    menu: Mapping[str, Sequence[SitePass]],
    inputs: Sequence[Sequence[Any]],
    *,
    held_out: int,
    vocabulary: int | None,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress,
    by: type[Measure] = Measure,
) -> list[SiteChoices]:
    """Return the choices at every site of ``program``, in data-flow order; the program is left as it was.

    Args:
        program: a captured model.
        menu: the passes of each expression (:attr:`slimc.planning.menu.Menu.expressions`).
        inputs: flat calibration inputs by batch.
        held_out: how many of the last batches the choices are judged by, and not fitted to; 0: all, for both.
        vocabulary: see :class:`slimc.planning.gradients.Samples`.
        seed: of what is drawn.
        device: where to compute, if not on the device of the model.
        progress: told what happens.
        by: what judges the choices.

    Raises:
        CaptureError: gradients cannot be computed.
        NumericsError: NaN or Inf appeared in activations or gradients.
    """
    judged = inputs[len(inputs) - held_out :] if held_out else inputs
    samples = Samples(program, judged, vocabulary=vocabulary, seed=seed, device=device, progress=progress)
    trial = by(menu, samples)
    try:
        Sweep(
            program,
            [trial],
            inputs,
            held_out=held_out,
            device=device,
            journal=None,
            progress=progress,
            stage="measure",
        ).run()
    finally:
        for site in program.sites.values():
            site.packed = None
    tied = tied_sites(program)
    return [
        SiteChoices(
            site.name,
            site.shape,
            site.group,
            trial.found[site.name],
            trial.refused.get(site.name, {}),
            tied.get(site.name),
        )
        for site in program.site_order()
    ]


def tied_sites(program: Program) -> dict[str, str]:
    """Return the sites whose weight is the table of an embedding, too, with the name of that embedding."""
    lookups = [node for node in program.graph.nodes if node.target in EMBEDDINGS and node.args[0].op == "get_attr"]
    tables = {memory(attribute(program.module, str(node.args[0].target))): innermost_module(node) for node in lookups}
    found = {
        site.name: tables.get(memory(attribute(program.module, site.weight_name))) for site in program.sites.values()
    }
    return {name: table for name, table in found.items() if table is not None}
