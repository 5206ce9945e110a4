"""``slimc kernels``: slimc's GPU kernels as a library for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimc.cli.terminal import note, say
from slimc.errors import InputError


def kernels(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of 'slimc export --target cuda'.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The library to write.", show_default=False)
    ],
    architectures: Annotated[
        list[str] | None,
        typer.Option(
            "--arch", help="What to compile for, repeatable; sm_80 and sm_90a by default.", show_default=False
        ),
    ] = None,
    include: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where onnxruntime_c_api.h lies, if what the library takes for it is to be checked.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
) -> None:
    """Build the library whose kernels compute an ONNX folder's layers in ONNX Runtime's CUDA provider.

    It needs a C++ compiler and NVRTC, and no GPU; one library serves all folders whose layers have the same forms.

    [bold]Examples[/bold]

      slimc export small -o small-cuda --target cuda --dtype float16

      slimc kernels small-cuda -o slim_kernels.so

      slimc generate small-cuda --kernels slim_kernels.so --prompt "Once upon a time"
    """
    from slimc.backends.hf_library import require

    require("onnx", "reading an ONNX model", extra="onnx")
    from slimc.backends.onnx.kernels.build import ARCHITECTURES, build_library, forms_of

    if output.is_dir():
        raise InputError(f"{output} is a folder; give --output the name of a file")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists; add --overwrite to replace it, or choose another --output")
    wanted = architectures or list(ARCHITECTURES)
    built = build_library(forms_of(folder), output, architectures=wanted, include=include)
    say(f"{built}: kernels for {', '.join(wanted)}")
    note(f"Use it with: slimc generate {folder} --kernels {output} --prompt TEXT")
