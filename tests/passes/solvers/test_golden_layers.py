"""slimc against what the SLiM authors' own code reaches on five seeded layers (the figures are in golden.json).

The layers are rebuilt from their seeds. A figure is met if slimc's error is not higher, to 1e-3 relative.

Where the paper leaves room, what is held to the figures here is: the grid is solved on the dense weight and the mask
taken from Wanda scores of the *original* weight (scores of the quantised weight, or a grid that ignores pruned weights,
miss some of them), and the saliency is the mean absolute activation (the root mean square differs by under 0.1 %).
The weights are float32 numbers here, as they were for the reference, and so is the scale beside the adapters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimc import recipes
from slimc.passes.base import SitePass
from slimc.passes.solvers import nm_mask, plain_adapters, quantize_slim, resolve_rank, slim_adapters, wanda_scores
from slimc.passes.statistics import InputStatistics
from slimc.passes.work import SiteWork

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]

TOLERANCE = 1 + 1e-3


@dataclass(frozen=True)
class Layer:
    figures: dict[str, Any]
    weight: Tensor
    inputs: Tensor

    def weight_error(self, approximation: Tensor) -> float:
        return float((approximation - self.weight).norm() / self.weight.norm())

    def output_error(self, approximation: Tensor) -> float:
        difference = self.inputs @ (approximation - self.weight).T
        return float(difference.norm() / (self.inputs @ self.weight.T).norm())


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"seed{case['seed']}")
def layer(request: pytest.FixtureRequest) -> Layer:
    figures = request.param
    n, k = figures["out_features"], figures["in_features"]
    rng = np.random.default_rng(figures["seed"])
    weight = (rng.standard_normal((n, k)) * 0.02).astype(np.float32)
    weight = (weight * np.exp(0.3 * rng.standard_normal((1, k)))).astype(np.float32)
    weight.reshape(-1)[np.unique(rng.integers(0, n * k, size=n * k // 500))] *= 5
    basis = (rng.standard_normal((k // 8, k)) / np.sqrt(k // 8)).astype(np.float32)
    inputs = (rng.standard_normal((2048, k // 8)) @ basis + 0.5 * rng.standard_normal((2048, k))).astype(np.float32)
    inputs = (inputs * np.exp(rng.standard_normal((1, k)))).astype(np.float32)
    return Layer(figures, torch.from_numpy(weight).bfloat16().float(), torch.from_numpy(inputs))


def wanda_2_4(layer: Layer) -> Tensor:
    return nm_mask(wanda_scores(layer.weight, layer.inputs.square().sum(dim=0)), 2, 4)


def in_16_bit(factors: tuple[Tensor, Tensor]) -> Tensor:
    left, right = (factor.bfloat16().float() for factor in factors)
    return left @ right


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_slim_quant(layer: Layer, bits: int, scale_dtype: torch.dtype) -> None:
    error = layer.weight_error(quantize_slim(layer.weight, bits, scale_dtype=scale_dtype).dequantize())
    assert error <= layer.figures["slim_quant"][str(bits)] * TOLERANCE


def test_wanda_mask(layer: Layer) -> None:
    assert layer.output_error(layer.weight * wanda_2_4(layer)) <= layer.figures["wanda_2:4"] * TOLERANCE


def test_4_bit_2_4_with_adapters(layer: Layer) -> None:
    rank = resolve_rank(0.1, *layer.weight.shape)
    assert rank == layer.figures["rank"]
    compressed = quantize_slim(layer.weight, 4).dequantize() * wanda_2_4(layer)
    error = layer.weight - compressed

    slim = compressed + in_16_bit(slim_adapters(error, layer.inputs.abs().mean(dim=0), rank))
    assert layer.output_error(slim) <= layer.figures["slim_lora"] * TOLERANCE
    plain = compressed + in_16_bit(plain_adapters(error, rank))
    assert layer.output_error(plain) <= layer.figures["naive_lora"] * TOLERANCE


def test_the_default_recipe_lies_far_below_the_reference_at_the_bits_of_4_bit_adapters(layer: Layer) -> None:
    """At most 3.25 bits a weight and 4.25 an element of adapters of the reference's rank, which are in 16 bits.

    No layer may have more than 0.55 of the reference's error. The inputs are those that are fitted to, at which a tenth
    of the recipe's damping would give 0.45; it is that high for the sake of other inputs.
    """
    passes = [one for one in recipes.load(recipes.DEFAULT).build() if isinstance(one, SitePass)]
    wanted = frozenset[str]().union(*(one.statistics() for one in passes))
    statistics = InputStatistics.gather([layer.inputs], wanted, "layer", dense=[layer.inputs])
    work = SiteWork("layer", layer.weight, torch.bfloat16, statistics, lambda: [layer.weight])
    for one in passes:
        one.apply(work)
    packed = work.pack()
    rows, columns = layer.weight.shape
    allowed = 3.25 * rows * columns + 4.25 * layer.figures["rank"] * (rows + columns)
    assert packed.format.bits_per_weight() * rows * columns <= allowed
    assert layer.output_error(packed.decode().float()) <= 0.55 * layer.figures["slim_lora"]
