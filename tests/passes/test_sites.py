"""What passes do to a site: report rows against independent computations, counts, fallbacks and refusals."""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slimc.errors import NumericsError, RecipeError
from slimc.passes import Calibrate, Fuse, LowRank, Pass, Prune, Quantize
from slimc.passes.solvers import damped
from slimc.passes.statistics import SAMPLE_TOKENS, InputStatistics
from slimc.passes.work import SiteWork
from slimc.runtime.packing import NM

COMBINATIONS: list[list[Pass]] = [
    [Quantize(bits=3, group=16)],
    [Quantize("absmax", 2, "channel", symmetric=False)],
    [Calibrate(), Quantize(activation_aware=True, fraction=0.1, factor=3), Prune("1:4"), LowRank(rank=3, rounds=2)],
    [Calibrate(), Prune("2:4")],
    [Calibrate(), Prune("3:4", "sparsegpt"), Quantize(group=8)],
    [Calibrate(), Quantize(group=16), Prune("2:4", "sparsegpt"), LowRank(rank=0.2, bits=4, group=4)],
    [Calibrate(), Quantize(), Prune(0.6), LowRank(rank=4, bits=4), Fuse()],
    [Prune(0.3, "magnitude"), LowRank("svd", rank=2)],
    [Calibrate(), Quantize(group=16), Prune("2:4", sweeps=1), LowRank("covariance", rank=2, bits=4, rounds=2)],
    [Calibrate(), Quantize("absmax", 3, symmetric=False), LowRank("covariance", rank=2, rounds=2)],
    [Calibrate(), Quantize(activation_aware=True), Prune("2:4"), LowRank("covariance", rank=2, rounds=1)],
    [Calibrate(), Prune("1:2", "sparsegpt", sweeps=1), LowRank("covariance", rank=2, bits=4, rounds=1)],
    [Calibrate(), Prune(0.5, sweeps=1), LowRank("covariance", rank=2, bits=4, rounds=1)],
]


def stored_bits(packed: Any) -> float:
    return 8 * sum(tensor.nbytes for tensor in packed.tensors().values()) / (packed.format.rows * packed.format.columns)


@pytest.mark.parametrize("passes", COMBINATIONS, ids=lambda passes: " ".join(one.name for one in passes))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_report_rows_say_what_is_stored_and_how_far_off_it_is(
    passes: list[Pass], dtype: torch.dtype, network: nn.Module, batches: list[Tensor], run: Any
) -> None:
    batches = [batch.to(dtype) for batch in batches]
    program, outcome = run(network.to(dtype), batches, passes)
    calibrated = isinstance(passes[0], Calibrate)
    rows = {row.name: row for row in outcome.rows}
    # The siblings read the inputs themselves, so their errors can be computed from nothing but what is packed.
    for name in ("gate", "up"):
        site, row = program.sites[name], rows[name]
        exact = network.get_submodule(name).weight.detach().double()
        left, right = site.packed.left, site.packed.right
        base = site.packed.weight.decode().double()
        if site.packed.input_scale is not None:
            base = base * site.packed.input_scale.double()
        decoded = base if left is None else base + left.decode().double() @ right.decode().double()
        x = torch.cat([batch.reshape(-1, 32) for batch in batches]).double()
        assert row.bits == stored_bits(site.packed)
        assert row.weight_error == pytest.approx(float((decoded - exact).norm() / exact.norm()), rel=1e-4)
        if not calibrated:
            assert (row.base_output_error, row.output_error) == (None, None)
            continue
        output = x @ exact.T
        assert row.output_error == pytest.approx(float((x @ decoded.T - output).norm() / output.norm()), rel=1e-4)
        assert row.base_output_error == pytest.approx(float((x @ base.T - output).norm() / output.norm()), rel=1e-4)


def test_groups_need_not_divide_the_width(network: nn.Module, batches: list[Tensor], run: Any) -> None:
    program, _ = run(network, batches, [Quantize(bits=4, group=16)])
    assert program.sites["mix"].packed.weight.scale.shape == (36, 3)


def test_patterns_keep_exactly_n_of_m(network: nn.Module, batches: list[Tensor], run: Any) -> None:
    for method in ("wanda", "magnitude", "sparsegpt"):
        program, _ = run(network, batches, [Calibrate(), Quantize(), Prune("1:4", method)])
        for site in program.sites.values():
            _, mask = site.packed.weight.unpack()
            assert site.packed.format.weight.sparsity == NM(1, 4)
            assert bool((mask.view(mask.shape[0], -1, 4).sum(2) == 1).all())


