"""Laws of block coordinate descent: it never raises the output error, stays on the grid, and stops at optima."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimc.errors import InputError, NumericsError, RecipeError
from slimc.passes.solvers import (
    Group,
    Quantized,
    descend,
    gptq,
    nm_mask,
    quantize_absmax,
    quantize_slim,
    sparsegpt,
    unstructured_mask,
)


def layer(seed: int, rows: int = 12, columns: int = 40, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """Return a weight, and the Gram matrix of inputs whose channels are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    inputs = inputs * torch.rand(columns, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def output_error(weight: Tensor, gram: Tensor, values: Tensor) -> float:
    error = (values - weight).double()
    return float(((error @ gram.double()) * error).sum())


def values_of(stored: Quantized | Tensor, mask: Tensor | None) -> Tensor:
    values = stored.dequantize() if isinstance(stored, Quantized) else stored
    return values if mask is None else values * mask


# Products and sums of float32: an error of a few roundings for each of the columns.
ROUNDING = 1 + 40 * 2**-20


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 3, 4]),
    group=st.sampled_from([None, "channel", 8, 12]),
    pattern=st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), None]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    block=st.sampled_from([4, 20, 128]),
)
def test_the_error_never_rises_and_what_is_stored_is_valid(
    seed: int,
    bits: int,
    group: Group,
    pattern: tuple[int, int] | None,
    symmetric: bool,
    dtype: torch.dtype,
    block: int,
) -> None:
    weight, gram = layer(seed, rows=5)
    mask = None if pattern is None else nm_mask(weight.abs(), *pattern)
    stored = quantize_absmax(weight, bits, group, symmetric=symmetric, scale_dtype=dtype, mask=mask)
    before = output_error(weight, gram, values_of(stored, mask))
    for _ in range(3):
        stored, mask = descend(weight, gram, stored, mask, pattern=pattern, block=block)
        after = output_error(weight, gram, values_of(stored, mask))
        assert after <= before * ROUNDING
        before = after
    assert stored.codes.dtype == torch.uint8
    assert int(stored.codes.max()) < 2**bits
    assert stored.scale.dtype == dtype
    assert bool((stored.scale > 0).all())
    if pattern is not None:
        assert mask is not None
        assert bool((mask.view(5, -1, pattern[1]).sum(2) == pattern[0]).all())
        assert torch.equal(stored.dequantize() * ~mask, torch.zeros_like(weight))


@pytest.mark.parametrize("seed", range(4))
def test_it_improves_on_the_column_loop(seed: int) -> None:
    weight, gram = layer(seed)
    start, mask = sparsegpt(weight, gram, sparsity=(2, 4), grid=quantize_slim(weight, 4, 20))
    stored, moved = descend(weight, gram, start, mask, pattern=(2, 4), sweeps=4)
    before = output_error(weight, gram, values_of(start, mask))
    assert output_error(weight, gram, values_of(stored, moved)) < 0.95 * before


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (1, 2)])
def test_uncorrelated_inputs_give_the_best_of_all_masks_and_codes(pattern: tuple[int, int]) -> None:
    """With a diagonal H every block stands alone, and all that it can be is few enough to be tried."""
    weight, _ = layer(3, rows=6, columns=8)
    energy = torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.1
    grid = quantize_slim(weight, 2, "channel")
    mask = nm_mask(weight.abs(), *pattern)
    # The scales move too, so the last mask and codes are looked at with the scales that they were chosen for.
    stored, mask = descend(weight, energy.diag(), grid, mask, pattern=pattern, sweeps=30)
    assert mask is not None
    found = (stored.dequantize() * mask - weight).square() * energy
    width = pattern[1]
    levels = (torch.arange(4) - 2).float()
    for row, first in itertools.product(range(6), range(0, 8, width)):
        part = slice(first, first + width)
        best = min(
            float(((torch.tensor(values) * keep * stored.scale[row] - weight[row, part]).square() * energy[part]).sum())
            for members in itertools.combinations(range(width), pattern[0])
            for keep in [torch.zeros(width).index_fill(0, torch.tensor(members), 1.0)]
            for values in itertools.product(levels.tolist(), repeat=width)
        )
        assert float(found[row, part].sum()) <= best * ROUNDING + 1e-12


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_values_without_a_grid_end_at_the_least_squares_fit(ratio: float) -> None:
    weight, gram = layer(5, rows=4, columns=16)
    # Coordinate descent is slow in directions that the inputs hardly have.
    gram = gram + gram.diagonal().mean() * torch.eye(16)
    target = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    mask = unstructured_mask(weight.abs(), ratio)
    fitted, same = descend(target, gram, weight * mask, mask, sweeps=400)
    assert torch.equal(same, mask)
    for row in range(4):
        kept = mask[row]
        inner = gram.double()[kept][:, kept]
        exact = torch.linalg.solve(inner, gram.double()[kept] @ target[row].double())
        # The descent stops where a step gains less than its own rounding.
        assert torch.allclose(fitted[row, kept].double(), exact, atol=2e-3)


