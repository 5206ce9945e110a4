"""What each ingredient of the joint solver gains, and what it costs, at equal bytes.

    python benchmarks/ablation.py MODEL --calibration valid.txt --test test.txt [--rows NAME...] [--json results/...]

The setting is that of ``smollm2.py``: calibration on the first 64 x 512 tokens, perplexity on the first 16 windows of
1024 tokens. Every row but the reference's has a rank such that its sites take at most 3.78 bits a weight in
SmolLM2-135M (what the SLiM authors' 4-bit adapters take), scales, masks and adapters counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import slimc
from slimc import recipes
from slimc.backends import hf
from slimc.passes import Calibrate, Compensate, Fuse, LowRank, Pass, Permute, Prune, Quantize, ScaleFolding, Tune
from slimc.runtime.evaluate import perplexity

CALIBRATE = Calibrate(samples=64, length=512)
HELD_OUT = Calibrate(samples=64, length=512, held_out=0.125)


JOINT = Prune("2:4", method="joint")
GROUPS = Quantize(group=128)


def covariance(rank: int | float = 0.1, rounds: int = 1, **options: Any) -> LowRank:
    """Return adapters of the full second moment, in 4 bits."""
    return LowRank("covariance", rank=rank, bits=4, rounds=rounds, **options)


def with_pass(recipe: str, added: Pass) -> list[Pass]:
    """Return the passes of a recipe with one more after ``calibrate``."""
    first, *others = recipes.load(recipe).build()
    return [first, added, *others]


ONE_BY_ONE = Prune("2:4", method="sparsegpt")

ROWS: dict[str, list[Pass]] = {
    "diagonal adapters": [CALIBRATE, GROUPS, ONE_BY_ONE, LowRank(rank=0.1, bits=4), Fuse()],
    "covariance": [CALIBRATE, GROUPS, ONE_BY_ONE, covariance(rounds=0), Fuse()],
    "joint": [CALIBRATE, GROUPS, JOINT, covariance(rounds=0), Fuse()],
    "joint, 1 round": [CALIBRATE, GROUPS, JOINT, covariance(), Fuse()],
    "joint, 4 rounds": [CALIBRATE, GROUPS, JOINT, covariance(rounds=4), Fuse()],
    "own input": [CALIBRATE, Compensate(residual=False), GROUPS, JOINT, covariance(), Fuse()],
    "sums": [CALIBRATE, Compensate(), GROUPS, JOINT, covariance(), Fuse()],
    "sums, held out": [HELD_OUT, Compensate(), GROUPS, JOINT, covariance(), Fuse()],
    "sums, half": [CALIBRATE, Compensate(strength=0.5), GROUPS, JOINT, covariance(), Fuse()],
    "sums, half of the rank first": [CALIBRATE, Compensate(), GROUPS, JOINT, covariance(before=0.5), Fuse()],
    "sums, a scale a row": [CALIBRATE, Compensate(), Quantize(group="channel"), JOINT, covariance(0.115), Fuse()],
    "sums, damping 0.1": [CALIBRATE, Compensate(), GROUPS, JOINT, covariance(damping=0.1), Fuse()],
    "sums, tuned": [CALIBRATE, Compensate(), GROUPS, JOINT, covariance(), Tune(), Fuse()],
}

SLIM = recipes.load("slim-w4-2x4").build()

GRAPH_ROWS: dict[str, list[Pass]] = {
    "joint": recipes.load("joint-w4-2x4").build(),
    "joint, permuted": with_pass("joint-w4-2x4", Permute()),
    "joint, permuted, unsorted": with_pass("joint-w4-2x4", Permute(sort=None)),
    "joint, permuted, sorted by energy": with_pass("joint-w4-2x4", Permute(sort="energy")),
    "joint, sorted only": with_pass("joint-w4-2x4", Permute(pattern=None)),
    "slim": recipes.load("slim-w4-2x4").build(),
    "slim, permuted": with_pass("slim-w4-2x4", Permute()),
    "slim, permuted, unsorted": with_pass("slim-w4-2x4", Permute(sort=None)),
    "slim, scales folded": with_pass("slim-w4-2x4", ScaleFolding()),
    "slim, scales of norms folded": with_pass("slim-w4-2x4", ScaleFolding(layers=False)),
    "joint, scales folded": with_pass("joint-w4-2x4", ScaleFolding(group=128)),
    "joint, scales of norms folded": with_pass("joint-w4-2x4", ScaleFolding(group=128, layers=False)),
    "slim w4, scales folded": with_pass("slim-w4", ScaleFolding(group=128)),
    "slim, scales folded, permuted": [*with_pass("slim-w4-2x4", ScaleFolding())[:2], Permute(), *SLIM[1:]],
    # What siblings save is spent on rank.
    "joint, siblings share": recipes.load("joint-w4-2x4")
    .override(["low_rank.rank=0.108", "low_rank.shared=siblings"])
    .build(),
    "slim, siblings share": recipes.load("slim-w4-2x4")
    .override(["low_rank.rank=0.108", "low_rank.shared=siblings"])
    .build(),
    "slim w4": recipes.load("slim-w4").build(),
    "slim w4, sorted": with_pass("slim-w4", Permute(pattern=None)),
    "slim w4, sorted by energy": with_pass("slim-w4", Permute(pattern=None, sort="energy")),
}
"""What the passes over the graph add to a recipe."""

ROWS |= {f"graph: {name}": passes for name, passes in GRAPH_ROWS.items()}


def main() -> None:
    """Run the chosen rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    model, tokenizer = hf.load_model(options.model)
    model.to(options.device)
    windows = hf.tokenize_text(tokenizer, options.test.read_text(encoding="utf-8"), 16, 1024).to(options.device)
    text = options.calibration.read_text(encoding="utf-8")
    results: list[dict[str, Any]] = []
    print(f"{'row':40} {'bits':>6} {'ppl':>8} {'seconds':>8} {'output':>7} {'held out':>8} {'stream':>7}", flush=True)
    for name in options.rows:
        started = time.perf_counter()
        small = slimc.compile(model, text, ROWS[name], tokenizer=tokenizer)
        seconds = time.perf_counter() - started
        report = slimc.report(small)
        errors = [
            fmean(error or 0.0 for error in column)
            for column in zip(
                *((row.output_error, row.held_out_error, row.stream_error) for row in report.sites), strict=True
            )
        ]
        found = perplexity(small, windows)
        results.append({"row": name, "bits": report.bits_per_weight, "perplexity": found, "seconds": seconds})
        shown = " ".join(f"{error:7.4f}" for error in errors)
        shown += "  " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in report.seconds.items())
        print(f"{name:40} {report.bits_per_weight:6.3f} {found:8.3f} {seconds:8.1f} {shown}", flush=True)
        del small
    if options.json:
        device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
        record = {"torch": str(torch.__version__), "device": device, "rows": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
