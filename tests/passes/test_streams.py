"""The sweep beyond its main stream: the dense model beside it, batches held out, and another device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import slimc
from slimc.errors import InputError, NumericsError, RecipeError
from slimc.ir.capture import capture
from slimc.passes import Calibrate, LowRank, Prune, Quantize
from slimc.passes.base import SitePass, Statistic
from slimc.passes.constants import Constants
from slimc.passes.statistics import InputStatistics
from slimc.passes.work import SiteWork

# ------------------------------------------------------------------------------------------------------ two streams


@dataclass(frozen=True)
class FollowDense(SitePass):
    """Fit the weight to what the dense model puts out: ``W C H^-1``, of the cross and the Gram matrix."""

    name: ClassVar[str] = "follow_dense"

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({"gram", "cross_gram"})

    def apply(self, work: SiteWork) -> None:
        statistics = work.require_statistics(self.name)
        gram, cross = work.require_gram(self.name).double(), statistics.cross_gram
        assert cross is not None
        damping = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        work.base = (work.base.double() @ cross.double() @ torch.linalg.inv(gram + damping)).float()


@dataclass(frozen=True)
class Look(SitePass):
    """Ask for both streams and note what there is."""

    name: ClassVar[str] = "look"
    seen: ClassVar[dict[str, tuple[InputStatistics, InputStatistics | None]]] = {}

    def statistics(self) -> frozenset[Statistic]:
        return frozenset({"gram", "cross_gram"})

    def apply(self, work: SiteWork) -> None:
        self.seen[work.name] = work.require_statistics(self.name), work.held_out


@pytest.fixture
def looked() -> Iterator[dict[str, tuple[InputStatistics, InputStatistics | None]]]:
    Look.seen.clear()
    yield Look.seen
    Look.seen.clear()


def inputs_of(model: nn.Module, batches: list[Tensor], names: Any) -> dict[str, Tensor]:
    """What modules read when ``model`` runs, float64 [tokens, columns]."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0].flatten(0, -2)))
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).double() for name, rows in found.items()}


def chain() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 8))


def test_the_cross_gram_is_that_of_the_dense_and_the_compressed_model(batches: list[Tensor], looked: Any) -> None:
    model = chain()
    small = slimc.compile(model, batches, [Calibrate(), Quantize(bits=3), Look()])
    dense, actual = inputs_of(model, batches, "024"), inputs_of(small, batches, "024")
    for name, (statistics, _) in looked.items():
        expected = dense[name].T @ actual[name]
        scale = dense[name].abs().T @ actual[name].abs()
        # Products and sums in float32 and the activations themselves: each is off by a few roundings a term.
        assert bool(((statistics.cross_gram.double() - expected).abs() <= 2**-18 * scale).all())
        assert torch.allclose(statistics.dense_sample.double(), dense[name], atol=1e-4)
        assert torch.allclose(statistics.sample.double(), actual[name], atol=1e-4)
    assert torch.equal(looked["0"][0].gram, looked["0"][0].cross_gram)
    assert not torch.allclose(looked["4"][0].gram, looked["4"][0].cross_gram, rtol=1e-2)


def test_fitting_to_the_dense_model_lowers_the_error_that_has_added_up(batches: list[Tensor]) -> None:
    model = chain()
    passes = [Calibrate(), Look(), Prune("2:4")]
    plain = slimc.report(slimc.compile(model, batches, passes))
    fitted = slimc.report(slimc.compile(model, batches, [passes[0], FollowDense(), passes[2]]))
    before, after = ([row.stream_error for row in report.sites] for report in (plain, fitted))
    assert all(error is not None for error in (*before, *after))
    assert after[-1] < before[-1]


def test_without_a_pass_that_asks_there_is_one_stream(batches: list[Tensor]) -> None:
    report = slimc.report(slimc.compile(chain(), batches, [Calibrate(), Prune()]))
    assert [row.stream_error for row in report.sites] == [None] * 3


