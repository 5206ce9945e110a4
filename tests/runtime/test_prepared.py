"""What kernels derive from layers: who keeps it alive, and when it goes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from slimc.errors import KernelError
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import NM
from slimc.runtime.prepared import prepared_layer, sibling_layers
from slimc.runtime.select import Kernel

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
