"""The public functions: ``compile``, ``plan``, ``save``, ``load``, ``export_onnx``, ``export_hf`` and so on."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import nn

from slimc import recipes
from slimc.backends import KERNELS, hf, tuning
from slimc.backends.hf_library import require
from slimc.backends.latency import DecodeTimes
from slimc.calibration import (
    calibration_batches,
    count_tokens,
    example_batches,
    example_settings,
    self_sampled_batches,
    self_sampled_outline,
)
from slimc.errors import FormatError, InputError, RecipeError
from slimc.ir.capture import Batch, capture
from slimc.ir.carrier import install
from slimc.ir.program import Program
from slimc.ir.text import text
from slimc.passes import Calibrate, Pass, pipeline
from slimc.passes.journal import Journal, digest
from slimc.passes.report import LeftRow, Report
from slimc.planning.budget import Budget
from slimc.planning.check import measured_damage
from slimc.planning.menu import Menu, MenuSource
from slimc.planning.plan import SIZE, Plan, Sensitivities, Times, refuse_tied, weights_digest
from slimc.planning.sensitivity import Measure, measure, tied_sites
from slimc.progress import Progress, SilentProgress
from slimc.recipes import Recipe
from slimc.runtime import modules
from slimc.runtime.description import FORMAT_VERSION
from slimc.runtime.devices import CANNOT_BE_COPIED, copy_to, home_of, usable_device
from slimc.runtime.files import file_inside, write_file
from slimc.runtime.modules import SlimLinear, use_kernels
from slimc.runtime.select import Explanation
from slimc.runtime.storage import load_folder, save_folder
from slimc.version import __version__

if TYPE_CHECKING:
    from slimc.backends.onnx.export import OnnxReport
    from slimc.backends.stock.export import HfReport

Model = TypeVar("Model", bound=nn.Module)
Passes = str | Path | Recipe | Plan | Pass | Sequence[Pass]
"""How people name passes: a preset, a recipe file, a recipe or a plan in memory, one pass or several."""

Patterns = str | Sequence[str]
Device = str | torch.device | None
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_GRAPH = "graph.txt"
"""The text form of the program, in the native folder."""


def _in_plain_mode(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run ``function`` outside the caller's autocast, inference mode and gradients: tensors keep such modes."""

    @wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(mode=False))
            modes.enter_context(torch.no_grad())
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    modes.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run


