"""Random models through random recipes: the graph stays sound, and the module computes what the graph computes."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from slimc.ir.capture import capture
from slimc.ir.carrier import install
from slimc.ir.text import text
from slimc.ir.verify import verify
from slimc.passes import Calibrate, Fuse, LowRank, Pass, Prune, Quantize
from slimc.passes.pipeline import run
from slimc.progress import SilentProgress


class Functional(nn.Module):
    """A linear in all but its class, its weight as [out, in] or [in, out]."""

    def __init__(self, columns: int, rows: int, bias: bool, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(torch.randn((columns, rows) if transposed else (rows, columns)))
        self.bias = nn.Parameter(torch.randn(rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    widths = draw(st.lists(st.sampled_from([4, 8, 12, 20]), min_size=2, max_size=4))
    layers: list[nn.Module] = []
    for columns, rows in pairwise(widths):
        bias = draw(st.booleans())
        kind = draw(st.sampled_from(["linear", "functional", "transposed"]))
        linear = nn.Linear(columns, rows, bias=bias)
        layers.append(linear if kind == "linear" else Functional(columns, rows, bias, kind == "transposed"))
        if draw(st.booleans()):
            layers.append(nn.Tanh())
    return nn.Sequential(*layers).eval()


@st.composite
def recipes(draw: st.DrawFn) -> list[Pass]:
    absmax = st.builds(
        Quantize,
        method=st.just("absmax"),
        bits=st.sampled_from([2, 3, 4, 8]),
        group=st.sampled_from([None, "channel", 3]),
        symmetric=st.booleans(),
    )
    slim = st.builds(Quantize, bits=st.sampled_from([3, 4]), activation_aware=st.booleans())
    prune = st.builds(
        Prune, st.sampled_from(["2:4", "1:4", 0.5]), method=st.sampled_from(["wanda", "magnitude", "sparsegpt"])
    )
    low_rank = st.builds(
        LowRank,
        method=st.sampled_from(["slim", "svd"]),
        rank=st.sampled_from([1, 2, 0.5]),
        bits=st.sampled_from([None, 4]),
        group=st.sampled_from([2, 64]),
    )
    chosen: list[Pass] = draw(st.permutations([draw(absmax | slim), draw(prune)]))
    chosen = chosen[: draw(st.integers(1, 2))]
    corrections = [draw(low_rank)] if draw(st.booleans()) else []
    fusion = [Fuse()] if draw(st.booleans()) else []
    return [Calibrate(), *chosen, *corrections, *fusion]


@settings(max_examples=25)
@given(model=models(), passes=recipes(), seed=st.integers(0, 2**31))
def test_every_recipe_gives_a_sound_graph_that_equals_the_module(
    model: nn.Module, passes: list[Pass], seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(6, _columns(model))
    program = capture(model, [((x,), {})])
    run(program, passes, [[x]], progress=SilentProgress())  # verifies after each stage
    verify(program)
    small = install(model, program, inplace=False)
    with torch.no_grad():
        assert torch.equal(program.run(x), small(x))
    assert ("slim.linear" in text(program)) is isinstance(passes[-1], Fuse)


def _columns(model: nn.Module) -> int:
    first = next(iter(model.children()))
    weight = next(first.parameters())
    return weight.shape[0] if getattr(first, "transposed", False) else weight.shape[1]
