"""What each ingredient of the joint solver gains on seeded layers, and what it costs, at equal bytes.

    python benchmarks/ablation_layers.py [--json results/ablation-layers-cpu.json]

The layers are those of ``tests/passes/solvers/golden.json``, where the error that the SLiM authors' code leaves with
16-bit adapters is known: an error of 1 is that one (output error, geometric mean over the layers). All rows take at
most 3.25 bits a weight and 4.25 for each element of adapters of the reference's rank; every row has the highest rank
that fits. Seconds are of process time, on one thread, for all layers together.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimc.passes import LowRank, Prune, Quantize
from slimc.passes.statistics import InputStatistics
from slimc.passes.work import SiteWork

CASES = json.loads(Path("tests/passes/solvers/golden.json").read_text(encoding="utf-8"))["cases"]
GROUPS = Quantize(group=128)
JOINT = Prune("2:4", method="joint")


WANDA, ONE_BY_ONE = Prune("2:4"), Prune("2:4", method="sparsegpt")
DIAGONAL = LowRank(rank=1, bits=4)
COVARIANCE = LowRank("covariance", rank=1, bits=4)
ROUND = replace(COVARIANCE, rounds=1)

# The rank is set to what fits, layer by layer.
ROWS: dict[str, tuple[Quantize, Prune, LowRank]] = {
    "diagonal adapters (SLiM)": (GROUPS, WANDA, DIAGONAL),
    "the same, 4 rounds": (GROUPS, WANDA, replace(DIAGONAL, rounds=4)),
    "covariance": (GROUPS, WANDA, COVARIANCE),
    "SparseGPT, diagonal adapters": (GROUPS, ONE_BY_ONE, DIAGONAL),
    "SparseGPT, covariance": (GROUPS, ONE_BY_ONE, COVARIANCE),
    "joint, covariance": (GROUPS, JOINT, COVARIANCE),
    "joint and descent, covariance": (GROUPS, replace(JOINT, sweeps=1), COVARIANCE),
    "joint, covariance, 1 round": (GROUPS, JOINT, ROUND),
    "joint, covariance, 2 rounds": (GROUPS, JOINT, replace(ROUND, rounds=2)),
    "joint, covariance, 4 rounds": (GROUPS, JOINT, replace(ROUND, rounds=4)),
    "1 round, half of the rank first": (GROUPS, JOINT, replace(ROUND, before=0.5)),
    "1 round, a scale for 64 columns": (Quantize(group=64), JOINT, ROUND),
    "1 round, a scale a row": (Quantize(group="channel"), JOINT, ROUND),
    "1 round, a scale a tensor": (Quantize(), JOINT, ROUND),
    "1 round, 3-bit weights": (Quantize(bits=3, group=128), JOINT, ROUND),
    "1 round, 3-bit adapters": (GROUPS, JOINT, replace(ROUND, bits=3)),
}


def layer_of(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return weight and inputs, drawn as the reference's were."""
    n, k = case["out_features"], case["in_features"]
    rng = np.random.default_rng(case["seed"])
    weight = (rng.standard_normal((n, k)) * 0.02).astype(np.float32)
    weight = (weight * np.exp(0.3 * rng.standard_normal((1, k)))).astype(np.float32)
    weight.reshape(-1)[np.unique(rng.integers(0, n * k, size=n * k // 500))] *= 5
    basis = (rng.standard_normal((k // 8, k)) / np.sqrt(k // 8)).astype(np.float32)
    inputs = (rng.standard_normal((2048, k // 8)) @ basis + 0.5 * rng.standard_normal((2048, k))).astype(np.float32)
    inputs = (inputs * np.exp(rng.standard_normal((1, k)))).astype(np.float32)
    return torch.from_numpy(weight).bfloat16().float(), torch.from_numpy(inputs)


def bits_of(weight: Tensor, quantize: Quantize, adapters: LowRank, rank: int) -> float:
    """Return the bits a weight that a row takes at ``rank``."""
    rows, columns = weight.shape
    group, bits = quantize.group, adapters.bits or 16
    scales = 1 if group is None else rows if group == "channel" else rows * math.ceil(columns / int(group))
    left = rows * (8 * math.ceil(rank * bits / 8) + 16 * math.ceil(rank / adapters.group))
    right = rank * (8 * math.ceil(columns * bits / 8) + 16 * math.ceil(columns / adapters.group))
    return quantize.bits / 2 + 1 + (16 * scales + left + right) / (rows * columns)


def main() -> None:
    """Run all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    layers = [(case, *layer_of(case)) for case in CASES]
    results = []
    print(f"{'row':34} {'bits':>6} {'error':>6} {'seconds':>8}", flush=True)
    for name, (quantize, prune, adapters) in ROWS.items():
        seconds, bits, ratios = 0.0, [], []
        for case, weight, inputs in layers:
            rows, columns = weight.shape
            allowed = 3.25 + 4.25 * case["rank"] * (rows + columns) / (rows * columns)
            fitting = [r for r in range(1, min(rows, columns)) if bits_of(weight, quantize, adapters, r) <= allowed]
            statistics = InputStatistics.gather([inputs], {"gram"}, "layer")
            work = SiteWork("layer", weight, torch.bfloat16, statistics, lambda weight=weight: [weight])
            started = time.process_time()
            for one in (quantize, prune, replace(adapters, rank=fitting[-1])):
                one.apply(work)
            seconds += time.process_time() - started
            packed = work.pack()
            error = (inputs @ (packed.decode().float() - weight).T).norm() / (inputs @ weight.T).norm()
            bits.append(packed.format.bits_per_weight())
            ratios.append(float(error) / case["slim_lora"])
        row = {"row": name, "bits": float(np.mean(bits)), "error": float(np.exp(np.mean(np.log(ratios))))}
        results.append(row | {"seconds": seconds})
        print(f"{name:34} {row['bits']:6.3f} {row['error']:6.3f} {seconds:8.1f}", flush=True)
    if options.json:
        command = "python benchmarks/ablation_layers.py"
        record = {"command": command, "device": f"{platform.machine()} CPU", "torch": str(torch.__version__)}
        options.json.write_text(json.dumps(record | {"rows": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