class WritesInPlace(nn.Module):
    """Adds to a value that both streams would otherwise share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        kept = x * 2
        kept += torch.tanh(self.first(x))
        return self.second(kept)


def test_an_operator_that_writes_its_argument_keeps_the_streams_apart(batches: list[Tensor], looked: Any) -> None:
    torch.manual_seed(5)
    model = WritesInPlace()
    small = slimc.compile(model, batches, [Calibrate(), Quantize(bits=2), Look()])
    statistics = looked["second"][0]
    assert torch.allclose(statistics.dense_sample, inputs_of(model, batches, ["second"])["second"].float(), atol=1e-4)
    assert torch.allclose(statistics.sample, inputs_of(small, batches, ["second"])["second"].float(), atol=1e-4)


class WritesInside(WritesInPlace):
    """The same, in a region that export puts into a graph of its own."""

    def forward(self, x: Tensor) -> Tensor:
        kept = x * 2
        addend = torch.tanh(self.first(x))
        with torch.autocast("cpu", enabled=False):
            kept += addend
        return self.second(kept)


def test_a_write_in_an_inner_graph_keeps_the_streams_apart(batches: list[Tensor], looked: Any) -> None:
    torch.manual_seed(5)
    model = WritesInside()
    small = slimc.compile(model, batches, [Calibrate(), Quantize(bits=2), Look()])
    statistics = looked["second"][0]
    assert torch.allclose(statistics.dense_sample, inputs_of(model, batches, ["second"])["second"].float(), atol=1e-4)
    assert torch.allclose(statistics.sample, inputs_of(small, batches, ["second"])["second"].float(), atol=1e-4)


class ReadsTwice(nn.Module):
    """Uses one weight twice, and changes its input in between."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.f(x)
        x.mul_(10)
        return y + self.f(x)


def test_an_input_that_is_written_between_two_uses_counts_as_it_was(batches: list[Tensor], looked: Any) -> None:
    model = ReadsTwice()
    slimc.compile(model, batches, [Calibrate(), Look()])
    rows = torch.cat([batch.flatten(0, -2) for batch in batches]).double()
    gram = looked["f"][0].gram.double()
    expected = rows.T @ rows * 101
    assert bool(((gram - expected).abs() <= 2**-18 * (rows.abs().T @ rows.abs() * 101)).all())


def test_a_dense_stream_that_overflows_is_an_error() -> None:
    with pytest.raises(NumericsError, match="'here' in the dense model contain NaN or Inf"):
        InputStatistics.gather([torch.ones(2, 4)], {"cross_gram"}, "here", dense=[torch.full((2, 4), float("inf"))])


# ------------------------------------------------------------------------------------------------- held-out batches


def test_held_out_batches_are_kept_out_of_the_statistics(batches: list[Tensor], looked: Any) -> None:
    model = chain()
    small = slimc.compile(model, batches, [Calibrate(held_out=0.3), Quantize(bits=3), Look()])
    actual, others = inputs_of(small, batches[:2], "024"), inputs_of(small, batches[2:], "024")
    for name, (statistics, held_out) in looked.items():
        assert statistics.count == len(actual[name])
        assert held_out is not None
        assert held_out.count == len(others[name])
        assert torch.allclose(held_out.sample.double(), others[name], atol=1e-4)
    report = slimc.report(small)
    assert report.calibration_tokens == sum(len(batch) for batch in batches[:2])
    for row in report.sites:
        x, weight = others[row.name], model.get_submodule(row.name).weight.detach().double()
        error = x @ (small.get_submodule(row.name).weight.double() - weight).T
        assert row.held_out_error == pytest.approx(float(error.norm() / (x @ weight.T).norm()), rel=1e-3)


