"""Laws of GPTQ: what it reduces to, what its errors add up to, and what its options change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.errors import InputError, NumericsError, RecipeError
from slimc.passes.solvers import PRESETS, Group, RangeSearch, gptq, quantize_absmax
from slimc.passes.solvers.clipping import LearnedClipping, learn_grids
from slimc.passes.solvers.error_feedback import inverse_factor, visiting_order
from slimc.passes.solvers.ranges import group_grids
from tests.passes.solvers.test_sparsegpt_solver import layer, output_error

OPTIONS: list[dict[str, Any]] = [
    {},
    {"symmetric": True},
    {"order": "groups"},
    {"order": "columns", "static_groups": True},
    {"search": PRESETS["paper"]},
    {"search": PRESETS["reference"], "order": "groups"},
    {"search": PRESETS["output"], "static_groups": True},
]


@pytest.mark.parametrize("group", [None, "channel", 16, 64])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_uncorrelated_inputs_give_plain_rounding(group: Group, bits: int, symmetric: bool) -> None:
    weight, _ = layer(0)
    found = gptq(weight, 3 * torch.eye(60), bits=bits, group=group, symmetric=symmetric)
    if bits in (2, 3, 8):
        plain = quantize_absmax(weight, bits, group, symmetric=symmetric)
        assert torch.equal(found.scale, plain.scale)
        assert torch.equal(found.codes, plain.codes)
        assert found.zero_point is None or torch.equal(found.zero_point, plain.zero_point)
    scale, _ = found.grid()
    half = 1.0 if symmetric and bits == 2 else 0.5  # A symmetric grid lacks its highest step.
    assert bool(((found.dequantize() - weight).abs() <= scale * (half + 2e-6)).all())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_feedback_lowers_the_output_error_whatever_the_options(options: dict[str, Any], bits: int) -> None:
    # On average: what the columns to the right absorb may widen their ranges.
    errors = torch.zeros(2)
    for seed in range(4):
        weight, inputs = layer(seed)
        for which, gram in enumerate((inputs.T @ inputs, inputs.square().sum(0).diag())):
            found = gptq(weight, gram, bits=bits, group=16, **options).dequantize()
            errors[which] += output_error(inputs, weight, found)
    assert float(errors[0]) < float(errors[1])


@pytest.mark.parametrize("order", [None, "groups"])
def test_the_output_error_is_the_sum_over_columns_of_their_rounding_errors_over_the_factor(order: Any) -> None:
    # One column a group and one row, so that what each column held when it was rounded follows from the row before.
    weight, inputs = layer(1, rows=1, columns=6)
    gram = inputs.T @ inputs
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(6)
    places = visiting_order(gram, 2) if order else torch.arange(6)
    found = gptq(weight, gram, bits=3, group=2, order=order, block=2).dequantize()
    factor = inverse_factor("test", gram[places][:, places], torch.zeros(6, dtype=torch.bool), 0.01)
    # The change as a combination of the factor's rows: (w - q) = sum_j e_j U_j, with e_j = (w_j - q_j) / U_jj.
    errors = torch.linalg.solve_triangular(factor.T.double(), (weight - found)[:, places].double().T, upper=False)
    change = (weight - found).double()
    energy = float(change @ damped.double() @ change.T)
    assert energy == pytest.approx(float(errors.square().sum() * gram.diagonal().mean()), rel=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_block_of_lazy_updates_changes_nothing(options: dict[str, Any]) -> None:
    weight, inputs = layer(2)
    gram = inputs.T @ inputs
    whole = gptq(weight, gram, bits=4, group=16, block=60, **options).dequantize()
    lazy = gptq(weight, gram, bits=4, group=16, block=7, **options).dequantize()
    step = gptq(weight, gram, bits=4, group=16, **options).grid()[0]
    # Another order of the sums may tip a weight that lies between two codes, and what follows with it.
    assert float(((whole - lazy).abs() > 0.01 * step).float().mean()) < 0.05


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_group_has_its_own_width(options: dict[str, Any]) -> None:
    weight, inputs = layer(3)
    gram = inputs.T @ inputs
    found = gptq(weight, gram, bits=4, group=16, widths=(1, 8, 2, 5), **options)
    highest = [int(found.codes[:, start : start + 16].max()) for start in range(0, 60, 16)]
    assert [code.bit_length() for code in highest] == [1, 8, 2, 5]
    apart = gptq(weight, torch.eye(60), bits=4, group=16, widths=(1, 8, 2, 5), **options).dequantize()
    errors = (apart - weight).square().mean(0)
    assert float(errors[16:32].max()) < float(errors[48:].min()) < float(errors[:16].min()) / 10
    if not options.get("static_groups"):
        return
    # With grids of the original weights, those of equal width are the same as in a matrix of one width.
    alike = gptq(weight, gram, bits=5, group=16, **options)
    assert torch.equal(found.scale[:, 3], alike.scale[:, 3])


def test_signs_stand_for_plus_and_minus_the_mean_magnitude() -> None:
    weight, _ = layer(4)
    found = gptq(weight, torch.eye(60), bits=1, group=16)
    start = weight[:, :16]
    # A mean of 16 numbers is off by at most 16 roundings.
    torch.testing.assert_close(
        found.dequantize()[:, :16], start.sign() * start.abs().mean(1, keepdim=True), rtol=16 * 2**-24, atol=0
    )


def test_searches_pay_and_the_salient_weigh_more() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    weight[:, 5] *= 6
    found = {
        name: gptq(weight, torch.eye(128), bits=2, group=128, search=search).dequantize()
        for name, search in {
            "range": None,
            "paper": PRESETS["paper"],
            "wide": RangeSearch(0.4, 1.1, 71, salient=None),
            "salient": RangeSearch(0.4, 1.1, 71, emphasis=50),
        }.items()
    }
    errors = {name: float((one - weight).norm()) for name, one in found.items()}
    assert errors["wide"] < errors["paper"] < errors["range"]
    outliers = (weight - weight.mean(1, keepdim=True)).abs() > 3 * weight.std(1, keepdim=True)
    loss = {name: float((one - weight)[outliers].norm()) for name, one in found.items()}
    assert loss["salient"] < loss["wide"] / 2
    assert errors["salient"] > errors["wide"]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("widths", [(2, 2, 2, 2), (1, 3, 2, 1)], ids=str)
def test_learned_ranges_lower_the_output_error_of_plain_rounding(widths: tuple[int, ...], symmetric: bool) -> None:
    weight, inputs = layer(6)
    gram = inputs.T @ inputs
    options: dict[str, Any] = {"symmetric": symmetric, "scale_dtype": torch.bfloat16}
    plain = group_grids(weight, widths, 16, **options, search=None, curvature=torch.ones(60))
    learned = learn_grids(weight, gram, widths, 16, **options, options=LearnedClipping())
    assert learned.widths == widths
    assert output_error(inputs, weight, learned.dequantize()) < 0.95 * output_error(inputs, weight, plain.dequantize())
    with torch.no_grad():
        again = learn_grids(weight, gram, widths, 16, **options, options=LearnedClipping())
    assert torch.equal(again.codes, learned.codes)
    silent = learn_grids(0 * weight, 0 * gram, widths, 16, **options, options=LearnedClipping(steps=3))
    assert bool((silent.scale == 1).all())


def test_dead_inputs_are_rounded_as_they_are() -> None:
    weight, inputs = layer(5)
    inputs[:, ::3] = 0
    grid = {"bits": 4, "group": 12, "static_groups": True}
    found = gptq(weight, inputs.T @ inputs, **grid)
    plain = gptq(weight, torch.eye(60), **grid)
    assert torch.equal(found.codes[:, ::3], plain.codes[:, ::3])
    silent = gptq(weight, torch.zeros(60, 60), **grid, search=PRESETS["output"])
    assert bool(silent.dequantize().isfinite().all())


def test_a_singular_gram_is_damped_until_it_can_be_factored() -> None:
    weight, inputs = layer(0, tokens=5)
    gram = inputs.T @ inputs
    found = gptq(weight, gram, bits=3, group=16, damping=1e-16).dequantize()
    plain = quantize_absmax(weight, 3, 16, symmetric=False).dequantize()
    assert output_error(inputs, weight, found) < output_error(inputs, weight, plain) / 2


def test_pruned_weights_stay_zero_and_the_others_make_up_for_nothing_they_lost() -> None:
    weight, inputs = layer(1)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    for bits in (1, 3):
        found = gptq(weight, inputs.T @ inputs, bits=bits, group=16, mask=mask).dequantize() * mask
        plain = gptq(weight, torch.eye(60), bits=bits, group=16, mask=mask).dequantize() * mask
        assert output_error(inputs, weight * mask, found) < output_error(inputs, weight * mask, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("search", [None, PRESETS["output"]], ids=["range", "search"])
def test_scales_are_those_that_can_be_stored(dtype: torch.dtype, search: RangeSearch | None) -> None:
    weight, inputs = layer(2)
    found = gptq(weight, inputs.T @ inputs, bits=3, group=16, scale_dtype=dtype, search=search)
    assert found.scale.dtype == dtype
    again = gptq(weight, inputs.T @ inputs, bits=3, group=16, scale_dtype=dtype, search=search)
    assert torch.equal(found.codes, again.codes)


def test_a_short_last_group_stays_last() -> None:
    order = visiting_order(torch.diag(torch.arange(1.0, 8)), 3)
    assert order.tolist() == [3, 4, 5, 0, 1, 2, 6]


def call(**options: Any) -> Tensor:
    arguments = {"weight": torch.ones(3, 6), "gram": torch.eye(6), "bits": 4} | options
    return gptq(arguments.pop("weight"), arguments.pop("gram"), **arguments).codes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 0}, RecipeError, r"codes of \[0\] bits were asked for; 1 to 8 are possible"),
        ({"bits": 9}, RecipeError, "1 to 8 are possible"),
        ({"group": 3, "widths": (2, 9)}, RecipeError, "1 to 8 are possible"),
        ({"group": 3, "widths": (2, 3, 4)}, RecipeError, "3 widths were given for 2 groups"),
        ({"widths": (2,)}, RecipeError, r"1 widths were given for 1 groups of columns .group=None."),
        ({"group": 0}, RecipeError, "the group 0 is not valid"),
        ({"scale_dtype": torch.float64}, RecipeError, "cannot be stored as torch.float64"),
        ({"damping": 0}, RecipeError, "damping=0 above 0"),
        ({"search": LearnedClipping()}, RecipeError, "clipping is learned for groups of columns, not for group=None"),
        ({"group": 3, "order": "columns"}, RecipeError, "set static_groups=true, or order='groups'"),
        ({"order": "rows"}, RecipeError, "order='rows' is not known"),
        ({"gram": torch.eye(5)}, InputError, r"'gram' has shape \(5, 5\) where \(6, 6\) is needed"),
        ({"gram": torch.eye(6) * torch.nan}, NumericsError, "'gram' of shape"),
        ({"gram": 11 * torch.eye(6) - 10}, NumericsError, "gptq: .* cannot be factored .* gather it anew"),
    ],
)
def test_refusals_say_what_to_do(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**options)
