"""Widths of groups: the exact optimum against trying everything, SliM-LLM's search against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from slimc.errors import InputError, NumericsError, RecipeError
from slimc.passes import AllocateBits, Quantize
from slimc.passes.solvers import gptq
from slimc.passes.solvers.allocation import cheapest_widths, group_saliences, search_split, split_widths
from slimc.passes.solvers.ranges import group_grids
from slimc.passes.statistics import InputStatistics
from slimc.passes.work import SiteWork
from tests.passes.solvers.test_golden_layers import Layer, layer  # noqa: F401 - a fixture


@given(
    sizes=st.lists(st.sampled_from([1, 4, 6, 16]), min_size=1, max_size=5),
    widths=st.sets(st.integers(1, 8), min_size=1, max_size=4).map(sorted),
    average=st.floats(1, 9),
    seed=st.integers(0, 999),
)
def test_no_other_widths_within_the_budget_cost_less(
    sizes: list[int], widths: list[int], average: float, seed: int
) -> None:
    # Errors without any order: more bits may cost more here.
    errors = torch.rand(len(sizes), len(widths), generator=torch.Generator().manual_seed(seed))
    budget = int(average * sum(sizes))
    if widths[0] * sum(sizes) > budget:
        with pytest.raises(RecipeError, match=rf"cannot be met: the narrowest codes have {widths[0]}"):
            cheapest_widths(errors, widths, sizes, budget)
        return
    found = cheapest_widths(errors, widths, sizes, budget)

    def spent(chosen: tuple[int, ...]) -> int:
        return sum(width * size for width, size in zip(chosen, sizes, strict=True))

    def cost(chosen: tuple[int, ...]) -> float:
        return sum(float(errors[group, widths.index(width)]) for group, width in enumerate(chosen))

    assert spent(found) <= budget
    best = min(cost(chosen) for chosen in itertools.product(widths, repeat=len(sizes)) if spent(chosen) <= budget)
    assert cost(found) == pytest.approx(best, abs=1e-6)


def test_of_equal_widths_the_narrower_are_taken() -> None:
    assert cheapest_widths(torch.zeros(3, 2), [2, 3], [4, 4, 4], 36) == (2, 2, 2)
    with pytest.raises(InputError, match="not in ascending order"):
        cheapest_widths(torch.zeros(1, 2), [3, 2], [4], 12)
    with pytest.raises(NumericsError, match="'errors'"):
        cheapest_widths(torch.full((1, 1), torch.nan), [2], [4], 12)


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    return group_grids(
        weight,
        [bits] * (weight.shape[1] // group),
        group,
        symmetric=False,
        scale_dtype=torch.float32,
        search=None,
        curvature=torch.ones(weight.shape[1]),
    ).dequantize()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("seed", range(4))
def test_the_split_has_the_least_divergence_of_all(seed: int, direction: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    group, groups, bits = 4, 7, 3
    weight = torch.randn(12, group * groups, generator=generator)
    inputs = torch.randn(50, group * groups, generator=generator)
    inputs *= torch.randn(groups, generator=generator).mul(1.5).exp().repeat_interleave(group)
    saliences = group_saliences(weight, inputs.square().mean(0), group)
    fewer, plain, more = (rounded(weight, width, group) for width in (bits - 1, bits, bits + 1))

    def divergence(p: int) -> float:
        order, mixed = saliences.argsort().tolist(), plain.clone()
        for index, source in [*((one, fewer) for one in order[:p]), *((one, more) for one in order[groups - p :])]:
            mixed[:, index * group : (index + 1) * group] = source[:, index * group : (index + 1) * group]
        logits = [functional.log_softmax(inputs.double() @ one.double().T, 1) for one in (mixed, weight)]
        first, second = logits if direction == "forward" else logits[::-1]
        return float(functional.kl_div(first, second, log_target=True, reduction="batchmean"))

    found = search_split(weight, (fewer, plain, more), inputs, saliences, group, direction)
    divergences = [divergence(p) for p in range(groups // 2 + 1)]
    assert divergences[found] == pytest.approx(min(divergences), rel=1e-4)
    widths = split_widths(saliences, found, bits, groups)
    assert sum(widths) == bits * groups
    assert widths.count(bits - 1) == widths.count(bits + 1) == found


def test_no_split_and_the_full_split_are_tried() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    saliences = torch.tensor([1.0, 2.0, 3.0, 4.0])
    worse = rounded(weight, 2, 4)
    assert search_split(weight, (worse, weight, worse), inputs, saliences, 4) == 0
    assert search_split(weight, (weight, worse, weight), inputs, saliences, 4) == 2
    assert split_widths(saliences, 2, 3, 5) == (2, 2, 4, 4, 3)


@pytest.mark.parametrize(("group", "bits"), [(64, 3.0), (64, 2.0), (32, 2.5)])
def test_widths_by_output_error_beat_one_width_on_the_golden_layers(layer: Layer, group: int, bits: float) -> None:  # noqa: F811
    """At equal bits, 3 % less error than GPTQ at least; with 2.5 bits, of which GPTQ has none, less than at 2."""
    gram = layer.inputs.T @ layer.inputs
    columns = layer.weight.shape[1]

    def choose(weight: Tensor, curvature: Tensor, *_: object) -> tuple[int, ...]:
        widths = range(1, 9)
        costs = [(rounded(weight, width, group) - weight).square().sum(0) * curvature for width in widths]
        errors = torch.stack([cost.view(-1, group).sum(1) for cost in costs], 1)
        return cheapest_widths(errors, widths, [group] * (columns // group), int(bits * columns))

    plain = gptq(layer.weight, gram, bits=int(bits), group=group)
    mixed = gptq(layer.weight, gram, bits=int(bits), group=group, widths=choose)
    assert float(mixed.column_widths().mean()) <= bits
    assert layer.output_error(mixed.dequantize()) <= 0.97 * layer.output_error(plain.dequantize())


def gptq_as_published(weight: Tensor, gram: Tensor, bits: int, group: int) -> Tensor:
    """Algorithm 1 of the paper as its authors' code has it, column by column, with the grid of a group at its start."""
    weight = weight.double().clone()
    hessian = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    for column in range(len(gram)):
        if column % group == 0:
            inside = weight[:, column : column + group]
            low, high = inside.amin(1).clamp(max=0), inside.amax(1).clamp(min=0)
            scale = (high - low) / (2**bits - 1)
            zero = (-low / scale).round()
        code = ((weight[:, column] / scale).round() + zero).clamp(0, 2**bits - 1)
        error = (weight[:, column] - (code - zero) * scale) / upper[column, column]
        weight[:, column:] -= error[:, None] * upper[column, column:]
        weight[:, column] = (code - zero) * scale
    return weight.float()


MEASURED = {0: 0.913, 1: 0.800, 2: 0.937, 3: 0.966, 4: 0.818}
"""Output errors of widths by output over those of GPTQ, 3 bits in groups of 64, by the seed of the layer."""


def test_the_passes_beat_published_gptq_at_3_bits(layer: Layer) -> None:  # noqa: F811
    statistics = InputStatistics.gather([layer.inputs], {"activations", "gram"}, "layer")
    work = SiteWork("layer", layer.weight, torch.float32, statistics, list)
    for one in (AllocateBits(3, 64, "output"), Quantize("gptq")):
        one.apply(work)
    mixed, packed = work.quantized, work.pack()
    assert packed.format.bits_per_weight() == 3 + (32 + 8) / 64
    assert float(mixed.column_widths().mean()) <= 3
    published = gptq_as_published(layer.weight, statistics.gram, 3, 64)
    ratio = layer.output_error(packed.decode()) / layer.output_error(published)
    assert ratio <= 0.97
    assert ratio == pytest.approx(MEASURED[layer.figures["seed"]], abs=0.01)