def test_coordinate_descent_moves_masks_and_keeps_patterns(network: nn.Module, batches: list[Tensor], run: Any) -> None:
    errors = []
    for sweeps in (0, 2):
        passes = [Calibrate(), Quantize(), Prune("1:4", sweeps=sweeps)]
        program, outcome = run(network, batches, passes)
        errors.append(outcome.rows[0].output_error)
        for site in program.sites.values():
            _, mask = site.packed.weight.unpack()
            assert bool((mask.view(mask.shape[0], -1, 4).sum(2) == 1).all())
    assert errors[1] < 0.9 * errors[0]


def test_sites_that_share_an_input_share_its_scale(network: nn.Module, batches: list[Tensor], run: Any) -> None:
    aware = Quantize(activation_aware=True, fraction=0.1, factor=3)
    program, _ = run(network.bfloat16(), [batch.bfloat16() for batch in batches], [Calibrate(), aware])
    gate, up, mix = (program.sites[name].packed for name in ("gate", "up", "mix"))
    assert torch.equal(gate.input_scale, up.input_scale)
    assert int((gate.input_scale != 1).sum()) == 3
    assert mix.input_scale.shape == (36,)
    assert any(
        str(node.target) == "aten.mul.Tensor" and "input_scale" in str(node.args[1]) for node in program.graph.nodes
    )


def work_on(weight: Tensor, inputs: Tensor, wanted: set[str], dtype: torch.dtype = torch.float32) -> SiteWork:
    return SiteWork("site", weight, dtype, InputStatistics.gather([inputs], wanted, "site"), lambda: [weight])


@given(st.integers(0, 10_000), st.sampled_from(["slim", "svd"]), st.sampled_from([None, 2, 4]))
@settings(max_examples=25)
def test_more_rounds_never_leave_a_larger_weighted_error(seed: int, method: Any, bits: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 20, generator=generator)
    inputs = torch.randn(64, 20, generator=generator) * torch.randn(20, generator=generator).mul(2).exp()
    errors = []
    for rounds in range(4):
        work = work_on(weight, inputs, {"activations"})
        for one in (Quantize(bits=3), Prune("2:4"), LowRank(method, rank=2, bits=bits, group=4, rounds=rounds)):
            one.apply(work)
        difference = (work.pack().decode() - weight).double()
        weights = inputs.abs().mean(0).double() if method == "slim" else torch.ones(20)
        errors.append(float((difference * weights).norm()))
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_more_rounds_of_the_covariance_never_leave_a_larger_output_error(bits: int | None, pattern: Any) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(12, 20, generator=generator)
        mix = torch.eye(20) + 0.3 * torch.randn(20, 20, generator=generator)
        inputs = torch.randn(64, 20, generator=generator) @ mix
        hessian = damped(inputs.T @ inputs, 0.01)
        errors = []
        for rounds in (0, 1, 4):
            work = work_on(weight, inputs, {"activations", "gram"})
            low_rank = LowRank("covariance", rank=2, bits=bits, group=4, rounds=rounds)
            for one in (Quantize(bits=3, group=10), Prune(pattern), low_rank):
                one.apply(work)
            difference = (work.pack().decode() - weight).double()
            errors.append(float(((difference @ hessian) * difference).sum()))
        assert max(errors[1:]) <= errors[0] * (1 + 1e-5)


