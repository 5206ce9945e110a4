"""Laws of the quantisers: grids, masks, groups and the optimality of SLiM-Quant's step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimc.errors import InputError, NumericsError, RecipeError
from slimc.passes.solvers import (
    Group,
    Quantized,
    activation_aware_scales,
    important_channels,
    quantize_absmax,
    quantize_slim,
    round_to_grid,
    step_search,
)

EPS = torch.finfo(torch.float32).eps

BITS = st.sampled_from([2, 3, 4, 8])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
KINDS = ["normal", "heavy", "uniform", "outlier", "constant", "negative", "zero", "sparse"]


def draw(kind: str, seed: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "heavy":
        return normal / torch.rand(rows, columns, generator=generator).clamp(min=1e-3)
    if kind == "uniform":
        return torch.rand(rows, columns, generator=generator) - 0.5
    if kind == "outlier":
        normal[0, 0] = 1e4
    if kind == "sparse":
        normal[torch.rand(rows, columns, generator=generator) < 0.7] = 0
    return {"constant": torch.full_like(normal, 0.3), "negative": -normal.abs(), "zero": normal * 0}.get(kind, normal)


@st.composite
def weights(data: st.DrawFn) -> Tensor:
    rows, columns = data(st.integers(1, 5)), data(st.integers(1, 40))
    weight = draw(data(st.sampled_from(KINDS)), data(st.integers(0, 2**16)), rows, columns)
    return weight * 10.0 ** data(st.integers(-4, 1))


@st.composite
def groups(data: st.DrawFn) -> Group:
    return data(st.one_of(st.none(), st.just("channel"), st.integers(1, 45)))


def any_quantiser(
    weight: Tensor, method: str, bits: int, group: Group, dtype: torch.dtype, mask: Tensor | None = None
) -> Quantized:
    if method == "slim":
        return quantize_slim(weight, bits, group, scale_dtype=dtype, mask=mask)
    return quantize_absmax(weight, bits, group, symmetric=method == "absmax", scale_dtype=dtype, mask=mask)


METHODS = st.sampled_from(["slim", "absmax", "asymmetric"])


@settings(deadline=None, max_examples=150)
@given(weights(), METHODS, BITS, groups(), DTYPES)
def test_what_every_quantiser_promises(
    weight: Tensor, method: str, bits: int, group: Group, dtype: torch.dtype
) -> None:
    quantized = any_quantiser(weight, method, bits, group, dtype)
    rows, columns = weight.shape
    per_row = -(-columns // group) if isinstance(group, int) else 1
    shape = (1, 1) if group is None else (rows, per_row)
    assert quantized.codes.shape == weight.shape
    assert quantized.scale.shape == shape
    assert quantized.scale.dtype == dtype
    assert bool((quantized.scale > 0).all())
    assert bool(quantized.scale.isfinite().all())
    assert quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) < 2**bits
    assert (quantized.zero_point is None) == (method != "asymmetric")
    if quantized.zero_point is not None:
        assert quantized.zero_point.dtype == torch.uint8
        assert quantized.zero_point.shape == shape
        assert int(quantized.zero_point.max()) < 2**bits

    # Inside the clipping range the nearest level is at most half a step away, up to float32 rounding.
    scale, zero = quantized.grid()
    decoded = quantized.dequantize()
    inside = (weight >= (-zero - 0.5) * scale) & (weight <= (2**bits - 0.5 - zero) * scale)
    bound = scale / 2 + 2 * EPS * (weight.abs() + decoded.abs())
    assert bool(((weight - decoded).abs() <= bound)[inside].all())
    # Outside it the code is the end of the grid.
    assert bool((quantized.codes[~inside] % (2**bits - 1) == 0).all())
    # Zero is represented exactly.
    assert bool((decoded[weight == 0] == 0).all())
    # A second rounding changes nothing.
    assert torch.equal(round_to_grid(decoded, quantized).codes, quantized.codes)


@settings(deadline=None, max_examples=60)
@given(weights(), METHODS, BITS, groups(), st.integers(0, 2**16))
def test_masked_entries_do_not_count(weight: Tensor, method: str, bits: int, group: Group, seed: int) -> None:
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    with_mask = any_quantiser(weight, method, bits, group, torch.float32, mask)
    other = torch.where(mask, weight, 1e3)
    assert torch.equal(any_quantiser(other, method, bits, group, torch.float32, mask).scale, with_mask.scale)
    assert bool((with_mask.dequantize()[~mask] == 0).all())


@settings(deadline=None, max_examples=60)
@given(weights(), BITS, st.integers(1, 45))
def test_groups_are_quantised_one_by_one(weight: Tensor, bits: int, group: int) -> None:
    absmax, slim = quantize_absmax(weight, bits, group), quantize_slim(weight, bits, group)
    for index, part in enumerate(torch.split(weight, group, dim=1)):
        alone = quantize_absmax(part, bits, "channel")
        assert torch.equal(absmax.scale[:, index : index + 1], alone.scale)
        columns = slice(index * group, index * group + part.shape[1])
        assert torch.equal(absmax.codes[:, columns], alone.codes)
        # The padding of a short group changes the order of summation, and with it the pick among near-equal steps.
        decoded, alone = slim.dequantize()[:, columns], quantize_slim(part, bits, "channel")
        for row, values in enumerate(part):
            error = float((decoded[row].double() - values.double()).square().sum())
            reference = float((alone.dequantize()[row].double() - values.double()).square().sum())
            assert error <= guaranteed(reference, values)


def test_absmax_conventions() -> None:
    weight = torch.tensor([[-0.5, 0.25, 1.4, 0.0]])
    symmetric = quantize_absmax(weight, 4)
    assert symmetric.scale.item() == pytest.approx(1.4 / 7)
    assert symmetric.codes.tolist() == [[8 - 2, 8 + 1, 15, 8]]
    asymmetric = quantize_absmax(weight, 4, symmetric=False)
    assert asymmetric.scale.item() == pytest.approx(1.9 / 15)
    assert asymmetric.zero_point is not None
    assert asymmetric.zero_point.item() == 4
    # The range always includes zero.
    positive = quantize_absmax(weight.abs() + 1, 4, symmetric=False)
    assert positive.zero_point is not None
    assert positive.zero_point.item() == 0


def squared_error(weight: Tensor, quantized: Quantized) -> float:
    return float((quantized.dequantize().double() - weight.double()).square().sum())


@settings(deadline=None, max_examples=100)
@given(weights(), BITS, groups(), DTYPES)
def test_slim_is_never_worse_than_absmax(weight: Tensor, bits: int, group: Group, dtype: torch.dtype) -> None:
    slim = squared_error(weight, quantize_slim(weight, bits, group, scale_dtype=dtype))
    absmax = squared_error(weight, quantize_absmax(weight, bits, group, scale_dtype=dtype))
    # Errors are compared in float32: each residual is exact to EPS * |w|.
    assert slim <= absmax * (1 + 1e-5) + (4 * EPS * float(weight.norm())) ** 2


def brute_force(weight: Tensor, bits: int, points: int) -> float:
    """Return the least squared error over a dense scan of steps, from far below any optimum to all codes zero."""
    flat = weight.flatten().double()
    levels = 2 ** (bits - 1)
    lowest, highest = flat.abs().mean() / (4 * levels), 2.5 * flat.abs().max()
    scan = torch.logspace(float(lowest.log10()), float(highest.log10()), points, dtype=torch.float64)
    best = float("inf")
    for steps in torch.split(scan, 500):
        codes = (flat / steps[:, None]).round().clamp(-levels, levels - 1)
        best = min(best, float((codes * steps[:, None] - flat).square().sum(dim=1).min()))
    return best


def guaranteed(optimum: float, weight: Tensor) -> float:
    """Return the largest squared error that the branch and bound may leave (step_search's docstring)."""
    finest = 1 / (step_search.COARSEST * 4 ** (step_search.SCANS - 1))
    energy = float(weight.double().square().sum())
    slack = (2 ** (finest / 2) - 1) ** 2 * energy
    # The float32 residuals are exact to EPS * |w|, which moves their norm by that much at most.
    rounding = EPS * float(weight.double().norm())
    left = max(optimum / (1 - step_search.GAP), optimum + slack, step_search.NEGLIGIBLE * energy)
    return float((left**0.5 + rounding) ** 2)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zero"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_step_is_optimal(kind: str, bits: int) -> None:
    for seed, columns in enumerate([7, 64, 500]):
        weight = draw(kind, seed, 1, columns)
        assert squared_error(weight, quantize_slim(weight, bits)) <= guaranteed(brute_force(weight, bits, 6000), weight)


@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "outlier"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_histogram_finds_what_the_direct_search_finds(
    kind: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw(kind, 5, 50, 50)
    direct = squared_error(weight, quantize_slim(weight, bits))
    monkeypatch.setattr(step_search, "DIRECT", weight.numel() - 1)
    assert squared_error(weight, quantize_slim(weight, bits)) <= guaranteed(direct, weight)


def test_steps_do_not_depend_on_the_precision_of_products() -> None:
    before = torch.get_float32_matmul_precision()
    rows, long_row = torch.randn(64, 576), torch.randn(1, step_search.DIRECT + 1)
    try:
        found = []
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            found.append([step_search.optimal_steps(values, -8, 7) for values in (rows, long_row)])
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    for steps in found[1:]:
        assert all(map(torch.equal, steps, found[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.75, -0.75])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_single_distinct_value_is_exact(bits: int, value: float, dtype: torch.dtype) -> None:
    weight = torch.full((3, 50), value)
    assert torch.equal(quantize_slim(weight, bits, scale_dtype=dtype).dequantize(), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_on_a_grid_are_found_again(bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (8, 200), generator=torch.Generator().manual_seed(bits))
    weight = codes * 0.0131
    error = (quantize_slim(weight, bits).dequantize() - weight).norm()
    assert error <= 8 * EPS * weight.norm()


def test_uniform_values_at_8_bits_use_the_whole_range() -> None:
    # The optimum lies at the end of the search range, where a search by deciles of the range may lose it.
    weight = torch.rand(1, 20_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    step = quantize_slim(weight, 8).scale.item()
    assert 2 / 256 * 0.99 < step < 1 / 127 * 1.01


def test_pruned_weights_leave_the_step_to_the_kept_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    mask = weight.abs() > 0.7
    kept = weight[mask][None]
    assert torch.allclose(quantize_slim(weight, 4, mask=mask).scale, quantize_slim(kept, 4).scale, rtol=1e-2)
    error = squared_error(kept, quantize_slim(kept, 4))
    masked = quantize_slim(weight, 4, mask=mask).dequantize()[mask][None]
    assert float((masked - kept).square().sum()) == pytest.approx(error, rel=step_search.GAP)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-12, 1e12, 1e30])
def test_extreme_magnitudes_stay_finite(size: float) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) * size
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for quantise in (quantize_absmax, quantize_slim):
            quantized = quantise(weight, 4, 8, scale_dtype=dtype)
            assert bool((quantized.scale > 0).all())
            assert bool(quantized.dequantize().isfinite().all())


def test_scale_dtypes_round_before_the_codes_are_chosen() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    quantized = quantize_slim(weight, 8, "channel", scale_dtype=torch.bfloat16)
    assert torch.equal(round_to_grid(weight, quantized).codes, quantized.codes)


def test_important_channels_breaks_ties_downwards_and_takes_at_least_one() -> None:
    saliency = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0])
    assert important_channels(saliency, 0.4).tolist() == [False, True, True, False, False]
    assert important_channels(saliency, 0.01).tolist() == [False, True, False, False, False]
    assert not important_channels(saliency, 0.0).any()
    assert important_channels(torch.ones(100), 0.29).sum() == 29


