"""``slimc eval`` and ``slimc generate``: what becomes of a model's answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimc.cli.models import open_language_model, open_onnx_model, read_text
from slimc.cli.terminal import err, note, out, say
from slimc.errors import InputError
from slimc.progress import counted, duration, for_console

if TYPE_CHECKING:
    from torch import nn

    from slimc.runtime.generate import Generation

_ANY_MODEL = "A folder that slimc wrote, a Hugging Face folder or id, or a .gguf file."


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_ANY_MODEL, show_default=False)],
    text: Annotated[Path, typer.Option(metavar="FILE", help="The text to predict, UTF-8.", show_default=False)],
    windows: Annotated[int, typer.Option(min=1, help="How many windows, from the start of the text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="How many tokens a window.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="How many windows run at once.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1...; a CUDA GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")] = False,
) -> None:
    """Measure how well a model predicts a text: its perplexity (lower is better).

    The text is cut into consecutive windows, and each token but a window's first is predicted from those before it.
    Perplexities compare only where the text, the tokenizer and the windows are the same.

    [bold]Examples[/bold]

      slimc eval small --text book.txt

      slimc eval Qwen/Qwen3-0.6B --text book.txt        the dense model, to compare with
    """
    content = read_text(text)

    from slimc.backends import hf
    from slimc.runtime.evaluate import perplexity

    opened, tokenizer = open_language_model(model, device=device)
    _check_context(opened, length)
    options = "fewer or shorter windows: --windows and --length"
    ids = hf.tokenize_text(tokenizer, content, windows, length, options=options)
    begun = time.monotonic()
    with for_console(err, quiet=quiet) as progress:
        value = perplexity(opened, ids, batch=batch, progress=progress)
    seconds = time.monotonic() - begun
    if as_json:
        record = {"model": model, "perplexity": value, "text": str(text), "windows": windows, "length": length}
        out.print_json(json.dumps(record | {"seconds": round(seconds, 2)}), ensure_ascii=True)
    else:
        shape = f"{counted(windows, 'window')} of {counted(length, 'token')}"
        say(f"{model}: perplexity {value:.3f} ({shape} of {text}, {duration(seconds)})")


def _check_context(model: nn.Module, length: int) -> None:
    """Refuse windows in which a model reads on beyond what it was made for: its perplexity there says nothing."""
    from slimc.runtime.positions import context_of

    limit = context_of(model)
    if limit is not None and length > limit:
        raise InputError(
            f"--length {length} is more than the {limit} tokens that this {type(model).__name__} was made to read at "
            f"once (its configuration says so); use --length {limit} or less"
        )


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_ANY_MODEL, show_default=False)],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.", show_default=False)],
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add, at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The seed of the choice when the temperature is above 0.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt to the model as a question in a chat.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1...; a CUDA GPU if there is one.")] = None,
    kernels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="For an ONNX folder on a GPU: a library of 'slimc kernels'.", show_default=False
        ),
    ] = None,
) -> None:
    """Let a model continue a text. A folder that 'slimc export --format onnx' wrote runs in ONNX Runtime.

    [bold]Examples[/bold]

      slimc generate small --prompt "The capital of France is"

      slimc generate small --prompt "Once upon a time" --tokens 200 --temperature 0.8 --seed 1

      slimc generate small --chat --prompt "Why is the sky blue?"
    """
    from slimc.backends.onnx.description import is_onnx_folder

    continue_prompt: Callable[..., Generation]
    if is_onnx_folder(Path(model)):
        from slimc.backends.onnx.text import continue_text

        continue_prompt = partial(continue_text, *open_onnx_model(Path(model), device=device, kernels=kernels))
    elif kernels is not None:
        raise InputError(f"{kernels}: a kernel library is for an ONNX folder, which {model} is not; leave it out")
    else:
        from slimc.runtime.generate import generate_text

        continue_prompt = partial(generate_text, *open_language_model(model, device=device))
    written = False

    def write(piece: str) -> None:
        nonlocal written
        written = written or bool(piece)
        say(piece, end="")

    if not chat:
        write(prompt)
    try:
        made = continue_prompt(
            prompt, max_new_tokens=tokens, temperature=temperature, seed=seed, chat=chat, write=write
        )
    finally:
        if written:  # what follows, an error too, begins a line
            say()
    note(f"{counted(made.tokens, 'token')} in {duration(made.seconds)}, {made.tokens / made.seconds:.1f} a second")
