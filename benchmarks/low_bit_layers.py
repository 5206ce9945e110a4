"""Take SliM-LLM apart at some layers of SmolLM2-135M: output errors and processor time of its ingredients, on a CPU.

    python benchmarks/low_bit_layers.py MODEL --calibration valid.txt [--layers 0,4,12,20,29] [--json results/...]

Each linear layer of these decoder layers is quantised by itself, for the inputs that the dense model gives it on the
first 8 x 512 tokens of WikiText-2 valid; what stands in the table is the mean over them of ``|X (W' - W)^T| / |X W^T|``
on the same tokens, and the seconds of all solvers on one thread. Groups have 64 columns and a zero point. Errors of
single layers tell ingredients apart in a minute; they are no perplexity (`benchmarks/low_bit.py`).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimc.backends import hf
from slimc.passes import AllocateBits, Quantize
from slimc.passes.statistics import InputStatistics
from slimc.passes.work import SiteWork

GROUP = 64
OUTPUT: dict[str, Any] = {"calibrate": "sqc", "preset": "output"}
ORDER: dict[str, Any] = {"order": "columns", "static_groups": True}


def recipes(bits: int) -> dict[str, list[AllocateBits | Quantize]]:
    """Return what is compared."""
    plain = partial(Quantize, "gptq", bits, GROUP)
    by_output, by_kl = AllocateBits(bits, GROUP, "output", widest=4), AllocateBits(bits, GROUP)
    return {
        "rtn": [Quantize("absmax", bits, GROUP, symmetric=False)],
        "gptq": [plain()],
        "gptq + sba": [by_kl, plain()],
        "gptq + widths by output": [by_output, plain()],
        "gptq + sqc, the paper's": [plain(calibrate="sqc")],
        "gptq + sqc, the code's": [plain(calibrate="sqc", preset="reference")],
        "gptq + sqc by output": [plain(**OUTPUT)],
        "gptq + order": [plain(**ORDER)],
        "slim-llm, the paper's": [by_kl, plain(calibrate="sqc")],
        "slim-llm without order": [by_output, plain(**OUTPUT)],
        "slim-llm without widths": [plain(**OUTPUT, **ORDER)],
        "slim-llm": [by_output, plain(**OUTPUT, **ORDER)],
    }


def gather(model: nn.Module, tokens: Tensor, chosen: list[str]) -> Iterator[tuple[str, Tensor, InputStatistics]]:
    """Run the dense model once; yield name, weight and input statistics of each linear layer of the chosen ones."""
    inputs: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(f"layers.{number}." in name for number in chosen):
            inputs[name] = []
            hooks.append(
                module.register_forward_pre_hook(partial(lambda to, _module, given: to.append(given[0]), inputs[name]))
            )
    with torch.no_grad():
        for row in tokens:
            model(row[None])
    for hook in hooks:
        hook.remove()
    for name, seen in inputs.items():
        weight = model.get_submodule(name).weight.detach().float()
        yield name, weight, InputStatistics.gather(seen, {"activations", "gram"}, name)


def error(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    """Return the relative error of the outputs."""
    change = found - weight
    return float(((change @ gram * change).sum() / (weight @ gram * weight).sum()).sqrt())


def main() -> None:
    """Measure, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--layers", default="0,4,12,20,29")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = hf.load_model(options.model)
    tokens = hf.tokenize_text(tokenizer, options.calibration.read_text(encoding="utf-8"), 8, 512)
    sites = list(gather(model, tokens, options.layers.split(",")))
    print(f"{'recipe':28} {'bits':>4} {'error':>8} {'seconds':>8}")
    rows = []
    for bits in (2, 3):
        for name, passes in recipes(bits).items():
            errors, started = [], time.process_time()
            for site, weight, statistics in sites:
                work = SiteWork(site, weight, torch.bfloat16, statistics, list)
                for one in passes:
                    one.apply(work)
                errors.append(error(weight, work.pack().decode(), statistics.gram))
            mean, seconds = sum(errors) / len(errors), time.process_time() - started
            rows.append({"recipe": name, "bits": bits, "error": mean, "seconds": seconds})
            print(f"{name:28} {bits:4} {mean:8.4f} {seconds:8.1f}", flush=True)
    if options.json:
        command = "python benchmarks/low_bit_layers.py MODEL --calibration valid.txt"
        command += f" --layers {options.layers}" if options.layers != parser.get_default("layers") else ""
        record = {
            "command": command,
            "device": f"{platform.machine()} CPU, one thread",
            "sites": len(sites),
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
