"""Where a model is, and where it computes."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import slimc
from slimc.errors import InputError
from slimc.passes import Quantize
from slimc.runtime.devices import copy_to, home_of, usable_device


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()


def spread() -> nn.Sequential:
    """A model whose last layer is on a GPU, whether there is one or not."""
    model = network()
    with FakeTensorMode():
        model[2].weight = nn.Parameter(torch.empty(8, 8, device="cuda:1"))
    return model


def test_a_model_is_where_its_tensors_are() -> None:
    assert home_of(network()) == torch.device("cpu")
    assert home_of(nn.ReLU()) == torch.device("cpu")


def test_a_spread_model_is_refused_unless_it_is_told_where_to_compute() -> None:
    message = r"Sequential is spread over cpu \('0.weight'\) and cuda:1 \('2.weight'\). Name the device .* with device="
    with pytest.raises(InputError, match=message):
        slimc.compile(spread(), torch.randn(2, 8), [Quantize()])
    assert home_of(spread(), chosen=torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_model_without_values_is_refused(device: str | None) -> None:
    model = network()
    model[2].to("meta")
    with pytest.raises(InputError, match="'2.weight' of Sequential is on the meta device and has no values; load"):
        slimc.compile(model, torch.randn(2, 8), [Quantize()], device=device)


@pytest.mark.parametrize("name", ["meta", 3.5, "nonsense"])
def test_what_cannot_compute_is_no_device(name: object) -> None:
    with pytest.raises(InputError, match="name cpu, cuda or cuda:N"):
        usable_device(name)  # type: ignore[arg-type]


def test_a_model_is_copied_to_a_device_as_one() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("scale", torch.ones(3))
    moved = copy_to(model, torch.device("meta"))
    assert moved[0].weight is moved[1].weight
    assert {tensor.device.type for tensor in moved.state_dict().values()} == {"meta"}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert copy_to(model, usable_device("cpu")) is model


def test_a_model_that_cannot_be_copied_elsewhere_says_what_to_do() -> None:
    model = network()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"Sequential cannot be copied to meta \(.*lock.*\). Move the model itself"):
        copy_to(model, torch.device("meta"))