def test_the_low_rank_rounds_are_judged_by_held_out_outputs(batches: list[Tensor], run: Any) -> None:
    def errors(rounds: int) -> list[float]:
        passes = [Calibrate(held_out=0.3), Quantize(bits=3), Prune("2:4"), LowRank(rank=4, rounds=rounds)]
        # With this seed the first round makes the held-out outputs worse than no round.
        torch.manual_seed(5)
        _, outcome = run(nn.Sequential(nn.Linear(32, 24)), batches, passes, held_out=1)
        return [row.held_out_error for row in outcome.rows]

    found = [errors(rounds)[0] for rounds in range(4)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


def test_held_out_batches_that_never_arrive_judge_nothing(
    batches: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    quiet = [*batches[:2], torch.zeros_like(batches[2])]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    passes = [Quantize(bits=3), Prune("2:4"), LowRank(rank=4, rounds=4)]
    with caplog.at_level("WARNING"):
        judged = slimc.report(slimc.compile(model, quiet, [Calibrate(held_out=0.3), *passes])).sites[0]
    assert "No held-out batch reached '0'" in caplog.text
    assert judged.held_out_error is None
    fitted = slimc.report(slimc.compile(model, quiet[:2], [Calibrate(), *passes])).sites[0]
    assert judged.output_error == fitted.output_error


@pytest.mark.parametrize(("share", "batches", "expected"), [(0.0, 1, 0), (0.01, 5, 1), (0.5, 5, 2), (0.9, 9, 8)])
def test_the_number_of_held_out_batches(share: float, batches: int, expected: int) -> None:
    assert Calibrate(held_out=share).held_out_batches(batches) == expected


@pytest.mark.parametrize(
    ("share", "samples", "expected"), [(0.0, 3, 8), (0.25, 64, 8), (0.25, 12, 3), (0.75, 30, 7), (0.25, 3, 1)]
)
def test_a_batch_is_no_larger_than_the_share_held_out(share: float, samples: int, expected: int) -> None:
    assert Calibrate(batch=8, held_out=share).batch_of(samples) == expected


def test_held_out_batches_that_nothing_could_be_judged_by_are_refused(batches: list[Tensor]) -> None:
    with pytest.raises(RecipeError, match="held_out=0.3 judges nothing"):
        slimc.compile(chain(), batches, [Calibrate(held_out=0.3), Quantize(), LowRank(method="svd", rounds=3)])


def test_no_batch_left_to_fit_to_is_an_error(batches: list[Tensor]) -> None:
    with pytest.raises(InputError, match="share of 0.5 .* which leaves none of 1 to fit them to"):
        slimc.compile(chain(), batches[:1], [Calibrate(held_out=0.5), Prune()])


@pytest.mark.parametrize("share", [-0.1, 1, 1.0, float("nan"), "half", True])
def test_a_share_is_a_number_below_one(share: Any) -> None:
    with pytest.raises(RecipeError, match="held_out must be a share of the batches"):
        Calibrate(held_out=share)


# --------------------------------------------------------------------------------------------------- another device


class Elsewhere(TorchDispatchMode):
    """Stands in for a second device: what `Tensor.to` brings over is noted, and only that may meet."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") == torch.device("meta"):
            self.copies += 1
        return function(*args, **(kwargs or {}))


class Positions(nn.Module):
    """Names its device inside, as position embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 32)
        self.linear = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.table(torch.arange(x.shape[1], device=x.device)))


def test_devices_named_in_the_graph_follow_the_sweep(batches: list[Tensor]) -> None:
    program = capture(Positions(), [((batch,), {}) for batch in batches])
    there = torch.device("meta")
    constants = Constants(program.module, there)
    named = [leaf for node in program.graph.nodes for leaf in node.kwargs.values() if isinstance(leaf, torch.device)]
    assert named
    assert {constants.here(device) for device in named} == {there}
    with Elsewhere() as mode:
        values = [constants[node] for node in program.graph.nodes if node.op == "get_attr"]
    assert {value.device for value in values} == {there}
    assert mode.copies == len(values) == len(list(program.module.parameters()))
    assert all(parameter.device.type == "cpu" for parameter in program.module.parameters())


def test_naming_the_models_own_device_changes_nothing(batches: list[Tensor]) -> None:
    model = chain()
    passes = [Calibrate(), Quantize(), Prune()]
    one, other = (slimc.compile(model, batches, passes, device=device) for device in (None, "cpu"))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_a_device_that_is_not_there_is_refused_before_any_work(batches: list[Tensor]) -> None:
    with pytest.raises(InputError, match="the device 'cuda:99' cannot be used"):
        slimc.compile(chain(), batches, [Calibrate(), Prune()], device="cuda:99")
