"""Fusion and the rules behind it: what is matched, what is refused and why, and that the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from slimc.ir.capture import capture
from slimc.ir.express import express
from slimc.ir.fusion import FUSION_RULES, FuseLinear, FuseLowRank, FuseSigns
from slimc.ir.match import Anything, Call, Match, arguments
from slimc.ir.program import Program
from slimc.ir.rules import Rule, apply_rules, explain
from slimc.ir.text import text
from slimc.ir.verify import verify

Packer = Callable[..., Any]

aten = torch.ops.aten
slim = torch.ops.slim


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def expressed(pack: Packer, x: torch.Tensor, form: str = "int4 2:4 rank4", *, bias: bool = True) -> Program:
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(16, 8, bias=bias), nn.Tanh()).eval(), [((x,), {})])
    site = program.sites["0"]
    express(program, site, pack(program.dense_weight(site), form))
    program.module.recompile()
    return program


def only(program: Program, target: Any) -> fx.Node:
    (node,) = program.graph.find_nodes(op="call_function", target=target)
    return node


def fused(program: Program, x: torch.Tensor, *, applications: int = 1) -> None:
    """Fuse, and check that the program is sound, computes the same bits, and has nothing more to fuse."""
    program.module.recompile()
    before = program.run(x)
    assert apply_rules(program, FUSION_RULES) == applications
    verify(program)
    assert torch.equal(program.run(x), before)
    after = text(program)
    assert apply_rules(program, FUSION_RULES) == 0
    assert text(program) == after


@pytest.mark.parametrize(
    "form",
    [
        *("int4", "int4z", "16bit 2:4", "int4 mask scaled", "int4 rank16", "int4 2:4 scaled rank4"),
        *("int4 int8in", "int4 rank16 fp8in", "int4 2:4 scaled rank4 int8in"),
        *("16bit mask signs", "int4 2:4 scaled rank4 int8in signs"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_site_becomes_one_op(form: str, bias: bool, pack: Packer, x: torch.Tensor) -> None:
    program = expressed(pack, x, form, bias=bias)
    fused(program, x, applications=2 if "signs" in form else 1)
    assert "slim.sign_low_rank" not in text(program)
    assert "slim.dequant" not in text(program)
    assert "slim.round" not in text(program)
    given = arguments(only(program, slim.linear.default))
    assert (given["bias"] is not None) is bias
    assert given["activation"] == (1 if "int8in" in form else 2 if "fp8in" in form else 0)


def test_the_sum_may_be_written_either_way_round(pack: Packer, x: torch.Tensor) -> None:
    program = expressed(pack, x)
    total = only(program, aten.add.Tensor)
    total.args = (total.args[1], total.args[0])
    fused(program, x)
    assert arguments(only(program, slim.linear.default))["rank"] == 2


def test_keyword_arguments_are_the_same_as_positional_ones(pack: Packer, x: torch.Tensor) -> None:
    program = expressed(pack, x)
    product = only(program, aten.linear.default)
    activation, weight, bias = product.args
    product.args, product.kwargs = (activation,), {"bias": bias, "weight": weight}
    fused(program, x)


def after(program: Program, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call that stands for ``node`` from here on; ``args`` follow ``node`` itself."""
    readers = list(node.users)
    with program.graph.inserting_before(next(reader for reader in readers if reader.op == "call_function")):
        new = program.graph.call_function(target, (node, *args), kwargs)
    new.meta["val"] = node.meta["val"]
    for reader in readers:
        reader.replace_input_with(node, new)
    return new


def reasons(program: Program, rule: Rule) -> dict[str, str]:
    return {miss.node: miss.reason for miss in explain(program, rule)}


def test_a_product_that_is_read_elsewhere_is_fused_without_its_adapters(pack: Packer, x: torch.Tensor) -> None:
    program = expressed(pack, x)
    product, total = only(program, aten.linear.default), only(program, aten.add.Tensor)
    after(program, total, aten.mul.Tensor, product)
    assert reasons(program, FuseLowRank()) == {total.name: f"%{product.name} is used elsewhere, by %mul_tensor"}
    fused(program, x)
    assert "slim.low_rank" in text(program)


