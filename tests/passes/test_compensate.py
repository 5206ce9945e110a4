"""Compensate: the target is the weight that comes closest to what the dense model puts out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc.errors import RecipeError
from slimc.passes import Calibrate, Compensate, LowRank, Pass, Prune, Quantize
from slimc.passes.statistics import InputStatistics, Shortfall
from slimc.passes.work import SiteWork


class Residual(nn.Module):
    """Blocks that add to a stream, so that the errors of all of them meet there."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(32, 48) for _ in range(3)])
        self.down = nn.ModuleList([nn.Linear(48, 32) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return x


def residual() -> Residual:
    torch.manual_seed(4)
    return Residual().eval()


def error_of(model: nn.Module, passes: list[Pass], batches: list[Tensor]) -> float:
    """Return the error of the output of the whole model."""
    small = slimc.compile(model, batches, passes)
    with torch.no_grad():
        pairs = [(small(batch), model(batch)) for batch in batches]
    found, exact = (torch.cat([one[side].flatten(0, -2) for one in pairs]) for side in (0, 1))
    return float((found - exact).norm() / exact.norm())


def test_each_part_of_the_correction_lowers_the_error_of_the_model(batches: list[Tensor]) -> None:
    rest: list[Pass] = [Quantize(bits=3, group=16), Prune("2:4", "sparsegpt")]
    plain = error_of(residual(), [Calibrate(), *rest], batches)
    inputs = error_of(residual(), [Calibrate(), Compensate(residual=False), *rest], batches)
    sums = error_of(residual(), [Calibrate(), Compensate(), *rest], batches)
    assert sums < inputs < plain


def work_on(inputs: Tensor, dense: Tensor, weight: Tensor, lack: Tensor | None = None) -> SiteWork:
    statistics = InputStatistics.gather([inputs], {"gram", "cross_gram"}, "site", dense=[dense])
    work = SiteWork("site", weight, torch.float32, statistics, lambda: [weight])
    if lack is not None:
        work.shortfalls = Shortfall.gather([inputs], [torch.zeros_like(lack)], [lack]), None
    return work


@pytest.mark.parametrize("with_sum", [False, True])
def test_the_target_is_the_ridge_regression_of_the_dense_output(with_sum: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 12, generator=generator)
    dense = inputs + 0.2 * torch.randn(200, 12, generator=generator)
    weight, lack = torch.randn(7, 12, generator=generator), torch.randn(200, 7, generator=generator)
    work = work_on(inputs, dense, weight, lack if with_sum else None)
    Compensate(strength=1.0, damping=1e-6).apply(work)
    wanted = (dense @ weight.T + lack * with_sum).double()
    exact = torch.linalg.lstsq(inputs.double(), wanted).solution.T
    assert torch.allclose(work.target.double(), exact, atol=1e-4)
    assert torch.equal(work.base, work.target)


def test_held_out_batches_say_how_much_of_the_correction_holds(batches: list[Tensor]) -> None:
    """Where the lack at the fitted tokens is noise, the held-out ones refuse the correction."""
    generator = torch.Generator().manual_seed(1)
    inputs, fresh = torch.randn(2, 30, 24, generator=generator)
    weight = torch.randn(5, 24, generator=generator)
    noise = torch.randn(2, 30, 24, generator=generator)
    work = work_on(inputs, inputs + noise[0], weight)
    Compensate(strength=1.0).apply(work)
    moved = (work.target - weight).norm()
    judged = work_on(inputs, inputs + noise[0], weight)
    judged.held_out = InputStatistics.gather([fresh], {"gram", "cross_gram"}, "site", dense=[fresh + noise[1]])
    Compensate(strength=1.0).apply(judged)
    assert (judged.target - weight).norm() < 0.5 * moved
    wanted = (fresh + noise[1]) @ weight.T
    errors = [float((fresh @ target.T - wanted).norm()) for target in (weight, work.target, judged.target)]
    assert errors[2] <= min(errors[:2]) * (1 + 1e-5)


def test_strength_scales_the_correction() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(80, 8, generator=generator)
    weight = torch.randn(3, 8, generator=generator)
    whole, half = (work_on(inputs, inputs * 1.3, weight) for _ in range(2))
    Compensate(strength=1.0).apply(whole)
    Compensate(strength=0.5).apply(half)
    assert torch.allclose(half.target - weight, (whole.target - weight) / 2, atol=1e-5)


def test_a_site_that_nothing_reaches_keeps_its_target() -> None:
    weight = torch.ones(2, 4)
    work = work_on(torch.zeros(5, 4), torch.zeros(5, 4), weight)
    Compensate().apply(work)
    assert work.target is work.dense


def test_only_plain_sums_count(network: nn.Module, batches: list[Tensor], run: Any) -> None:
    """``mix`` runs twice and nothing is added to the result of ``down``: there is no shortfall, and no failure."""
    _, outcome = run(network, batches, [Calibrate(held_out=0.3), Compensate(), Quantize(), LowRank(rank=2)])
    assert len(outcome.rows) == 4
    assert all(row.stream_error is not None for row in outcome.rows)


@pytest.mark.parametrize("late", [Quantize(), Prune(method="magnitude")])
def test_the_target_must_stand_first(late: Pass, network: nn.Module, batches: list[Tensor], run: Any) -> None:
    with pytest.raises(RecipeError, match=f"compensate comes after {late.name}, .*right after calibrate"):
        run(network, batches, [Calibrate(), late, Compensate()])
    with pytest.raises(RecipeError, match="compensate appears twice"):
        run(network, batches, [Calibrate(), Compensate(), Compensate(), late])
