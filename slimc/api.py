"""The public functions: ``compile``, ``save``, ``load``, ``report``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from slimc import recipes
from slimc.backends import KERNELS, hf
from slimc.calibration import calibration_batches, count_tokens, example_batches, is_language_model
from slimc.errors import InputError
from slimc.ir.capture import Batch, capture
from slimc.ir.carrier import install
from slimc.ir.program import Program
from slimc.ir.text import text
from slimc.passes import Calibrate, Pass, pipeline
from slimc.passes.journal import Journal, digest
from slimc.passes.report import LeftRow, Report
from slimc.progress import Progress, SilentProgress
from slimc.runtime.files import write_file
from slimc.runtime.modules import use_kernels
from slimc.runtime.storage import load_folder, save_folder
from slimc.version import __version__

Model = TypeVar("Model", bound=nn.Module)

_GRAPH = "graph.txt"
"""The text form of the program, in the native folder."""


def compile(  # noqa: A001 - slimc.compile, like torch.compile
    model: Model,
    calibration: Any = None,
    passes: str | Path | Sequence[Pass] = recipes.DEFAULT,
    *,
    tokenizer: Any = None,
    inplace: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    journal: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    skip: Sequence[str] = (),
    stop_after: str | None = None,
    dump_dir: str | Path | None = None,
) -> Model:
    """Return ``model`` with its linear layers compressed; same class, same call.

    Args:
        model: any module that ``torch.export`` captures. Left as it was unless ``inplace``.
        calibration: texts (with ``tokenizer``), a tensor, or an iterable of batches (tensors, tuples of arguments, dicts of keyword
            arguments). ``None``: a causal language model writes its own text.
        passes: the name of a preset, the path of a recipe file, or a list of passes.
        tokenizer: of a language model, for texts and self-sampling.
        inplace: replace the linears of ``model`` itself and return it.
        include: patterns of sites to compress although they are dense by default (``"lm_head"``).
        exclude: patterns of sites to leave dense. Patterns are shell wildcards, or regular expressions after ``re:``.
        journal: folder that keeps finished sites, so that a run that dies can be resumed.
        resume: go on with the run that ``journal`` holds.
        progress: told what happens; see :mod:`slimc.progress`.
        skip: names of passes to leave out.
        stop_after: name of the last pass to run.
        dump_dir: folder for the text of the graph after each pass.

    Returns:
        The compressed model. ``slimc.report(model)`` says what was done to each site and what was left alone.

    Raises:
        SlimError: with what happened, where, and what to do; see :mod:`slimc.errors`.
    """
    recipe_include, recipe_exclude, chosen = _passes(passes)
    chosen = pipeline.select(chosen, skip=skip, stop_after=stop_after)
    progress = progress or SilentProgress()
    seconds: dict[str, float] = {}
    record = Journal(Path(journal), resume=resume) if journal else None

    started = time.perf_counter()
    batches = _batches(model, calibration, chosen, tokenizer, record, progress)
    seconds["calibration data"] = time.perf_counter() - started

    started = time.perf_counter()
    program = _capture(model, batches, (*recipe_include, *include), (*recipe_exclude, *exclude))
    seconds["capture"] = time.perf_counter() - started

    calibrated = pipeline.needs_calibration(chosen)
    inputs = [program.flatten_inputs(*batch) for batch in batches] if calibrated else []
    if record:
        record.begin(_fingerprint(program, chosen, inputs))
    outcome = pipeline.run(
        program, chosen, inputs, journal=record, progress=progress, dump_dir=Path(dump_dir) if dump_dir else None
    )
    small = install(model, program, inplace=inplace)
    use_kernels(small, KERNELS)
    small.slim_report = Report(
        recipe=[one.to_config() for one in chosen],
        sites=outcome.rows,
        left=[LeftRow(row.name, row.shape, row.reason) for row in program.left],
        calibration_tokens=count_tokens(batches) if calibrated else 0,
        seconds=seconds | outcome.seconds,
        graph=text(program),
    )
    return small  # type: ignore[return-value]


def save(model: nn.Module, path: str | Path, *, tokenizer: Any = None, overwrite: bool = False) -> None:
    """Write a compressed model to a folder, really packed: the files are as large as the bits that the report promises.

    Args:
        model: what :func:`compile` or :func:`load` returned.
        path: the folder. It appears whole or not at all.
        tokenizer: saved beside the model, so that :func:`load` and the command line find it.
        overwrite: replace a folder that slimc wrote.

    Raises:
        InputError: the model is not compressed, the folder exists, or the disk is full.
    """
    done = report(model)
    record, write_model_files = hf.saved_form(model, tokenizer)

    def write_extra(folder: Path) -> None:
        write_model_files(folder)
        write_file(folder / _GRAPH, done.graph.encode())

    save_folder(
        model, Path(path), record=record, report=done.to_json(), seconds=done.seconds, write_extra=write_extra, overwrite=overwrite
    )


def load(path: str | Path, *, model: nn.Module | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Read a folder that :func:`save` wrote; outputs are equal to those before saving, bit for bit.

    Args:
        path: the folder. Every size, offset and digest is checked before anything is built; no pickle is ever read.
        model: for a model that is not from Hugging Face, an instance of the same architecture, which is filled in place.
        device: where the tensors go.

    Raises:
        FormatError: a file is missing, damaged, or not what ``slimc.json`` promises.
        InputError: ``model`` is missing or does not fit.
    """
    loaded, record = load_folder(Path(path), model=model, skeleton=hf.native_skeleton, device=device)
    use_kernels(loaded, KERNELS)
    graph = Path(path) / _GRAPH
    loaded.slim_report = replace(Report.from_json(record), graph=graph.read_text("utf-8") if graph.is_file() else "")  # type: ignore[assignment]
    return loaded


