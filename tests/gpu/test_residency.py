"""A GPU holds a layer once: in its kernels' form; the packed tensors wait in main memory until they are needed.

On parts other than Hopper they stay, for long prompts decode them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from slimc.backends import KERNELS
from slimc.runtime.devices import copy_to
from slimc.runtime.modules import SlimLinear
from slimc.runtime.ops import apply_packed


@pytest.fixture
def layer(random_layer: Any) -> SlimLinear:
    made = SlimLinear(random_layer(512, 640, 57), kernels=KERNELS)
    made(torch.zeros(1, 640, dtype=torch.bfloat16, device="cuda"))
    return made


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 640, dtype=torch.bfloat16, device="cuda")


def test_the_packed_tensors_leave_and_are_the_same(random_layer: Any, layer: SlimLinear) -> None:
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"cpu"}
    original = random_layer(512, 640, 57).tensors()
    assert all(torch.equal(layer.state_dict()[name], tensor.cpu()) for name, tensor in original.items())
    assert layer.weight.is_cuda
    assert all(tensor.is_cuda for tensor in layer.packed.tensors().values())


def test_the_device_holds_a_layer_once(random_layer: Any) -> None:
    one = SlimLinear(random_layer(4096, 4096, 409), kernels=KERNELS)
    packed = sum(tensor.nbytes for tensor in one.state_dict().values())
    before = torch.cuda.memory_allocated()
    one(torch.zeros(1, 4096, dtype=torch.bfloat16, device="cuda"))
    assert torch.cuda.memory_allocated() - before < 0.1 * packed


def test_they_come_back_where_they_are_needed(layer: SlimLinear, x: torch.Tensor) -> None:
    expected = layer(x)
    inputs = x.clone().requires_grad_()
    layer(inputs).sum().backward()
    assert inputs.grad.shape == x.shape
    elsewhere = copy_to(layer, torch.device("cpu"))
    assert elsewhere is not layer
    for other in (copy.deepcopy(layer), elsewhere.cuda(), layer.cpu().cuda()):
        assert other.values.is_cuda
        assert torch.equal(other(x), expected)
        assert not other.values.is_cuda
    layer.scale = layer.scale * 2
    assert layer.values.is_cuda
    torch.testing.assert_close(layer(x), apply_packed(x, layer.packed), rtol=0.05, atol=0.05)
    layer.load_state_dict(copy.deepcopy(layer).state_dict())
    assert layer.values.is_cuda
    layer.to("meta")
    assert layer(x.to("meta")).shape == expected.shape


def test_a_copy_on_the_cpu_computes_there(layer: SlimLinear, x: torch.Tensor) -> None:
    assert copy_to(layer, torch.device("cuda:0")) is layer
    twin = copy_to(layer, torch.device("cpu"))
    assert all(not tensor.is_cuda for tensor in twin.buffers())
    torch.testing.assert_close(twin(x.cpu()), layer(x).cpu(), rtol=0.05, atol=0.05)
