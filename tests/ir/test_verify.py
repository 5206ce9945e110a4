"""The verifier: a sound program passes, and each rule catches what it is there for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from slimc.errors import VerifyError
from slimc.ir.capture import capture
from slimc.ir.express import express
from slimc.ir.program import Program
from slimc.ir.verify import verify

Packer = Callable[..., Any]

aten = torch.ops.aten
slim = torch.ops.slim


def expressed(pack: Packer, model: nn.Module | None = None) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)) if model is None else model
    program = capture(model, [((torch.randn(3, 16),), {})])
    for site in program.sites.values():
        express(program, site, pack(program.dense_weight(site), "int4 rank4"))
    verify(program)
    return program


def calls(program: Program, target: Any) -> list[fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=target))


def test_a_graph_out_of_order(pack: Packer) -> None:
    program = expressed(pack)
    first, second = calls(program, aten.linear.default)
    second.append(first)
    with pytest.raises(VerifyError, match="The graph is not well formed"):
        verify(program)


def test_a_constant_that_is_missing(pack: Packer) -> None:
    program = expressed(pack)
    del program.module.get_submodule("0")._buffers["values"]
    with pytest.raises(VerifyError, match=r"not well formed|reads '0.values', which the module does not have"):
        verify(program)


def test_operands_that_do_not_fit_a_slim_op(pack: Packer) -> None:
    program = expressed(pack)
    node = calls(program, slim.dequant.default)[0]
    node.kwargs = {**node.kwargs, "columns": 12}
    with pytest.raises(VerifyError, match=f"The operands of %{node.name} do not fit slim.dequant: values must have"):
        verify(program)


@pytest.mark.parametrize("wrong", [torch.float64, (8, 12), (8, 16, 1)])
def test_a_recorded_value_that_the_op_does_not_give(wrong: Any, pack: Packer) -> None:
    program = expressed(pack)
    node = calls(program, slim.dequant.default)[0]
    value = node.meta["val"]
    with value.fake_mode:
        node.meta["val"] = value.to(wrong) if isinstance(wrong, torch.dtype) else torch.empty(wrong)
    with pytest.raises(
        VerifyError, match=r"is recorded as torch.float\d\d\[8, 1.*but slim.dequant gives torch.float32\["
    ):
        verify(program)


def test_a_dense_weight_that_is_still_read(pack: Packer) -> None:
    program = expressed(pack)
    site = program.sites["2"]
    site.uses[0].node.args = (site.uses[0].input, site.uses[0].weight, site.uses[0].bias)
    with pytest.raises(VerifyError, match="'2' is compressed, but its dense weight is still read by %linear_1"):
        verify(program)


def test_a_dense_weight_that_is_still_read_under_another_name(pack: Packer) -> None:
    shared = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    shared[1].weight = shared[0].weight
    program = expressed(pack, shared)
    use = program.sites["0"].uses[0]
    use.node.args = (use.input, use.weight, use.bias)
    with pytest.raises(VerifyError, match="'0' is compressed, but its dense weight is still read by %linear"):
        verify(program)


def test_a_reader_without_readers_does_no_harm(pack: Packer) -> None:
    program = expressed(pack)
    use = program.sites["2"].uses[0]
    with program.graph.inserting_after(use.weight):
        program.graph.call_function(aten.t.default, (use.weight,))
    verify(program)


def test_a_deep_graph_is_no_problem(pack: Packer) -> None:
    program = expressed(pack)
    use = program.sites["0"].uses[0]
    use.node.args = (use.input, use.weight, use.bias)
    (last,) = calls(program, aten.relu.default)
    readers = list(last.users)
    for _ in range(1500):
        with program.graph.inserting_after(last):
            last = program.graph.call_function(aten.relu.default, (last,))
    for reader in readers:
        reader.replace_input_with(calls(program, aten.relu.default)[0], last)
    with pytest.raises(VerifyError, match="'0' is compressed, but its dense weight is still read"):
        verify(program)


def test_packed_tensors_that_the_format_does_not_promise(pack: Packer) -> None:
    program = expressed(pack)
    site = program.sites["0"]
    assert site.packed is not None
    weight = site.packed.weight
    site.packed = replace(site.packed, weight=replace(weight, values=weight.values[:, :-1]))
    with pytest.raises(VerifyError, match="'0' is not in its storage form: .*values"):
        verify(program)
