"""What each ingredient of the joint solver gains, and what it costs, at equal bytes.

    python benchmarks/ablation.py MODEL --calibration valid.txt --test test.txt [--rows NAME...] [--json results/...]
    python benchmarks/ablation.py MODEL --calibration valid.txt --blocks 6           # seconds alone

The recipe joint-w4-2x4 is the row "damped, a quarter, permuted"; rows not called damped have a damping of 0.01.
The setting is that of ``smollm2.py``: calibration on the first 64 x 512 tokens, perplexity on the first 16 windows of
1024 tokens of each text of ``--test``. Every row but the mixed ones and ``slim w4`` has a rank such that its sites take
at most 3.78 bits a weight in SmolLM2-135M (what the SLiM authors' 4-bit adapters take), scales, masks and adapters
counted. ``--start 0.5`` calibrates on other text, from the middle of the file on; ``--calibration self`` on what the
model writes.

Seconds depend on what else a machine does. ``--blocks 6`` keeps the first six decoder blocks of the model, which is
enough to compare rows on a card of their own within minutes: each row prints the seconds of its sweeps there.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

import slimc
from slimc import recipes
from slimc.backends import hf
from slimc.passes import (
    AllocateBits,
    Calibrate,
    Compensate,
    Fuse,
    LowRank,
    Pass,
    Permute,
    Prune,
    Quantize,
    ScaleFolding,
    Tune,
)
from slimc.runtime.evaluate import perplexity

CALIBRATE = Calibrate(samples=64, length=512)
HELD_OUT = Calibrate(samples=64, length=512, held_out=0.125)


JOINT = Prune("2:4", method="joint")
GROUPS = Quantize(group=128)


def covariance(rank: int | float = 0.1, rounds: int = 1, **options: Any) -> LowRank:
    """Return adapters of the full second moment, in 4 bits."""
    return LowRank("covariance", rank=rank, bits=4, rounds=rounds, **options)


def with_pass(passes: list[Pass], added: Pass) -> list[Pass]:
    """Return passes with one more after ``calibrate``."""
    first, *others = passes
    return [first, added, *others]


def compensated(strength: float, rounds: int = 1) -> list[Pass]:
    """Return the joint recipe with a part of what the dense model's output asks for."""
    return [CALIBRATE, Compensate(strength=strength), GROUPS, JOINT, covariance(rounds=rounds), Fuse()]


def half(group: int | Literal["channel"], rank: float, **options: Any) -> list[Pass]:
    """Return the recipe with other scales, and the rank that these leave."""
    return [CALIBRATE, Compensate(strength=0.5), Quantize(group=group), JOINT, covariance(rank, **options), Fuse()]


def damped(strength: float, damping: float, target: float = 0.01, rounds: int = 1, *before: Pass) -> list[Pass]:
    """Return the recipe with a damping of its solvers, and another of the regression for its target."""
    return [
        CALIBRATE,
        *before,
        Compensate(strength=strength, damping=target),
        GROUPS,
        replace(JOINT, damping=damping),
        covariance(rounds=rounds, damping=damping),
        Fuse(),
    ]


ONE_BY_ONE = Prune("2:4", method="sparsegpt")

