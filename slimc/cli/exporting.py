"""``slimc export`` and ``slimc verify``: models for other runtimes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from slimc.cli.models import open_model
from slimc.cli.terminal import note, say
from slimc.errors import FormatError


class Format(StrEnum):
    """What to export to."""

    onnx = "onnx"


class Target(StrEnum):
    """What an ONNX folder is written for."""

    portable = "portable"
    ort = "ort"
    cuda = "cuda"
    dense = "dense"


class Precision(StrEnum):
    """What an ONNX graph computes in."""

    float32 = "float32"
    float16 = "float16"


class Exporter(StrEnum):
    """Who traces a language model with its cache."""

    auto = "auto"
    transformers = "transformers"
    slimc = "slimc"


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder that slimc wrote; also a dense model: a Hugging Face folder or id, or a .gguf file.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.", show_default=False)
    ],
    form: Annotated[Format, typer.Option("--format", help="What to export to.")] = Format.onnx,
    target: Annotated[
        Target,
        typer.Option(
            help="portable: any runtime of opset 21; ort: ONNX Runtime's own operators; cuda: the same around layers "
            "for 'slimc kernels'; dense: decoded weights."
        ),
    ] = Target.portable,
    dtype: Annotated[Precision, typer.Option(help="What the graph computes in.")] = Precision.float32,
    opset: Annotated[
        int | None, typer.Option(help="The ONNX operator set; the lowest that will do.", show_default=False)
    ] = None,
    accuracy_level: Annotated[
        int, typer.Option(min=0, max=4, help="With --target ort: 0 is exact, 4 rounds inputs to 8 bits.")
    ] = 0,
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            help="Keys and values of earlier tokens as inputs and outputs; with a language model that has them.",
            show_default=False,
        ),
    ] = None,
    embedding_bits: Annotated[
        int | None,
        typer.Option(
            min=4,
            max=8,
            help="With --target ort: 4 or 8 round the embedding of tokens, and the output embedding if both are one.",
            show_default=False,
        ),
    ] = None,
    exporter: Annotated[
        Exporter,
        typer.Option(help="Who traces a model with a cache; auto: transformers' exporter if it is there and can."),
    ] = Exporter.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an ONNX folder that slimc wrote.")] = False,
) -> None:
    """Write a model as an ONNX folder, which ONNX Runtime runs without PyTorch and without slimc.

    [bold]Examples[/bold]

      slimc export small -o small-onnx

      slimc export small -o small-onnx --target ort --accuracy-level 4        for speed on a CPU
    """
    import slimc

    del form  # the only one so far
    opened, tokenizer = open_model(model, device="cpu")
    written = slimc.export_onnx(
        opened,
        output,
        target=target.value,
        dtype=dtype.value,
        opset=opset,
        accuracy_level=accuracy_level,
        cache=cache,
        embedding_bits=embedding_bits,
        exporter=exporter.value,
        tokenizer=tokenizer,
        overwrite=overwrite,
    )
    say(str(written))
    note(f"Check it with: slimc verify {output} --against {model}")


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that slimc compress or export wrote.", show_default=False)
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model that an ONNX folder was exported from.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many greedy tokens are compared, with --against.")] = 64,
) -> None:
    """Check a folder: files, sizes, digests; of an ONNX folder also the graph, and what it computes.

    [bold]Examples[/bold]

      slimc verify small

      slimc verify small-onnx --against small        compares outputs and 64 greedy tokens with PyTorch's
    """
    from slimc.backends.hf_library import require
    from slimc.runtime.storage import is_native_folder, open_folder

    if is_native_folder(folder):
        opened = open_folder(folder, verify=True)
        say(f"{folder}: every file is whole, {len(opened.formats)} compressed layers")
        return
    require("onnx", "verifying an ONNX model", extra="onnx")
    from slimc.backends.onnx.verify import verify_folder

    model = None if against is None else open_model(against, device="cpu")[0]
    failed = []
    for check in verify_folder(folder, against=model, tokens=tokens):
        say(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}")
        if not check.passed:
            failed.append(check.name)
    if failed:
        raise FormatError(f"{folder}: did not pass: {', '.join(failed)}; export the model again")
