"""``slimc bench``."""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from slimc.cli.terminal import say
from slimc.errors import InputError, closest


class Benchmark(StrEnum):
    """What can be measured."""

    LINEAR = "linear"
    GENERATE = "generate"


def bench(
    which: Annotated[
        Benchmark | None,
        typer.Argument(metavar="linear|generate", help="One of the two; both without.", show_default=False),
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="llama-2-7b, llama-3-8b; linear also llama-2-13b, llama-2-70b, llama-3.2-1b.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[str, typer.Option(help="linear: the tokens of a call.")] = "1,2,4,8,16,32,64,128,256,1024,2048",
    batches: Annotated[str, typer.Option(help="generate: how many sequences at once.")] = "1,16",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write every figure there as JSON.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="linear: draw ratios over cuBLAS by tokens; needs matplotlib.", show_default=False
        ),
    ] = None,
) -> None:
    """Measure what compression brings on this machine's GPU. Nothing is downloaded: the weights are random.

    linear: the linear layers of Llama models, with a cold cache, against cuBLAS in bf16 and int4 kernels of others that
    are installed (humming-kernels; torch's own is always there).

    generate: whole models, 512 tokens of prompt and 128 new ones, tokens a second and memory, against the same model
    in bf16 and in torch's int4, all compiled with CUDA graphs. It needs transformers and room for the dense model.

    Both together take about half an hour on an H100.

    [bold]Examples[/bold]

      slimc bench -o figures --plot linear.png

      slimc bench linear --models llama-3-8b --tokens 1,16

      slimc bench generate --models llama-2-7b --batches 1
    """
    names = _words(models)
    counts, sizes = _numbers(tokens, "--tokens"), _numbers(batches, "--batches")

    from slimc.bench import generate, linear, no_gpu

    wanted = tuple(Benchmark) if which is None else (which,)
    known: dict[Benchmark, Collection[str]] = {Benchmark.LINEAR: linear.LAYERS, Benchmark.GENERATE: generate.MODELS}
    for name in names:
        for benchmark in wanted:
            if name not in known[benchmark]:
                choices = ", ".join(known[benchmark])
                raise InputError(
                    f"{benchmark} has no model {name!r}{closest(name, known[benchmark])}; it has {choices}"
                )
    if reason := no_gpu():
        raise InputError(reason)
    if plot is not None and (reason := linear.no_plots()):
        raise InputError(reason)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    if Benchmark.LINEAR in wanted:
        found = linear.run(names or linear.SHOWN, counts, save=lambda found: _write(output, "linear.json", found))
        if plot is not None:
            linear.plot(found["rows"], plot)
    if Benchmark.GENERATE in wanted:
        generate.run(
            names or tuple(generate.MODELS), batches=sizes, save=lambda found: _write(output, "generate.json", found)
        )


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _numbers(text: str, option: str) -> list[int]:
    words = _words(text)
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise InputError(f"{option} takes whole numbers above 0 with commas between them, such as 1,16; not {text!r}")
    return [int(word) for word in words]


def _write(folder: Path | None, name: str, figures: dict[str, Any]) -> None:
    if folder is not None:
        (folder / name).write_text(json.dumps(figures, indent=1) + "\n")
        say(f"# {folder / name}")
