"""ScaleFolding: what a norm or a layer multiplies each channel by is chosen for the grid of the next layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimc.ir.channels import Channels, Stretch, scalable
from slimc.ir.program import Program, attribute
from slimc.passes.base import ProgramPass, Statistic, whole_number
from slimc.passes.observe import observe
from slimc.passes.quantize import Quantize
from slimc.passes.solvers.quantization import Group
from slimc.passes.solvers.trial_rounding import round_for_trial
from slimc.passes.statistics import evenly_spaced
from slimc.progress import Progress

log = logging.getLogger(__name__)

TOKENS = 256
"""Tokens that choices are judged by: two numbers are chosen for each set of channels."""

MOST = 8
"""No factor is larger than 2 to this power, or smaller than its inverse."""


@dataclass(frozen=True)
class ScaleFolding(ProgramPass):
    """``linear(norm(x) * g, W) = linear(norm(x) * (g / s), W * s)``, with ``s`` chosen for the grid of ``W * s``.

    The factors belong to what is stored already, the weight of a norm, the rows of ``up`` or of the values in
    attention, so that nothing is computed at run time that was not before. They are powers of two: dividing and
    multiplying by them rounds nothing, in any dtype. Which channels have such factors, the captured graph says
    (:func:`slimc.ir.channels.scalable`): all that reads them must be sites.

    ``s = 2 ** round(a * log2(size of the input) - b * log2(size of the weight))``, each relative to its mean; of the
    powers ``a`` and ``b`` from 0 to 1 those are taken with which rounding the sites to ``bits`` costs their outputs
    least on calibration tokens (AWQ, arXiv 2306.00978, has ``b = 0``, SmoothQuant, arXiv 2211.10438, ``b = 1 - a``
    for inputs). Where channels come from rows of sites, what these lose counts, too.

    Attributes:
        bits: of the grid that a choice is tried on.
        group: columns that share a scale there, ``"channel"``, or ``None`` for a scale a tensor; as ``quantize`` will
            have it.
        steps: how many values each power takes from 0 to 1.
        layers: whether factors pass from layer to layer, not only from a norm.
    """

    name: ClassVar[str] = "scale_folding"

    bits: int = 4
    group: Group = None
    steps: int = 5
    layers: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        Quantize(method="absmax", bits=self.bits, group=self.group)
        self._require(whole_number(self.steps) and self.steps >= 2, f"steps must be 2 or more, not {self.steps!r}")
        self._require(isinstance(self.layers, bool), f"layers must be true or false, not {self.layers!r}")

    def statistics(self) -> frozenset[Statistic]:
        """A sample of each site's input."""
        return frozenset({"activations"})

    def run(
        self,
        program: Program,
        inputs: Sequence[Sequence[Any]],
        *,
        held_out: int,
        device: torch.device | None,
        progress: Progress,
    ) -> None:
        """Move factors from what is stored before sites to the sites."""
        found = scalable(program)
        for site, reason in found.refused.items():
            log.info("scale_folding: the input channels of %s stay as large as they are: %s", site, reason)
        rows = {site.weight_name: site.name for site in program.sites.values()}
        channels = [one for one in found.channels if self.layers or not any(end.tensor in rows for end in one.produced)]
        producers = {rows[end.tensor] for one in channels for end in one.produced if end.tensor in rows}
        samples = observe(
            program,
            inputs,
            lambda work: _some(work.require_statistics(self.name).sample),
            sites={site for one in channels for site in one.consumed} | producers,
            held_out=held_out,
            device=device,
            progress=progress,
            stage=self.name,
        )
        for one in channels:
            trial = _Trial(program, one, rows, samples, self)
            factors = trial.best()
            trial.apply(factors)


def _some(sample: Tensor) -> Tensor:
    return sample[evenly_spaced(len(sample), TOKENS).to(sample.device)]


