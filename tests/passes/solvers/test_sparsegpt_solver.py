"""Laws of SparseGPT: what it reduces to, exact counts, and that its compensation lowers the output error."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from slimc.errors import InputError, NumericsError, RecipeError
from slimc.passes.solvers import (
    Group,
    Quantized,
    nm_mask,
    quantize_absmax,
    quantize_slim,
    round_to_grid,
    sparsegpt,
    unstructured_mask,
)
from slimc.passes.solvers.error_feedback import visiting_order

# The package exports the function under the name of its module.
solver = importlib.import_module("slimc.passes.solvers.sparsegpt")


def layer(seed: int, rows: int = 24, columns: int = 60, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """Return a weight and inputs whose channels are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs * torch.rand(columns, generator=generator).exp()


def output_error(inputs: Tensor, weight: Tensor, approximation: Tensor) -> float:
    return float((inputs @ (approximation - weight).T).norm() / (inputs @ weight.T).norm())


@pytest.mark.parametrize("seed", range(3))
def test_uncorrelated_inputs_give_plain_magnitude_pruning(seed: int) -> None:
    weight, _ = layer(seed)
    pruned, mask = sparsegpt(weight, torch.eye(60) * 7, sparsity=(2, 4))
    assert torch.equal(mask, nm_mask(weight.abs(), 2, 4))
    assert torch.equal(pruned, weight * mask)
    pruned, mask = sparsegpt(weight, torch.eye(60), sparsity=0.3)
    assert torch.equal(mask, unstructured_mask(weight.abs(), 0.3, per="tensor"))
    assert torch.equal(pruned, weight * mask)
    grid = quantize_absmax(weight, 4, 16)
    quantized, mask = sparsegpt(weight, torch.eye(60), sparsity=(2, 4), grid=grid)
    assert torch.equal(quantized.codes, round_to_grid(weight * mask, grid).codes)


@pytest.mark.parametrize("sparsity", [(2, 4), (1, 3), (5, 5), 0.5, 0.29, 0.0])
@pytest.mark.parametrize("block", [1, 7, 32, 128])
def test_counts_are_exact(sparsity: tuple[int, int] | float, block: int) -> None:
    weight, inputs = layer(0)
    pruned, mask = sparsegpt(weight, inputs.T @ inputs, sparsity=sparsity, block=block)
    if isinstance(sparsity, tuple):
        assert bool((mask.view(24, -1, sparsity[1]).sum(dim=2) == sparsity[0]).all())
    else:
        assert int((~mask).sum()) == int(sparsity * weight.numel() + 1e-9)
    assert bool((pruned[~mask] == 0).all())


