"""``slimc compress``."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimc import recipes
from slimc.cli import options
from slimc.cli.models import calibration_text, open_model
from slimc.cli.terminal import err, megabytes, note, say
from slimc.errors import InputError, ResumeError
from slimc.progress import duration, for_console
from slimc.runtime.files import recover

if TYPE_CHECKING:
    from torch import nn

    from slimc.passes import Pass
    from slimc.passes.report import Report
    from slimc.progress import Progress


_REPLACE = "add --overwrite to replace it, or choose another --output"


def compress(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.", show_default=False)
    ],
    recipe: Annotated[
        str,
        typer.Option("--recipe", "-r", metavar="NAME|FILE", help="A preset (see 'slimc recipes') or a YAML file."),
    ] = recipes.DEFAULT,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PASS.OPTION=VALUE", help="Change an option of the recipe: quantize.bits=3"),
    ] = None,
    calibration: options.CalibrationText = "self",
    samples: options.Samples = None,
    length: options.Length = None,
    batch: options.BatchSize = None,
    seed: options.Seed = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    dtype: options.DType = None,
    device: options.Device = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was interrupted, if it is not complete.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DIR, and what an interrupted run left.")
    ] = False,
    skip: Annotated[list[str] | None, typer.Option(metavar="PASS", help="Leave a pass of the recipe out.")] = None,
    stop_after: Annotated[str | None, typer.Option(metavar="PASS", help="Leave out all passes after this one.")] = None,
    dump_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the graph after every pass as text into this folder.")
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Compress a model into a folder.

    The model is read, its linear layers are rewritten one after another, and a folder is written that holds exactly
    the bits promised. Nothing is downloaded to calibrate on: by default the model samples its own text.

    [bold]Examples[/bold]

      slimc compress Qwen/Qwen3-0.6B -o small                      the default recipe

      slimc compress model.gguf -o small --recipe slim-w4          another preset

      slimc compress ./llama -o small --set quantize.bits=3        one option changed

      slimc compress ./llama -o small --calibration notes.txt --samples 128 --length 2048

      slimc compress ./llama -o small --resume                     go on after an interruption
    """
    begun = time.monotonic()
    recover(output)
    finished = resume and not overwrite and _is_finished(output)
    if not finished:
        _check_places(model, output, overwrite=overwrite)
    journal = _journal_of(output)
    chosen = recipes.load(recipe)
    calibrate = {"samples": samples, "length": length, "batch": batch, "seed": seed}
    given = {option: value for option, value in calibrate.items() if value is not None}
    if given and "calibrate" not in chosen.pass_names:
        note(f"Ignored: {', '.join('--' + option for option in given)}. The recipe {chosen.name} does not calibrate.")
        given = {}
    chosen = chosen.override([*(f"calibrate.{option}={value}" for option, value in given.items()), *(settings or [])])
    passes = chosen.build()
    if finished:
        _check_recipe(output, passes, skip=skip or (), stop_after=stop_after)
    text = None if calibration == "self" else calibration_text(calibration)

    import slimc
    from slimc.passes import journal as journals
    from slimc.runtime.devices import default_device, usable_device

    place = default_device() if device is None else usable_device(device)
    if not overwrite:
        journals.Journal(journal, resume=resume)  # refuses what is in its place before a model is opened
    dense, tokenizer = open_model(model, dtype=dtype, device="cpu")
    before = weight_bytes(dense)
    task: dict[str, Any] = {
        "calibration": text,
        "passes": passes,
        "tokenizer": tokenizer,
        "device": place,
        "include": [*chosen.include, *(include or [])],
        "exclude": [*chosen.exclude, *(exclude or [])],
        "skip": skip or (),
        "stop_after": stop_after,
    }
    if finished:
        with for_console(err, quiet=quiet) as progress:
            _check_task(output, dense, task, progress)
        return

    def run(progress: Progress) -> nn.Module:
        return slimc.compile(
            dense, **task, inplace=True, journal=journal, resume=resume, dump_dir=dump_dir, progress=progress
        )

    if overwrite and not resume:
        journals.discard(journal)
    try:
        with for_console(err, quiet=quiet) as progress:
            try:
                small = run(progress)
            except ResumeError:
                if not overwrite:
                    raise
                note(f"{journal} belongs to another run, so nothing can be resumed; starting again.")
                journals.discard(journal)
                small = run(progress)
            slimc.save(small, output, tokenizer=tokenizer, overwrite=overwrite)
    except KeyboardInterrupt:
        if journal.exists():
            note(f"Interrupted. What is finished is in {journal}; the same command with --resume goes on from there.")
        raise
    shutil.rmtree(journal, ignore_errors=True)
    _summarise(slimc.report(small), before, output, time.monotonic() - begun)