@dataclass
class _Trial:
    """One set of channels, and what its factors do to the sites at either side."""

    program: Program
    channels: Channels
    rows: dict[str, str]
    samples: dict[str, Tensor]
    settings: ScaleFolding
    consumed: list[tuple[str, Tensor, Stretch]] = field(init=False)
    produced: list[tuple[str, Tensor, Stretch]] = field(init=False)

    def __post_init__(self) -> None:
        self.consumed = [(name, self._weight(name), stretch) for name, stretch in self.channels.consumed.items()]
        self.produced = [
            (self.rows[end.tensor], self._weight(self.rows[end.tensor]), end)
            for end in self.channels.produced
            if end.tensor in self.rows
        ]

    def _weight(self, site: str) -> Tensor:
        return self.program.dense_weight(self.program.sites[site]).to(self.samples[site].device).float()

    def best(self) -> Tensor:
        """Return the factor by which each channel gets smaller, float32 ``[channels]``."""
        larger, heavier = self._sizes()
        steps = self.settings.steps
        powers = [step / (steps - 1) for step in range(steps)]
        chosen = best = 0.0, 0.0
        least = self._error(torch.ones(self.channels.count))
        # One power after the other: they hardly depend on each other.
        for tried in ([(power, 0.0) for power in powers[1:]], [(None, power) for power in powers[1:]]):
            for first, second in tried:
                candidate = (best[0] if first is None else first, second)
                error = self._error(_factors(larger, heavier, candidate))
                if error < least:
                    chosen, least = candidate, error
            best = chosen
        return _factors(larger, heavier, best)

    def apply(self, factors: Tensor) -> None:
        """Divide what is stored before the sites, and multiply their columns."""
        for end in self.channels.produced:
            multiply(self.program, end, 1 / factors)
        for name, end in self.channels.consumed.items():
            multiply(self.program, end, factors)
            sample = self.samples[name]
            # Siblings may have one sample; each is replaced, not written.
            self.samples[name] = sample / factors[end.order].to(sample)

    def _sizes(self) -> tuple[Tensor, Tensor]:
        """Return how large the inputs and the weights of each channel are, as logarithms."""
        inputs = torch.zeros(self.channels.count)
        weights = torch.zeros(self.channels.count)
        for name, weight, end in self.consumed:
            inputs.index_add_(0, end.order, self.samples[name].square().mean(0).cpu())
            weights.index_add_(0, end.order, weight.square().mean(0).cpu())
        return _centred(inputs), _centred(weights)

    def _error(self, factors: Tensor) -> float:
        """Return the sum of the squared relative errors of the outputs of all sites."""
        total = 0.0
        for name, weight, end in self.consumed:
            columns = factors[end.order].to(weight)
            total += self._relative(name, weight, self._rounded(weight * columns) / columns)
        for name, weight, end in self.produced:
            rows = torch.ones(len(weight))
            rows[end.start : end.start + len(end.order)] = factors[end.order]
            rows = rows.to(weight)[:, None]
            total += self._relative(name, weight, self._rounded(weight / rows) * rows)
        return total

    def _relative(self, name: str, weight: Tensor, rounded: Tensor) -> float:
        sample = self.samples[name]
        exact = (sample @ weight.t()).square().sum()
        return float((sample @ (rounded - weight).t()).square().sum() / exact.clamp(min=torch.finfo(exact.dtype).tiny))

    def _rounded(self, weight: Tensor) -> Tensor:
        return round_for_trial(weight, self.settings.bits, self.settings.group)


def _factors(larger: Tensor, heavier: Tensor, powers: tuple[float, float]) -> Tensor:
    return torch.exp2((powers[0] * larger - powers[1] * heavier).round().clamp(-MOST, MOST))


def _centred(squares: Tensor) -> Tensor:
    """Return half the binary logarithm of each, relative to the mean; channels of zeros are at the mean."""
    sizes = squares.clamp(min=torch.finfo(torch.float32).tiny).log2() / 2
    alive = squares > 0
    centre = sizes[alive].mean() if bool(alive.any()) else torch.zeros(())
    return torch.where(alive, sizes - centre, torch.zeros_like(sizes))


def multiply(program: Program, end: Stretch, factors: Tensor) -> None:
    """Multiply part of an axis of a tensor of ``program`` by a power of two for each channel."""
    tensor: Tensor = attribute(program.module, end.tensor).detach()
    along = torch.ones(tensor.shape[end.axis])
    along[end.start : end.start + len(end.order)] = factors[end.order]
    shape = [1] * tensor.ndim
    shape[end.axis] = -1
    program.replace(end.tensor, tensor * along.to(tensor).reshape(shape))
