"""What solving one large layer costs, step by step.

    python benchmarks/solver_cost.py [--rows 4096] [--columns 11008] [--recipe NAME]

The weight and the inputs are random; the time does not depend on what they are. Times are wall-clock, the device idle
before and after. Every line is the time of one pass; the first site of its shape also pays for what is recorded once.
"""

from __future__ import annotations

import argparse
import time

import torch

from slimc import recipes
from slimc.passes.base import SitePass
from slimc.passes.statistics import InputStatistics
from slimc.passes.work import SiteWork


def main() -> None:
    """Solve the layer three times and print the seconds of each pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--recipe", default=recipes.DEFAULT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(options.rows, options.columns, device=device)
    basis = torch.randn(options.columns // 8, options.columns, device=device) / (options.columns // 8) ** 0.5
    inputs = torch.randn(2**14, len(basis), device=device) @ basis
    inputs = inputs + 0.5 * torch.randn(2**14, options.columns, device=device)
    passes = [one for one in recipes.load(options.recipe).build() if isinstance(one, SitePass)]
    wanted = frozenset().union(*(one.statistics() for one in passes))
    statistics = InputStatistics.gather([inputs], wanted, "layer", dense=[inputs])

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for run in range(3):
        work = SiteWork("layer", weight, torch.bfloat16, statistics, lambda: [weight])
        total = 0.0
        for one in passes:
            started = clock()
            one.apply(work)
            seconds = clock() - started
            total += seconds
            print(f"run {run}: {one.name:12} {seconds:7.3f} s", flush=True)
        row = work.row(work.pack())
        print(
            f"run {run}: {'all':12} {total:7.3f} s, {row.bits:.3f} bits, output error {row.output_error:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