def test_adapters_that_read_another_input_are_not_fused(pack: Packer, x: torch.Tensor) -> None:
    program = expressed(pack, x)
    adapters, total = only(program, slim.low_rank.default), only(program, aten.add.Tensor)
    with program.graph.inserting_before(adapters):
        other = program.graph.call_function(aten.neg.default, (adapters.args[0],))
    other.meta["val"] = adapters.args[0].meta["val"]
    adapters.args = (other, *adapters.args[1:])
    found = reasons(program, FuseLowRank())
    assert found == {total.name: "'x' is %input_1 in one place and %neg_default (aten.neg) in another"}
    fused(program, x)


def test_adapters_that_are_added_twice_over_are_not_fused(pack: Packer, x: torch.Tensor) -> None:
    program = expressed(pack, x)
    total = only(program, aten.add.Tensor)
    total.kwargs = {"alpha": 2}
    assert reasons(program, FuseLowRank()) == {total.name: "the adapters are added 2 times"}
    fused(program, x)
    assert "alpha=2" in text(program)


def test_a_factor_with_a_zero_point_is_not_fused(pack: Packer, x: torch.Tensor) -> None:
    program = expressed(pack, x)
    factor = only(program, slim.low_rank.default).args[1]
    program.module.register_buffer("zero", torch.full((8, 1), 7, dtype=torch.uint8))
    with program.graph.inserting_before(factor):
        zero = program.graph.get_attr("zero")
    zero.meta["val"] = factor.meta["val"].fake_mode.from_tensor(program.module.zero)
    factor.args = (*factor.args[:2], zero)
    total = only(program, aten.add.Tensor)
    assert reasons(program, FuseLowRank()) == {total.name: "the left factor has a zero point"}
    fused(program, x)


def test_a_factor_that_is_computed_is_not_fused(pack: Packer, x: torch.Tensor) -> None:
    program = expressed(pack, x)
    adapters, total = only(program, slim.low_rank.default), only(program, aten.add.Tensor)
    after(program, adapters.args[2], aten.neg.default)
    assert reasons(program, FuseLowRank()) == {total.name: "the right factor is neither a constant nor its dequant"}
    fused(program, x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda program, total: total.update_kwarg("alpha", 2), "the binary part is added 2 times"),
        (
            lambda program, total: after(program, only(program, slim.sign_low_rank.default).args[2], aten.neg.default),
            "sign_left is not a constant",
        ),
    ],
)
def test_signs_that_are_not_the_storage_form_stay_outside(
    change: Callable[..., Any], reason: str, pack: Packer, x: torch.Tensor
) -> None:
    program = expressed(pack, x, "int4 signs")
    change(program, only(program, aten.add.Tensor))
    program.module.recompile()
    fused(program, x)
    assert "slim.sign_low_rank" in text(program)
    assert list(reasons(program, FuseSigns()).values()) == [reason]


def test_a_second_binary_part_stays_outside(pack: Packer, x: torch.Tensor) -> None:
    program = expressed(pack, x, "int4 signs")
    signs, total = only(program, slim.sign_low_rank.default), only(program, aten.add.Tensor)
    with program.graph.inserting_after(total):
        again = program.graph.call_function(slim.sign_low_rank.default, signs.args)
    again.meta["val"] = signs.meta["val"]
    after(program, total, aten.add.Tensor, again)
    program.module.recompile()
    fused(program, x, applications=2)
    assert list(reasons(program, FuseSigns()).values()) == ["the linear has a binary part already"]


