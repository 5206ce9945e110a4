"""AllocateBits and GPTQ in a recipe: what is stored, what comes before and after, refusals and fallbacks."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc import recipes
from slimc.errors import NumericsError, RecipeError
from slimc.passes import (
    Activations,
    AllocateBits,
    Calibrate,
    Decompose,
    Fuse,
    LowRank,
    Pass,
    Prune,
    Quantize,
    check_order,
    from_config,
)

KL, OUTPUT = AllocateBits(3, 8), AllocateBits(2.5, 8, "output", widest=4)
CHAINS: list[list[Pass]] = [
    [KL, Quantize("gptq")],
    [AllocateBits(2, 8, direction="reverse"), Quantize("gptq", symmetric=True, calibrate="sqc")],
    [OUTPUT, Quantize("gptq", group=8, calibrate="sqc", preset="output", order="columns", static_groups=True)],
    [OUTPUT, Quantize("gptq", calibrate="sqc", preset="reference", order="groups")],
    [OUTPUT, Quantize("gptq", calibrate="learned", order="columns")],
    [OUTPUT, Quantize("absmax", symmetric=False)],
    [OUTPUT, Quantize("gptq"), Prune("2:4")],
    [OUTPUT, Quantize("gptq"), Prune("1:4", "sparsegpt")],
    [OUTPUT, Quantize("gptq"), Prune("2:4", "joint", sweeps=1)],
    [AllocateBits(3, 8, "output", narrowest=2), Quantize("gptq"), Prune("2:4", "joint", sweeps=1)],
    [AllocateBits(3, 8, "output", narrowest=2), Quantize("absmax"), LowRank("covariance", rank=2, rounds=2)],
    [Quantize("gptq", 1, 8), Prune("2:4", "joint", sweeps=1), LowRank("covariance", rank=2, rounds=2)],
    [OUTPUT, Prune("2:4"), Quantize("gptq")],
    [OUTPUT, Quantize("gptq"), LowRank(rank=4, bits=4, group=8, rounds=2)],
    [OUTPUT, Quantize("gptq"), Prune("2:4"), Activations(), LowRank(rank=2)],
    [Quantize("gptq", 1, 8), LowRank(rank=2)],
    [Quantize("gptq", 5, "channel"), Prune(0.5)],
    [Prune(0.5), Quantize("gptq", 3)],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(one.name for one in chain))
def test_bits_are_what_is_stored_and_the_graph_computes_it(
    chain: list[Pass], network: nn.Module, batches: list[Tensor], run: Any
) -> None:
    program, outcome = run(network, batches, [Calibrate(), *chain, Fuse()])
    for row in outcome.rows:
        packed = program.sites[row.name].packed
        form, shape = packed.format, row.shape[0] * row.shape[1]
        assert row.bits == 8 * sum(tensor.nbytes for tensor in packed.tensors().values()) / shape
        if isinstance(chain[0], AllocateBits):
            widths = form.weight.widths or (form.weight.bits,) * form.weight.scale_shape[1]
            sizes = [min(8, row.shape[1] - start) for start in range(0, row.shape[1], 8)]
            spent = sum(width * size for width, size in zip(widths, sizes, strict=True)) / row.shape[1]
            assert chain[0].bits - 1 < spent <= chain[0].bits
    compressed, exact = program.run(batches[0]), network(batches[0]).detach()
    assert float((compressed - exact).norm() / exact.norm()) < 0.9
    again, _ = run(network, batches, [Calibrate(), *chain, Fuse()])
    assert torch.equal(again.run(batches[0]), compressed)


@pytest.mark.parametrize("recipe", ["slim-llm-w3", "slim-llm-w2"])
def test_the_recipes_may_be_followed_by_pruning_and_adapters(
    recipe: str, network: nn.Module, batches: list[Tensor], run: Any
) -> None:
    *passes, fuse = recipes.load(recipe).build()
    pruning, adapters = Prune("2:4", "sparsegpt"), LowRank(rank=4, bits=4, group=8)
    errors = []
    for more in ([], [adapters], [pruning], [pruning, adapters]):
        program, outcome = run(network, batches, [*passes, *more, fuse])
        errors.append(outcome.rows[0].output_error)
        expression = outcome.rows[0].expression
        assert expression.startswith("2:4" if pruning in more else "int")
        assert expression.endswith("+ low-rank 4 int4/8" if adapters in more else "asymmetric")
        exact, stream = network(batches[0]).detach(), program.run(batches[0])
        assert float((stream - exact).norm() / exact.norm()) < 1
    alone, corrected, pruned, pruned_and_corrected = errors
    assert corrected < alone < pruned
    assert pruned_and_corrected < pruned


def test_files_are_as_large_as_the_bits_promise(tmp_path: Path) -> None:
    """Within 1 %, the header of the file included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 256, bias=False)).bfloat16()
    batch = torch.randn(40, 512).bfloat16()
    small = slimc.compile(model, [batch], [Calibrate(), AllocateBits(2.5, 64, "output"), Quantize("gptq"), Fuse()])
    slimc.save(small, tmp_path / "model")
    row = slimc.report(small).sites[0]
    assert "int2-4/64" in row.expression
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    promised = row.bits * 512 * 256 / 8
    assert promised <= size <= 1.01 * promised


