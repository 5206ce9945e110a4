"""Decompose: what is stored and reported of a site, the bits, fallbacks, and refusals before any work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc.errors import NumericsError, RecipeError
from slimc.ir.text import text
from slimc.passes import Calibrate, Decompose, Fuse, LowRank
from slimc.passes.report import Report, table_of_sites
from slimc.runtime.packing import NM, Unstructured

FORMS = {
    "unstructured": Decompose(),
    "2:4 within a ratio": Decompose(ratio=0.55, pattern="2:4"),
    "2:4": Decompose(ratio=None, pattern="2:4"),
    "2:4 codes": Decompose(ratio=None, pattern="2:4", bits=4, group=8),
    "feedback": Decompose(feedback=True),
    "rank 2, weighted": Decompose(ratio=0.4, rank=2, weighting="activations"),
}


def stored_bits(packed: Any) -> float:
    return 8 * sum(tensor.nbytes for tensor in packed.tensors().values()) / (packed.format.rows * packed.format.columns)


@pytest.mark.parametrize("step", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_say_what_is_stored_and_how_far_off_it_is(
    step: Decompose, dtype: torch.dtype, network: nn.Module, batches: list[Tensor], run: Any
) -> None:
    batches = [batch.to(dtype) for batch in batches]
    program, outcome = run(network.to(dtype), batches, [Calibrate(), step, Fuse()])
    rows = {row.name: row for row in outcome.rows}
    for name in ("gate", "up"):
        packed, row = program.sites[name].packed, rows[name]
        exact = network.get_submodule(name).weight.detach().double()
        base, binary = packed.weight.decode().double(), packed.binary.decode().double()
        x = torch.cat([batch.reshape(-1, 32) for batch in batches]).double()
        assert row.bits == stored_bits(packed) == packed.format.bits_per_weight()
        assert row.weight_error == pytest.approx(float((base + binary - exact).norm() / exact.norm()), rel=1e-4)
        size = float((x @ exact.T).norm())
        assert row.output_error == pytest.approx(float((x @ (base + binary - exact).T).norm()) / size, rel=1e-3)
        assert row.base_output_error == pytest.approx(float((x @ (base - exact).T).norm()) / size, rel=1e-3)
        assert row.output_error < 0.6 * row.base_output_error
        kept = int((base != 0).sum())
        bits = 16 * kept + exact.numel() + 16 * step.rank * sum(exact.shape)
        # A value may have been rounded to zero, and feedback keeps whole numbers of a block of columns.
        assert row.compression_ratio == pytest.approx(1 - bits / (16 * exact.numel()), abs=0.01)
        assert packed.weight.format.sparsity == (Unstructured() if step.pattern is None else NM(2, 4))
        assert row.fallback is None
        if step.ratio is not None and not step.feedback:
            assert row.compression_ratio >= step.ratio


def test_the_table_shows_the_published_ratio_beside_the_bits(
    network: nn.Module, batches: list[Tensor], run: Any
) -> None:
    _, outcome = run(network, batches, [Calibrate(), Decompose()])
    headings, first, *_ = table_of_sites(outcome.rows)
    assert headings[-1] == "published ratio"
    assert first[-1] == f"{outcome.rows[0].compression_ratio:.4f}"
    report = Report([], outcome.rows, [])
    assert Report.from_json(report.to_json()) == report


def test_adapters_correct_what_signs_leave(network: nn.Module, batches: list[Tensor], run: Any) -> None:
    plain, _ = run(network, batches, [Calibrate(), Decompose()])
    program, outcome = run(network, batches, [Calibrate(), Decompose(), LowRank(rank=3, rounds=2)])
    exact = network.gate.weight.detach()
    errors = [(one.sites["gate"].packed.decode() - exact).norm() for one in (plain, program)]
    assert errors[1] < 0.9 * errors[0]
    assert outcome.rows[0].expression.endswith("+ low-rank 3 fp32 + signs x rank 1 fp32")


def test_a_site_that_calibration_never_reaches_is_decomposed_by_its_weights(
    network: nn.Module, batches: list[Tensor], run: Any
) -> None:
    silent = [torch.zeros_like(batch) for batch in batches]
    for step in (Decompose(), Decompose(feedback=True, weighting="activations")):
        program, outcome = run(network, silent, [Calibrate(), step])
        assert outcome.rows[0].fallback == (
            "calibration saw no input but zeros: entries were chosen by their magnitude"
        )
        assert table_of_sites(outcome.rows)[0][-1] == "instead"
        exact = network.gate.weight.detach()
        assert float((program.sites["gate"].packed.decode() - exact).norm() / exact.norm()) < 0.3


def test_a_resumed_run_gives_the_same_tensors(network: nn.Module, batches: list[Tensor], tmp_path: Path) -> None:
    passes = [Calibrate(), Decompose(pattern="2:4"), Fuse()]
    first = slimc.compile(network, batches, passes, journal=tmp_path / "journal")
    resumed = slimc.compile(network, batches, passes, journal=tmp_path / "journal", resume=True)
    assert slimc.report(resumed).sites == slimc.report(first).sites
    for name, tensor in first.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


def test_the_graph_before_and_after_fusion(batches: list[Tensor], run: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 36, bias=False))
    program, _ = run(layer, batches, [Calibrate(), Decompose(ratio=None, pattern="2:4", bits=4, group=8)])
    lines = [re.sub(" +# 0$", "", line) for line in text(program).splitlines()]
    attributes = "{bits=4, columns=32, group=8, n=2, m=4}"
    assert lines[1:] == [
        "%_0_values : u8[36, 8] = @0.values",
        "%_0_pattern : u8[36, 4] = @0.pattern",
        "%_0_scale : f32[36, 4] = @0.scale",
        f"%dequant_nm : f32[36, 32] = slim.dequant_nm(%_0_values, %_0_pattern, %_0_scale){attributes}",
        "%_0_signs : u8[36, 4] = @0.signs",
        "%_0_sign_left : f32[36, 1] = @0.sign_left",
        "%_0_sign_right : f32[1, 32] = @0.sign_right",
        "%linear : f32[s0, 9, 36] = aten.linear(%input_1, %dequant_nm)",
        "%sign_low_rank : f32[s0, 9, 36] = slim.sign_low_rank(%input_1, %_0_signs, %_0_sign_left, %_0_sign_right)",
        "%add : f32[s0, 9, 36] = aten.add.Tensor(%linear, %sign_low_rank)",
        "return [%add]",
    ]
    program, _ = run(layer, batches, [Calibrate(), Decompose(ratio=None, pattern="2:4", bits=4, group=8), Fuse()])
    lines = [re.sub(" +# 0$", "", line) for line in text(program).splitlines()]
    operands = "%input_1, %_0_values, %_0_pattern, %_0_scale, None, None, None, None, None, None"
    signs = "%_0_signs, %_0_sign_left, %_0_sign_right"
    assert lines[-2].startswith(f"%linear : f32[s0, 9, 36] = slim.linear({operands}, {signs}){{")


def test_what_does_not_fit_a_site_is_refused_before_any_work(
    network: nn.Module, batches: list[Tensor], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: Any) -> None:
        raise RuntimeError("work has begun")

    monkeypatch.setattr("slimc.passes.sweep.Sweep.run", work)
    refused = {
        Decompose(pattern="4:8"): r"pattern 4:8 does not divide the width 36 of 'mix'.*exclude=\['mix'\]",
        Decompose(ratio=0.9): r"decompose: 'gate': a compression ratio of 0.9 cannot be met.*exclude=\['gate'\]",
        Decompose(ratio=0.2, pattern="2:4"): "but the pattern 2:4 keeps 16, which is a ratio of 0.378",
        Decompose(rank=30, ratio=0.1): "decompose: 'gate': a compression ratio of 0.1 cannot be met",
        Decompose(rank=33, ratio=0.1): "rank 33 does not fit a 36 x 32 weight",
    }
    for step, message in refused.items():
        with pytest.raises(RecipeError, match=message):
            run(network, batches, [Calibrate(), step])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_broken_activations_name_the_site(bad: float, network: nn.Module, batches: list[Tensor], run: Any) -> None:
    broken = [batch.clone() for batch in batches]
    broken[1][0, 0, 0] = bad
    with pytest.raises(NumericsError, match="calibration inputs of 'gate' contain NaN or Inf"):
        run(network, broken, [Calibrate(), Decompose()])


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="ratio=null keeps what a pattern keeps, but there is none"):
        Decompose(ratio=None)
    with pytest.raises(RecipeError, match="with feedback an N:M pattern is filled; use ratio=null"):
        Decompose(pattern="2:4", feedback=True)
