"""Whether a plan for the time of a token keeps what it promises: predicted against measured microseconds, on a GPU.

    python benchmarks/planner_latency.py [--budgets 0.5x 0.6x 0.8x] [--layers 2] [--json results/...]

A model of Llama-2-7B's layers, a few of them and with random weights, is planned for ``decode`` and carried out. What
the plan promises is the sum of times of forms, each taken once. Beside it: the sum of the layers' own times as they
are in the compressed model, each with a cold cache, and the dense model's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import slimc
from slimc import api
from slimc.backends import tuning
from slimc.backends.latency import DecodeTimes
from slimc.passes import Calibrate, Fuse, LowRank, Pass, PerSite, Prune, Quantize
from slimc.planning.sensitivity import SiteChoices
from slimc.progress import SilentProgress
from slimc.runtime.modules import SlimLinear

MENU: Sequence[Pass] = [
    Calibrate(),
    PerSite(
        {
            "int4/64": [Quantize("absmax", 4, 64)],
            "int4/64+adapters": [Quantize("absmax", 4, 64), LowRank("svd", 64, bits=4)],
            "2:4 int4": [Quantize("absmax", 4), Prune("2:4", method="magnitude")],
            "int3/64": [Quantize("absmax", 3, 64)],
        }
    ),
    Fuse(),
]
TOKENS = 512


def dense_model(layers: int) -> LlamaForCausalLM:
    """Return a model with the layers of Llama-2-7B."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).eval()


def measured(model: nn.Module, sites: Sequence[SiteChoices]) -> float:
    """Return microseconds of all layers of ``model`` that are planned, one after another, each with a cold cache."""
    total = 0.0
    for site in sites:
        layer = model.get_submodule(site.name)
        x = torch.randn(1, site.shape[1], device="cuda", dtype=torch.bfloat16)
        total += tuning.microseconds(lambda x=x, layer=layer: _product(layer, x), torch.device("cuda"))
    return total


def _product(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) if isinstance(layer, SlimLinear) else F.linear(x, layer.weight)  # type: ignore[arg-type]


def main() -> None:
    """Plan for each budget, carry it out, and time it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="*", default=["0.5x", "0.6x", "0.8x", "4bpw"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--target", default="decode@h100")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = dense_model(options.layers)
    text = [torch.randint(0, 1024, (1, TOKENS), device="cuda") for _ in range(4)]
    found = api.sensitivities(model, text, menu=MENU)
    times = DecodeTimes(options.target, SilentProgress())(choice for site in found.sites for choice in site.choices)
    with torch.inference_mode():
        dense = measured(model, found.sites)
    rows: list[dict[str, Any]] = []
    print(f"dense: {dense:.0f} us")
    for budget in options.budgets:
        plan = found.plan(budget, options.target, times=times)
        small = slimc.compile(model, text, plan.recipe.build(), exclude=plan.recipe.exclude)
        with torch.inference_mode():
            real = measured(small, found.sites)
        predicted = plan.microseconds or 0.0
        rows.append({"budget": budget, "predicted": predicted, "measured": real, "choices": plan.counts()})
        print(f"{budget:>6}: predicted {predicted:8.0f} us, measured {real:8.0f} us, {real / predicted:.3f} x", end="")
        print(f"  {plan.counts()}", flush=True)
        if options.json:
            record = {"device": torch.cuda.get_device_name(), "layers": options.layers, "dense": dense, "rows": rows}
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