def test_what_later_passes_fit_to_is_what_is_stored(network: nn.Module, batches: list[Tensor], run: Any) -> None:
    program, _ = run(network, batches, [Calibrate(), OUTPUT, Quantize("gptq"), Prune("2:4", "sparsegpt")])
    site = program.sites["gate"].packed.weight
    assert site.format.widths is not None
    assert len(set(site.format.widths)) > 1
    _, mask = site.unpack()
    assert bool((mask.view(36, -1, 4).sum(2) == 2).all())


def test_a_folder_keeps_the_widths(tmp_path: Path, network: nn.Module, batches: list[Tensor]) -> None:
    passes = [Calibrate(), OUTPUT, Quantize("gptq"), Fuse()]
    small = slimc.compile(network, batches, passes)
    slimc.save(small, tmp_path / "model")
    loaded = slimc.load(tmp_path / "model", model=copy.deepcopy(network))
    with torch.no_grad():
        assert torch.equal(small(batches[0]), loaded(batches[0]))
    expressions = {row.name: row.expression for row in slimc.report(loaded).sites}
    for name, expression in expressions.items():
        packed = loaded.get_submodule(name).packed
        assert expression == packed.format.describe()
        assert packed.format.weight.widths is not None
    assert "cuda-mixed" in str(slimc.explain(loaded))


