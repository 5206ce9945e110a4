"""Decode speed on the CPU: a compressed model against the dense bf16 model it was made from, side by side.

    python benchmarks/decode_cpu.py DENSE COMPRESSED [--tokens 32] [--rounds 5] [--json results/...]

Both models generate greedily from the same prompt, in turns; the figures are medians over the rounds, in tokens a
second.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import slimc
from slimc.backends import hf

PROMPT_TOKENS = 32


def tokens_per_second(model: nn.Module, prompt: torch.Tensor, tokens: int) -> float:
    """Return the decode speed of one greedy generation, the prompt's own forward left out."""
    marks: list[float] = []

    class Clock:
        def put(self, _: torch.Tensor) -> None:
            marks.append(time.perf_counter())

        def end(self) -> None:
            """Nothing is open."""

    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=Clock())
    return (len(marks) - 2) / (marks[-1] - marks[1])


def main() -> None:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("compressed")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    dense, _ = hf.load_model(options.dense)
    models = {"dense bf16": dense.to(torch.bfloat16), "slimc": slimc.load(options.compressed)}
    prompt = torch.arange(100, 100 + PROMPT_TOKENS)[None]
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        tokens_per_second(model, prompt, 4)
    for _ in range(options.rounds):
        for name, model in models.items():
            speeds[name].append(tokens_per_second(model, prompt, options.tokens))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = statistics.median(a / b for a, b in zip(speeds["slimc"], speeds["dense bf16"], strict=True))
    for name, speed in medians.items():
        print(f"{name:12} {speed:7.2f} tokens/s")
    print(f"ratio        {ratio:7.2f}")
    if options.json:
        record = {
            "command": "python benchmarks/decode_cpu.py DENSE COMPRESSED",
            "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "torch": str(torch.__version__),
            "tokens_per_second": medians,
            "ratio": ratio,
            "rounds": speeds,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