def test_activation_aware_scales_weigh_each_matrix_alike() -> None:
    inputs = torch.ones(4)
    loud, quiet = torch.ones(2, 4) * 100, torch.full((8, 4), 1e-3)
    quiet[:, 2] = 1.0
    assert activation_aware_scales(inputs, [loud, quiet], fraction=0.25).tolist() == [1, 1, 2, 1]
    inputs[3] = 50
    assert activation_aware_scales(inputs, [loud, quiet], fraction=0.5, factor=4).tolist() == [1, 1, 4, 4]
    assert activation_aware_scales(inputs * 0, [loud], fraction=0.25).tolist() == [2, 1, 1, 1]


def test_activation_aware_rounding_halves_the_error_bound_of_the_chosen_channel() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    weight[:, :16] *= 10
    inputs = torch.ones(32)
    inputs[20] = 1e3
    scales = activation_aware_scales(inputs, [weight], fraction=0.03)
    grid = quantize_slim(weight, 4)
    # Twice the small weights of this channel are still inside the clipping range.
    assert float(2 * weight[:, 20].abs().max()) < 7 * grid.scale.item()
    decoded = round_to_grid(weight * scales, grid).dequantize() / scales
    half_step = grid.scale.item() / 2
    assert float((decoded - weight)[:, 20].abs().max()) <= half_step / 2 * (1 + 8 * EPS)
    assert float((grid.dequantize() - weight)[:, 20].abs().max()) > half_step / 2


