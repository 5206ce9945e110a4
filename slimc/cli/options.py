"""What several commands take: each option defined once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Precision(StrEnum):
    """The precision in which the dense model is loaded, and in which 16-bit values and scales are stored."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder or id, or a .gguf file.", show_default=False)
]
CalibrationText = Annotated[
    str, typer.Option(metavar="self|FILE", help="A text file to calibrate on, or 'self': text sampled from the model.")
]
Samples = Annotated[int | None, typer.Option(min=1, help="How many calibration sequences.")]
Length = Annotated[int | None, typer.Option(min=1, help="How many tokens a sequence.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="How many sequences run at once.")]
Seed = Annotated[int | None, typer.Option(help="The seed of sampled calibration text.")]
Include = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Take these weights in, though left dense by default.")
]
Exclude = Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Leave these weights dense: '*.layers.0.*'")]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1...; a CUDA GPU if any.")]
DType = Annotated[Precision | None, typer.Option(help="Load the model in this precision, not its own.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