def test_sixteen_bit_input_scales_add_no_error_of_their_own() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    weight[:, :4] *= 0.1
    weight = weight.bfloat16().float()
    inputs = torch.ones(4, 16)
    inputs[:, :4] = 1000
    work = work_on(weight, inputs, {"activations"}, torch.bfloat16)
    Quantize(bits=8, activation_aware=True, fraction=0.25, factor=3).apply(work)
    # 1/3 is no bfloat16. The error must be that of rounding to the grid alone, half a step scaled back by the input.
    error = (work.quantized.dequantize() * work.input_scale - weight)[:, :4].abs()
    assert float(error.max()) <= float(work.quantized.scale) / 2 * float(work.input_scale[0]) * (1 + 1e-4)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_site_that_calibration_never_reaches_is_compressed_by_its_weights(
    method: Any, network: nn.Module, batches: list[Tensor], run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    silent = [torch.zeros_like(batch) for batch in batches]
    with caplog.at_level(logging.WARNING, "slimc"):
        program, outcome = run(network, silent, [Calibrate(), Quantize(), Prune("2:4", method), LowRank(rank=2)])
    assert "Calibration never reached 'gate' and 'up': its inputs are all zero" in caplog.text
    expected, _ = run(network, batches, [Quantize(), Prune("2:4", "magnitude"), LowRank("svd", rank=2)])
    for name in ("gate", "up"):
        assert torch.equal(program.sites[name].packed.decode(), expected.sites[name].packed.decode())
    assert outcome.rows[0].output_error == 0


def test_what_does_not_fit_a_site_is_refused_before_any_work(
    network: nn.Module, batches: list[Tensor], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: Any) -> None:
        raise RuntimeError("work has begun")

    monkeypatch.setattr("slimc.passes.sweep.Sweep.run", work)
    with pytest.raises(RecipeError, match=r"2:8 does not divide the width 36 of 'mix'.*exclude=\['mix'\]"):
        run(network, batches, [Prune("2:8", "magnitude")])
    with pytest.raises(RecipeError, match="low_rank: 'down': rank 30 does not fit a 24 x 36 weight; give 1 to 24"):
        run(network, batches, [Quantize(), LowRank("svd", rank=30)])
    with torch.no_grad():
        network.mix.weight[3, 4] = torch.nan
    with pytest.raises(NumericsError, match=r"weight of 'mix' holds NaN or Inf. Repair .*exclude=\['mix'\]"):
        run(network, batches, [Quantize()])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_broken_activations_name_the_site(bad: float, network: nn.Module, batches: list[Tensor], run: Any) -> None:
    broken = [batch.clone() for batch in batches]
    broken[1][0, 0, 0] = bad
    with pytest.raises(NumericsError, match="calibration inputs of 'gate' contain NaN or Inf"):
        run(network, broken, [Calibrate(), Prune()])


def test_float16_activations_are_summed_in_float32() -> None:
    inputs = torch.full((5000, 3), 300.0, dtype=torch.float16)
    statistics = InputStatistics.gather([inputs, inputs], {"gram"}, "site")
    assert statistics.count == 10_000
    # A sum of n numbers of one sign is off by at most n - 1 roundings.
    bound = 10_000 * 2**-24
    assert torch.allclose(statistics.mean_abs, torch.full((3,), 300.0), rtol=bound)
    assert torch.allclose(statistics.gram, torch.full((3, 3), 9e8), rtol=bound)


@given(st.lists(st.integers(1, 700), min_size=1, max_size=12))
def test_the_sample_is_evenly_spaced_whatever_the_batches(sizes: list[int]) -> None:
    tokens = sum(sizes)
    values = torch.arange(tokens, dtype=torch.float32)[:, None]
    sample = InputStatistics.gather(list(values.split(sizes)), set(), "site").sample.flatten()
    assert len(sample) == min(tokens, SAMPLE_TOKENS)
    gaps = sample.diff()
    assert sample[0] == 0
    assert not len(gaps) or float(gaps.max() - gaps.min()) <= 1
    assert tokens - float(sample[-1]) <= tokens / len(sample) + 1


@given(data=st.data())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_promised_bits_are_the_stored_bytes(data: st.DataObject, batches: list[Tensor], run: Any) -> None:
    middle: list[Pass] = data.draw(
        st.sampled_from([0, 1, 2, 3]).flatmap(
            lambda kind: st.tuples(
                st.builds(Quantize, bits=st.sampled_from([2, 3, 4, 8]), group=st.none() | st.integers(2, 40)),
                st.builds(Prune, st.sampled_from(["2:4", "1:2", "3:4"]) | st.floats(0.05, 0.95)),
            ).map(lambda pair: [list(pair), list(pair)[::-1], [pair[0]], [pair[1]]][kind])
        )
    )
    low_rank = data.draw(
        st.just([])
        | st.builds(LowRank, rank=st.integers(1, 8), bits=st.sampled_from([None, 2, 4]), rounds=st.integers(0, 1)).map(
            lambda one: [one]
        )
    )
    torch.manual_seed(data.draw(st.integers(0, 99)))
    width = 4 * data.draw(st.integers(1, 12))
    model = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 20)).eval()
    program, outcome = run(model, copy.deepcopy(batches[:1]), [Calibrate(), *middle, *_fitting(low_rank, width)])
    assert len(outcome.rows) == 2
    for row in outcome.rows:
        assert row.bits == stored_bits(program.sites[row.name].packed)


def _fitting(low_rank: list[LowRank], width: int) -> list[LowRank]:
    return [one for one in low_rank if one.rank <= width]
