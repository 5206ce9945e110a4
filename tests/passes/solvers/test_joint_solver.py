"""Laws of the joint solver: what it reduces to, that it is the best for a single block, and what it gains."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from slimc.errors import InputError, NumericsError, RecipeError
from slimc.passes.solvers import (
    Group,
    Quantized,
    damped,
    nm_mask,
    quantize_absmax,
    quantize_slim,
    round_to_grid,
    solve_jointly,
    sparsegpt,
)


def layer(seed: int, rows: int = 24, columns: int = 60, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """Return a weight, and the Gram matrix of inputs whose channels are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    inputs = inputs * torch.rand(columns, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator), damped(inputs.T @ inputs, 1e-3)


def output_error(weight: Tensor, gram: Tensor, values: Tensor) -> float:
    error = (values - weight).double()
    return float(((error @ gram.double()) * error).sum())


@pytest.mark.parametrize("seed", range(3))
def test_uncorrelated_inputs_give_plain_magnitude_pruning(seed: int) -> None:
    weight, _ = layer(seed)
    pruned, mask = solve_jointly(weight, 7 * torch.eye(60), None, pattern=(2, 4))
    assert torch.equal(mask, nm_mask(weight.abs(), 2, 4))
    assert isinstance(pruned, Tensor)
    assert torch.allclose(pruned, weight * mask, atol=1e-5)
    grid = quantize_absmax(weight, 4, 16)
    stored, mask = solve_jointly(weight, torch.eye(60), grid, pattern=(4, 4))
    assert isinstance(stored, Quantized)
    assert bool(mask.all())
    assert torch.equal(stored.codes, round_to_grid(weight, grid).codes)


@pytest.mark.parametrize("seed", range(4))
def test_without_pruning_it_is_gptq(seed: int) -> None:
    """Babai's nearest plane within a block is GPTQ's loop over its columns."""
    weight, gram = layer(seed)
    grid = quantize_slim(weight, 3, 20)
    blocks, _ = solve_jointly(weight, gram, grid, pattern=(4, 4))
    loop, _ = sparsegpt(weight, gram, sparsity=0.0, grid=grid, damping=1e-6)
    assert isinstance(blocks, Quantized)
    # Two roads to the same number may round a tie differently, and later columns then differ for a reason.
    assert float((blocks.codes != loop.codes).float().mean()) < 0.02


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 4), (1, 2), (4, 6)])
@pytest.mark.parametrize("group", [None, "channel", 16])
def test_what_is_stored_is_valid(pattern: tuple[int, int], group: Group) -> None:
    weight, gram = layer(0)
    for symmetric in (True, False):
        grid = quantize_absmax(weight, 3, group, symmetric=symmetric)
        stored, mask = solve_jointly(weight, gram, grid, pattern=pattern, block=17)
        assert isinstance(stored, Quantized)
        assert bool((mask.view(24, -1, pattern[1]).sum(2) == pattern[0]).all())
        assert torch.equal(stored.dequantize() * ~mask, torch.zeros_like(weight))
        assert torch.equal(stored.scale, grid.scale)
        assert int(stored.codes.max()) < 8


def test_a_single_block_gets_the_mask_of_the_least_error() -> None:
    """Real values: the best mask is that whose least-squares fit leaves least, and the values are that fit."""
    weight, gram = layer(5, rows=9, columns=4)
    found, mask = solve_jointly(weight, gram, None, pattern=(2, 4))
    assert isinstance(found, Tensor)
    for row in range(9):
        fits = []
        for members in itertools.combinations(range(4), 2):
            kept = list(members)
            values = torch.zeros(4, dtype=torch.float64)
            values[kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight[row].double())
            error = values - weight[row]
            fits.append((float(error @ gram @ error), members, values))
        least = min(fits, key=lambda fit: fit[0])
        assert tuple(mask[row].nonzero().flatten().tolist()) == least[1]
        assert torch.allclose(found[row].double(), least[2], atol=1e-4)


def test_it_beats_the_scores_of_single_entries_on_the_whole() -> None:
    errors = []
    for seed in range(6):
        weight, gram = layer(seed, rows=48, columns=120)
        grid = quantize_slim(weight, 4, 40)
        joint, joint_mask = solve_jointly(weight, gram, grid, pattern=(2, 4))
        single, mask = sparsegpt(weight, gram, sparsity=(2, 4), grid=grid, damping=1e-6)
        assert isinstance(joint, Quantized)
        pair = (joint.dequantize() * joint_mask, single.dequantize() * mask)
        errors.append([output_error(weight, gram, values) for values in pair])
    found, other = torch.tensor(errors).log().mean(0)
    assert found < other


def test_what_cannot_be() -> None:
    weight, gram = layer(0)
    with pytest.raises(RecipeError, match="60 columns are no multiple of 7"):
        solve_jointly(weight, gram, None, pattern=(2, 7))
    with pytest.raises(RecipeError, match="6:12 allows too many masks"):
        solve_jointly(weight, gram, None, pattern=(6, 12))
    with pytest.raises(InputError, match="'gram'"):
        solve_jointly(weight, gram[:8, :8], None, pattern=(2, 4))
    with pytest.raises(NumericsError, match="not X.T X of any input"):
        solve_jointly(weight, torch.ones(60, 60) - 90 * (1 - torch.eye(60)), None, pattern=(2, 4))
