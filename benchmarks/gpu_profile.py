r"""The launches of a layer, for NVIDIA's profiler: how busy each part of a multiprocessor is.

    ncu --clock-control none -k regex:stream_linear --section SpeedOfLight --section ComputeWorkloadAnalysis \
        --section MemoryWorkloadAnalysis --section SchedulerStats --csv --page details \
        python benchmarks/gpu_profile.py [--model llama-2-70b] [--tokens 128] > profile.csv
    python benchmarks/gpu_profile.py --read profile.csv [--json FILE]

The profiler runs each launch by itself and from a cold cache, so t and the layer do not overlap, and neither does one
layer and the next. Shares of what a multiprocessor has are of the cycles in which one works, of device memory of all.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch

from slimc.backends import KERNELS
from slimc.bench import no_gpu
from slimc.bench.linear import DTYPE, LAYERS, SERVED, Subject, chosen_for

CALLS = 2
"""Of a layer: the first also finds its memory."""

SHARES = {
    "shared_memory": "L1/TEX Cache Throughput",
    "tensor_cores": "SM Busy",
    "issue_slots": "Issue Slots Busy",
    "memory": "DRAM Throughput",
}
"""What is reported, as the profiler calls it; the tensor cores are the busiest pipe of these kernels."""

OF_ALL = ("tensor_cores", "issue_slots")
"""Shares that the profiler takes of all cycles of all multiprocessors, at work or not."""


def launch(model: str, layers: list[str], tokens: int) -> None:
    """Call each layer, as it is served, and say which, and where, among what the profiler writes."""
    where = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(where | {"model": model, "layers": layers, "tokens": tokens}), flush=True)
    shapes = {name: (rows, columns) for name, rows, columns in LAYERS[model]}
    for name in layers:
        rows, columns = shapes[name]
        subject = Subject(rows, columns)
        x = torch.randn(tokens, columns, dtype=DTYPE, device="cuda")
        kernel, _ = chosen_for(KERNELS, subject.formats, x.device, tokens)
        if kernel is None:
            raise SystemExit(f"no kernel of slimc's computes {name} of {model} on this card")
        calls = subject.calls(kernel, x)
        for _ in range(CALLS):
            calls[0]()
            torch.cuda.synchronize()


def read(path: Path) -> dict[str, Any]:
    """Return what was launched, and a row a launch from what the profiler wrote; each call has two launches."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        launched = next(json.loads(line) for line in lines if line.startswith("{"))
    except (OSError, ValueError, StopIteration) as error:
        raise SystemExit(f"{path} is not all that the first command above wrote, to be read here: {error!r}") from error
    launches: dict[int, dict[str, str]] = {}
    for row in csv.DictReader(line for line in lines if line.startswith('"')):
        metrics = launches.setdefault(int(row["ID"]), {"grid": row["Grid Size"]})
        metrics[row["Metric Name"]] = row["Metric Value"].replace(",", "")
    layers = launched.pop("layers")
    names = [{"layer": layer, "launch": part} for layer in layers for _ in range(CALLS) for part in ("t", "layer")]
    if len(names) != len(launches):
        raise SystemExit(f"{path} has {len(launches)} launches, and {', '.join(layers)} make {len(names)}")
    rows = [name | _summary(metrics) for name, (_, metrics) in zip(names, sorted(launches.items()), strict=True)]
    return launched | {"rows": rows}


def _summary(metrics: dict[str, str]) -> dict[str, Any]:
    at_work = float(metrics["SM Active Cycles"]) / float(metrics["Elapsed Cycles"])
    shares = {name: float(metrics[title]) / 100 for name, title in SHARES.items()}
    return {
        "blocks": int(metrics["grid"].strip("()").split(",")[0]),
        "us": float(metrics["Duration"]) / 1e3,
        "megahertz": round(float(metrics["SM Frequency"]) / 1e6),
        "at_work": round(at_work, 3),
        **{name: round(share / at_work if name in OF_ALL else share, 3) for name, share in shares.items()},
    }


def main() -> None:
    """Launch, or read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-2-70b", choices=sorted(LAYERS))
    parser.add_argument("--layers", nargs="+", default=[name for name in SERVED if name != "qkv"])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument(
        "--read", type=Path, help="a file of the profiler's, to be summed up; it says what was launched"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.read is None:
        if reason := no_gpu():
            parser.exit(2, f"error: {reason}\n")
        launch(arguments.model, arguments.layers, arguments.tokens)
        return
    results = read(arguments.read)
    for row in results["rows"]:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
