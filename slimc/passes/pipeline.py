"""The pipeline: check the order of the passes, sweep, rewrite the graph stage by stage, verify in between."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimc.errors import InputError, NumericsError, RecipeError, VerifyError, closest
from slimc.ir.express import express
from slimc.ir.program import Program, Site
from slimc.ir.text import text
from slimc.ir.verify import verify
from slimc.passes.activations import Activations
from slimc.passes.allocate_bits import AllocateBits
from slimc.passes.base import Pass, ProgramPass, SitePass
from slimc.passes.bias_correction import BiasCorrection
from slimc.passes.calibrate import Calibrate
from slimc.passes.compensate import Compensate
from slimc.passes.decompose import Decompose
from slimc.passes.fuse import Fuse
from slimc.passes.journal import Journal
from slimc.passes.low_rank import LowRank
from slimc.passes.per_site import PerSite
from slimc.passes.permute import Permute
from slimc.passes.prune import Prune
from slimc.passes.quantize import Quantize
from slimc.passes.report import SiteRow
from slimc.passes.scale_folding import ScaleFolding
from slimc.passes.sweep import Sweep
from slimc.passes.tune import Tune
from slimc.progress import Progress
from slimc.runtime.files import write_bytes
from slimc.runtime.packing import PackedLinear

log = logging.getLogger(__name__)

PASSES: Mapping[str, type[Pass]] = {
    one.name: one
    for one in (
        Calibrate,
        Permute,
        ScaleFolding,
        Compensate,
        AllocateBits,
        Quantize,
        Prune,
        Decompose,
        LowRank,
        BiasCorrection,
        Activations,
        Tune,
        PerSite,
        Fuse,
    )
}
"""Every pass by its name in recipes."""


def from_config(lines: Sequence[Any]) -> list[Pass]:
    """Build passes from recipe lines: a name, or ``{name: {option: value}}``.

    Raises:
        RecipeError: a line has another form, or names an unknown pass or option.
    """
    return [_from_line(line) for line in lines]


def _from_line(line: Any) -> Pass:
    name: object
    options: object = None
    if isinstance(line, str):
        name = line
    elif isinstance(line, Mapping) and len(line) == 1:
        name, options = next(iter(line.items()))
    else:
        raise RecipeError(f"A line of 'passes' must be a name or one 'name: {{options}}', not {line!r}.")
    if not isinstance(name, str) or name not in PASSES:
        raise RecipeError(f"There is no pass '{name}'{closest(str(name), PASSES)}; there are {', '.join(PASSES)}.")
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise RecipeError(f"The options of '{name}' must be a mapping such as {{bits: 4}}, not {options!r}.")
    return PASSES[name].from_options(options)


def check_order(passes: Sequence[Pass]) -> None:
    """Check that every pass may follow the ones before it, and that somebody compresses.

    Raises:
        RecipeError: naming the pass, what is wrong with its place, and what to do.
    """
    _require_passes(passes)
    for position, one in enumerate(passes):
        earlier = passes[:position]
        if "fuse" in [other.name for other in earlier]:
            raise RecipeError(f"'{one.name}' comes after fuse, which must be the last pass. Move fuse to the end.")
        for expressed in _expressed(earlier):
            one.check_after(expressed)
        if isinstance(one, SitePass) and one.compresses and "bias_correction" in [other.name for other in earlier]:
            raise RecipeError(
                f"'{one.name}' comes after bias_correction, and would change the error that was corrected. Put "
                "bias_correction after it."
            )
        if one.statistics() and not any(isinstance(other, Calibrate) for other in earlier):
            raise RecipeError(
                f"{one.name} needs calibrate before it, for statistics of the activations. Put calibrate first."
            )
    if not any(isinstance(one, SitePass) and one.compresses for one in passes):
        raise RecipeError("The recipe compresses nothing: it has neither quantize nor prune nor decompose.")
    for expressed in _expressed(passes):
        names = [one.name for one in expressed]
        if "allocate_bits" in names and "quantize" not in names:
            raise RecipeError(
                "allocate_bits chooses the widths of codes, but nothing makes codes: put quantize after it."
            )


def _expressed(passes: Sequence[Pass]) -> list[list[Pass]]:
    """Return what runs at a site, for each of the expressions that it may have."""
    runs: list[list[Pass]] = [[]]
    for one in passes:
        choices = [[one, *inner] for inner in one.built.values()] if isinstance(one, PerSite) else [[one]]
        runs = [[*run, *chosen] for run in runs for chosen in choices]
    return runs


def _require_passes(passes: Sequence[object]) -> None:
    for position, one in enumerate(passes, start=1):
        if not isinstance(one, Pass):
            raise RecipeError(
                f"Number {position} of the passes is {one!r}, which is not a pass. Use slimc.passes, such as "
                "Quantize(bits=4)."
            )


def select(passes: Sequence[Pass], *, skip: Sequence[str] = (), stop_after: str | None = None) -> list[Pass]:
    """Return the passes without those named in ``skip`` and without all after ``stop_after``; the order is checked.

    Raises:
        RecipeError: a name is not in the recipe, or what is left has no valid order.
    """
    _require_passes(passes)
    names = [one.name for one in passes]
    for name in (*skip, *([stop_after] if stop_after else [])):
        if name not in names:
            raise RecipeError(f"The recipe has no pass '{name}'{closest(name, names)}; it has {', '.join(names)}.")
    end = names.index(stop_after) + 1 if stop_after else len(names)
    selected = [one for one in passes[:end] if one.name not in skip]
    check_order(selected)
    return selected


def needs_calibration(passes: Sequence[Pass]) -> bool:
    """Tell whether any pass asks for statistics of the activations."""
    return any(one.statistics() for one in passes)


@dataclass(frozen=True)
class Outcome:
    """What a pipeline run did: the report rows, and seconds by stage."""

    rows: list[SiteRow]
    seconds: dict[str, float]


def run(
    program: Program,
    passes: Sequence[Pass],
    inputs: Sequence[Sequence[Any]],
    *,
    held_out: int = 0,
    device: torch.device | None = None,
    journal: Journal | None = None,
    progress: Progress,
    dump_dir: Path | None = None,
) -> Outcome:
    """Run ``passes`` over ``program``; its sites and its graph are changed.

    Args:
        program: a captured model that :func:`check_sites` has accepted.
        passes: in an order that :func:`check_order` accepts.
        inputs: flat calibration inputs by batch (:meth:`Program.flatten_inputs`).
        held_out: how many of the last batches nothing is fitted to.
        device: where to compute, if not on the device of the model.
        journal: for resuming.
        progress: told what happens.
        dump_dir: where to write the text of the graph after every pass, as ``0-capture.txt``, ``1-quantize.txt``...

    Raises:
        NumericsError: NaN or Inf appeared in the activations.
        InputError: ``dump_dir`` cannot be written.
        VerifyError: a pass left the graph inconsistent.
    """
    check_order(passes)
    verify(program)
    dump = _Dump(program, dump_dir)
    dump.write("capture")
    seconds: dict[str, float] = {}

    for one in (one for one in passes if isinstance(one, ProgramPass)):
        started = time.perf_counter()
        one.run(program, inputs, held_out=held_out, device=device, progress=progress)
        seconds[one.name] = time.perf_counter() - started
        verify(program)
        dump.write(one.name)

    started = time.perf_counter()
    site_passes = [one for one in passes if isinstance(one, SitePass)]
    snapshot = dump.snapshot if dump_dir else None
    rows = Sweep(
        program,
        site_passes,
        inputs,
        held_out=held_out,
        device=device,
        journal=journal,
        progress=progress,
        snapshot=snapshot,
    ).run()
    seconds["sweep"] = time.perf_counter() - started

    for tune in (one for one in passes if isinstance(one, Tune)):
        started = time.perf_counter()
        tune.run(program, inputs, held_out=held_out, device=device, progress=progress)
        seconds["tune"] = time.perf_counter() - started

    for site in program.sites.values():
        if site.bias is not None and site.uses[0].bias is not None:
            program.replace(str(site.uses[0].bias.target), site.bias)
    if dump_dir:
        dump.write_stages(site_passes)
    for site in program.sites.values():
        express(program, site, _packed(site))
    program.module.recompile()
    verify(program)

    for fuse in (one for one in passes if isinstance(one, Fuse)):
        started = time.perf_counter()
        log.info("fuse: %d sites", fuse.rewrite(program))
        seconds["fuse"] = time.perf_counter() - started
        verify(program)
        dump.write(fuse.name)
    return Outcome(rows, seconds)


def _packed(site: Site) -> PackedLinear:
    if site.packed is None:
        raise VerifyError(f"The sweep never reached '{site.name}'; this is a bug in the order of the graph.")
    return site.packed


def check_sites(program: Program, passes: Sequence[Pass]) -> None:
    """Check, before any work starts, that every site can be compressed by every pass.

    Raises:
        RecipeError: a pass cannot work on a site (a pattern that does not divide the width, a rank that is too large),
            or names sites that are not there.
        NumericsError: a weight holds NaN or Inf.
    """
    names = [*program.sites, *(row.name for row in program.left)]
    for one in passes:
        one.check_names(names)
    for site in program.sites.values():
        for one in passes:
            one.check_site(site.name, site.shape)
    for site in program.sites.values():
        if not bool(program.dense_weight(site).isfinite().all()):
            raise NumericsError(
                f"The weight of '{site.name}' holds NaN or Inf. Repair the checkpoint, or leave the site out with "
                f"exclude=['{site.name}']."
            )


class _Dump:
    """Writes the graph after each stage, for people who want to see what a pass did."""

    def __init__(self, program: Program, folder: Path | None) -> None:
        self.program = program
        self.folder = folder
        self.stages: dict[tuple[str, str], PackedLinear] = {}
        self._count = 0
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{folder}: cannot be made to hold the dumps ({error.strerror}).") from error

    def snapshot(self, name: str, site: Site, packed: PackedLinear) -> None:
        self.stages[name, site.name] = packed

    def write_stages(self, passes: Sequence[SitePass]) -> None:
        """Write the graph as it was after each pass; a site from the journal is shown in its final form throughout."""
        final = {site.name: _packed(site) for site in self.program.sites.values()}
        for one in passes:
            for site in self.program.sites.values():
                express(self.program, site, self.stages.get((one.name, site.name), final[site.name]))
            verify(self.program)
            self.write(one.name)
        for site in self.program.sites.values():
            site.packed = final[site.name]

    def write(self, stage: str) -> None:
        if self.folder is None:
            return
        write_bytes(self.folder / f"{self._count}-{stage}.txt", text(self.program).encode())
        self._count += 1
