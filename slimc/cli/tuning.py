"""``slimc tune``: which kernels are fastest on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimc.cli.models import open_model
from slimc.cli.terminal import note, say
from slimc.errors import InputError


def tune(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A folder that slimc wrote.", show_default=False)],
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1...; a CUDA GPU if there is one.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Time what is known already, too.")] = False,
) -> None:
    """Time the kernels of a compressed model on this machine's GPU, and show which layers run on which.

    The times are kept for the card and its driver: whatever loads a model with layers of these forms later chooses by
    them. Without them layers choose by what was measured elsewhere. Kernels that were never used are compiled first,
    which takes seconds each.

    [bold]Examples[/bold]

      slimc tune small

      slimc tune small --device cuda:1 --again
    """
    from slimc import api
    from slimc.runtime.storage import is_native_folder

    if not is_native_folder(Path(model)):
        raise InputError(f"{model} is no folder that slimc wrote; compress the model first, with 'slimc compress'")
    opened, _ = open_model(model, device=device)
    if not any(tensor.is_cuda for tensor in opened.state_dict().values()):
        note("Nothing was timed: kernels are timed on CUDA GPUs only. On this device the layers choose as follows:")
    say(str(api.tune(opened, again=again)))
