"""What a plan takes the damage of a site for, against what really happens: the divergence of the model's output.

    python benchmarks/planner_damage.py MODEL --calibration valid.txt [--bits 5 4] [--json results/...]

One site at a time is rounded to nearest, the model runs in float32 on the texts by which choices are judged, and the
Kullback-Leibler divergence from the dense model is taken. Beside it: the damage as it is predicted from gradients, with
the tokens of a text together, and with each token for itself. In the end all sites are rounded at once, which says
whether damages add up.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from slimc.backends import hf
from slimc.calibration import calibration_batches
from slimc.ir.capture import capture
from slimc.passes.solvers import quantize_absmax
from slimc.planning.check import measured_damage
from slimc.planning.gradients import Samples
from slimc.planning.menu import Menu
from slimc.progress import PlainProgress

GROUP = 64


def error(weight: Tensor, bits: int) -> Tensor:
    """Return what rounding to nearest changes."""
    exact = weight.detach()
    return quantize_absmax(exact, bits, GROUP, symmetric=True, scale_dtype=torch.float32).dequantize() - exact


def main() -> None:
    """Predict, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="*", default=[5, 4])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer = hf.load_model(options.model)
    model.to(options.device).float()
    vocabulary = hf.vocabulary_size(model)
    menu = Menu.load(None)
    text = options.calibration.read_text(encoding="utf-8")
    batches = calibration_batches(model, text, menu.measuring, tokenizer=tokenizer)
    judged = batches[-menu.measuring.held_out_batches(len(batches)) :]
    program = capture(model, batches, dense=dict.fromkeys(hf.output_embedding_names(model), "output embedding"))
    inputs = [program.flatten_inputs(*batch) for batch in judged]
    samples = Samples(
        program, inputs, vocabulary=vocabulary, seed=0, device=None, progress=PlainProgress(print, every=30)
    )
    rows = []
    for site, sample in samples.items():
        alone = replace(sample, texts=torch.arange(len(sample.inputs), device=sample.inputs.device))
        for bits in options.bits:
            moved = sample.inputs @ error(program.dense_weight(program.sites[site]), bits).t()
            rows.append({"site": site, "bits": bits, "texts": sample.damage(moved), "tokens": alone.damage(moved)})
    del samples

    changed = copy.deepcopy(model)
    weights = {site: changed.get_submodule(site).weight.data for site in program.sites}
    for row in rows:
        weight = weights[row["site"]]
        kept = weight.clone()
        weight += error(weight, row["bits"])
        row["measured"] = measured_damage(model, changed, judged, vocabulary=vocabulary)
        weight.copy_(kept)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    record = {"device": device, "torch": str(torch.__version__), "rows": rows, "summary": []}
    for bits in options.bits:
        for weight in weights.values():
            weight += error(weight, bits)
        together = measured_damage(model, changed, judged, vocabulary=vocabulary)
        changed.load_state_dict(model.state_dict())
        here = [row for row in rows if row["bits"] == bits]
        summed = sum(row["measured"] for row in here)
        print(f"{bits} bits: all sites at once {together:.4f} nats, one at a time {summed:.4f} in all")
        record["summary"].append({"bits": bits, "together": together, "one at a time": summed})
        for by in ("texts", "tokens"):
            ratios = defaultdict(list)
            for row in here:
                ratios[row["site"].rpartition(".")[2]].append(math.log(row[by] / row["measured"]))
            spread = statistics.pstdev([one for several in ratios.values() for one in several])
            means = {kind: f"{math.exp(statistics.mean(several)):.2f}" for kind, several in ratios.items()}
            print(
                f"  {by:6}: {sum(row[by] for row in here):.4f} in all, deviation of its logarithm {spread:.3f}, {means}"
            )
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