ROWS: dict[str, list[Pass]] = {
    "diagonal adapters": [CALIBRATE, GROUPS, ONE_BY_ONE, LowRank(rank=0.1, bits=4), Fuse()],
    "covariance": [CALIBRATE, GROUPS, ONE_BY_ONE, covariance(rounds=0), Fuse()],
    "joint": [CALIBRATE, GROUPS, JOINT, covariance(rounds=0), Fuse()],
    "joint, 1 round": [CALIBRATE, GROUPS, JOINT, covariance(), Fuse()],
    "joint, 4 rounds": [CALIBRATE, GROUPS, JOINT, covariance(rounds=4), Fuse()],
    "own input": [CALIBRATE, Compensate(strength=1.0, residual=False), GROUPS, JOINT, covariance(), Fuse()],
    "sums": [CALIBRATE, Compensate(strength=1.0), GROUPS, JOINT, covariance(), Fuse()],
    "sums, held out": [HELD_OUT, Compensate(strength=1.0), GROUPS, JOINT, covariance(), Fuse()],
    "sums, a quarter": compensated(0.25),
    "sums, half": compensated(0.5),
    "sums, three quarters": compensated(0.75),
    "sums, half, 0 rounds": compensated(0.5, rounds=0),
    "sums, half, 2 rounds": compensated(0.5, rounds=2),
    "sums, half, 4 rounds": compensated(0.5, rounds=4),
    "sums, half, held out": [HELD_OUT, *compensated(0.5)[1:]],
    "sums, half, a scale a row": half("channel", 0.115),
    "sums, half, groups of 64": half(64, 0.083),
    "sums, half, damping 0.1": half(128, 0.1, damping=0.1),
    "damped, a quarter": damped(0.25, 0.1),
    "damped, half": damped(0.5, 0.1),
    "damped, half, its target too": damped(0.5, 0.1, 0.1),
    "damped by 0.3, half, its target by 0.1": damped(0.5, 0.3, 0.1),
    "damped, half, 4 rounds": damped(0.5, 0.1, rounds=4),
    "damped, half, permuted": damped(0.5, 0.1, 0.01, 1, Permute(sort="energy", batches=1)),
    "damped, half, tuned": [*damped(0.5, 0.1)[:-1], Tune(), Fuse()],
    "damped, an eighth": damped(0.125, 0.1),
    "damped, a quarter, 4 rounds": damped(0.25, 0.1, rounds=4),
    "damped, a quarter, permuted": damped(0.25, 0.1, 0.01, 1, Permute(sort="energy", batches=1)),
    "damped, a quarter, permuted, tuned": [
        *damped(0.25, 0.1, 0.01, 1, Permute(sort="energy", batches=1))[:-1],
        Tune(),
        Fuse(),
    ],
    "damped, a quarter, tuned": [*damped(0.25, 0.1)[:-1], Tune(), Fuse()],
    "sums, half, siblings share, a scale a row": half("channel", 0.126, shared="siblings"),
    "sums, half, siblings share, a scale a row, damping 0.1": half("channel", 0.126, shared="siblings", damping=0.1),
    "sums, half, a scale a row, damping 0.1": half("channel", 0.115, damping=0.1),
    "sums, half, 2 rounds, a scale a row, damping 0.1": half("channel", 0.115, rounds=2, damping=0.1),
    "sums, half of the rank first": [
        CALIBRATE,
        Compensate(strength=1.0),
        GROUPS,
        JOINT,
        covariance(before=0.5),
        Fuse(),
    ],
    "sums, a scale a row": [
        CALIBRATE,
        Compensate(strength=1.0),
        Quantize(group="channel"),
        JOINT,
        covariance(0.115),
        Fuse(),
    ],
    "sums, damping 0.1": [CALIBRATE, Compensate(strength=1.0), GROUPS, JOINT, covariance(damping=0.1), Fuse()],
    "sums, tuned": [CALIBRATE, Compensate(strength=1.0), GROUPS, JOINT, covariance(), Tune(), Fuse()],
}

SLIM, SLIM_W4 = recipes.load("slim-w4-2x4").build(), recipes.load("slim-w4").build()
UNDAMPED = compensated(0.5)

GRAPH_ROWS: dict[str, list[Pass]] = {
    "joint": UNDAMPED,
    "joint, permuted": with_pass(UNDAMPED, Permute()),
    "joint, permuted by one batch": with_pass(UNDAMPED, Permute(batches=1)),
    "joint, permuted, unsorted": with_pass(UNDAMPED, Permute(sort=None)),
    "joint, permuted, sorted by energy": with_pass(UNDAMPED, Permute(sort="energy")),
    "joint, permuted by one batch, sorted by energy": with_pass(UNDAMPED, Permute(sort="energy", batches=1)),
    "joint, sorted only": with_pass(UNDAMPED, Permute(pattern=None)),
    "slim": SLIM,
    "slim, permuted": with_pass(SLIM, Permute()),
    "slim, permuted, unsorted": with_pass(SLIM, Permute(sort=None)),
    "slim, scales folded": with_pass(SLIM, ScaleFolding()),
    "slim, scales of norms folded": with_pass(SLIM, ScaleFolding(layers=False)),
    "joint, scales folded": with_pass(UNDAMPED, ScaleFolding(group=128)),
    "joint, scales of norms folded": with_pass(UNDAMPED, ScaleFolding(group=128, layers=False)),
    "slim w4, scales folded": with_pass(SLIM_W4, ScaleFolding(group=128)),
    "slim, scales folded, permuted": [*with_pass(SLIM, ScaleFolding())[:2], Permute(), *SLIM[1:]],
    # What siblings save is spent on rank.
    "joint, siblings share": half(128, 0.108, shared="siblings"),
    "slim, siblings share": recipes.load("slim-w4-2x4")
    .override(["low_rank.rank=0.108", "low_rank.shared=siblings"])
    .build(),
    "slim w4": SLIM_W4,
    "slim w4, sorted": with_pass(SLIM_W4, Permute(pattern=None)),
    "slim w4, sorted by energy": with_pass(SLIM_W4, Permute(pattern=None, sort="energy")),
}
"""What the passes over the graph add to a recipe."""

ROWS |= {f"graph: {name}": passes for name, passes in GRAPH_ROWS.items()}


