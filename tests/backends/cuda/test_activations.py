"""Rounded inputs in the kernels for fragments: which kernel, and what each of its launches reads."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends import KERNELS
from slimc.backends.cuda import decode, dense, layer, prefill, stream
from slimc.errors import KernelError
from slimc.runtime.activations import round_tokens
from slimc.runtime.formats import ACTIVATIONS, NM, LinearFormat, WeightFormat
from slimc.runtime.select import choose

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16
kinds = pytest.mark.parametrize("kind", ACTIVATIONS)


def linear(kind: str, rank: int) -> LinearFormat:
    weight = WeightFormat(256, 640, 4, per_tensor=True, sparsity=NM(2, 4), dtype=BF16)
    factors = [WeightFormat(*shape, 4, 64, dtype=BF16) for shape in ((256, rank), (rank, 640)) if rank]
    return LinearFormat(weight, *factors, activation=kind)


@kinds
def test_which_kernel_takes_them(gpu: SimpleNamespace, kind: str) -> None:
    def chosen(rank: int, tokens: int) -> Any:
        return choose(KERNELS, linear(kind, rank), BF16, GPU, tokens)[0]

    assert [chosen(0, tokens) for tokens in (1, 16, 2048)] == [stream.STREAM, stream.STREAM, prefill.PREFILL]
    assert [chosen(20, tokens) for tokens in (1, 16, 2048)] == [stream.STREAM, stream.STREAM, prefill.PREFILL]
    gpu.capability = (8, 0)
    assert [chosen(0, tokens) for tokens in (1, 64)] == [decode.DECODE, dense.DENSE]
    assert [chosen(20, tokens) for tokens in (1, 64)] == [decode.DECODE, dense.DENSE]


@kinds
@pytest.mark.parametrize("module", [prefill, stream], ids=["prefill", "stream"])
def test_adapters_read_the_rounded_input(
    make_packed: Any, monkeypatch: pytest.MonkeyPatch, module: Any, kind: str
) -> None:
    read: list[tuple[str, Tensor]] = []
    monkeypatch.setattr(module, "_start", lambda step, x, *_: read.append((step, x)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=0))
    held = layer.prepare(replace(make_packed(256, 256, 20), activation=kind))
    held.counters = SimpleNamespace(of_launch=lambda _stream: 0)  # type: ignore[assignment]
    x = torch.randn(3, 256).to(BF16)
    main, right = SimpleNamespace(sharing=None, ready=None), SimpleNamespace(sharing=None, ready=None)
    module.launch(SimpleNamespace(main=main, right=right, quantizer=None), x, held, None)
    assert [step is main for step, _ in read] == [False, True]
    assert all(torch.equal(given, round_tokens(x, kind)) for _, given in read)


@kinds
def test_one_launch_reads_the_rounded_input(make_packed: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    given: list[Tensor] = []
    monkeypatch.setattr(decode, "make_plan", lambda *_: None)
    monkeypatch.setattr(decode, "launch", lambda _plan, x, _layer, _bias: given.append(x))
    x = torch.randn(3, 256).to(BF16)
    decode.run(x, layer.prepare(replace(make_packed(256, 256), activation=kind)), None)
    assert torch.equal(given[0], round_tokens(x, kind))


@kinds
@pytest.mark.parametrize("group", [None, 64])
def test_products_of_8_bits_where_sums_have_one_scale(
    make_packed: Any, monkeypatch: pytest.MonkeyPatch, kind: str, group: int | None
) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(prefill, "make_plan", lambda _layer, _dtype, _tokens, activation: asked.append(activation))
    monkeypatch.setattr(prefill, "launch", lambda *_: None)
    held = layer.prepare(replace(make_packed(256, 256, group=group), activation=kind))
    prefill.run(torch.randn(300, 256).to(BF16), held, None)
    assert asked == [kind if group is None else None]


@kinds
def test_a_dense_product_reads_the_rounded_input(
    make_packed: Any, monkeypatch: pytest.MonkeyPatch, rounded_product: Any, kind: str
) -> None:
    packed = replace(make_packed(256, 256, 20), activation=kind)
    assert packed.left is not None
    assert packed.right is not None
    wide = 64 - packed.format.rank
    right = torch.nn.functional.pad(packed.right.decode(), (0, 0, 0, wide))
    left = torch.nn.functional.pad(packed.left.decode(), (0, wide))
    monkeypatch.setattr(dense, "expand_weight", lambda _layer: packed.weight.decode())
    monkeypatch.setattr(dense, "expand_right", lambda _layer: right)
    monkeypatch.setattr(dense, "expand_left", lambda _layer: left)
    x = torch.randn(100, 256).to(BF16)
    ideal, bound = rounded_product(packed, x)
    assert bool(((dense.run(x, layer.prepare(packed), None).double() - ideal).abs() <= bound).all())


def test_a_stack_rounds_as_its_layers_do(make_packed: Any) -> None:
    one, other = (layer.prepare(replace(make_packed(256, 256), activation=kind)) for kind in ("int8", "float8_e4m3fn"))
    assert layer.stack([one, one]).format.activation == "int8"
    with pytest.raises(KernelError, match="cannot be stacked"):
        layer.stack([one, other])
