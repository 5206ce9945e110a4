"""The grammar of the passes: one form as repr, recipe line and JSON; refusals that say what to do; the order."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slimc.errors import RecipeError
from slimc.passes import (
    Activations,
    Calibrate,
    Compensate,
    Decompose,
    Fuse,
    LowRank,
    Pass,
    Prune,
    Quantize,
    Tune,
    check_order,
    from_config,
)
from slimc.passes.pipeline import select

positive = st.integers(1, 4096)
groups = st.none() | st.just("channel") | st.integers(2, 4096)
shares = st.floats(0.001, 0.999)

calibrates = st.builds(Calibrate, positive, st.integers(2, 4096), positive, st.integers(0, 2**63 - 1))
plain_quantizes = st.builds(Quantize, st.just("absmax"), st.sampled_from([2, 3, 4, 8]), groups, st.booleans())
slim_quantizes = st.builds(
    Quantize,
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=groups,
    activation_aware=st.booleans(),
    fraction=shares,
    factor=st.floats(1.1, 256),
)
# Codes of 1 bit need groups of columns.
bits_and_groups = st.tuples(st.integers(2, 8), groups) | st.tuples(st.just(1), st.integers(2, 4096))


def gptq(bits_and_group: tuple[int, int | str | None], **options: Any) -> Quantize:
    bits, group = bits_and_group
    return Quantize("gptq", bits, group, **options)


gptq_quantizes = st.builds(
    gptq,
    bits_and_groups,
    symmetric=st.none() | st.booleans(),
    calibrate=st.sampled_from(["range", "sqc", "learned"]),
    preset=st.sampled_from(["paper", "reference", "output"]),
    order=st.sampled_from([None, "groups", "columns"]),
    static_groups=st.just(True),
    damping=shares,
)
patterns = st.tuples(st.integers(1, 31), st.integers(1, 31)).map(lambda pair: f"{pair[0]}:{sum(pair)}")
prunes = st.builds(
    Prune, patterns | shares, st.sampled_from(["wanda", "magnitude", "sparsegpt"]), shares, st.integers(0, 9)
)
low_ranks = st.builds(
    LowRank,
    st.sampled_from(["slim", "svd", "covariance"]),
    shares | positive,
    st.sampled_from([None, 2, 3, 4, 8]),
    st.integers(2, 4096),
    st.integers(0, 9),
    st.integers(0, 9),
    shares,
    shares,
)
compensates = st.builds(Compensate, shares, shares, st.booleans())
tunes = st.builds(Tune, positive, shares, st.sampled_from(["kl", "mse"]))


activations = st.builds(Activations, kind=st.sampled_from(["int8", "fp8"]))


decomposes = st.builds(
    Decompose,
    ratio=shares,
    pattern=st.none() | patterns,
    rank=st.integers(1, 9),
    rounds=st.integers(1, 99),
    weighting=st.sampled_from(["none", "activations"]),
    bits=st.sampled_from([None, 2, 3, 4, 8]),
    group=st.integers(2, 4096),
    damping=shares,
)
filled = st.builds(Decompose, ratio=st.none(), pattern=patterns, feedback=st.booleans())


@given(
    decomposes
    | filled
    | calibrates
    | compensates
    | tunes
    | plain_quantizes
    | slim_quantizes
    | gptq_quantizes
    | prunes
    | low_ranks
    | activations
    | st.just(Fuse())
)
def test_repr_recipe_line_and_json_are_one_grammar(one: Pass) -> None:
    assert eval(repr(one)) == one
    line = json.loads(json.dumps(one.to_config()))
    assert from_config([line]) == [one]
    assert hash(from_config([line])[0]) == hash(one)


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert Quantize().to_config() == {"quantize": {}}
    assert Prune(0.5).to_config() == {"prune": {"pattern": 0.5}}
    assert from_config(["fuse", {"quantize": None}, {"low_rank": {}}]) == [Fuse(), Quantize(), LowRank()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("quantise", "no pass 'quantise' .did you mean 'quantize'"),
        ({"prun": {}}, "did you mean 'prune'"),
        ({"quantize": {"bit": 4}}, "no option 'bit' .did you mean 'bits'.*it takes method, bits"),
        ({"fuse": {"fast": True}}, "no option 'fast'; it takes none"),
        ({"quantize": 4}, "options of 'quantize' must be a mapping such as {bits: 4}, not 4"),
        ({"quantize": [["bits", 4]]}, "must be a mapping"),
        ({"quantize": {}, "fuse": {}}, "a name or one 'name: {options}'"),
        ({}, "a name or one 'name: {options}'"),
        (4, "a name or one 'name: {options}'"),
        ({7: {}}, "There is no pass '7'"),
    ],
)
def test_a_bad_recipe_line_is_refused(line: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        from_config([line])


REFUSED = [
    *(
        (Calibrate, option, value)
        for option in ("samples", "length", "batch")
        for value in (0, -1, 1.5, "8", True, None)
    ),
    (Calibrate, "length", 1),
    *((Calibrate, "seed", value) for value in (-1, 2**63, 0.5, "x", None, False)),
    *((Quantize, "method", value) for value in ("rtn", None, 3, [])),
    *((Quantize, "bits", value) for value in (0, 1, 7, 16, 4.0, "4", True, None)),
    *((Quantize, "group", value) for value in (0, 1, -64, 64.0, "row", True, [64])),
    *((Quantize, "symmetric", value) for value in (False, 1, "yes")),
    *((Quantize, "calibrate", value) for value in ("search", "sqc", None, 1)),
    *((Quantize, "preset", value) for value in ("papers", "reference", None, [])),
    *((Quantize, "order", value) for value in ("groups", "rows", 1, True)),
    *((Quantize, "static_groups", value) for value in (True, 1, None)),
    *((Quantize, "damping", value) for value in (0, 2, 0.02, "x", None)),
    *((Quantize, "activation_aware", value) for value in (1, "yes", None)),
    *((Quantize, "fraction", value) for value in (0, -0.1, 1.1, float("nan"), "x", None, True)),
    *((Quantize, "factor", value) for value in (1, 0, 257, float("inf"), float("nan"), "x", None)),
    *(
        (Prune, "pattern", value)
        for value in ("4:2", "2:2", "0:4", "2/4", "2:4 ", "٢:٤", "9999:99999", 0, 1, 1.5, True)
    ),
    *((Prune, "pattern", value) for value in (None, (2, 4), float("nan"))),
    *((Prune, "method", value) for value in ("obs", None)),
    *((Prune, "damping", value) for value in (0, -1, 2, float("nan"), "x", None)),
    *((Prune, "sweeps", value) for value in (-1, 0.5, True, None)),
    *((Compensate, option, value) for option in ("strength", "damping") for value in (0, -1, 2, "x", None, True)),
    *((Compensate, "residual", value) for value in (1, "yes", None)),
    *((LowRank, "sweeps", value) for value in (-1, 0.5, True, None)),
    *((LowRank, "before", value) for value in (-0.1, 1.1, float("nan"), "x", None, True)),
    *((LowRank, "damping", value) for value in (0, -1, 2, float("nan"), "x", None)),
    *((LowRank, "method", value) for value in ("pca", None)),
    *((LowRank, "rank", value) for value in (0, -1, 0.0, 1.5, True, None, "8", float("nan"))),
    *((LowRank, "bits", value) for value in (1, 16, 4.0, "4", True)),
    *((LowRank, "group", value) for value in (0, 1, None, 64.0)),
    *((LowRank, "rounds", value) for value in (-1, 0.5, True, None)),
    *((Decompose, "method", value) for value in ("wanda", None)),
    *((Decompose, "ratio", value) for value in (0, 1, -0.5, 1.5, "0.5", True, None, float("nan"))),
    *((Decompose, "pattern", value) for value in ("4:2", "2/4", 0.5, 2)),
    *((Decompose, "rank", value) for value in (0, -1, 0.5, True, None)),
    *((Decompose, "rounds", value) for value in (0, -1, 0.5, True, None)),
    *((Decompose, "weighting", value) for value in ("gram", None)),
    *((Decompose, "bits", value) for value in (1, 16, 4.0, "4", True)),
    *((Decompose, "group", value) for value in (0, 1, None, 64.0)),
    *((Decompose, "feedback", value) for value in (1, None, "yes")),
    *((Decompose, "damping", value) for value in (0, -1, 2, float("nan"), "x", None)),
    *((Activations, "bits", value) for value in (4, 16, 8.0, "8", True, None)),
    *((Activations, "kind", value) for value in ("float8_e4m3fn", "int4", None, 8)),
]


@pytest.mark.parametrize(("kind", "option", "value"), REFUSED)
def test_options_of_a_wrong_type_or_range_are_refused_by_name(kind: type[Pass], option: str, value: Any) -> None:
    with pytest.raises(
        RecipeError, match=f"{kind.name}: .*{'symmetric' if option == 'symmetric' else option}|{kind.name}: .*share"
    ):
        kind.from_options({option: value})


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Quantize(), Calibrate()], "calibrate must be the first pass, but it comes after 'quantize'. Move it"),
        ([Quantize(), Quantize()], "quantize appears twice.*Remove one"),
        ([Prune(method="magnitude"), Prune(method="magnitude")], "prune appears twice.*Remove one"),
        ([Quantize(), LowRank(method="svd"), Prune(method="magnitude")], "Put prune before low_rank"),
        ([Prune(method="magnitude"), LowRank(method="svd"), Quantize()], "Put quantize before low_rank"),
        ([LowRank(method="svd")], "no error to correct: put quantize, prune or decompose before it"),
        ([Quantize(), LowRank(method="svd"), LowRank(method="svd")], "low_rank appears twice.*Raise the rank"),
        ([Fuse()], "nothing to fuse: put quantize, prune or decompose before it"),
        ([Quantize(), Fuse(), Prune(method="magnitude")], "'prune' comes after fuse.*Move fuse to the end"),
        ([Quantize(), Fuse(), Fuse()], "'fuse' comes after fuse"),
        ([Prune()], "^prune needs calibrate before it, for statistics of the activations. Put"),
        ([Quantize(), LowRank()], "Put calibrate first"),
        ([Quantize(activation_aware=True)], "Put calibrate first"),
        ([Calibrate()], "compresses nothing: it has neither quantize nor prune nor decompose"),
        ([Calibrate(), Activations()], "compresses nothing: it has neither quantize nor prune nor decompose"),
        ([Calibrate(), Decompose(), Decompose()], "decompose comes twice.*Remove the other"),
        ([Calibrate(), Prune(), Decompose()], "decompose comes after prune.*pattern= and ratio="),
        ([Calibrate(), Quantize(), Decompose()], "decompose comes after quantize.*bits="),
        ([Calibrate(), Decompose(), Prune()], "prune comes after decompose.*Remove prune"),
        ([Calibrate(), Decompose(), Quantize()], "quantize comes after decompose.*give decompose bits= and group="),
        ([Calibrate(), Decompose(feedback=True), LowRank(rounds=1)], "rounds=1 would store.*Use rounds=0"),
        ([Decompose()], "^decompose needs calibrate before it"),
        ([Quantize(), Activations(), Activations(kind="fp8")], "activations appears twice.*Remove one"),
        ([Quantize(), Fuse(), Activations()], "'activations' comes after fuse.*Move fuse to the end"),
        ([Activations(), Fuse(), Quantize()], "nothing to fuse: put quantize, prune or decompose before it"),
        ([], "compresses nothing"),
        ([Quantize(), "fuse"], "Number 2 of the passes is 'fuse', which is not a pass"),
    ],
)
def test_an_order_that_cannot_work_is_refused(passes: list[Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_order(passes)


def test_passes_are_left_out_by_name() -> None:
    passes = [Calibrate(), Quantize(), Prune(), LowRank(), Fuse()]
    assert select(passes, stop_after="prune") == passes[:3]
    assert select(passes, skip=["low_rank", "fuse"]) == passes[:3]
    with pytest.raises(RecipeError, match="no pass 'lowrank' .did you mean 'low_rank'..; it has calibrate, quantize"):
        select(passes, skip=["lowrank"])
    with pytest.raises(RecipeError, match="no pass 'pruning'.*did you mean 'prune'"):
        select(passes, stop_after="pruning")
    with pytest.raises(RecipeError, match="compresses nothing"):
        select(passes, stop_after="calibrate")
    with pytest.raises(RecipeError, match="Put calibrate first"):
        select(passes, skip=["calibrate"])


MIDDLES = [list(order) for count in (1, 2) for order in itertools.permutations([Quantize(), Prune(0.5)], count)]
ORDERS = [
    [Calibrate(), *middle, *low_rank, *fuse]
    for middle in MIDDLES
    for low_rank in ([], [LowRank(rank=2)], [Activations(), LowRank(rank=2)])
    for fuse in ([], [Fuse()])
]
ORDERS += [
    [Calibrate(), Decompose(), LowRank(rank=2, rounds=2), Activations(), Fuse()],
    [Calibrate(), Decompose(ratio=None, pattern="2:4", bits=4, group=8, feedback=True), LowRank(rank=2), Fuse()],
    [Calibrate(), Activations(), Decompose(pattern="2:4", bits=4, group=8)],
]


@pytest.mark.parametrize("passes", ORDERS, ids=lambda passes: "-".join(one.name for one in passes[1:]))
def test_every_valid_order_runs(passes: list[Pass], network: nn.Module, batches: list[Tensor], run: Any) -> None:
    program, outcome = run(network, batches, passes)
    assert len(outcome.rows) == 4
    compressed, exact = program.run(batches[0]), network(batches[0]).detach()
    assert float((compressed - exact).norm() / exact.norm()) < 0.7
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("slim.linear.default" in targets) == isinstance(passes[-1], Fuse)


def test_the_graph_is_dumped_after_every_pass(
    network: nn.Module, batches: list[Tensor], run: Any, tmp_path: Path
) -> None:
    passes = [Calibrate(), Quantize(), Prune(), LowRank(), Fuse()]
    program, _ = run(network, batches, passes, dump_dir=tmp_path / "dump")
    dumps = {path.name: path.read_text() for path in (tmp_path / "dump").iterdir()}
    assert sorted(dumps) == ["0-capture.txt", "1-quantize.txt", "2-prune.txt", "3-low_rank.txt", "4-fuse.txt"]
    assert "slim" not in dumps["0-capture.txt"]
    assert "slim.dequant(" in dumps["1-quantize.txt"]
    assert "slim.dequant_nm(" in dumps["2-prune.txt"]
    assert "slim.low_rank(" not in dumps["2-prune.txt"]
    assert "slim.low_rank(" in dumps["3-low_rank.txt"]
    assert "slim.linear(" in dumps["4-fuse.txt"]
    straight, _ = run(network, batches, passes)
    assert torch.equal(program.run(batches[0]), straight.run(batches[0]))