@_in_plain_mode
def compile(  # noqa: A001 - slimc.compile, like torch.compile
    model: Model,
    calibration: Any = None,
    passes: Passes = recipes.DEFAULT,
    *,
    tokenizer: Any = None,
    inplace: bool = False,
    device: Device = None,
    include: Patterns = (),
    exclude: Patterns = (),
    journal: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    skip: Patterns = (),
    stop_after: str | None = None,
    dump_dir: str | Path | None = None,
    budget: str | None = None,
    target: str = SIZE,
) -> Model:
    """Return ``model`` with its linear layers compressed; same class, same call.

    Args:
        model: any module that ``torch.export`` captures. Left as it was unless ``inplace``.
        calibration: texts (with ``tokenizer``), a tensor, or an iterable of batches (tensors, tuples of arguments,
            dicts of keyword arguments). Batches are used as they are given, all of them: the ``samples`` and the
            ``length`` of ``Calibrate`` shape text only. ``None``: a causal language model writes its own text.
        passes: the name of a preset, the path of a recipe file, what :func:`plan` returned, one pass or a list of
            passes.
        tokenizer: of a language model, for texts and self-sampling.
        inplace: replace the linears of ``model`` itself and return it; an error leaves it as it was.
        device: where to compute, if not where ``model`` is; needed if it is spread over several. The model stays where
            it is, and so does the result: each weight is brought over when its turn comes, so that the device holds
            the activations of all calibration batches and one layer at a time. Self-sampling alone needs all of the
            model there.
        include: patterns of sites to compress although they are dense by default (``"lm_head"``).
        exclude: patterns of sites to leave dense. Patterns are shell wildcards, or regular expressions after ``re:``.
        journal: folder that keeps finished sites, so that a run that dies can be resumed.
        resume: go on with the run that ``journal`` holds, or start one if it holds none.
        progress: told what happens; see :mod:`slimc.progress`.
        skip: names of passes to leave out.
        stop_after: name of the last pass to run.
        dump_dir: folder for the text of the graph after each pass.
        budget: in place of ``passes``: what the layers may take together, ``"3.2bpw"`` (bits a weight), ``"45MB"`` or
            ``"0.25x"`` (of what they take now); :func:`plan`, with its trial, then chooses how to express each of
            them.
        target: what the budget counts; see :func:`plan`.

    Returns:
        The compressed model. ``slimc.report(model)`` says what was done to each site and what was left alone.

    Raises:
        SlimError: with what happened, where, and what to do; see :mod:`slimc.errors`.
    """
    _require_dense(model)
    progress = progress or SilentProgress()
    if budget is None and target != SIZE:
        raise RecipeError(f"target={target!r} is of a plan, which is made for a budget: pass budget=, too.")
    if budget is not None:
        if passes != recipes.DEFAULT:
            raise RecipeError("passes= and budget= exclude each other: a budget is what the passes are chosen by.")
        wanted, times_of = Budget.parse(budget), _times(target, progress)
        found, calibration = _measure(
            model,
            calibration,
            tokenizer=tokenizer,
            device=device,
            include=include,
            exclude=exclude,
            counts_bytes=target == SIZE or wanted.in_bytes,
            progress=progress,
        )
        # The patterns are the plan's by now.
        passes, include, exclude = (
            _best(model, found, wanted, target, times_of(found), calibration, device, progress),
            (),
            (),
        )
    if resume and journal is None:
        raise InputError("There is nothing to resume from: pass journal= with the folder of the run that stopped.")
    record = Journal(Path(journal), resume=resume) if journal is not None else None
    if not inplace:
        _check_copyable(model)
    clock = _Clock()
    run = _prepare(
        model,
        calibration,
        passes,
        tokenizer=tokenizer,
        device=device,
        include=include,
        exclude=exclude,
        skip=skip,
        stop_after=stop_after,
        progress=progress,
        clock=clock,
    )
    batches, inputs, fingerprint = run.batches, run.inputs, {}
    if record:
        fingerprint = run.fingerprint()
        record.begin(fingerprint)
        clock.lap("journal")
    if run.self_sampled:
        batches = self_sampled_batches(
            model, run.settings, tokenizer=tokenizer, device=run.device, journal=record, progress=progress
        )
        inputs = [run.program.flatten_inputs(*batch) for batch in batches]
        clock.lap("calibration data")

    dumps = Path(dump_dir) if dump_dir is not None else None
    outcome = pipeline.run(
        run.program,
        run.passes,
        inputs,
        held_out=run.held_out,
        device=run.device,
        journal=record,
        progress=progress,
        dump_dir=dumps,
    )
    small = _install(model, run.program, inplace=inplace)
    use_kernels(small, KERNELS)
    report = Report(
        recipe=[one.to_config() for one in run.passes],
        sites=outcome.rows,
        left=[LeftRow(row.name, row.shape, row.reason) for row in run.program.left],
        calibration_tokens=count_tokens(batches[: len(batches) - run.held_out]) if run.calibrated else 0,
        seconds=clock.seconds | outcome.seconds,
        graph=text(run.program),
        fingerprint=fingerprint,
    )
    _attach(small, report)
    return small  # type: ignore[return-value]


