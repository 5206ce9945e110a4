"""Sparse plus signs (SLaB) against pruning alone, on SmolLM2-135M: perplexity, published ratio, true bits, file sizes.

    python benchmarks/sparse_binary.py MODEL --calibration valid.txt --test test.txt [--rows NAME...] [--json FILE]

Model, texts and windows are those of ``benchmarks/smollm2.py``. The published ratio counts 16 bits for a value and one
for a sign, and nothing for where values are; bits count everything that is stored. A row is a method or a recipe;
``--rows table`` stands for the comparison, ``--rows ablation`` for what each ingredient is worth. Rows of other names
that FILE holds already stay there. Seconds and peak memory are those of the compression; bytes are those of the files.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shlex
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimc
from slimc import recipes
from slimc.backends import hf
from slimc.passes import Calibrate, Decompose, Fuse, LowRank, Pass, Prune
from slimc.passes.report import Report
from slimc.runtime.evaluate import perplexity

CALIBRATE = Calibrate(samples=64, length=512)
RATIOS = {"50 %": 0.5, "60 %": 0.6, "70 %": 0.7, "80 %": 0.8}
METHODS = ("magnitude", "wanda", "sparsegpt")


def alone(step: Pass) -> list[Pass]:
    """Return a recipe of one step."""
    return [CALIBRATE, step, Fuse()]


TABLE: dict[str, list[Pass]] = {
    **{f"{method} {name}": alone(Prune(ratio, method)) for name, ratio in RATIOS.items() for method in METHODS},
    **{f"slab {name}": alone(Decompose(ratio=ratio)) for name, ratio in RATIOS.items()},
    **{f"slab {name}, feedback": alone(Decompose(ratio=ratio, feedback=True)) for name, ratio in RATIOS.items()},
    **{f"{method} 2:4": alone(Prune("2:4", method)) for method in METHODS},
    "slab 2:4, 50 %": alone(Decompose(pattern="2:4")),
    "slab 2:4": alone(Decompose(ratio=None, pattern="2:4")),
    "slab 2:4, feedback": alone(Decompose(ratio=None, pattern="2:4", feedback=True)),
    "slab 4:8, 50 %": alone(Decompose(pattern="4:8")),
    **{f"slab 2:4 w{bits}": alone(Decompose(ratio=None, pattern="2:4", bits=bits)) for bits in (4, 3)},
    **{
        f"slab 2:4 w{bits}, feedback": alone(Decompose(ratio=None, pattern="2:4", bits=bits, feedback=True))
        for bits in (4, 3)
    },
}
ABLATION: dict[str, list[Pass]] = {
    # What S keeps at 50 % when the binary part is paid for, without that part; and a low-rank part in its place.
    "slab 50 %, S alone": alone(Prune(0.5629)),
    "slab 50 %, adapters in place of signs": [CALIBRATE, Prune(0.5629), LowRank(rank=26), Fuse()],
    **{f"slab 50 %, {rounds} rounds": alone(Decompose(rounds=rounds)) for rounds in (1, 2, 5, 10, 40)},
    **{f"slab 50 %, rank {rank}": alone(Decompose(rank=rank)) for rank in (2, 4, 16)},
    "slab 50 %, weighted": alone(Decompose(weighting="activations")),
    "slab 2:4, weighted": alone(Decompose(ratio=None, pattern="2:4", weighting="activations")),
}
EVERYTHING = TABLE | ABLATION
GROUPS = {"table": list(TABLE), "ablation": list(ABLATION)}


def file_bytes(small: nn.Module, model: nn.Module, report: Report) -> tuple[int, int]:
    """Return the bytes of the weight files of a compressed model, and what the report promises of them."""
    with tempfile.TemporaryDirectory() as folder:
        slimc.save(small, f"{folder}/model")
        found = sum(path.stat().st_size for path in Path(folder, "model").glob("*.safetensors"))
    promised = sum(row.bits * row.shape[0] * row.shape[1] / 8 for row in report.sites)
    names = {f"{row.name}.weight" for row in report.sites}
    dense = [parameter for name, parameter in model.named_parameters() if name not in names]
    return found, round(promised + sum(parameter.nbytes for parameter in dense))


def published_ratio(report: Report, passes: list[Pass]) -> float | None:
    """Return the compression ratio as it is published: over all weights, or what pruning dropped."""
    weights = [row.shape[0] * row.shape[1] for row in report.sites]
    if all(row.compression_ratio is not None for row in report.sites):
        return sum((row.compression_ratio or 0) * size for row, size in zip(report.sites, weights, strict=True)) / sum(
            weights
        )
    steps = [one for one in passes if isinstance(one, Prune)]
    if not steps or any(isinstance(one, LowRank) for one in passes):
        return None
    return 0.5 if isinstance(steps[0].pattern, str) else steps[0].pattern


def measure(model: nn.Module, tokenizer: Any, name: str, text: str, windows: torch.Tensor) -> dict[str, Any]:
    """Compress, save and evaluate; return the row."""
    passes = EVERYTHING.get(name) or recipes.load(name).build()
    on_gpu = windows.is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    small = slimc.compile(model, text, passes, tokenizer=tokenizer)
    seconds = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = slimc.report(small)
    found, promised = file_bytes(small, model, report)
    errors = [row.output_error for row in report.sites if row.output_error is not None]
    return {
        "variant": name,
        "perplexity": perplexity(small, windows),
        "published_ratio": published_ratio(report, passes),
        "bits": report.bits_per_weight,
        "output_error": sum(errors) / len(errors) if errors else None,
        "seconds": seconds,
        "peak_memory_mib": memory / 2**20,
        "file_bytes": found,
        "promised_bytes": promised,
    }


def main() -> None:
    """Run the chosen rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=["table"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    model, tokenizer = hf.load_model(options.model)
    model.to(options.device)
    windows = hf.tokenize_text(tokenizer, options.test.read_text(encoding="utf-8"), 16, 1024).to(options.device)
    text = options.calibration.read_text(encoding="utf-8")
    command = "python benchmarks/sparse_binary.py MODEL --calibration valid.txt --test test.txt"
    where = {
        "command": " ".join([command, "--rows", *map(shlex.quote, options.rows)]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU",
        "torch": str(torch.__version__),
    }
    results: dict[str, dict[str, Any]] = {}
    if options.json and options.json.is_file():
        results = {row["variant"]: row for row in json.loads(options.json.read_text(encoding="utf-8"))["rows"]}

    print(
        f"{'variant':45} {'ratio':>6} {'bits':>7} {'perplexity':>11} {'error':>7} {'s':>6} {'MiB':>6} {'file':>7}",
        flush=True,
    )
    for name in [row for chosen in options.rows for row in GROUPS.get(chosen, [chosen])]:
        row = measure(model, tokenizer, name, text, windows)
        results[name] = row | where
        ratio = "-" if row["published_ratio"] is None else f"{row['published_ratio']:.3f}"
        print(
            f"{name:45} {ratio:>6} {row['bits']:7.3f} {row['perplexity']:11.3f} {row['output_error'] or 0:7.4f} "
            f"{row['seconds']:6.1f} {row['peak_memory_mib']:6.0f} {row['file_bytes'] / row['promised_bytes']:7.4f}",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps({"rows": list(results.values())}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
