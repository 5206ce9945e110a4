"""``slimc plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimc.cli import options
from slimc.cli.models import calibration_text, open_model
from slimc.cli.terminal import err, note, say
from slimc.errors import InputError
from slimc.progress import for_console


def plan(
    model: options.Model,
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            "-b",
            metavar="BUDGET",
            help="3.2bpw (bits a weight), 45MB, 0.25x, or a time.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The recipe to write.", show_default=False)
    ] = None,
    target: Annotated[
        str, typer.Option(metavar="TARGET", help="What counts: size, or decode (time, on this GPU).")
    ] = "size",
    menu: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A recipe whose per_site has the expressions to choose from."),
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
    sensitivities: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Measurements of an earlier plan; written there if there are none.", show_default=False
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="Carry it out on trial beside the best single expression; keep the better."
        ),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Choose how to express each layer of a model, so that all together keep to a budget.

    Every expression on a menu (widths from 2 to 8 bits, sizes of groups, and so on) is tried at every layer of the
    dense model. What it does to a layer's output counts by how much the output of the model depends on it there. A
    solver then picks one expression for each layer, all at once, so that the predicted damage is least: the divergence
    of the model's output from the dense one's, in nats a token (half its squared relative error, if it predicts no
    tokens). The budget is for the planned layers, scales and adapters included: bits a weight, megabytes, or a share of
    what they take now.

    Predictions are of one layer at a time, so in the end the plan is carried out on trial, beside the best single
    expression within the budget, and the one closer to the dense model is kept.

    The plan is a recipe: read it, edit it, and run it with 'slimc compress --recipe' and the same calibration.

    [bold]Examples[/bold]

      slimc plan Qwen/Qwen3-0.6B --budget 3.2bpw                    show what would be chosen

      slimc plan ./llama -b 0.25x -o plan.yaml                      write the recipe

      slimc compress ./llama -o small --recipe plan.yaml            run it

      slimc plan ./llama -b 45MB -o plan.yaml --calibration notes.txt --samples 32

      slimc plan ./llama -b 3bpw --sensitivities llama.json         measure once for all budgets

      slimc plan ./llama -b 0.4x --target decode@h100               of the time of a token, measured on this H100
    """
    import slimc
    from slimc.planning.budget import Budget
    from slimc.planning.menu import Menu
    from slimc.runtime.devices import default_device, usable_device
    from slimc.runtime.files import check_writable

    wanted = Budget.parse(budget)
    if output is not None:
        if output.suffix not in {".yaml", ".yml"}:
            raise InputError(f"{output}: a recipe's file ends in .yaml, so that 'slimc compress --recipe' knows it")
        if output.exists() and not overwrite:
            raise InputError(f"{output} exists; add --overwrite to replace it, or choose another --output")
        if output.is_dir():
            raise InputError(f"{output} is a folder; give --output the name of a file")
        check_writable(output)
    given = {"samples": samples, "length": length, "batch": batch, "seed": seed}
    changed = {option: value for option, value in given.items() if value is not None}
    known = sensitivities is not None and sensitivities.exists()
    if known and (menu or changed or include or exclude):
        raise InputError(
            f"{sensitivities} holds measurements with a menu, calibration and patterns of their own. Leave --menu, "
            "--samples, --length, --batch, --seed, --include and --exclude out, or name a file that is not there yet."
        )
    choices = None if known else Menu.load(menu).calibrated(**changed)
    text = None if calibration == "self" else calibration_text(calibration)
    place = default_device() if device is None else usable_device(device)
    dense, tokenizer = open_model(model, dtype=dtype, device="cpu")
    with for_console(err, quiet=quiet) as progress:
        found = slimc.plan(
            dense,
            text,
            budget=str(wanted),
            target=target,
            menu=choices,
            tokenizer=tokenizer,
            device=place,
            include=include or (),
            exclude=exclude or (),
            sensitivities=sensitivities,
            check=check,
            progress=progress,
        )
    say(str(found))
    if output is None:
        note("Nothing was written; with --output plan.yaml the recipe would be.")
        return
    found.save(output)
    flags = "" if calibration == "self" else f" --calibration {calibration}"
    flags += "" if dtype is None else f" --dtype {dtype}"
    say(f"\n{output} is written. Next: slimc compress {model} -o small --recipe {output}{flags}")
