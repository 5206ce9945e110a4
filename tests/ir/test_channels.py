"""Which channels the graph proves to be inner ones, and the reason for each that it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from slimc.ir.capture import capture
from slimc.ir.channels import Found, permutable, scalable
from slimc.ir.program import Program


class Layers(nn.Module):
    """Linears, a norm and vectors, wired by a function."""

    def __init__(self, wiring: Callable[[Layers, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(16, 24, bias=False)
        self.last = nn.Linear(24, 16)
        self.other = nn.Linear(24, 16)
        self.norm = nn.LayerNorm(24)
        self.outer_norm = nn.LayerNorm(16)
        self.vector = nn.Parameter(torch.randn(24))
        self.table = nn.Embedding(5, 24)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def program_of(wiring: Callable[[Layers, Tensor], Tensor], change: Callable[[Layers], None] | None = None) -> Program:
    torch.manual_seed(0)
    model = Layers(wiring).eval()
    if change:
        change(model)
    return capture(model, [((torch.randn(2, 3, 16),), {})])


def stored(found: Found) -> list[tuple[set[str], set[str]]]:
    return [({one.tensor for one in channels.produced}, set(channels.consumed)) for channels in found.channels]


def gated(m: Layers, x: Tensor) -> Tensor:
    return m.last(functional.silu(m.first(x)) * m.second(x))


PRODUCED = {"first.weight", "first.bias", "second.weight"}

REORDERED: dict[str, tuple[Callable[[Layers, Tensor], Tensor], set[str], set[str]]] = {
    "gate and up": (gated, PRODUCED, {"last"}),
    "a norm between": (
        lambda m, x: m.last(m.norm(functional.gelu(m.first(x)))),
        {"first.weight", "first.bias", "norm.weight", "norm.bias"},
        {"last"},
    ),
    "a norm written out": (
        lambda m, x: m.last((h := m.first(x)) * (h.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * m.vector),
        {"first.weight", "first.bias", "vector"},
        {"last"},
    ),
    "a vector": (
        lambda m, x: m.last(torch.relu(m.first(x) + m.vector)),
        {"first.weight", "first.bias", "vector"},
        {"last"},
    ),
    "two readers": (
        lambda m, x: m.last(h := torch.tanh(m.first(x))) + m.other(h),
        {"first.weight", "first.bias"},
        {"last", "other"},
    ),
    "there and back": (
        lambda m, x: m.last(m.second(x).view(2, 3, 4, 6).transpose(1, 2).transpose(1, 2).reshape(2, 3, 24)),
        {"second.weight"},
        {"last"},
    ),
    "summed over tokens": (
        lambda m, x: m.last(torch.relu(m.first(x)).mean(1)),
        {"first.weight", "first.bias"},
        {"last"},
    ),
}


@pytest.mark.parametrize("name", REORDERED)
def test_inner_channels_are_found_with_all_that_they_index(name: str) -> None:
    wiring, produced, consumed = REORDERED[name]
    assert stored(permutable(program_of(wiring))) == [(produced, consumed)]


REFUSED: dict[str, tuple[Callable[[Layers, Tensor], Tensor], str]] = {
    "the input": (lambda m, x: m.first(x), "%x is an input of the model"),
    "a result": (lambda m, x: (m.last(h := torch.relu(m.first(x))), h), "%relu is a result of the model"),  # type: ignore[arg-type,return-value]
    "a running sum": (lambda m, x: m.last(m.first(x).cumsum(-1)), "(aten.cumsum) reads them in their order"),
    "a piece": (lambda m, x: m.last((h := m.first(x)) * h[..., :1]), "cuts them into pieces"),
    "put together": (
        lambda m, x: m.last(torch.cat([m.first(x)[..., :12], m.second(x)[..., 12:]], -1)),
        "(aten.cat) reads them in their order",
    ),
    "written in place": (lambda m, x: m.last(torch.relu_(m.first(x))), "(aten.relu_) reads them in their order"),
    "a table": (
        lambda m, x: m.last(m.first(x) + m.table(torch.tensor([0, 1, 2]))),
        "(aten.embedding) reads them in their order",
    ),
    "turned around": (
        lambda m, x: m.last(
            m.second(x).view(2, 3, 4, 6).transpose(2, 3).reshape(2, 3, 24).view(2, 3, 4, 6).flip(3).reshape(2, 3, 24)
        ),
        "(aten.flip) reads them in their order",
    ),
    "a dense product": (
        lambda m, x: m.last((h := m.first(x)) + h @ m.table.weight.t() @ m.table.weight),
        "reads them in their order",
    ),
    "multiplied by themselves": (
        lambda m, x: m.last(((h := m.first(x)) @ h.transpose(1, 2) @ h) * h),
        "multiplies them by each other",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_channels_that_something_depends_on_are_refused_with_it(name: str) -> None:
    wiring, reason = REFUSED[name]
    found = permutable(program_of(wiring))
    refused = found.refused["first" if name == "the input" else "last"]
    assert reason in refused, refused


def test_the_residual_stream_keeps_its_order() -> None:
    def block(m: Layers, x: Tensor) -> Tensor:
        x = x + gated(m, m.outer_norm(x))
        return x + m.other(torch.relu(m.first(m.outer_norm(x))))

    found = permutable(program_of(block))
    assert not any({"first", "second"} & set(channels.consumed) for channels in found.channels)
    assert "%x is an input of the model" in found.refused["second"]


def tie(m: Layers) -> None:
    m.other.weight = m.last.weight


@pytest.mark.parametrize("find", [permutable, scalable])
def test_shared_weights_stay(find: Callable[[Program], Found]) -> None:
    def tied(m: Layers, x: Tensor) -> Tensor:
        return m.last(m.first(x) * m.vector) + m.other(m.second(x))

    found = find(program_of(tied, tie))
    assert not any("last" in channels.consumed for channels in found.channels)
    assert "last.weight shares its memory with other.weight" in found.refused["last"] or (
        "last.weight is read more than once" in found.refused["last"]
    )


def vector_twice(m: Layers, x: Tensor) -> Tensor:
    return m.last(m.first(x) * m.vector) + m.other(m.second(x) * m.vector)


def test_a_vector_with_two_readers_keeps_its_order() -> None:
    found = permutable(program_of(vector_twice))
    assert stored(found) == []
    assert "vector is read more than once" in found.refused["last"]


def test_a_vector_with_two_readers_takes_no_factors() -> None:
    assert stored(scalable(program_of(vector_twice))) == [
        ({"first.weight", "first.bias"}, {"last"}),
        ({"second.weight"}, {"other"}),
    ]


def test_a_layer_that_runs_twice_stays() -> None:
    found = permutable(program_of(lambda m, x: m.last(torch.relu(m.first(m.last(torch.relu(m.first(x))))))))
    assert "is read more than once" in found.refused["last"]


SCALED: dict[str, tuple[Callable[[Layers, Tensor], Tensor], set[str], set[str]]] = {
    "from a norm": (
        lambda m, x: m.last(h := m.norm(torch.sigmoid(m.second(x)))) + m.other(h),
        {"norm.weight", "norm.bias"},
        {"last", "other"},
    ),
    "from up": (gated, {"second.weight"}, {"last"}),
    "over a relu": (lambda m, x: m.last(torch.relu(m.first(x))), {"first.weight", "first.bias"}, {"last"}),
    "from both sides of a sum": (lambda m, x: m.last(m.first(x) - m.second(x)), PRODUCED, {"last"}),
    "from a vector": (lambda m, x: m.last(torch.tanh(m.first(x)) * m.vector), {"vector"}, {"last"}),
}


@pytest.mark.parametrize("name", SCALED)
def test_factors_are_found_where_they_are_stored(name: str) -> None:
    wiring, produced, consumed = SCALED[name]
    found = scalable(program_of(wiring))
    assert (produced, consumed) in stored(found), found


UNSCALED: dict[str, tuple[Callable[[Layers, Tensor], Tensor], str]] = {
    "a function": (lambda m, x: m.last(torch.sigmoid(m.first(x))), "%sigmoid (aten.sigmoid) does not pass factors on"),
    "a norm that something else reads": (
        lambda m, x: m.last(h := m.norm(torch.sigmoid(m.first(x)))).sum(-1, keepdim=True) + h,
        "is no site that could take the factor on",
    ),
    "a value with two readers": (
        lambda m, x: m.last((h := m.first(x)) * torch.sigmoid(h)),
        "does not pass factors on",
    ),
    "a number added": (lambda m, x: m.last(m.first(x) + 1), "does not pass factors on"),
    "one number for all": (
        lambda m, x: m.last(torch.sigmoid(m.first(x)) * m.second(x).mean(-1, keepdim=True)),
        "does not pass factors on",
    ),
}


@pytest.mark.parametrize("name", UNSCALED)
def test_factors_that_the_graph_does_not_pass_on_are_refused(name: str) -> None:
    wiring, reason = UNSCALED[name]
    found = scalable(program_of(wiring))
    assert reason in found.refused["last"], found.refused["last"]


def test_searching_changes_nothing() -> None:
    program = program_of(gated)
    before = str(program.graph)
    assert stored(permutable(program)) == stored(permutable(program))
    scalable(program)
    assert str(program.graph) == before
    assert not program.replaced