def report(model: nn.Module) -> Report:
    """Return what slimc did to ``model``: a row a site, and a reason for every weight left alone.

    Raises:
        InputError: the model is not one that slimc compressed.
    """
    found = getattr(model, "slim_report", None)
    if not isinstance(found, Report):
        raise InputError(f"{type(model).__name__} was not compressed by slimc; call slimc.compile(model) first.")
    return found


def _passes(passes: str | Path | Sequence[Pass]) -> tuple[Sequence[str], Sequence[str], Sequence[Pass]]:
    """Return the include patterns, the exclude patterns and the passes of what the user named."""
    if isinstance(passes, str | Path):
        recipe = recipes.load(passes)
        return recipe.include, recipe.exclude, recipe.build()
    return (), (), list(passes)


def _batches(
    model: nn.Module, calibration: Any, passes: Sequence[Pass], tokenizer: Any, journal: Journal | None, progress: Progress
) -> list[Batch]:
    settings = next((one for one in passes if isinstance(one, Calibrate)), Calibrate())
    if calibration is None and not pipeline.needs_calibration(passes):
        return example_batches(model)
    return calibration_batches(
        model, calibration, settings, tokenizer=tokenizer, journal=journal, progress=progress
    )


def _capture(model: nn.Module, batches: Sequence[Batch], include: Sequence[str], exclude: Sequence[str]) -> Program:
    dense: dict[str, str] = {}
    if is_language_model(model):
        dense = dict.fromkeys(hf.output_embedding_names(model), "output embedding, dense by default; include it by its name")
    return capture(model, batches, dense=dense, include=include, exclude=exclude)


def _fingerprint(program: Program, passes: Sequence[Pass], inputs: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return everything that must be the same for a resumed run to give the same bytes."""
    tensors = [
        (f"{batch}.{leaf}", value)
        for batch, values in enumerate(inputs)
        for leaf, value in enumerate(values)
        if isinstance(value, torch.Tensor)
    ]
    device = next(program.module.parameters()).device
    return {
        "slimc": __version__,
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "recipe": [one.to_config() for one in passes],
        "sites": sorted(program.sites),
        "weights": digest(sorted(program.module.named_parameters())),
        "calibration": digest(tensors),
    }
