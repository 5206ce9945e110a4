"""Perplexity against bytes: slimc's planner and recipes beside other methods, on SmolLM2-135M.

    python benchmarks/frontier.py MODEL --calibration valid.txt --test test.txt --json results/frontier.json
    python benchmarks/frontier.py --results results/frontier*.json [--plot frontier.png]

The first form measures: every point of ``frontier.yaml`` (or of the methods named by ``--methods``; ``planner`` is one
of them, at ``--budgets``), with the model, text and windows of ``benchmarks/smollm2.py``. A plan is what ``slimc
plan`` makes, after a trial, and ``slimc compress`` carries out; ``--sensitivities`` keeps what it measures,
so that budgets can be run one by one. The second one puts files of results together: a table, whether the planner lies
on or under each other point, and a plot (extra ``report``). Bytes are those of the layers as they are stored, adapters,
masks and scales included; embeddings stay as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimc
from slimc import recipes
from slimc.backends import hf
from slimc.passes import Calibrate, Fuse, from_config
from slimc.runtime.evaluate import perplexity

CALIBRATE = Calibrate(samples=64, length=512)
METHODS = recipes.read(Path(__file__).with_suffix(".yaml"), "the list of methods")
PLANNER = "planner"
BUDGETS = ("2.5bpw", "2.75bpw", "3bpw", "3.25bpw", "3.5bpw", "4bpw", "4.25bpw", "4.5bpw", "5bpw", "6bpw")
RANGE = (2.5, 6.0)
"""Bits a weight between which the planner is compared."""

Row = dict[str, Any]


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each point, as it is measured."""
    model, tokenizer = hf.load_model(options.model)
    model.to(options.device)
    windows = hf.tokenize_text(tokenizer, options.test.read_text(encoding="utf-8"), options.windows or None, 1024)
    windows = windows.to(options.device)
    text = options.calibration.read_text(encoding="utf-8")
    yield {"method": "dense", "point": "", "bits": 16.0, "perplexity": perplexity(model, windows, batch=4)}

    def row(method: str, point: str, passes: Any, **more: Any) -> Row:
        started = time.perf_counter()
        small: nn.Module = slimc.compile(model, text, passes, tokenizer=tokenizer)
        seconds = time.perf_counter() - started
        bits = slimc.report(small).bits_per_weight
        nbytes = round(sum(site.bits * site.shape[0] * site.shape[1] for site in slimc.report(small).sites) / 8)
        found = perplexity(small, windows, batch=4)
        return {
            "method": method,
            "point": point,
            "bits": bits,
            "bytes": nbytes,
            "perplexity": found,
            "seconds": seconds,
        } | more

    for method in options.methods:
        if method == PLANNER:
            kept: Any = options.sensitivities or slimc.sensitivities(model, text, tokenizer=tokenizer)
            for budget in options.budgets:
                given = {"tokenizer": tokenizer, "sensitivities": kept, "check": options.check}
                plan = slimc.plan(model, text, budget=budget, **given)
                if options.json:
                    plan.save(options.json.with_name(f"plan-{budget}.yaml"))
                more = {"predicted": plan.damage, "measured": plan.measured, "choices": plan.counts()}
                yield row(method, budget, plan, **more)
            continue
        for number, point in enumerate(METHODS[method]):
            if options.points and number not in options.points:
                continue
            named = isinstance(point, str)
            passes = point if named else [CALIBRATE, *from_config(point), Fuse()]
            yield row(method, point if named else json.dumps(point), passes)


def interpolate(rows: Sequence[Row], bits: float) -> float | None:
    """Return the perplexity of a method at ``bits`` a weight: straight between its points, in the logarithm."""
    points = sorted((row["bits"], math.log(row["perplexity"])) for row in rows)
    for (left, low), (right, high) in pairwise(points):
        if left <= bits <= right:
            return math.exp(low + (high - low) * (bits - left) / max(right - left, 1e-9))
    return None


def show(rows: Sequence[Row]) -> None:
    """Print every point, and beside it the planner at the same bytes."""
    planned = [row for row in rows if row["method"] == PLANNER]
    print(f"{'method':28} {'bits':>6} {'MB':>8} {'perplexity':>11} {'planner':>9}  point")
    for row in sorted(rows, key=lambda row: (row["method"], row["bits"])):
        there = interpolate(planned, row["bits"]) if row["method"] != PLANNER else None
        megabytes = f"{row['bytes'] / 1e6:.2f}" if "bytes" in row else ""
        beside = "" if there is None else f"{there:.2f}"
        numbers = f"{row['bits']:6.3f} {megabytes:>8} {row['perplexity']:11.2f} {beside:>9}"
        print(f"{row['method']:28} {numbers}  {row['point']}", flush=True)
    others = [
        row
        for row in rows
        if row["method"] != "dense" and not row["method"].startswith(PLANNER) and RANGE[0] <= row["bits"] <= RANGE[1]
    ]
    compared = [(row, there) for row in others if (there := interpolate(planned, row["bits"])) is not None]
    above = [f"{row['method']} {row['point']}" for row, there in compared if there > row["perplexity"]]
    if compared:
        print(
            f"The planner lies on or under {len(compared) - len(above)} of {len(compared)} points.",
            *above,
            sep="\n  not ",
        )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a plot of all methods."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(8, 5.5))
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows if not row["method"].startswith(f"{PLANNER},")):
        points = sorted((row["bits"], row["perplexity"]) for row in rows if row["method"] == method)
        if method == "dense":
            axes.axhline(points[0][1], color="black", linewidth=0.8, linestyle=":", label="dense, 16 bits")
            continue
        bold = method == PLANNER
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            linewidth=2.5 if bold else 1.2,
            zorder=3 if bold else 2,
            label=method,
        )
    axes.set(xscale="linear", yscale="log", xlim=(2, 6.5), ylim=(18, 300), xlabel="bits a weight, everything counted")
    axes.set(ylabel="perplexity, WikiText-2", title="SmolLM2-135M-Instruct, compressed without training")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks([20, 25, 30, 40, 60, 100, 200])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, or put results together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--methods", nargs="*", default=[*METHODS, PLANNER], choices=[*METHODS, PLANNER])
    parser.add_argument("--points", type=int, nargs="*", help="only these points of each method, counted from 0")
    parser.add_argument("--budgets", nargs="*", default=list(BUDGETS))
    parser.add_argument("--sensitivities", type=Path, help="where the planner's measurements are kept")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not carry plans out on trial")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="results to put together")
    parser.add_argument("--plot", type=Path, help="where the plot goes")
    options = parser.parse_args()
    rows = [row for path in options.results for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    if options.model:
        if options.calibration is None or options.test is None:
            parser.error("a MODEL is measured with --calibration and --test")
        for row in measure(options):
            rows.append(row)
            print(f"{row['method']:28} {row['bits']:6.3f} {row['perplexity']:10.3f} {row['point']}", flush=True)
            if options.json:
                device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
                record = {"device": device, "torch": str(torch.__version__), "windows": options.windows, "rows": rows}
                options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    elif not rows:
        parser.error("give a MODEL to measure, or --results to show")
    show(rows)
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
