"""Which measure of a site's error predicts best what it does to the model: the ablation behind ``slimc plan``.

    python benchmarks/planner_proxies.py MODEL --calibration valid.txt --test test.txt [--json results/...]

The menu is measured once at every site. Then plans are made by each measure at several budgets, and the model is judged
with the weights as they were solved on dense inputs: a plan takes a second, and all measures are treated alike. Each
expression for all sites comes first.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimc.backends import hf
from slimc.calibration import calibration_batches
from slimc.ir.capture import capture
from slimc.passes.work import SiteWork
from slimc.planning import knapsack, sensitivity
from slimc.planning.gradients import Sample
from slimc.planning.menu import DENSE, Menu
from slimc.planning.sensitivity import SiteChoices
from slimc.progress import PlainProgress
from slimc.runtime.evaluate import perplexity

BUDGETS = (2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.25, 4.5, 5.0, 6.0)

Measure = Callable[[SiteWork, Sample, Tensor], float]

MEASURED: dict[tuple[str, str], dict[str, float]] = {}
"""All measures of each choice at each site."""

WEIGHTS: dict[tuple[str, str], Tensor] = {}
"""What each choice at each site decodes to."""


def _difference(work: SiteWork, sample: Sample, weight: Tensor) -> Tensor:
    return work.output_difference(weight, sample.inputs.float())


def _gradients(work: SiteWork, sample: Sample, weight: Tensor) -> float:
    return sample.damage(_difference(work, sample, weight))


def _relative(work: SiteWork, _: Sample, weight: Tensor) -> float:
    return (work.output_error(weight, work.held_out or work.statistics) or 0.0) ** 2


def _by_token(work: SiteWork, sample: Sample, weight: Tensor) -> float:
    alone = replace(sample, texts=torch.arange(len(sample.inputs), device=sample.inputs.device))
    return alone.damage(_difference(work, sample, weight))


def _by_site(work: SiteWork, sample: Sample, weight: Tensor) -> float:
    errors = _difference(work, sample, weight).square().sum(1).mean()
    return float(errors * sample.gradients.float().square().mean())


def _by_channel(work: SiteWork, sample: Sample, weight: Tensor) -> float:
    errors = _difference(work, sample, weight).square().mean(0)
    return float((errors * sample.gradients.float().square().mean((0, 1))).sum())


MEASURES: dict[str, Measure] = {
    "gradients": _gradients,
    "gradients, tokens apart": _by_token,
    "gradients^0.75": lambda *case: _gradients(*case) ** 0.75,
    "gradients^0.5": lambda *case: _gradients(*case) ** 0.5,
    "mean squares of a site": _by_site,
    "mean squares of a channel": _by_channel,
    "relative output error": _relative,
    "squared weight error": lambda work, _, weight: float((weight - work.dense).square().sum()),
}


@dataclass(frozen=True)
class Everything(sensitivity.Measure):
    """Judges choices by all measures."""

    def judge(self, name: str, trial: SiteWork, weight: Tensor) -> tuple[float, float]:
        """Keep all measures, and the weight."""
        sample = self.samples[trial.name]
        MEASURED[trial.name, name] = {one: function(trial, sample, weight) for one, function in MEASURES.items()}
        WEIGHTS[trial.name, name] = weight.to(trial.dtype)
        return super().judge(name, trial, weight)


def choose(sites: Sequence[SiteChoices], measure: str, bits: float) -> list[str]:
    """Return the names of the choices that are best by ``measure`` within a budget."""

    def damage(site: SiteChoices, choice: str) -> float:
        return 0.0 if choice == DENSE else MEASURED[site.name, choice][measure]

    damages = [[damage(site, choice.name) for choice in site.choices] for site in sites]
    costs = [[float(choice.nbytes) for choice in site.choices] for site in sites]
    solution = knapsack.solve(damages, costs, bits / 8 * sum(site.weights for site in sites))
    return [site.choices[option].name for site, option in zip(sites, solution.chosen, strict=True)]


def measure(model: nn.Module, tokenizer: Any, text: str, menu: Menu) -> list[SiteChoices]:
    """Measure all choices at all sites."""
    batches = calibration_batches(model, text, menu.measuring, tokenizer=tokenizer)
    dense = dict.fromkeys(hf.output_embedding_names(model), "output embedding")
    program = capture(model, batches, dense=dense)
    return sensitivity.measure(
        program,
        menu.expressions,
        [program.flatten_inputs(*batch) for batch in batches],
        held_out=menu.measuring.held_out_batches(len(batches)),
        vocabulary=hf.vocabulary_size(model),
        progress=PlainProgress(print),
        by=Everything,
    )


def main() -> None:
    """Measure, plan by each measure, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--menu", type=Path, help="a recipe with expressions to choose from")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer = hf.load_model(options.model)
    model.to(options.device)
    windows = hf.tokenize_text(tokenizer, options.test.read_text(encoding="utf-8"), options.windows, 1024)
    windows = windows.to(options.device)
    menu = Menu.load(options.menu)
    sites = measure(model, tokenizer, options.calibration.read_text(encoding="utf-8"), menu)
    weights = sum(site.weights for site in sites)
    modules = dict(model.named_modules())
    dense = {site.name: modules[site.name].weight.detach().clone() for site in sites}
    exact = perplexity(model, windows, batch=4)
    rows: list[dict[str, Any]] = []

    def judge(by: str, choices: Sequence[str]) -> None:
        nbytes, predicted = 0, 0.0
        for site, name in zip(sites, choices, strict=True):
            choice = next(one for one in site.choices if one.name == name)
            nbytes, predicted = nbytes + choice.nbytes, predicted + choice.damage
            weight = dense[site.name] if name == DENSE else WEIGHTS[site.name, name]
            modules[site.name].weight.data.copy_(weight)
        found = perplexity(model, windows, batch=4)
        rows.append({"by": by, "bits": 8 * nbytes / weights, "perplexity": found, "predicted": predicted})
        print(f"{by:28} {8 * nbytes / weights:6.3f} {found:12.3f} nats: predicted {predicted:.4f}, ", end="")
        print(f"measured {math.log(found / exact):.4f}", flush=True)

    for name in menu.expressions:
        judge(f"all {name}", [name] * len(sites))
    for by in MEASURES:
        for bits in BUDGETS:
            judge(by, choose(sites, by, bits))
    if options.json:
        options.json.write_text(json.dumps({"dense": exact, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