@_in_plain_mode
def plan(
    model: nn.Module,
    calibration: Any = None,
    *,
    budget: str,
    target: str = SIZE,
    menu: Menu | MenuSource = None,
    tokenizer: Any = None,
    device: Device = None,
    include: Patterns = (),
    exclude: Patterns = (),
    sensitivities: Sensitivities | str | Path | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Choose how to express each layer, so that all together keep to a budget and the model's output suffers least.

    Every expression of the menu is tried at every site of the dense model; a site's error counts by how much the output
    of the model depends on it there. Then one is chosen for each site, all at once. ``plan(...).recipe`` is a
    recipe like any other; ``plan(...).save("plan.yaml")`` writes it for :func:`compile` and ``slimc compress``.

    Args:
        model: any module that ``torch.export`` captures; left as it is.
        calibration: as for :func:`compile`.
        budget: ``"3.2bpw"`` (bits a weight), ``"45MB"`` or ``"0.25x"`` (of what the layers take now), for all sites
            together, scales and adapters included. Weights that are no sites, such as embeddings, do not count.
        target: ``"size"``; or ``"decode"``, the time of one token, for which every form of layer is timed on the GPU of
            this machine (``"decode@h100"``: which must be one). The budget may then be a time, too (``"2ms"``);
            ``"0.5x"`` is of the time that the layers take now, layers that share an input get one expression, and
            with a budget in bytes no layer becomes slower than it is.
        menu: what to choose from: expressions by name, each a list of passes; or a whole recipe, as a file or a list
            of passes, whose ``per_site`` has the expressions and whose sites the plan fills in. Left out, it is
            :data:`slimc.planning.menu.PRESET`.
        tokenizer: as for :func:`compile`.
        device: as for :func:`compile`.
        include: as for :func:`compile`.
        exclude: as for :func:`compile`.
        sensitivities: what :func:`sensitivities` measured on this model, in place of measuring; menu and patterns are
            then those of it. Or a file that keeps it: it is read if it is there, and written if not.
        check: carry out the plan and the best single expression within the budget on trial, and return the one whose
            output is closer to the dense model's, on calibration data that nothing is fitted to. Predictions are of
            sites in the dense model, one at a time; that later sites make good the errors of earlier ones
            (``compensate``) they do not see. It compresses twice, where measuring tries the whole menu at every site.
        progress: told what happens.

    Raises:
        SlimError: what :func:`compile` refuses, or no choice on the menu keeps to the budget (then the least is told).
    """
    progress = progress or SilentProgress()
    wanted, times_of = Budget.parse(budget), _times(target, progress)
    _require_dense(model)
    given: object = sensitivities
    if not isinstance(given, Sensitivities | str | Path | None):
        kind = type(given).__name__
        raise InputError(
            f"sensitivities is of type {kind}; give what slimc.sensitivities returned, or a file that keeps it."
        )
    keep = Path(sensitivities) if isinstance(sensitivities, str | Path) else None
    if keep is not None and keep.exists():
        sensitivities = Sensitivities.load(keep)
    if isinstance(sensitivities, Sensitivities):
        if menu is not None or include or exclude:
            raise RecipeError("Sensitivities have a menu, include and exclude of their own; leave these arguments out.")
        found = sensitivities
        found.require_measured_on(model)
        batches = _batches(model, calibration, found.menu.measuring, tokenizer, device, progress) if check else []
    else:
        if keep is not None and not keep.parent.is_dir():
            raise InputError(f"{keep} cannot be written: there is no folder {keep.parent}.")
        found, batches = _measure(
            model,
            calibration,
            menu=menu,
            tokenizer=tokenizer,
            device=device,
            include=include,
            exclude=exclude,
            counts_bytes=target == SIZE or wanted.in_bytes,
            progress=progress,
        )
        if keep is not None:
            found.save(keep)
    if not check:
        return found.plan(wanted, target, times=times_of(found))
    return _best(model, found, wanted, target, times_of(found), batches, device, progress)


def _best(
    model: nn.Module,
    found: Sensitivities,
    budget: Budget,
    target: str,
    times: Times | None,
    batches: Sequence[Any],
    device: Device,
    progress: Progress,
) -> Plan:
    """Return the plan, or the best single expression within the budget, whichever does less when it is tried."""
    plans = [found.plan(budget, target, times=times), found.uniform(budget, target, times=times)]
    tried = [
        _try(model, one, found.menu, batches, device=device, progress=progress) for one in plans if one is not None
    ]
    return min(tried, key=lambda one: math.inf if one.measured is None else one.measured)


def _try(
    model: nn.Module,
    plan: Plan,
    menu: Menu,
    batches: Sequence[Any],
    *,
    device: Device,
    progress: Progress,
) -> Plan:
    """Return the plan with what it does to the model when all but the held-out batches are what it is fitted to."""
    passes = plan.recipe.build()
    calls = calibration_batches(model, batches, menu.measuring)
    fitted = len(calls) - menu.measuring.held_out_batches(len(calls))
    if calibrated := pipeline.needs_calibration(passes):
        passes = [menu.measuring if isinstance(one, Calibrate) else one for one in passes]
    small = compile(
        model,
        batches if calibrated else batches[:fitted],
        passes,
        device=device,
        include=plan.recipe.include,
        exclude=plan.recipe.exclude,
        progress=progress,
    )
    place = home_of(model, chosen=None if device is None else usable_device(device))
    dense = model if device is None else copy_to(model, place)
    return replace(
        plan, measured=measured_damage(dense, small.to(place), calls[fitted:], vocabulary=hf.vocabulary_size(model))
    )


def _batches(
    model: nn.Module, calibration: Any, settings: Calibrate, tokenizer: Any, device: Device, progress: Progress
) -> list[Any]:
    """Return calibration batches in a form that :func:`compile` takes."""
    if calibration is not None:
        batches = calibration_batches(model, calibration, settings, tokenizer=tokenizer)
    else:
        place = None if device is None else usable_device(device)
        batches = self_sampled_batches(
            model, settings, tokenizer=tokenizer, device=place, journal=None, progress=progress
        )
    return [args or kwargs for args, kwargs in batches]


def _times(target: str, progress: Progress) -> Callable[[Sensitivities], Times | None]:
    """Return what times the choices for ``target``; what can be refused about it is refused at once."""
    if target == SIZE:
        return lambda _: None
    clock = DecodeTimes(target, progress)
    return lambda found: clock(choice for site in found.sites for choice in site.choices)


@_in_plain_mode
def sensitivities(
    model: nn.Module,
    calibration: Any = None,
    *,
    menu: Menu | MenuSource = None,
    tokenizer: Any = None,
    device: Device = None,
    include: Patterns = (),
    exclude: Patterns = (),
    progress: Progress | None = None,
) -> Sensitivities:
    """Measure what :func:`plan` decides by; plans for several budgets can be made of one measurement.

    ``found = sensitivities(...)`` has ``found.plan(budget)``, and ``found.save(path)`` for :func:`plan` on another day.
    The arguments are those of :func:`plan`.

    Raises:
        SlimError: what :func:`compile` refuses.
    """
    found, _ = _measure(
        model,
        calibration,
        menu=menu,
        tokenizer=tokenizer,
        device=device,
        include=include,
        exclude=exclude,
        progress=progress or SilentProgress(),
    )
    return found


def _measure(
    model: nn.Module,
    calibration: Any,
    *,
    menu: Menu | MenuSource = None,
    tokenizer: Any,
    device: Device,
    include: Patterns,
    exclude: Patterns,
    counts_bytes: bool = False,
    progress: Progress,
) -> tuple[Sensitivities, list[Any]]:
    """Return the sensitivities, and the calibration batches in a form that :func:`compile` takes.

    With ``counts_bytes`` it refuses, before it measures, sites that can save none.
    """
    _require_dense(model)
    menu = Menu.load(menu)
    include = (*menu.include, *_several(include))
    exclude = (*menu.exclude, *_several(exclude))
    run = _prepare(
        model,
        calibration,
        [menu.measuring, Measure(menu.expressions)],
        tokenizer=tokenizer,
        device=device,
        include=include,
        exclude=exclude,
        skip=(),
        stop_after=None,
        progress=progress,
        clock=_Clock(),
    )
    if counts_bytes:
        refuse_tied(tied_sites(run.program))
    batches, inputs = run.batches, run.inputs
    if run.self_sampled:
        batches = self_sampled_batches(
            model, run.settings, tokenizer=tokenizer, device=run.device, journal=None, progress=progress
        )
        inputs = [run.program.flatten_inputs(*batch) for batch in batches]
    sites = measure(
        run.program,
        menu.expressions,
        inputs,
        held_out=run.held_out,
        vocabulary=hf.vocabulary_size(model),
        device=run.device,
        progress=progress,
    )
    found = Sensitivities(tuple(sites), menu, include, exclude, type(model).__name__, weights_digest(model))
    return found, [args or kwargs for args, kwargs in batches]


@dataclass(frozen=True)
class _Prepared:
    """A run before its first long step: everything is checked, the model is captured, nothing is computed yet.

    Attributes:
        program: the captured model.
        passes: what will run.
        settings: of the calibration.
        calibrated: whether any pass asks for statistics.
        self_sampled: whether the model is yet to write its calibration text; ``batches`` are then an outline of it.
        batches: calls of the model.
        inputs: the same, flat; none if nothing is calibrated.
        held_out: how many of the last batches are held out.
        device: where to compute, if it was chosen.
        home: where the model is.
    """

    program: Program
    passes: Sequence[Pass]
    settings: Calibrate
    calibrated: bool
    self_sampled: bool
    batches: Sequence[Batch]
    inputs: Sequence[Sequence[Any]]
    held_out: int
    device: torch.device | None
    home: torch.device

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that must be the same for a resumed run to give the same bytes.

        The model's own device is part of it, because its code may ask where it is and compute something else there.
        """
        tensors = [*self.program.module.named_parameters(), *self.program.module.named_buffers()]
        return {
            "version of slimc": __version__,
            "version of its files": FORMAT_VERSION,
            "version of torch": str(torch.__version__),
            "device": _device_name(self.device or self.home),
            "device of the model": self.home.type,
            "number of threads": torch.get_num_threads(),
            "float32 matmul precision": torch.get_float32_matmul_precision(),
            "recipe": [one.to_config() for one in self.passes],
            "choice of sites": sorted(self.program.sites),
            # The graph also holds the dtypes, the attention implementation, and what the configuration decided.
            "model's code or configuration": hashlib.sha256(text(self.program).encode()).hexdigest(),
            "model's weights": digest(sorted(tensors)),
            "calibration": "self-sampled" if self.self_sampled else _calibration_digest(self.inputs),
        }


def _prepare(
    model: nn.Module,
    calibration: Any,
    passes: Passes,
    *,
    tokenizer: Any,
    device: Device,
    include: Patterns,
    exclude: Patterns,
    skip: Patterns,
    stop_after: str | None,
    progress: Progress,
    clock: _Clock,
) -> _Prepared:
    recipe_include, recipe_exclude, chosen = _passes(passes)
    chosen = pipeline.select(chosen, skip=_several(skip), stop_after=stop_after)
    settings = next((one for one in chosen if isinstance(one, Calibrate)), Calibrate())
    calibrated = pipeline.needs_calibration(chosen)
    if settings.held_out and not calibrated:
        raise RecipeError(
            f"calibrate: held_out={settings.held_out} judges nothing, because no pass of this recipe asks for "
            "statistics of the inputs; leave it out, or add a pass that does, such as low_rank with method slim"
        )
    place = None if device is None else usable_device(device)
    home = home_of(model, chosen=place)

    # What can be refused is refused before a model spends its time on writing text.
    if calibration is not None:
        shape = settings if calibrated else example_settings(settings)
        batches = calibration_batches(model, calibration, shape, tokenizer=tokenizer)
    else:
        batches = self_sampled_outline(model, settings) if calibrated else example_batches(model)
    held_out = settings.held_out_batches(len(batches)) if calibrated else 0
    clock.lap("calibration data")
    progress.start("capture", 1)
    program = _capture(model, batches, (*recipe_include, *_several(include)), (*recipe_exclude, *_several(exclude)))
    pipeline.check_sites(program, chosen)
    inputs = [program.flatten_inputs(*batch) for batch in batches] if calibrated else []
    progress.advance("capture")
    progress.finish("capture")
    clock.lap("capture")
    return _Prepared(
        program=program,
        passes=chosen,
        settings=settings,
        calibrated=calibrated,
        self_sampled=calibrated and calibration is None,
        batches=batches,
        inputs=inputs,
        held_out=held_out,
        device=place,
        home=home,
    )


@_in_plain_mode
def fingerprint(
    model: nn.Module,
    calibration: Any = None,
    passes: Passes = recipes.DEFAULT,
    *,
    tokenizer: Any = None,
    device: Device = None,
    include: Patterns = (),
    exclude: Patterns = (),
    skip: Patterns = (),
    stop_after: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return what decides the result of :func:`compile` with the same arguments, without compressing anything.

    Runs with equal fingerprints give equal bytes. Model and calibration are in it as digests.

    Raises:
        SlimError: as :func:`compile`, for what it refuses before it computes.
    """
    _require_dense(model)
    return _prepare(
        model,
        calibration,
        passes,
        tokenizer=tokenizer,
        device=device,
        include=include,
        exclude=exclude,
        skip=skip,
        stop_after=stop_after,
        progress=progress or SilentProgress(),
        clock=_Clock(),
    ).fingerprint()


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        given = repr(str(model)) if isinstance(model, str | Path) else f"a {type(model).__name__}"
        raise InputError(
            f"slimc takes a loaded torch.nn.Module, not {given}. Load the model first, for example with "
            "transformers.AutoModelForCausalLM.from_pretrained(path), or give its path to the command 'slimc compress'."
        )


def _require_dense(model: nn.Module) -> None:
    _require_module(model)
    if any(isinstance(module, SlimLinear) for module in model.modules()):
        raise InputError(
            f"{type(model).__name__} is compressed already; compress the dense model that it was made from."
        )


class _Clock:
    """Adds up the seconds between laps, by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def save(model: nn.Module, path: str | Path, *, tokenizer: Any = None, overwrite: bool = False) -> None:
    """Write a compressed model to a folder, really packed: the files are as large as the bits that the report promises.

    Args:
        model: what :func:`compile` or :func:`load` returned.
        path: the folder. It appears whole or not at all.
        tokenizer: saved beside the model, so that the command line and ``AutoTokenizer.from_pretrained(path)`` find it.
            Without it there is none in the folder. (One that is written there later works too, but ``overwrite`` then
            refuses the folder, for it holds files that were not saved with it.)
        overwrite: replace a folder that slimc wrote.

    Raises:
        InputError: the model is not compressed, the folder exists, or the disk is full.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile returns is a wrapper
    done = report(model)
    record, write_model_files = hf.saved_form(model, tokenizer)

    def write_extra(folder: Path) -> None:
        write_model_files(folder)
        write_file(folder / _GRAPH, done.graph.encode())

    save_folder(
        model,
        Path(path),
        record=record,
        report=done.to_json(),
        seconds=done.seconds,
        fingerprint=done.fingerprint,
        write_extra=write_extra,
        overwrite=overwrite,
    )


def load(path: str | Path, *, model: nn.Module | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Read a folder that :func:`save` wrote; outputs are equal to those before saving, bit for bit.

    Args:
        path: the folder. Every size, offset and digest is checked before anything is built; no pickle is ever read.
        model: for a model that is not from Hugging Face, an instance of the same architecture; it is filled in place.
        device: where the tensors go.

    Raises:
        FormatError: a file is missing, damaged, or not what ``slimc.json`` promises.
        InputError: ``model`` is missing or does not fit, or ``device`` cannot be used.
    """
    loaded, record = load_folder(Path(path), model=model, skeleton=hf.native_skeleton, device=usable_device(device))
    use_kernels(loaded, KERNELS)
    _attach(loaded, replace(Report.from_json(record), graph=_read_graph(Path(path))))
    return loaded


@_in_plain_mode
def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any = None,
    target: str = "portable",
    *,
    dtype: str = "float32",
    opset: int | None = None,
    accuracy_level: int = 0,
    cache: bool | None = None,
    embedding_bits: int | None = None,
    exporter: str = "auto",
    tokenizer: Any = None,
    overwrite: bool = False,
) -> OnnxReport:
    """Write a model as an ONNX folder, which ONNX Runtime runs without PyTorch and without slimc.

    A causal language model of Hugging Face gets a cache: the graph reads a prompt, or the next token of each text, and
    hands out the keys and values that the call after it wants back. ``slimc generate`` runs such a folder.

    Compressed layers stay compressed: as codes of 4 or 8 bits (2 from opset 25 on), which ONNX Runtime multiplies by
    as they are. What ONNX cannot hold, such as 3 bits or the pattern of 2:4, takes more, and the report says how much.

    Args:
        model: what :func:`compile` or :func:`load` returned, or a dense model. It is left as it was.
        path: the folder, or ``model.onnx`` in it. It appears whole or not at all.
        example_inputs: a call of the model: a tensor, a tuple of arguments or a dict of keyword arguments. ``None``:
            token ids and a mask for a language model, images for a vision model of Hugging Face.
        target: ``"portable"`` (functions of the domain ``slim``, which any runtime of opset 21 runs), ``"ort"`` (ONNX
            Runtime's own operators), ``"cuda"`` (the same around layers for a library of ``slimc kernels``) or
            ``"dense"`` (decoded weights, for TensorRT, which finds the zeros of 2:4).
        dtype: what the graph computes in, ``"float32"`` or ``"float16"``.
        opset: of the graph; ``None`` is the lowest that has what the layers need.
        cache: whether the graph has one; ``None`` decides by the model, and means no if there are ``example_inputs``.
            The report says why a model that generates text gets none.
        embedding_bits: with ``"ort"`` and a cache: 4 or 8 round the embedding of tokens, and the output embedding where
            both are one. ``None`` leaves it dense.
        accuracy_level: of ``"ort"``: 0 is exact, 4 rounds the inputs of products to 8 bits and is faster on a CPU.
        exporter: who traces a model with a cache: ``"transformers"`` (its exporter, from transformers 5.14 and torch
            2.11 on), ``"slimc"`` (``torch.export`` without it) or ``"auto"``, the first that can. Graphs are equal.
        tokenizer: saved beside the model.
        overwrite: replace an ONNX folder that slimc wrote.

    Returns:
        What the folder takes; a table if printed.

    Raises:
        InputError: an option is not known, the example does not fit the model, a weight is too large for ``dtype``, the
            folder exists or cannot be written, or a package is missing. Nothing is written then.
        CaptureError: PyTorch cannot trace the model, or not translate it to ONNX.
    """
    for package in ("onnx", "onnxscript"):
        require(package, "exporting to ONNX", extra="onnx")
    from slimc.backends.onnx import export
    from slimc.backends.onnx.decoder import cache_geometry, why_without_cache

    model = getattr(model, "_orig_mod", model)  # what torch.compile returns is a wrapper
    _require_module(model)
    if cache and example_inputs is not None:
        raise InputError("a graph with a cache has inputs of its own: leave example_inputs out, or pass cache=False.")
    example: Batch | None = None
    decided_by_model = cache is None and example_inputs is None
    if cache or (decided_by_model and why_without_cache(model) is None):
        cache_geometry(model)
    elif example_inputs is not None:
        example = calibration_batches(model, [example_inputs], Calibrate())[0]
    else:
        example = export.images(model) or export.with_mask(model, example_batches(model, needed="example_inputs=")[0])
    return export.export_folder(
        model,
        Path(path),
        example,
        target=target,
        dtype=export.compute_dtype(dtype),
        opset=opset,
        accuracy_level=accuracy_level,
        embedding_bits=embedding_bits,
        exporter=exporter,
        tokenizer=tokenizer,
        overwrite=overwrite,
        notes=export.cache_notes(model) if decided_by_model else (),
    )


@_in_plain_mode
def export_hf(
    model: nn.Module, path: str | Path, *, tokenizer: Any = None, allow_dense: bool = False, overwrite: bool = False
) -> HfReport:
    """Write a compressed model of transformers as a folder that transformers opens without slimc, and vLLM serves.

    Codes are stored as int4 or int8 of compressed-tensors (``pack-quantized``), low-rank adapters in 16 bits as a PEFT
    LoRA in the same folder: ``from_pretrained(path)`` finds both if the packages ``compressed-tensors`` and ``peft``
    are there. What it computes is what ``model`` computes, but for the order of sums; what 2:4 and narrower codes gain
    in size is lost, and the report says how much. transformers decodes the codes, so it is neither smaller in memory
    nor faster there than the dense model.

    Args:
        model: what :func:`compile` or :func:`load` returned, of a class of transformers. It is left as it was.
        path: the folder. It appears whole or not at all.
        tokenizer: saved beside the model.
        allow_dense: decode layers that the folder has no codes for (signs, scaled inputs) to dense weights, adapters
            included and rounded once to the dtype of the model, in place of refusing them.
        overwrite: replace a folder that this function wrote.

    Returns:
        What the folder takes; a table if printed.

    Raises:
        InputError: the model is not compressed or not of transformers, a layer has no place in such a folder (the first
            is named), the folder exists or cannot be written. Nothing is written then.
    """
    from slimc.backends.stock import export

    model = getattr(model, "_orig_mod", model)  # what torch.compile returns is a wrapper
    report(model)
    return export.export_folder(model, Path(path), tokenizer=tokenizer, allow_dense=allow_dense, overwrite=overwrite)


def explain(model: nn.Module) -> Explanation:
    """Return, for each compressed layer, which kernel runs at which token counts, and why the better ones refused.

    It is a dict by the layers' names; printed, it is text for people. What ``torch.compile(model, backend="slim")`` has
    put together so far, such as q, k and v, has an entry more under all of its names: which kernel runs it as one.

    Raises:
        InputError: the model is not one that slimc compressed.
    """
    report(model)
    return modules.explain(model)


def tune(
    model: nn.Module,
    *,
    tokens: Iterable[int] = tuning.TOKENS,
    dtype: torch.dtype | None = None,
    again: bool = False,
) -> Explanation:
    """Time the kernels on this machine's GPU for every form of layer in ``model``, and choose by it from then on.

    The times are kept on disk (in ``SLIMC_CACHE_DIR``, ``$XDG_CACHE_HOME/slimc`` or ``~/.cache/slimc``) for the card,
    its driver and these kernels, so that later processes choose by them without measuring. Without them layers choose
    by what was measured on one card while slimc was written. A graph that was captured before keeps its kernels.

    Args:
        model: what :func:`compile` or :func:`load` returned. Layers that are on no GPU are left as they are.
        tokens: numbers of tokens a call to measure, each rounded up to a power of two.
        dtype: of the layers' inputs; by default that of the model's weights.
        again: measure what is known already, too.

    Returns:
        What :func:`explain` returns then.

    Raises:
        InputError: the model is not one that slimc compressed, or a number of tokens is not positive.
        KernelError: a CUDA graph is being captured.
    """
    report(model)
    tuning.tune(model, tokens=tokens, dtype=dtype, again=again)
    return modules.explain(model, dtype)


def report(model: nn.Module) -> Report:
    """Return what slimc did to ``model``: a row a site, and a reason for every weight left alone; a table if printed.

    Raises:
        InputError: the model is not one that slimc compressed.
    """
    found = getattr(model, "slim_report", None)
    if not isinstance(found, Report):
        raise InputError(f"{type(model).__name__} was not compressed by slimc; call slimc.compile(model) first.")
    return found


def _passes(passes: Passes) -> tuple[Sequence[str], Sequence[str], Sequence[Pass]]:
    """Return the include patterns, the exclude patterns and the passes of what the user named."""
    if isinstance(passes, str | Path):
        passes = recipes.load(passes)
    if isinstance(passes, Plan):
        passes = passes.recipe
    if isinstance(passes, Recipe):
        return passes.include, passes.exclude, passes.build()
    if isinstance(passes, Pass):
        return (), (), [passes]
    if not isinstance(passes, Iterable):
        raise RecipeError(f"passes is a {type(passes).__name__}; give a recipe's name, its path, or a list of passes.")
    return (), (), list(passes)


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    """Let one name stand for a list of it; its letters are never meant."""
    return (names,) if isinstance(names, str) else tuple(names)


def _capture(model: nn.Module, batches: Sequence[Batch], include: Sequence[str], exclude: Sequence[str]) -> Program:
    reason = "output embedding, dense by default; include it by its name"
    dense = dict.fromkeys(hf.output_embedding_names(model), reason)
    return capture(model, batches, dense=dense, include=include, exclude=exclude)


def _check_copyable(model: nn.Module) -> None:
    """Refuse, before any work, a model that could not be copied after it; its tensors are left out of the trial."""
    with _explained_copy(model):
        copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _install(model: nn.Module, program: Program, *, inplace: bool) -> nn.Module:
    """Put the compressed linears into a copy of ``model``, or into itself."""
    with nullcontext() if inplace else _explained_copy(model):
        return install(model, program, inplace=inplace)


@contextmanager
def _explained_copy(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except CANNOT_BE_COPIED as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({error}). Pass inplace=True to compress the model itself."
        ) from error


def _attach(model: nn.Module, report: Report) -> None:
    # A plain attribute of no declared name: modules type theirs as tensors and modules only.
    model.slim_report = report  # type: ignore[assignment]
    hf.guard_save_pretrained(model)


def _read_graph(folder: Path) -> str:
    if not (folder / _GRAPH).exists():
        return ""
    path = file_inside(folder, _GRAPH)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} cannot be read ({error}); delete it, or get the whole folder again.") from error


def _device_name(device: torch.device) -> str:
    """Name what computes there: another card, or other vector units, round otherwise."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _calibration_digest(inputs: Sequence[Sequence[Any]]) -> str:
    """Return the digest of the flat inputs of all batches."""
    leaves = [(f"{batch}.{leaf}", value) for batch, values in enumerate(inputs) for leaf, value in enumerate(values)]
    tensors = [(name, value) for name, value in leaves if isinstance(value, torch.Tensor)]
    others = [(name, repr(value)) for name, value in leaves if not isinstance(value, torch.Tensor)]
    return hashlib.sha256(f"{digest(tensors)} {others}".encode()).hexdigest()