def test_a_resumed_run_takes_finished_sites_from_the_journal(
    tmp_path: Path, network: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [Calibrate(), OUTPUT, Quantize("gptq"), Fuse()]
    first = slimc.compile(network, batches, passes, journal=tmp_path / "journal")
    monkeypatch.delattr(AllocateBits, "_solve")
    again = slimc.compile(network, batches, passes, journal=tmp_path / "journal", resume=True)
    with torch.no_grad():
        assert torch.equal(first(batches[0]), again(batches[0]))
    assert slimc.report(again).sites == slimc.report(first).sites


@pytest.mark.parametrize("allocation", [[], [OUTPUT], [KL]], ids=["uniform", "output", "kl"])
def test_a_site_that_calibration_never_reaches_is_rounded_to_the_nearest_codes(
    allocation: list[Pass], network: nn.Module, batches: list[Tensor], run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    silent = [torch.zeros_like(batch) for batch in batches]
    with caplog.at_level(logging.WARNING, "slimc"):
        program, outcome = run(network, silent, [Calibrate(), *allocation, Quantize("gptq", 3, 8)])
    assert "Calibration never reached 'gate' and 'up'" in caplog.text
    row = outcome.rows[0]
    assert "weights were rounded to the nearest codes" in row.fallback
    if allocation:
        assert f"all groups have {int(allocation[0].bits)} bits" in row.fallback
    bits = int(allocation[0].bits) if allocation else 3
    expected, _ = run(network, batches, [Quantize("absmax", bits, 8, symmetric=False)])
    assert torch.equal(program.sites["gate"].packed.decode(), expected.sites["gate"].packed.decode())


@pytest.mark.parametrize(
    "passes",
    [
        [Quantize("gptq", 3, 8, damping=1e-18)],
        [AllocateBits(3, 8), Quantize("gptq", calibrate="sqc", damping=1e-18)],
        [Prune("2:4", "sparsegpt", damping=1e-18)],
        [Quantize("gptq", 3, 8), Prune("2:4", "sparsegpt", damping=1e-18)],
        [Decompose(ratio=None, pattern="2:4", feedback=True, damping=1e-18)],
    ],
    ids=lambda passes: "-".join(one.name for one in passes),
)
def test_a_singular_gram_matrix_is_damped_more_and_the_report_says_so(
    passes: list[Pass], network: nn.Module, run: Any
) -> None:
    """Three tokens span 3 of 32 dimensions, so that nothing but damping makes their Gram matrix regular."""
    few = [torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))]
    program, outcome = run(network, few, [Calibrate(), *passes])
    assert "the Gram matrix is singular with 1e-18 of its mean diagonal added, so " in outcome.rows[0].fallback
    assert all(bool(site.packed.decode().isfinite().all()) for site in program.sites.values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("chain", [[KL, Quantize("gptq")], [OUTPUT, Quantize("absmax")], [Quantize("gptq", 3, 8)]])
def test_inputs_whose_gram_matrix_is_not_finite_name_the_site(
    bad: float, chain: list[Pass], network: nn.Module, batches: list[Tensor], run: Any
) -> None:
    broken = [batch.clone() for batch in batches]
    broken[1][0, 0, 0] = bad
    with pytest.raises(NumericsError, match="calibration inputs of 'gate' contain NaN or Inf"):
        run(network, broken, [Calibrate(), *chain])


def test_groups_need_not_divide_the_width(network: nn.Module, batches: list[Tensor], run: Any) -> None:
    """Layers of 32 and 36 columns: the last group of 7 is short, and counts for as much as it has columns."""
    program, outcome = run(network, batches, [Calibrate(), AllocateBits(2.5, 7, "output"), Quantize("gptq")])
    for row in outcome.rows:
        form = program.sites[row.name].packed.format.weight
        widths = form.widths or (form.bits,) * form.scale_shape[1]
        sizes = [min(7, row.shape[1] - start) for start in range(0, row.shape[1], 7)]
        assert sum(width * size for width, size in zip(widths, sizes, strict=True)) <= 2.5 * row.shape[1]


class PassedBy(nn.Module):
    """A layer that no token comes to, as to an expert that is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.never = nn.Linear(32, 36), nn.Linear(32, 36)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.used(x), self.never(x[:, :0])], 1)


@pytest.mark.parametrize(
    ("passes", "fallback"),
    [
        ([KL, Quantize("gptq")], "all groups have 3 bits; .*rounded to the nearest codes"),
        ([OUTPUT, Quantize("absmax")], "all groups have 2 bits"),
        ([Quantize("gptq", 3, 8, calibrate="learned")], "rounded to the nearest codes"),
        ([Decompose(ratio=None, pattern="2:4", bits=4, group=8, feedback=True)], "chosen by their magnitude"),
        ([KL, Quantize("gptq"), Prune(), LowRank(rank=2)], "nearest codes; .*chosen by their magnitude"),
    ],
    ids=["kl", "output", "learned", "slab", "all"],
)
def test_a_site_that_sees_no_token_says_what_was_done_instead(
    passes: list[Pass], fallback: str, batches: list[Tensor], run: Any
) -> None:
    torch.manual_seed(0)
    program, outcome = run(PassedBy().eval(), batches, [Calibrate(), *passes, Fuse()])
    used, never = outcome.rows
    assert used.fallback is None
    assert re.search(fallback, never.fallback)
    assert bool(program.sites["never"].packed.decode().isfinite().all())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "joint"])
def test_a_site_that_calibration_never_reaches_is_pruned_by_magnitude_and_the_report_says_so(
    method: str, network: nn.Module, batches: list[Tensor], run: Any
) -> None:
    silent = [torch.zeros_like(batch) for batch in batches]
    program, outcome = run(network, silent, [Calibrate(), Prune("2:4", method)])
    assert outcome.rows[0].fallback == "calibration saw no input but zeros: entries were chosen by their magnitude"
    expected, _ = run(network, batches, [Prune("2:4", "magnitude")])
    assert torch.equal(program.sites["gate"].packed.decode(), expected.sites["gate"].packed.decode())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0.5}, "bits must lie between narrowest=1 and widest=8, or the budget cannot be met; found 0.5"),
        ({"bits": 4.5, "objective": "output", "widest": 4}, "the budget cannot be met"),
        ({"bits": float("nan")}, "bits must lie between"),
        ({"bits": "3"}, "bits must lie between"),
        ({"bits": 2.5}, "'kl' searches among one bit less and one more.*objective 'output' takes any average"),
        ({"bits": 1}, "must be a whole number from 2 to 7"),
        ({"bits": 8}, "must be a whole number from 2 to 7"),
        ({"group": 1}, "group must be a number of columns"),
        ({"group": "channel"}, "group must be a number of columns"),
        ({"objective": "mse"}, "objective must be 'kl' or 'output'"),
        ({"direction": "both"}, "direction must be 'forward' or 'reverse'"),
        ({"narrowest": 0}, "narrowest must be 1 to 8"),
        ({"widest": 9}, "widest must be 1 to 8"),
        ({"narrowest": 5, "widest": 4}, "narrowest=5 must not be above widest=4"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"allocate_bits: .*{message}"):
        AllocateBits.from_options(options)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Calibrate(), KL, KL, Quantize("gptq")], "allocate_bits appears twice"),
        ([Calibrate(), Quantize("gptq"), KL], "allocate_bits comes after quantize. Put allocate_bits before it"),
        ([Calibrate(), Prune(), KL, Quantize("gptq")], "allocate_bits comes after prune"),
        ([KL, Quantize("absmax")], "allocate_bits needs calibrate before it"),
        ([Quantize("gptq")], "quantize needs calibrate before it"),
        ([Calibrate(), KL], "compresses nothing"),
        ([Calibrate(), KL, Quantize()], "method 'slim' has one width for all; .* use method 'gptq' or 'absmax'"),
        ([Calibrate(), KL, Quantize("gptq", group=16)], "group=16, but allocate_bits chooses a width for every 8"),
        ([Calibrate(), KL, Quantize("gptq", order="columns")], "order='columns' after allocate_bits needs static"),
        ([Calibrate(), KL, Quantize("gptq"), Prune(0.5)], "a share of weights does not go with allocate_bits"),
        ([Calibrate(), KL, Quantize("gptq"), Prune("3:5")], "3:5 does not divide the groups of 8 columns"),
        ([Calibrate(), Quantize("gptq", 1, 8), Prune(0.5)], "a share of weights does not go with quantize"),
        ([Calibrate(), Quantize("gptq", calibrate="learned")], "calibrate='learned' needs groups of columns"),
        ([Calibrate(), Prune(0.5), Quantize("gptq", 1, 8)], "signs do not go with a share of weights"),
        ([Calibrate(), Prune(), Quantize("gptq", 1, 6)], "pattern 2:4 of prune does not divide the groups of 6"),
        ([Calibrate(), Prune("1:8"), Quantize("gptq", 1, 12)], "Use a group that its second number divides"),
        ([Calibrate(), Quantize("gptq", 1, 6), Prune()], "2:4 does not divide the groups of 6 columns of quantize"),
    ],
)
def test_an_order_that_cannot_work_is_refused(passes: list[Pass], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_order(passes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptq", "bits": 9}, "1 to 8"),
        ({"method": "gptq", "bits": 1}, "signs, which need a scale for every group of columns"),
        ({"method": "gptq", "group": 16, "order": "columns"}, "set static_groups=true, or order='groups'"),
        ({"method": "absmax", "calibrate": "sqc"}, "calibrate belongs to method 'gptq', not to 'absmax'"),
        ({"method": "gptq", "activation_aware": True}, "activation_aware belongs to method 'slim'"),
        (
            {"method": "gptq", "preset": "papper"},
            "preset must be one of paper, reference, output.*did you mean 'paper'",
        ),
    ],
)
def test_options_of_gptq_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Quantize.from_options(options)


def test_recipe_lines_read_back() -> None:
    for one in (KL, OUTPUT, AllocateBits(bits=4)):
        assert from_config([one.to_config()]) == [one]
        assert eval(repr(one)) == one
