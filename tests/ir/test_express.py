"""Express: the storage form in the graph, and that it computes what the module carrier computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimc.errors import VerifyError
from slimc.ir.capture import capture
from slimc.ir.carrier import install
from slimc.ir.express import express
from slimc.ir.fusion import FUSION_RULES
from slimc.ir.program import Program
from slimc.ir.rules import apply_rules
from slimc.ir.text import text
from slimc.ir.verify import verify

Packer = Callable[..., Any]

FORMS = {
    "int4": {"slim.dequant"},
    "int4z": {"slim.dequant"},
    "int4 2:4": {"slim.dequant_nm"},
    "int4 mask": {"slim.dequant_mask"},
    "16bit 2:4": {"slim.dequant_nm"},
    "16bit mask": {"slim.dequant_mask"},
    "int4 scaled": {"slim.dequant", "aten.mul.Tensor"},
    "int4 2:4 rank16": {"slim.dequant_nm", "slim.low_rank", "aten.add.Tensor"},
    "int4 2:4 scaled rank4": {
        *("slim.dequant_nm", "slim.dequant", "aten.mul.Tensor", "slim.low_rank", "aten.add.Tensor"),
    },
    "16bit mask signs": {"slim.dequant_mask", "slim.sign_low_rank", "aten.add.Tensor"},
    "int4 2:4 scaled rank16 int8in signs": {
        *("slim.dequant_nm", "aten.mul.Tensor", "slim.round_activations", "slim.low_rank", "slim.sign_low_rank"),
        "aten.add.Tensor",
    },
    "int4 fp8in": {"slim.dequant", "slim.round_activations"},
    "int4 2:4 scaled rank4 int8in": {
        *("slim.dequant_nm", "slim.dequant", "aten.mul.Tensor", "slim.round_activations", "slim.low_rank"),
        "aten.add.Tensor",
    },
}


class Mm(nn.Module):
    """A linear written as ``mm``, its weight [in, out]."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, rows))

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight)


class Addmm(Mm):
    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.bias = nn.Parameter(torch.randn(rows))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(16, 8),
    "addmm": lambda: Addmm(16, 8),
    "mm": lambda: Mm(16, 8),
}


def captured(layer: nn.Module) -> tuple[nn.Module, Program, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(5, 16)
    return model, capture(model, [((x,), {})]), x


def operators(program: Program) -> set[str]:
    lines = text(program).splitlines()
    return {line.split(" = ")[1].split("(")[0] for line in lines if " = " in line and "(" in line}


def express_all(program: Program, pack: Packer, form: str) -> None:
    for site in program.sites.values():
        express(program, site, pack(program.dense_weight(site), form))
    program.module.recompile()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_graph_and_the_module_agree_in_every_form(layer: str, form: str, pack: Packer) -> None:
    model, program, x = captured(LAYERS[layer]())
    captured_operators = operators(program)
    express_all(program, pack, form)
    verify(program)
    # The plain ReLU, the products and, where the weight is read transposed, its transposition stay.
    assert operators(program) - captured_operators - {"aten.t"} == FORMS[form]
    small = install(model, program, inplace=False)
    with torch.no_grad():
        expected = small(x)
        assert torch.equal(program.run(x), expected)
        apply_rules(program, FUSION_RULES)
        verify(program)
        assert operators(program) == {"aten.relu", "slim.linear"}
        assert torch.equal(program.run(x), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_call_changes_nothing(form: str, pack: Packer) -> None:
    _, program, x = captured(nn.Linear(16, 8))
    express_all(program, pack, form)
    first, result = text(program), program.run(x)
    express_all(program, pack, form)
    verify(program)
    assert text(program) == first
    assert torch.equal(program.run(x), result)


def test_another_form_replaces_the_first_without_a_trace(pack: Packer) -> None:
    _, program, _ = captured(nn.Linear(16, 8))
    express_all(program, pack, "int4 2:4 scaled rank4 int8in signs")
    express_all(program, pack, "int4")
    _, fresh, _ = captured(nn.Linear(16, 8))
    express_all(fresh, pack, "int4")
    assert text(program) == text(fresh)
    assert dict(program.module.named_buffers()).keys() == dict(fresh.module.named_buffers()).keys()


@pytest.mark.parametrize("order", [("0", "1"), ("1", "0")])
def test_a_site_that_reads_another_one_directly_reads_it_with_its_adapters(
    order: tuple[str, str], pack: Packer
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16)).eval()
    x = torch.randn(5, 16)
    program = capture(model, [((x,), {})])
    for form in (
        "int4 scaled rank4 fp8in",
        "int4 rank16 signs",
        "int4 signs",
        "int4 scaled rank4 int8in signs",
        "int4",
    ):
        for name in order:
            site = program.sites[name]
            express(program, site, pack(program.dense_weight(site), form))
        program.module.recompile()
        verify(program)
        with torch.no_grad():
            assert torch.equal(program.run(x), install(model, program, inplace=False)(x)), form


@pytest.mark.parametrize(
    ("form", "decoded"),
    [("int4", 1), ("int4 scaled rank4", 3), ("int4 2:4 scaled rank16", 1), ("int4 rank16 int8in signs", 1)],
)
def test_a_weight_with_several_uses_is_decoded_once(form: str, decoded: int, pack: Packer) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, shared, nn.ReLU(), shared).eval()
    x = torch.randn(5, 8)
    program = capture(model, [((x,), {})])
    for _ in range(2):
        express_all(program, pack, form)
        verify(program)
        assert text(program).count("= slim.dequant") == decoded
        with torch.no_grad():
            expected = install(model, program, inplace=False)(x)
            assert torch.equal(program.run(x), expected)
    assert apply_rules(program, FUSION_RULES) == (6 if "signs" in form else 3)
    verify(program)
    assert torch.equal(program.run(x), expected)


class HasScale(nn.Linear):
    """Holds a tensor under a name that the storage form uses too."""

    def __init__(self) -> None:
        super().__init__(16, 8)
        self.register_buffer("scale", torch.ones(3))


def test_a_tensor_of_the_same_name_is_left_alone(pack: Packer) -> None:
    model, program, x = captured(HasScale())
    express_all(program, pack, "int4")
    verify(program)
    assert torch.equal(program.module.get_buffer("0.scale"), torch.ones(3))
    with torch.no_grad():
        assert torch.equal(program.run(x), install(model, program, inplace=False)(x))


def test_what_has_been_fused_cannot_be_expressed_again(pack: Packer) -> None:
    _, program, _ = captured(nn.Linear(16, 8))
    express_all(program, pack, "int4")
    apply_rules(program, FUSION_RULES)
    with pytest.raises(VerifyError, match="'0' has been fused"):
        express_all(program, pack, "int4")
