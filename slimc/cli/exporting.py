"""``slimc export`` and ``slimc verify``: models for other runtimes."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimc.cli.models import open_model
from slimc.cli.terminal import note, say
from slimc.errors import FormatError, InputError

if TYPE_CHECKING:
    from torch import nn

    from slimc.backends.check import Check


class Format(StrEnum):
    """What to export to."""

    onnx = "onnx"
    hf = "hf"


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


_OF_ONE_FORMAT = {
    Format.onnx: ("target", "dtype", "opset", "accuracy_level", "cache", "embedding_bits", "exporter"),
    Format.hf: ("allow_dense",),
}
"""Options that have no meaning with the other format."""


class Exporter(StrEnum):
    """Who traces a language model with its cache."""

    auto = "auto"
    transformers = "transformers"
    slimc = "slimc"


def export(
    context: typer.Context,
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
    form: Annotated[
        Format,
        typer.Option(
            "--format", help="onnx; hf: a folder for transformers with compressed-tensors and peft, and for vLLM."
        ),
    ] = Format.onnx,
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
    allow_dense: Annotated[
        bool,
        typer.Option(
            "--allow-dense", help="With --format hf: decode layers that it has no codes for, in place of refusing them."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace such a folder that slimc wrote.")] = False,
) -> None:
    """Write a model as a folder that runs without slimc: ONNX Runtime's, or one that stock transformers opens.

    [bold]Examples[/bold]

      slimc export small -o small-onnx

      slimc export small -o small-onnx --target ort --accuracy-level 4        for speed on a CPU

      slimc export small -o small-hf --format hf                              for transformers and vLLM
    """
    import slimc

    for other, options in _OF_ONE_FORMAT.items():
        given = [name for name in options if _is_given(context, name)]
        if given and form is not other:
            option = "--" + given[0].replace("_", "-")
            raise InputError(f"{option} has no meaning with --format {form}; leave it out, or use --format {other}")
    opened, tokenizer = open_model(model, device="cpu")
    if form is Format.hf:
        done = slimc.export_hf(opened, output, tokenizer=tokenizer, allow_dense=allow_dense, overwrite=overwrite)
        say(str(done))
        note(f"Check it with: slimc verify {output} --against {model}; {output}/README.md says how to open it")
        return
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


def _is_given(context: typer.Context, name: str) -> bool:
    """Tell whether the command line has an option, which may have the default's value there, too."""
    source = context.get_parameter_source(name)
    # The enumeration is click's or, depending on typer's version, its own copy of it.
    return source is not None and source.name == "COMMANDLINE"


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that slimc compress or export wrote.", show_default=False)
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model that the folder was exported from.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many greedy tokens are compared, with --against.")] = 64,
) -> None:
    """Check a folder: files, sizes, digests; of an exported one also what it computes.

    [bold]Examples[/bold]

      slimc verify small

      slimc verify small-onnx --against small        compares outputs and 64 greedy tokens with PyTorch's
    """
    from slimc.runtime.storage import is_native_folder, open_folder

    if is_native_folder(folder):
        opened = open_folder(folder, verify=True)
        say(f"{folder}: every file is whole, {len(opened.formats)} compressed layers")
        return
    model = None if against is None else open_model(against, device="cpu")[0]
    failed = []
    for check in _checks(folder, model, tokens):
        say(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}")
        if not check.passed:
            failed.append(check.name)
    if failed:
        raise FormatError(f"{folder}: did not pass: {', '.join(failed)}; export the model again")


def _checks(folder: Path, model: nn.Module | None, tokens: int) -> Iterable[Check]:
    """Return the checks of an exported folder, each made when its turn comes."""
    from slimc.backends.hf_library import require
    from slimc.backends.stock.folder import is_stock_folder

    if is_stock_folder(folder):
        from slimc.backends.stock.verify import verify_folder as verify_stock

        return verify_stock(folder, against=model)
    require("onnx", "verifying an ONNX model", extra="onnx")
    from slimc.backends.onnx.verify import verify_folder

    return verify_folder(folder, against=model, tokens=tokens)
