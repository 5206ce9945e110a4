"""What kernels derive from layers: who keeps it alive, and when it goes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from slimc.errors import InputError, KernelError
from slimc.runtime.modules import SlimLinear, explain
from slimc.runtime.packing import NM
from slimc.runtime.prepared import prepared_layer, sibling_layers
from slimc.runtime.select import Case, Kernel

STACKED: list[weakref.ref[Tensor]] = []


def stack(weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    stacked = torch.cat(weights)
    STACKED.append(weakref.ref(stacked))
    return stacked, [part.clone() for part in stacked.split([len(weight) for weight in weights])]


KERNEL = Kernel(
    "dense",
    lambda spec, dtype, device, tokens: "few tokens only" if tokens > 4 else None,
    lambda packed: packed.decode(),
    lambda x, weight, bias: functional.linear(x, weight.to(x.dtype), bias),
    stack,
)


@pytest.fixture
def layers(make_linear: Callable[..., object]) -> Iterator[list[SlimLinear]]:
    """Two layers of one input; nothing here may wait for the collector of cycles, for it is memory of a GPU."""
    STACKED.clear()
    gc.disable()
    yield [SlimLinear(make_linear(rows, 16, 4, sparsity=NM(2, 4)), kernels=[KERNEL]) for rows in (6, 4)]
    gc.enable()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 16).bfloat16()


def handles(layers: list[SlimLinear]) -> list[Tensor]:
    return [layer._handle for layer in layers]


def test_siblings_compute_what_each_computes(layers: list[SlimLinear], x: Tensor) -> None:
    family = sibling_layers(handles(layers))
    assert family.prepare()
    for tokens in (x, torch.randn(5, 16).bfloat16()):
        torch.testing.assert_close(family(tokens), torch.cat([layer(tokens) for layer in layers], -1))
    assert len(STACKED) == 1


@pytest.mark.parametrize("tokens", [2, 5], ids=["as one", "one by one"])
def test_siblings_refuse_an_input_elsewhere(layers: list[SlimLinear], tokens: int) -> None:
    family = sibling_layers(handles(layers))
    x = torch.randn(tokens, 16).bfloat16()
    expected = family(x)
    with pytest.raises(InputError, match=r"x is on meta, but this compressed layer of 16 inputs is on cpu; move one"):
        family(x.to("meta"))
    assert torch.equal(family(x), expected)


def test_siblings_are_one_object_as_long_as_a_member_lives(layers: list[SlimLinear], x: Tensor) -> None:
    family = sibling_layers(handles(layers))
    family(x)
    assert sibling_layers(handles(layers)) is family
    del family
    assert STACKED[0]() is not None
    layers.clear()
    assert STACKED[0]() is None


def test_a_change_of_one_brings_a_new_family_and_drops_the_old(layers: list[SlimLinear], x: Tensor) -> None:
    sibling_layers(handles(layers))(x)
    layers[0].scale = layers[0].scale * 2
    family = sibling_layers(handles(layers))
    torch.testing.assert_close(family(x), torch.cat([layer(x) for layer in layers], -1))
    assert [reference() is not None for reference in STACKED] == [False, True]


def test_a_state_that_a_graph_reads_stays(layers: list[SlimLinear], x: Tensor) -> None:
    layers[0](x)
    prepared = layers[0]._prepared
    state = prepared.state(KERNEL)
    prepared.capture()
    sibling_layers(handles(layers)).prepare()
    assert prepared.state(KERNEL) is state
    assert layers[1]._prepared.state(KERNEL) is not None


def test_a_deleted_layer_is_gone(layers: list[SlimLinear], x: Tensor) -> None:
    layers[0](x)
    handle, state = layers[0]._handle, weakref.ref(layers[0]._prepared.state(KERNEL))
    prepared = layers[0]._prepared
    layers.clear()
    with pytest.raises(KernelError, match="this compressed layer was deleted"):
        prepared.prepare()
    del prepared
    assert state() is None
    with pytest.raises(KernelError, match="the handle of a compressed layer that is gone"):
        prepared_layer(handle)


def test_layers_run_as_one_by_another_kernel_than_each_by_itself(make_linear: Callable[..., object], x: Tensor) -> None:
    runs: list[str] = []

    def kernel(name: str, expects: Callable[[Case], str | None]) -> Kernel:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            runs.append(name)
            return KERNEL.run(x, weight, bias)

        return replace(KERNEL, name=name, accepts=lambda *_case: None, run=run, expects=expects)

    def few_rows(case: Case) -> str | None:
        return "has few rows" if sum(form.rows for form in case.members) < 10 else None

    table = [kernel("many rows", few_rows), kernel("few rows", lambda _case: None)]
    model = nn.Sequential(*(SlimLinear(make_linear(rows, 16, 4, sparsity=NM(2, 4)), kernels=table) for rows in (6, 4)))
    family = sibling_layers(handles(list(model)))
    assert family.prepare()
    y = family(x)
    torch.testing.assert_close(y, torch.cat([layer(x) for layer in model], -1))
    assert runs == ["many rows", "few rows", "few rows"]
    assert {name: [str(choice) for choice in made] for name, made in explain(model).items()} == {
        "0": ["1 tokens or more: few rows (many rows: has few rows)"],
        "1": ["1 tokens or more: few rows (many rows: has few rows)"],
        "0 + 1": ["1 tokens or more: many rows"],
    }


def test_where_layers_run_as_one_is_explained(layers: list[SlimLinear]) -> None:
    model = nn.Sequential(*layers)
    assert list(explain(model)) == ["0", "1"]
    sibling_layers(handles(layers)).prepare()
    found = explain(model)
    assert list(found) == ["0", "1", "0 + 1"]
    # With more tokens each is computed by itself, by the reference here.
    assert [str(choice) for choice in found["0 + 1"]] == ["1 to 4 tokens: dense"]
    assert list(explain(layers[0])) == [""]
    layers[1].scale = layers[1].scale * 2
    assert list(explain(model)) == ["0", "1"]


def test_layers_that_do_not_fit_each_other_are_not_explained_as_one(make_linear: Callable[..., object]) -> None:
    def refuse(_states: object) -> tuple[object, list[object]]:
        raise KernelError("they do not fit")

    kernels = [replace(KERNEL, stack=refuse)]
    layers = [SlimLinear(make_linear(rows, 16, 4, sparsity=NM(2, 4)), kernels=kernels) for rows in (6, 4)]
    family = sibling_layers(handles(layers))
    assert not family.prepare()
    assert list(explain(nn.Sequential(*layers))) == ["0", "1"]
