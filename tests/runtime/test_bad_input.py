"""What a layer says to inputs and tensors that do not fit it: never a wrong result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimc.errors import FormatError, InputError
from slimc.runtime.modules import SlimLinear
from slimc.runtime.ops import apply_packed
from slimc.runtime.packing import NM, PackedLinear
from slimc.runtime.prepared import run_on
from slimc.runtime.select import Kernel


def careless_kernel(seen: list[tuple[Any, ...]]) -> Kernel:
    """Takes everything that it says it takes without looking at it, as a kernel in CUDA does."""

    def accepts(_spec: object, dtype: torch.dtype, *_: object) -> str | None:
        return None if dtype == torch.bfloat16 else "is for bfloat16"

    def run(x: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
        seen.append((x, bias))
        return apply_packed(x, packed, bias)

    return Kernel("careless", accepts, lambda packed: packed, run)


@pytest.fixture
def packed(make_linear: Callable[..., PackedLinear]) -> PackedLinear:
    return make_linear(6, 20, 4, rank=3, sparsity=NM(2, 4))


@pytest.fixture
def seen() -> list[tuple[Any, ...]]:
    return []


@pytest.fixture
def layer(packed: PackedLinear, seen: list[tuple[Any, ...]]) -> SlimLinear:
    return SlimLinear(packed, torch.rand(6).bfloat16(), kernels=[careless_kernel(seen)])


@pytest.mark.parametrize("shape", [(2, 19), (20, 2), (0, 19), ()])
def test_another_width(layer: SlimLinear, seen: list[Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"x must be \[..., 20\], not \("):
        layer(torch.zeros(shape).bfloat16())
    assert not seen


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_another_kind_of_number(packed: PackedLinear, layer: SlimLinear, seen: list[Any], dtype: torch.dtype) -> None:
    x, every_kernel = torch.ones(2, 20).to(dtype), SlimLinear(packed)
    for one in (layer, every_kernel, torch.compile(every_kernel, backend="aot_eager")):
        with (
            pytest.raises(InputError, match=f"x must be floating point of 16 bits or more, not {dtype}"),
            torch.no_grad(),
        ):
            one(x)
    assert not seen


def test_another_device(layer: SlimLinear, seen: list[Any]) -> None:
    layer(torch.zeros(2, 20).bfloat16())
    with pytest.raises(InputError, match=r"x is on meta, but this compressed layer of 20 inputs is on cpu; move one"):
        layer(torch.zeros(2, 20, device="meta").bfloat16())
    assert len(seen) == 1


@pytest.mark.parametrize("shape", [(0, 20), (3, 0, 20)])
def test_no_tokens(layer: SlimLinear, seen: list[Any], shape: tuple[int, ...]) -> None:
    assert layer(torch.zeros(shape).bfloat16()).shape == (*shape[:-1], 6)
    assert not seen


def test_a_dtype_that_no_kernel_takes_is_computed_by_the_reference(
    layer: SlimLinear, packed: PackedLinear, seen: list[Any]
) -> None:
    x = torch.randn(2, 20)
    assert torch.equal(layer(x), apply_packed(x, packed, layer.bias))
    assert not seen


@pytest.mark.parametrize(
    "bias", [torch.rand(6), torch.rand(6).half(), torch.rand(12).bfloat16()[::2]], ids=["fp32", "fp16", "strided"]
)
def test_a_bias_reaches_a_kernel_as_it_reads_it(packed: PackedLinear, seen: list[Any], bias: Tensor) -> None:
    layer = SlimLinear(packed, bias, kernels=[careless_kernel(seen)])
    x = torch.randn(2, 20).bfloat16()
    assert torch.equal(layer(x), apply_packed(x, packed, bias))
    ((_, given),) = seen
    assert given.dtype == torch.bfloat16
    assert given.is_contiguous()


@pytest.mark.parametrize("bias", [torch.zeros(5), torch.zeros(6, 1), torch.zeros(6, device="meta")])
def test_a_bias_that_does_not_fit(layer: SlimLinear, seen: list[Any], bias: Tensor) -> None:
    layer.bias = nn.Parameter(bias, requires_grad=False)
    with pytest.raises(InputError, match=r"the bias of a compressed layer with 6 outputs on cpu has the shape \("):
        layer(torch.zeros(2, 20).bfloat16())
    assert not seen


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("values", torch.zeros(6, 4, dtype=torch.uint8)), ("scale", torch.zeros(6, 1)), ("pattern", torch.zeros(6, 3))],
)
def test_packed_tensors_that_do_not_fit(layer: SlimLinear, seen: list[Any], name: str, tensor: Tensor) -> None:
    setattr(layer, name, tensor)
    with pytest.raises(FormatError, match=f"packed tensor {name} is"):
        layer(torch.zeros(2, 20).bfloat16())
    assert not seen


def test_views_that_begin_anywhere_and_skip(layer: SlimLinear, packed: PackedLinear) -> None:
    memory = torch.randn(1 + 4 * 40).bfloat16()
    for x in (memory[1:].view(4, 40)[:, :20], memory[1:].view(4, 40)[:, ::2], memory[:80].view(20, 4).t()):
        assert torch.equal(layer(x), apply_packed(x, packed, layer.bias))


def test_a_kernel_runs_with_the_layers_gpu_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            entered.append(torch.device("cuda", 0))

    monkeypatch.setattr(torch.cuda, "device", Current)
    kernel = Kernel("k", lambda *_: None, lambda packed: packed, lambda x, _state, _bias: x)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert run_on(kernel.run, torch.device("cuda", 0)) is kernel.run
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run_on(kernel.run, torch.device("cpu")) is kernel.run
    run_on(kernel.run, torch.device("cuda", 1))(torch.zeros(1), None, None)
    assert entered == [torch.device("cuda", 1), torch.device("cuda", 0)]