def test_scales_are_the_best_that_can_be_stored() -> None:
    weight, gram = layer(8)
    stored, mask = descend(weight, gram, quantize_slim(weight, 3, 8, scale_dtype=torch.bfloat16), sweeps=1)
    assert mask is None
    # The last group is fitted last, so its scales are optimal for everything else as it is.
    least = output_error(weight, gram, stored.dequantize())
    for direction in (-1, 1):
        scale = stored.scale.clone()
        scale[:, -1] = (scale[:, -1].view(torch.int16) + direction).view(torch.bfloat16)
        moved = Quantized(stored.codes, scale, None, 3, 8)
        assert output_error(weight, gram, moved.dequantize()) >= least / ROUNDING


def test_the_block_of_lazy_updates_does_not_matter() -> None:
    weight, gram = layer(9)
    mask = nm_mask(weight.abs(), 2, 4)
    start = quantize_slim(weight, 4, 20, mask=mask)
    found = [descend(weight, gram, start, mask, pattern=(2, 4), block=block) for block in (4, 16, 40)]
    errors = [output_error(weight, gram, values_of(*one)) for one in found]
    assert max(errors) <= min(errors) * 1.01


def test_what_cannot_be() -> None:
    weight, gram = layer(0)
    stored = quantize_slim(weight, 4)
    mask = nm_mask(weight.abs(), 2, 4)
    with pytest.raises(RecipeError, match="40 columns are no multiple of 7"):
        descend(weight, gram, stored, mask, pattern=(2, 7))
    with pytest.raises(InputError, match="'gram'"):
        descend(weight, gram[:5, :5], stored, mask)
    with pytest.raises(InputError, match="'mask'"):
        descend(weight, gram, stored, mask[:3])
    with pytest.raises(NumericsError, match="'weight'.*NaN"):
        descend(weight * torch.nan, gram, stored, mask)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_different_widths_keep_theirs(symmetric: bool) -> None:
    weight, gram = layer(3, columns=32)
    start = gptq(weight, gram, bits=4, group=16, widths=(2, 4), symmetric=symmetric)
    found, _ = descend(weight, gram, start)
    before, after = (output_error(weight, gram, one.dequantize()) for one in (start, found))
    assert after < before
    narrow, wide = found.codes.split(16, dim=1)
    assert int(narrow.max()) < 4 <= int(wide.max()) < 16


def test_a_single_column_has_the_strides_of_its_shape() -> None:
    """They are what its bytes are viewed by when it is stored."""
    weight, gram = layer(0, rows=12, columns=1)
    stored, _ = descend(weight, gram, quantize_slim(weight, 4, 64, scale_dtype=torch.bfloat16))
    assert isinstance(stored, Quantized)
    assert stored.codes.stride() == stored.scale.stride() == (1, 1)
