"""A layer on a GPU holds one copy of its weight, whichever way it got there and whatever it shares with others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimc.backends import KERNELS
from slimc.errors import InputError
from slimc.runtime.devices import copy_to
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear
from slimc.runtime.prepared import sibling_layers

# What Inductor and Triton say about themselves is not slimc's.
pytestmark = pytest.mark.filterwarnings("default")


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)


def on_cpu(packed: PackedLinear) -> PackedLinear:
    return PackedLinear.assemble(packed.format, {name: tensor.cpu() for name, tensor in packed.tensors().items()})


def share(layers: list[SlimLinear]) -> bool:
    """Let layers share the tensors of a stack, as a compiled graph does."""
    return sibling_layers([layer._handle for layer in layers]).prepare()


class Attention(nn.Module):
    """Three layers that read one input."""

    def __init__(self, *layers: SlimLinear) -> None:
        super().__init__()
        self.q, self.k, self.v = layers

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


def attention(parts: list[PackedLinear], *, bias: bool = True) -> Attention:
    layers = []
    for index, part in enumerate(parts):
        own = torch.randn(part.format.rows, dtype=part.format.weight.dtype) if bias and index != 1 else None
        layers.append(SlimLinear(on_cpu(part), own, kernels=KERNELS))
    return Attention(*layers)


def test_the_device_holds_one_copy(random_layer: Any) -> None:
    packed = on_cpu(random_layer(4096, 4096, 409))
    model = nn.Sequential(*(SlimLinear(copy.deepcopy(packed), kernels=KERNELS) for _ in range(8)))
    expected = copy.deepcopy(model.state_dict())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.cuda()
    x = torch.randn(2, 4096, dtype=torch.bfloat16, device="cuda")
    model(x)
    torch.cuda.synchronize()
    stored = 8 * packed.format.nbytes()
    # Ranks are filled up to 64, and allocations to 512 bytes or 2 MB.
    assert torch.cuda.memory_allocated() - before < 1.1 * stored
    # While one layer changes its order, it is there several times over.
    assert torch.cuda.max_memory_allocated() - before < 1.1 * stored + 12 * packed.format.nbytes()
    assert same(model.state_dict(), expected)
    assert same(model.cpu().state_dict(), expected)


@pytest.mark.parametrize("tokens", [1, 5, 16, 40, 200])
@pytest.mark.parametrize("ranks", [(57, 57, 57), (130, 20, 64), (0, 0, 0)])
def test_layers_of_a_stack_are_computed_alone(
    random_layer: Any, check: Any, ranks: tuple[int, ...], tokens: int
) -> None:
    parts = [random_layer(rows, 640, rank) for rows, rank in zip((512, 256, 300), ranks, strict=True)]
    model = attention(parts).cuda()
    share([model.q, model.k, model.v])
    x = torch.randn(tokens, 640, dtype=torch.bfloat16, device="cuda")
    for part, layer in zip(parts, model.children(), strict=True):
        check(part, x, layer.bias, layer(x))
        assert same(layer.packed.tensors(), part.tensors())


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled(random_layer: Any, check: Any, mode: str | None, stacked: bool) -> None:
    parts = [random_layer(rows, 640, 57) for rows in (512, 256, 300)]
    model = attention(parts).cuda()
    if stacked:
        share([model.q, model.k, model.v])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(3, 640, dtype=torch.bfloat16, device="cuda")
            results = [y.clone() for y in compiled(x)]
            for y, part, layer in zip(results, parts, model.children(), strict=True):
                check(part, x, layer.bias, y)
                assert torch.equal(y, layer(x))


def test_a_copy_computes_the_same(random_layer: Any) -> None:
    model = attention([random_layer(rows, 640, 57) for rows in (512, 256, 300)]).cuda()
    share([model.q, model.k, model.v])
    twin = copy.deepcopy(model)
    x = torch.randn(3, 640, dtype=torch.bfloat16, device="cuda")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(twin(x), model(x), strict=True))


def test_a_copy_on_the_cpu_computes_there(random_layer: Any) -> None:
    layer = SlimLinear(random_layer(512, 640, 57), kernels=KERNELS)
    x = torch.randn(3, 640, dtype=torch.bfloat16, device="cuda")
    twin = copy_to(layer, torch.device("cpu"))
    assert not any(tensor.is_cuda for tensor in twin.buffers())
    assert same(twin.state_dict(), layer.state_dict())
    torch.testing.assert_close(twin(x.cpu()), layer(x).cpu(), rtol=0.05, atol=0.05)
    assert torch.equal(twin.cuda()(x), layer(x))


def test_an_input_elsewhere_is_refused(random_layer: Any) -> None:
    layer = SlimLinear(random_layer(256, 640, 57), kernels=KERNELS)
    with pytest.raises(InputError, match=r"x is on cpu, but this compressed layer of 640 inputs is on cuda:0"):
        layer(torch.zeros(1, 640, dtype=torch.bfloat16))


def test_other_dtypes_and_gradients_are_computed_by_the_reference(random_layer: Any) -> None:
    packed = random_layer(256, 640, 57)
    layer, plain = SlimLinear(packed, kernels=KERNELS), SlimLinear(packed)
    x = torch.randn(3, 640, device="cuda")
    assert torch.equal(layer(x), plain(x))
    x = x.bfloat16().requires_grad_()
    (ours,), (theirs,) = (torch.autograd.grad(one(x).sum(), x) for one in (layer, plain))
    assert torch.equal(ours, theirs)
    assert layer(x[:0].detach()).shape == (0, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bias_of_another_dtype(random_layer: Any, check: Any, dtype: torch.dtype) -> None:
    packed = random_layer(256, 640, 57)
    bias = torch.randn(512, dtype=torch.bfloat16, device="cuda")[::2].to(dtype)
    x = torch.randn(3, 640, dtype=torch.bfloat16, device="cuda")
    check(packed, x, bias, SlimLinear(packed, bias, kernels=KERNELS)(x))
