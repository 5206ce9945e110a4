"""BiasCorrection: no mean error is left where there is a bias to take it, and nothing is added where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc.errors import RecipeError
from slimc.passes import BiasCorrection, Calibrate, Compensate, Fuse, LowRank, Pass, Prune, Quantize

Run = Callable[..., Any]


class Two(nn.Module):
    """A layer with a bias and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sigmoid(self.first(x)))


@pytest.fixture
def two() -> Two:
    torch.manual_seed(0)
    return Two().eval()


def x() -> Tensor:
    return torch.randn(8, 9, 16, generator=torch.Generator().manual_seed(3)) + 1


CORRECTED: list[Pass] = [Calibrate(), Quantize(bits=2, group="channel"), BiasCorrection(), Fuse()]
PLAIN: list[Pass] = [one for one in CORRECTED if one.name != "bias_correction"]


def test_the_mean_of_the_output_is_that_of_the_dense_layer(two: Two) -> None:
    exact = two.first(x()).mean((0, 1))
    errors = [
        (slimc.compile(two, [x()], passes).first(x()).mean((0, 1)) - exact).abs().max() for passes in (PLAIN, CORRECTED)
    ]
    # Means of 72 tokens, each the sum of 16 products.
    assert errors[1] <= 100 * 2.0**-24 * exact.abs().max()
    assert errors[0] > 1e-3


def test_a_layer_without_a_bias_gets_none_and_the_users_model_stays(two: Two) -> None:
    before = two.first.bias.clone()
    small = slimc.compile(two, [x()], CORRECTED)
    assert small.second.bias is None
    assert torch.equal(two.first.bias, before)
    assert not torch.equal(small.first.bias, before)


def test_both_carriers_the_report_and_the_files_have_it(two: Two, run: Run, tmp_path: Path) -> None:
    program, outcome = run(two, [x()], CORRECTED)
    small = slimc.compile(two, [x()], CORRECTED)
    assert torch.equal(program.run(x()), small(x()))
    with torch.no_grad():
        exact = two.first(x()) - two.first.bias
        found = float((small.first(x()) - two.first(x())).norm() / exact.norm())
    assert outcome.rows[0].output_error == pytest.approx(found, rel=1e-4)
    slimc.save(small, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(slimc.load(tmp_path / "out", model=Two().eval())(x()), small(x()))


def test_a_resumed_run_has_the_same_biases(two: Two, tmp_path: Path) -> None:
    first = slimc.compile(two, [x()], CORRECTED, journal=tmp_path / "journal")
    again = slimc.compile(two, [x()], CORRECTED, journal=tmp_path / "journal", resume=True)
    assert torch.equal(first.first.bias, again.first.bias)


class Shared(Two):
    """Two layers that add one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(16, 24)
        self.twin.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sigmoid(self.first(x)) * self.twin(x))


def test_a_shared_bias_stays(run: Run) -> None:
    torch.manual_seed(0)
    program, _ = run(Shared().eval(), [x()], CORRECTED)
    assert all(site.bias is None for site in program.sites.values())


def test_with_the_dense_stream_its_mean_is_what_counts(run: Run) -> None:
    """A later layer then makes good the mean error of earlier ones, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Sigmoid(), nn.Linear(24, 8)).eval()
    rounding: list[Pass] = [Quantize(bits=2, group="channel"), BiasCorrection(), Fuse()]
    with torch.no_grad():
        exact = model(x()).mean((0, 1))
    own, _ = run(model, [x()], [Calibrate(), *rounding])
    dense, _ = run(model, [x()], [Calibrate(), Compensate(strength=0.5), *rounding])
    errors = [float((program.run(x()).mean((0, 1)) - exact).abs().max()) for program in (own, dense)]
    assert errors[1] <= 100 * 2.0**-24 * float(exact.abs().max()) < errors[0]


def test_where_it_stands_is_checked(two: Two) -> None:
    with pytest.raises(RecipeError, match="bias_correction has no error to correct"):
        slimc.compile(two, [x()], [Calibrate(), BiasCorrection(), Quantize(), Fuse()])
    with pytest.raises(RecipeError, match="'low_rank' comes after bias_correction"):
        slimc.compile(two, [x()], [Calibrate(), Prune(), BiasCorrection(), LowRank(), Fuse()])
    with pytest.raises(RecipeError, match="bias_correction appears twice"):
        slimc.compile(two, [x()], [Calibrate(), Prune(), BiasCorrection(), BiasCorrection(), Fuse()])