def mixed(bits: float, group: int = 128, strength: float = 0.5, *before: Pass, damping: float = 0.01) -> list[Pass]:
    """Return codes of several widths, aimed at the dense model's output unless ``strength`` is 0."""
    target = [Compensate(strength=strength)] if strength else []
    return [
        CALIBRATE,
        *before,
        *target,
        AllocateBits(bits, group, "output", narrowest=2 if bits >= 4 else 1, widest=round(bits) + 2),
        Quantize("gptq", calibrate="sqc", preset="output", order="columns", static_groups=True, damping=damping),
        Fuse(),
    ]


ROWS |= {
    "mixed-w2": recipes.load("mixed-w2").build(),
    "mixed-w3": recipes.load("mixed-w3").build(),
    "mixed-w4": recipes.load("mixed-w4").build(),
    "mixed: 3 bits, own weight": mixed(3, strength=0),
    "mixed: 3 bits, a quarter": mixed(3, strength=0.25),
    "mixed: 3 bits, three quarters": mixed(3, strength=0.75),
    "mixed: 3 bits, all": mixed(3, strength=1),
    "mixed: 3 bits, damped": mixed(3, 128, 0.5, damping=0.1),
    "mixed: 3 bits, a quarter, damped": mixed(3, 128, 0.25, damping=0.1),
    "mixed: 2 bits, groups of 64": mixed(2, 64),
    "mixed: 3 bits, groups of 64": mixed(3, 64),
    "mixed: 4 bits, groups of 64": mixed(4, 64),
    "mixed: 3 bits, sorted": mixed(3, 128, 0.5, Permute(pattern=None, batches=1)),
    "mixed: 3 bits, sorted by energy": mixed(3, 128, 0.5, Permute(pattern=None, sort="energy", batches=1)),
    "mixed: 3 bits, tuned": [*mixed(3)[:-1], Tune(), Fuse()],
}
"""The recipes without pruning and adapters, and what their parts are worth."""


def keep_blocks(model: nn.Module, blocks: int) -> None:
    """Shorten a Llama to its first decoder blocks."""
    model.model.layers = model.model.layers[:blocks]  # type: ignore[union-attr]
    model.config.num_hidden_layers = blocks  # type: ignore[union-attr]


def calibration(model: nn.Module, tokenizer: Any, source: str, start: float) -> str | Tensor:
    """Return the text from the share ``start`` of a file on, or tokens that the model samples."""
    if source == "self":
        return torch.stack(hf.sample_calibration(model, tokenizer, CALIBRATE.samples, CALIBRATE.length, seed=0))
    text = Path(source).read_text(encoding="utf-8")
    return text[round(start * len(text)) :]


def main() -> None:
    """Run the chosen rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="a text file, or 'self'")
    parser.add_argument("--start", type=float, default=0.0, help="share of that text to leave out first")
    parser.add_argument("--test", type=Path, nargs="*", default=[])
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    model, tokenizer = hf.load_model(options.model)
    if options.blocks:
        keep_blocks(model, options.blocks)
    model.to(options.device)
    tests = {
        path.stem: hf.tokenize_text(tokenizer, path.read_text(encoding="utf-8"), None, 1024)[:16].to(options.device)
        for path in options.test
    }
    data = calibration(model, tokenizer, options.calibration, options.start)
    results: list[dict[str, Any]] = []
    print(f"dense: { ({name: round(perplexity(model, windows), 3) for name, windows in tests.items()}) }", flush=True)
    shown = " ".join(f"{name:>8}" for name in tests)
    print(f"{'row':40} {'bits':>6} {shown} {'seconds':>8} {'output':>7} {'held out':>8} {'stream':>7}", flush=True)
    for name in options.rows:
        started = time.perf_counter()
        small = slimc.compile(model, data, ROWS[name], tokenizer=tokenizer)
        seconds = time.perf_counter() - started
        report = slimc.report(small)
        errors = [
            fmean(error or 0.0 for error in column)
            for column in zip(
                *((row.output_error, row.held_out_error, row.stream_error) for row in report.sites), strict=True
            )
        ]
        found = {text: perplexity(small, windows) for text, windows in tests.items()}
        results.append(
            {
                "row": name,
                "calibration": options.calibration if options.calibration == "self" else Path(options.calibration).stem,
                "start": options.start,
                "bits": report.bits_per_weight,
                "perplexity": found,
                "seconds": seconds,
                "stages": dict(report.seconds),
            }
        )
        shown = " ".join(f"{value:8.3f}" for value in found.values())
        shown += f" {seconds:8.1f} " + " ".join(f"{error:7.4f}" for error in errors)
        shown += "  " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in report.seconds.items())
        print(f"{name:40} {report.bits_per_weight:6.3f} {shown}", flush=True)
        del small
        if options.json:
            device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
            record = {"torch": str(torch.__version__), "device": device, "blocks": options.blocks, "rows": results}
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
