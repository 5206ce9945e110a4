"""ScaleFolding: the same function bit for bit, and a grid that costs the outputs less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slimc.errors import RecipeError
from slimc.ir.capture import capture
from slimc.ir.channels import scalable
from slimc.ir.program import Program
from slimc.passes import ScaleFolding, from_config
from slimc.passes.observe import observe
from slimc.passes.scale_folding import MOST, multiply
from slimc.passes.solvers.quantization import quantize_absmax
from slimc.passes.solvers.trial_rounding import round_for_trial
from slimc.passes.work import SiteWork
from slimc.progress import SilentProgress


class Block(nn.Module):
    """A norm before two siblings, an MLP with a gate, and values that run through heads, two queries each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.query = nn.Linear(16, 16)
        self.value = nn.Linear(16, 8)
        self.mix = nn.Linear(16, 16)
        self.inner_norm = nn.RMSNorm(16)
        self.gate = nn.Linear(16, 32)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query = self.query(h).unflatten(-1, (4, 4)).transpose(1, 2)
        value = self.value(h).unflatten(-1, (2, 4)).transpose(1, 2)
        value = value[:, :, None].expand(-1, -1, 2, -1, -1).reshape(query.shape)
        mixed = nn.functional.scaled_dot_product_attention(query, query, value)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        h = self.inner_norm(x)
        return x + self.down(torch.sigmoid(self.gate(h)) * self.up(h))


def block(dtype: torch.dtype = torch.float32) -> Block:
    torch.manual_seed(0)
    model = Block().eval()
    with torch.no_grad():
        for norm in (model.norm, model.inner_norm):
            norm.weight.mul_(torch.randn(16).mul(1.5).exp())
        model.norm.bias.add_(torch.randn(16) / 4)
        model.up.weight.mul_(torch.randn(32, 1).exp())
    return model.to(dtype)


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(3)).to(dtype)


def captured(model: nn.Module, batch: Tensor) -> Program:
    return capture(model, [((batch,), {})])


def test_every_factor_that_the_graph_allows_is_found() -> None:
    found = scalable(captured(block(), x()))
    assert [({end.tensor for end in one.produced}, set(one.consumed), one.count) for one in found.channels] == [
        ({"norm.weight", "norm.bias"}, {"query", "value"}, 16),
        ({"value.weight", "value.bias"}, {"mix"}, 8),
        ({"inner_norm.weight"}, {"gate", "up"}, 16),
        ({"up.weight", "up.bias"}, {"down"}, 32),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_round_nothing(dtype: torch.dtype) -> None:
    model = block(dtype)
    program = captured(model, x(dtype))
    before = program.run(x(dtype))
    generator = torch.Generator().manual_seed(1)
    for channels in scalable(program).channels:
        factors = torch.exp2(torch.randint(-MOST, MOST + 1, (channels.count,), generator=generator).float())
        for end in channels.produced:
            multiply(program, end, 1 / factors)
        for end in channels.consumed.values():
            multiply(program, end, factors)
    assert len(program.replaced) == 11
    assert torch.equal(program.run(x(dtype)), before)
    assert torch.equal(model(x(dtype)), before), "the user's model stays"


@pytest.mark.parametrize("group", [None, "channel", 8])
def test_rounding_costs_the_layers_less(group: Any) -> None:
    def cost(program: Program) -> float:
        def look(work: SiteWork) -> float:
            error = work.output_error(round_for_trial(work.dense, 3, group), work.statistics)
            assert error is not None
            return error**2

        errors = observe(
            program,
            [[x()]],
            look,
            sites=program.sites,
            held_out=0,
            device=None,
            progress=SilentProgress(),
            stage="cost",
        )
        return sum(errors.values())

    program = captured(block(), x())
    before = cost(program)
    ScaleFolding(bits=3, group=group).run(program, [[x()]], held_out=0, device=None, progress=SilentProgress())
    assert cost(program) < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_at_sites_holds_no_second_copy_of_their_weights(dtype: torch.dtype) -> None:
    program = captured(block(dtype), x(dtype))

    def look(_work: SiteWork) -> int:
        held = [(site.packed, program.dense_weight(site)) for site in program.sites.values() if site.packed]
        assert all(packed.weight.values.data_ptr() == dense.data_ptr() for packed, dense in held)
        return len(held)

    seen = observe(
        program,
        [[x(dtype)]],
        look,
        sites=program.sites,
        held_out=0,
        device=None,
        progress=SilentProgress(),
        stage="look",
    )
    assert sorted(seen.values()) == list(range(len(program.sites)))


@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from([None, "channel", 8]), st.sampled_from([2, 3, 4, 8]))
def test_a_trial_is_on_a_grid_and_no_worse_than_the_widest(rows: int, columns: int, group: Any, bits: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    rounded = round_for_trial(weight, bits, group)
    widest = quantize_absmax(weight, bits, group, symmetric=True, scale_dtype=torch.float32).dequantize()
    assert rounded.shape == weight.shape
    # Steps and products are rounded to 2^-24 each, in either.
    assert (rounded - weight).norm() <= (widest - weight).norm() + 2.0**-21 * weight.norm()
    for row in rounded if group == "channel" else [rounded.flatten()] if group is None else []:
        assert len(row.unique()) <= 2**bits


def test_the_pass_itself_changes_no_output_and_keeps_layers_if_told_to() -> None:
    model = block()
    for layers in (True, False):
        program = captured(model, x())
        before = program.run(x())
        one = ScaleFolding(bits=3, layers=layers)
        one.run(program, [[x()]], held_out=0, device=None, progress=SilentProgress())
        assert torch.equal(program.run(x()), before)
        assert ("up.bias" in program.replaced) is layers
        assert "norm.bias" in program.replaced


def test_channels_without_any_input_stay() -> None:
    model = block()
    with torch.no_grad():
        model.norm.weight[3:5] = 0
        model.norm.bias[3:5] = 0
    program = captured(model, x())
    before = program.run(x())
    ScaleFolding().run(program, [[x()]], held_out=0, device=None, progress=SilentProgress())
    assert torch.equal(program.run(x()), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "scale_folding: steps must be 2 or more, not 1"),
        ({"bits": 17}, "bits must be"),
        ({"layers": 1}, "layers must be true or false"),
        ({"group": "row"}, "group must be"),
        ({"grup": 64}, "has no option 'grup'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        from_config([{"scale_folding": options}])
    assert message in str(refusal.value)