def test_refusals_say_what_to_do() -> None:
    weight = torch.ones(2, 8)
    for quantise in (quantize_absmax, quantize_slim):
        with pytest.raises(RecipeError, match=r"7 bits are not supported; choose one of 2, 3, 4, 5, 6, 8"):
            quantise(weight, 7)
        with pytest.raises(RecipeError, match=r"the group 'row' is not valid; give None, 'channel' or a number"):
            quantise(weight, 4, "row")  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match="the group 0 is not valid"):
            quantise(weight, 4, 0)
        with pytest.raises(RecipeError, match=r"cannot be stored as torch.int8; choose float32"):
            quantise(weight, 4, scale_dtype=torch.int8)
        with pytest.raises(InputError, match=r"'weight' has shape \(8,\); give a non-empty matrix"):
            quantise(weight[0], 4)
        with pytest.raises(InputError, match=r"'mask' has shape \(2, 4\) where \(2, 8\) is needed"):
            quantise(weight, 4, mask=torch.ones(2, 4, dtype=torch.bool))
        broken = weight.clone()
        broken[1, 3] = torch.nan
        broken[1, 4] = torch.inf
        with pytest.raises(NumericsError, match=r"'weight' of shape \(2, 8\) holds 2 NaN or Inf .* index \(1, 3\)"):
            quantise(broken, 4)
    with pytest.raises(InputError, match="round_to_grid: argument 'weight' has shape"):
        round_to_grid(weight[:, :4], quantize_absmax(weight, 4))
    with pytest.raises(NumericsError, match="round_to_grid: argument 'weight'"):
        round_to_grid(broken, quantize_absmax(weight, 4))


def test_activation_aware_refusals() -> None:
    weight = torch.ones(2, 8)
    with pytest.raises(RecipeError, match=r"the fraction 1.5 is no share"):
        activation_aware_scales(torch.ones(8), [weight], fraction=1.5)
    with pytest.raises(RecipeError, match="the factor 0 is not positive"):
        activation_aware_scales(torch.ones(8), [weight], factor=0)
    with pytest.raises(InputError, match="no weight was given"):
        activation_aware_scales(torch.ones(8), [])
    with pytest.raises(InputError, match=r"'weights' has shape \(2, 8\) where \(2, 7\) is needed"):
        activation_aware_scales(torch.ones(7), [weight])
    with pytest.raises(NumericsError, match="'mean_abs_input'"):
        activation_aware_scales(torch.full((8,), torch.nan), [weight])
