"""What passes over the whole program learn of the dense model before anything is compressed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch

from slimc.ir.program import Program, Site
from slimc.passes.base import SitePass, Statistic
from slimc.passes.sweep import Inputs, Solved, Sweep
from slimc.passes.work import SiteWork
from slimc.progress import Progress

Found = TypeVar("Found")


@dataclass(frozen=True)
class _Observe(SitePass, Generic[Found]):
    """Looks at sites and leaves them as they are."""

    name: ClassVar[str] = "observe"

    wanted: frozenset[Statistic]
    look: Callable[[SiteWork], Found]
    sites: Collection[str]
    found: dict[str, Found] = field(default_factory=dict)

    def statistics(self) -> frozenset[Statistic]:
        return self.wanted

    def apply(self, work: SiteWork) -> None:
        if work.name in self.sites:
            self.found[work.name] = self.look(work)


class _ObservingSweep(Sweep):
    """Leaves sites as they are, and holds no second copy of their weights."""

    def _solve(self, site: Site, inputs: Sequence[Inputs]) -> Solved:
        packed, row, bias = super()._solve(site, inputs)
        weight = self.program.dense_weight(site)
        if weight.dtype == packed.weight.values.dtype:
            packed = replace(packed, weight=replace(packed.weight, values=weight))
        return packed, row, bias


def observe(
    program: Program,
    inputs: Sequence[Sequence[Any]],
    look: Callable[[SiteWork], Found],
    *,
    wanted: frozenset[Statistic] = frozenset({"activations"}),
    sites: Collection[str],
    held_out: int,
    device: torch.device | None,
    progress: Progress,
    stage: str,
) -> dict[str, Found]:
    """Return what ``look`` makes of each of ``sites`` in the dense model; the program is left as it was.

    Args:
        program: a captured model, nothing of which is compressed.
        inputs: flat calibration inputs by batch.
        look: sees a site with the statistics of its input.
        wanted: which statistics those are.
        sites: names of sites.
        held_out: how many of the last batches are kept out of the statistics.
        device: where to compute, if not on the device of the model.
        progress: told once a site.
        stage: what it is told that this is.
    """
    observer = _Observe(wanted, look, sites)
    try:
        _ObservingSweep(
            program,
            [observer],
            inputs,
            held_out=held_out,
            device=device,
            journal=None,
            progress=progress,
            stage=stage,
        ).run()
    finally:
        for site in program.sites.values():
            site.packed = None
    return observer.found