@pytest.mark.parametrize("seed", range(4))
def test_the_block_of_lazy_updates_does_not_change_nm_results(seed: int) -> None:
    weight, inputs = layer(seed)
    gram = inputs.T @ inputs
    whole, mask = sparsegpt(weight, gram, sparsity=(2, 4), block=60)
    lazy, lazy_mask = sparsegpt(weight, gram, sparsity=(2, 4), block=8)
    assert torch.equal(mask, lazy_mask)
    assert torch.allclose(whole, lazy, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparsity", [(2, 4), 0.5])
def test_compensation_beats_plain_masking(seed: int, sparsity: tuple[int, int] | float) -> None:
    weight, inputs = layer(seed)
    gram = inputs.T @ inputs
    pruned, mask = sparsegpt(weight, gram, sparsity=sparsity)
    assert output_error(inputs, weight, pruned) < output_error(inputs, weight, weight * mask)
    # And it beats the mask that the same saliency, |w| / U_jj, chooses without looking at what came before.
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(60)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    scores = weight.abs() / upper.diagonal().float()
    static = nm_mask(scores, 2, 4) if isinstance(sparsity, tuple) else unstructured_mask(scores, sparsity, per="tensor")
    assert output_error(inputs, weight, pruned) < output_error(inputs, weight, weight * static)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("group", [None, "channel", 48])
def test_mask_and_grid_in_one_loop_beat_one_after_the_other(seed: int, group: Group) -> None:
    # At 3 bits, where rounding weighs about as much as pruning; the gain is 5 % on average and not a law in one layer.
    weight, inputs = layer(seed, rows=64, columns=128, tokens=1000)
    gram = inputs.T @ inputs
    grid = quantize_slim(weight, 3, group)
    joint, mask = sparsegpt(weight, gram, sparsity=(2, 4), grid=grid)
    assert isinstance(joint, Quantized)
    assert torch.equal(joint.scale, grid.scale)
    assert bool((joint.dequantize()[~mask] == 0).all())
    pruned, _ = sparsegpt(weight, gram, sparsity=(2, 4))
    after = round_to_grid(pruned, grid).dequantize()
    assert output_error(inputs, weight, joint.dequantize()) < output_error(inputs, weight, after)


def test_ratio_zero_with_a_grid_is_gptq() -> None:
    weight, inputs = layer(1)
    grid = quantize_absmax(weight, 3, 16, symmetric=False)
    quantized, mask = sparsegpt(weight, inputs.T @ inputs, sparsity=0.0, grid=grid)
    assert bool(mask.all())
    assert quantized.zero_point is grid.zero_point
    assert output_error(inputs, weight, quantized.dequantize()) < output_error(inputs, weight, grid.dequantize())


def test_first_column_follows_the_published_update() -> None:
    weight, inputs = layer(2, rows=3, columns=4)
    # Columns are visited by falling energy; put in that order, they are visited from left to right.
    inputs = inputs[:, inputs.square().sum(0).argsort(descending=True)]
    gram = (inputs.T @ inputs).double()
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(4))
    grid = quantize_absmax(weight, 8)
    quantized, _ = sparsegpt(weight, gram, sparsity=0.0, grid=grid, block=4)
    first = round_to_grid(weight, grid).dequantize()[:, 0]
    # The optimal brain surgeon's update of the second weight, given the first one fixed.
    moved = weight[:, 1] - (weight[:, 0] - first) * (inverse[1, 0] / inverse[0, 0]).float()
    expected = round_to_grid(torch.stack([first, moved, *weight[:, 2:].T], dim=1), grid).codes[:, 1]
    assert torch.equal(quantized.codes[:, 0], grid.codes[:, 0])
    assert torch.equal(quantized.codes[:, 1], expected)


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_visiting_strong_columns_first_lowers_the_output_error(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_error() -> float:
        errors = []
        for seed in range(8):
            weight, inputs = layer(seed, rows=48)
            sizes = torch.randn(60, generator=torch.Generator().manual_seed(seed)).mul(spread).exp()
            inputs = inputs * sizes
            pruned, _ = sparsegpt(weight, inputs.T @ inputs, sparsity=(2, 4))
            errors.append(output_error(inputs, weight, pruned))
        return sum(errors) / len(errors)

    by_energy = mean_error()
    with monkeypatch.context() as patch:
        patch.setattr(solver, "visiting_order", lambda gram, width: torch.arange(len(gram)))
        from_left_to_right = mean_error()
    assert by_energy < from_left_to_right


def test_unstructured_pruning_takes_most_from_weak_columns() -> None:
    """A block of columns loses a fixed share, so strong and weak columns must meet in one block."""
    weight, inputs = layer(4, rows=48)
    sizes = torch.ones(60)
    sizes[::2] = 20
    _, mask = sparsegpt(weight, (inputs * sizes).T @ (inputs * sizes), sparsity=0.5, block=10)
    kept = mask.float().mean(0)
    assert float(kept[::2].mean()) > 0.75
    assert float(kept[1::2].mean()) < 0.25


def test_nm_blocks_stay_together_when_columns_are_reordered() -> None:
    weight, inputs = layer(5)
    inputs = inputs * torch.rand(60, generator=torch.Generator().manual_seed(1)).mul(6).exp()
    order = visiting_order(inputs.T @ inputs, 4)
    blocks = order.view(-1, 4)
    assert torch.equal(blocks % 4, torch.arange(4).expand(15, 4))
    assert torch.equal(order.sort().values, torch.arange(60))
    energy = inputs.square().sum(0).view(-1, 4).sum(1)[blocks[:, 0] // 4]
    assert torch.equal(energy, energy.sort(descending=True).values)
    _, mask = sparsegpt(weight, inputs.T @ inputs, sparsity=(2, 4))
    assert bool((mask.view(24, 15, 4).sum(2) == 2).all())


def test_dead_inputs_are_pruned_first_and_otherwise_keep_their_weight() -> None:
    weight, inputs = layer(3)
    weight = weight.abs() + 1
    weight[:, ::4] += 100
    inputs[:, ::4] = 0
    inputs[:, 1::4] = 0
    inputs[:, 2:8] = 0
    pruned, mask = sparsegpt(weight, inputs.T @ inputs, sparsity=(2, 4))
    assert not mask[:, 8::4].any()
    assert not mask[:, 9::4].any()
    assert bool(mask[:, :2].all())
    assert torch.equal(pruned[:, :2], weight[:, :2])
    assert bool(pruned.isfinite().all())
    silent, mask = sparsegpt(weight, torch.zeros(60, 60), sparsity=(2, 4))
    assert torch.equal(silent, weight * mask)


def test_a_singular_gram_is_damped_until_it_can_be_factored() -> None:
    weight, inputs = layer(0, tokens=5)
    gram = inputs.T @ inputs
    pruned, mask = sparsegpt(weight, gram, sparsity=(2, 4), damping=1e-16)
    assert bool(pruned.isfinite().all())
    assert output_error(inputs, weight, pruned) < output_error(inputs, weight, weight * mask)


def test_refusals_say_what_to_do() -> None:
    weight, gram = torch.ones(3, 6), torch.eye(6)
    with pytest.raises(RecipeError, match=r"sparsegpt: the pattern 2:4 does not divide a matrix of shape \(3, 6\)"):
        sparsegpt(weight, gram, sparsity=(2, 4))
    with pytest.raises(RecipeError, match=r"sparsegpt: the sparsity ratio 1 is not valid"):
        sparsegpt(weight, gram, sparsity=1)
    with pytest.raises(RecipeError, match="block=0 must be at least 1"):
        sparsegpt(weight, gram, sparsity=0.5, block=0)
    with pytest.raises(InputError, match=r"'gram' has shape \(5, 5\) where \(6, 6\) is needed"):
        sparsegpt(weight, torch.eye(5), sparsity=0.5)
    with pytest.raises(InputError, match=r"'grid' has shape \(3, 4\)"):
        sparsegpt(weight, gram, sparsity=0.5, grid=quantize_absmax(weight[:, :4], 4))
    with pytest.raises(NumericsError, match="'gram' of shape"):
        sparsegpt(weight, gram * torch.nan, sparsity=0.5)
    with pytest.raises(NumericsError, match=r"cannot be factored .* gather it anew"):
        sparsegpt(weight, gram - 10 * (1 - gram), sparsity=0.5)