def weight_bytes(model: nn.Module) -> int:
    """Return the size of a model's parameters and persistent buffers, shared ones counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(storages.values())


def _check_places(model: str, output: Path, *, overwrite: bool) -> None:
    """Refuse before any work what could only fail after it."""
    from slimc.runtime.files import check_replaceable
    from slimc.runtime.storage import is_native_folder, is_replaceable

    if output.name in ("", ".."):
        raise InputError(f"'{output}' has no name of its own; give --output the name of a new folder, such as 'small'")
    if is_native_folder(Path(model)):
        raise InputError(f"{model} is compressed already; compress the dense model that it was made from")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise InputError(f"{output}: already exists; add --overwrite to replace it, or choose another --output")
    check_replaceable(output, overwrite=overwrite, replaceable=is_replaceable)


def _journal_of(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _is_finished(output: Path) -> bool:
    """Tell whether a run has written ``output``, and no later one was interrupted."""
    from slimc.runtime.storage import is_native_folder

    return bool(output.name) and is_native_folder(output) and not _journal_of(output).exists()


def _check_recipe(output: Path, passes: Sequence[Pass], *, skip: Sequence[str], stop_after: str | None) -> None:
    """Refuse a complete folder that another recipe made, before the model is opened."""
    from slimc.passes import pipeline
    from slimc.runtime.storage import open_folder

    asked = [one.to_config() for one in pipeline.select(passes, skip=skip, stop_after=stop_after)]
    if open_folder(output, verify=False).report["recipe"] != json.loads(json.dumps(asked)):
        raise InputError(f"{output}: is complete, but with another recipe, so nothing can be resumed; {_REPLACE}")


def _check_task(output: Path, dense: nn.Module, task: Mapping[str, Any], progress: Progress) -> None:
    """Say that a complete folder is what was asked for; refuse one that came of another model or text."""
    from slimc.api import fingerprint
    from slimc.passes.journal import differences_in_task
    from slimc.runtime.storage import recorded_fingerprint

    recorded = recorded_fingerprint(output)
    if not recorded:
        say(f"{output} is complete, with the same recipe, so there is nothing to resume.")
        say("It keeps no record of its model and calibration text; if they are others now: --overwrite.")
        return
    differences = differences_in_task(recorded, fingerprint(dense, **task, progress=progress))
    if differences:
        raise InputError(f"{output}: is complete, but of another run: {differences}; {_REPLACE}")
    say(f"{output} is complete, of the same model, calibration and recipe, so there is nothing to resume.")


def _summarise(report: Report, before: int, output: Path, seconds: float) -> None:
    after = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    say(f"{output}: {megabytes(before)} of weights are now {megabytes(after)}, in {duration(seconds)}.")
    say(
        f"{len(report.sites)} layers take {report.bits_per_weight:.2f} bits a weight; "
        f"left dense: {len(report.left)} ('slimc inspect {output}' tells what, and why)."
    )
    say(f"Next: slimc generate {output} --prompt 'Once upon a time'")