class Multiplies(nn.Module):
    """Multiplies the activation itself, by a constant with a treacherous name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("input_scale", torch.linspace(1, 2, 16))
        self.linear = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.input_scale)


@pytest.mark.parametrize("form", ["int4", "int4 rank4", "int4 scaled rank4", "int4 rank4 int8in"])
def test_a_multiplication_of_the_model_itself_stays(form: str, pack: Packer, x: torch.Tensor) -> None:
    program = capture(Multiplies(), [((x,), {})])
    site = program.sites["linear"]
    express(program, site, pack(program.dense_weight(site), form))
    fused(program, x)
    scale = arguments(only(program, slim.linear.default))["input_scale"]
    assert (scale is not None) is ("scaled" in form)
    assert "aten.mul" in text(program)


def test_dense_products_and_other_sums_are_no_near_misses(x: torch.Tensor) -> None:
    class Residual(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + nn.functional.relu(super().forward(x))

    program = capture(nn.Sequential(nn.Linear(16, 16), Residual(16, 16)), [((x,), {})])
    assert explain(program, FuseLinear()) == explain(program, FuseLowRank()) == []
    assert apply_rules(program, FUSION_RULES) == 0


def test_fuel_limits_the_number_of_applications(pack: Packer, x: torch.Tensor) -> None:
    program = capture(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)), [((x,), {})])
    for site in program.sites.values():
        express(program, site, pack(program.dense_weight(site), "int4"))
    assert apply_rules(program, FUSION_RULES, fuel=0) == 0
    assert apply_rules(program, FUSION_RULES, fuel=1) == 1
    assert text(program).count("slim.linear") == 1
    assert apply_rules(program, FUSION_RULES) == 1


def test_the_new_node_keeps_where_it_comes_from(pack: Packer, x: torch.Tensor) -> None:
    program = expressed(pack, x)
    total = only(program, aten.add.Tensor)
    stack, value = total.meta["nn_module_stack"], total.meta["val"]
    apply_rules(program, FUSION_RULES)
    node = only(program, slim.linear.default)
    assert node.meta["nn_module_stack"] == stack
    assert node.meta["val"] is value
    assert node.meta["slim_rule"] == "FuseLowRank"


def test_adapters_that_read_another_input_than_the_product_stay_outside(pack: Packer, x: torch.Tensor) -> None:
    program = expressed(pack, x, "int4 rank4 int8in")
    adapters, rounding = only(program, slim.low_rank.default), only(program, slim.round_activations.default)
    exact = rounding.args[0]
    adapters.args = (exact, *adapters.args[1:])
    fused(program, x)
    node = only(program, slim.linear.default)
    assert node.args[0] is exact
    assert (node.kwargs["activation"], node.kwargs["rank"]) == (1, 0)
    assert adapters in program.graph.nodes


def test_a_rounded_input_that_is_read_elsewhere_stays_for_the_others(pack: Packer, x: torch.Tensor) -> None:
    program = expressed(pack, x, "int4 rank4 int8in")
    rounding, total = only(program, slim.round_activations.default), only(program, aten.add.Tensor)
    with program.graph.inserting_after(rounding):
        mean = program.graph.call_function(aten.mean.dim, (rounding, [1], True))
    mean.meta["val"] = rounding.meta["val"]
    after(program, total, aten.sub.Tensor, mean)
    fused(program, x)
    assert arguments(only(program, slim.linear.default))["activation"] == 1
    assert "slim.round_activations" in text(program)


class DoubleNegation(Rule):
    """``-(-x)  ->  alias(x)``."""

    def pattern(self) -> Call:
        return Call((aten.neg.default,), {"self": Call((aten.neg.default,), {"self": Anything("x")})})

    def check(self, found: Match) -> None:
        found.require(isinstance(found["x"], fx.Node), "not a tensor")

    def rewrite(self, graph: fx.Graph, found: Match) -> fx.Node:
        return graph.call_function(aten.alias.default, (found["x"],))


class DropAlias(Rule):
    """``-alias(x)  ->  neg(x)``."""

    def pattern(self) -> Call:
        return Call((aten.neg.default,), {"self": Call((aten.alias.default,), {"self": Anything("x")})})

    def check(self, found: Match) -> None:
        """Always holds."""

    def rewrite(self, graph: fx.Graph, found: Match) -> fx.Node:
        return graph.call_function(aten.neg.default, (found["x"],))


def test_rules_are_applied_until_none_matches(x: torch.Tensor) -> None:
    class Negates(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).neg().neg().neg().neg()

    program = capture(nn.Sequential(nn.Linear(16, 16), Negates(16, 16)), [((x,), {})])
    before = program.run(x)
    apply_rules(program, [DropAlias(), DoubleNegation()])
    assert "aten.neg" not in text(program)
    assert torch.equal(program.run(x), before)
