"""A layer holds the GPU's form only: its canonical bytes come back for whoever asks, alone and in a stack."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slimc.backends.cuda.fragments import value_words
from slimc.backends.cuda.layer import stack
from slimc.backends.cuda.layout import FRAGMENTS
from slimc.errors import KernelError
from slimc.runtime import calls
from slimc.runtime.devices import copy_to
from slimc.runtime.formats import ACTIVATIONS
from slimc.runtime.modules import SlimLinear, use_kernels
from slimc.runtime.ops import apply_packed
from slimc.runtime.packing import PackedLinear
from slimc.runtime.prepared import sibling_layers
from slimc.runtime.select import Kernel
from slimc.runtime.storage import collect

Make = Callable[..., PackedLinear]
Table = tuple[Kernel, ...]


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def held(*modules: nn.Module) -> int:
    """Bytes of the distinct storages that modules hold."""
    buffers = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in buffers}.values())


def share(layers: list[SlimLinear]) -> bool:
    """Let layers share the tensors of a stack, as a compiled graph does."""
    return sibling_layers([layer._handle for layer in layers]).prepare()


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 40).map(lambda n: 8 * n),
    rank=st.integers(0, 130),
    sparse=st.booleans(),
    scales=st.sampled_from([(None, True), (None, False), (32, False), (64, False), (128, False)]),
    half=st.booleans(),
)
def test_the_canonical_bytes_come_back(
    make_packed: Make, rows: int, columns: int, rank: int, sparse: bool, scales: tuple[Any, bool], half: bool
) -> None:
    group, per_tensor = scales
    dtype = torch.float16 if half else torch.bfloat16
    packed = make_packed(rows, columns, rank, sparse=sparse, group=group, per_tensor=per_tensor, dtype=dtype)
    state = FRAGMENTS.prepare(packed)
    restored = FRAGMENTS.restore((packed.format,), FRAGMENTS.tensors(state), 0)
    assert same(restored.tensors(), packed.tensors())
    own = {tensor.data_ptr() for tensor in FRAGMENTS.tensors(state).values()}
    assert not own & {tensor.data_ptr() for tensor in restored.tensors().values()}


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 40).map(lambda n: 8 * n),
    rank=st.integers(0, 130),
    half=st.booleans(),
)
def test_the_canonical_values_come_back(make_packed: Make, rows: int, columns: int, rank: int, half: bool) -> None:
    dtype = torch.float16 if half else torch.bfloat16
    packed = make_packed(rows, columns, rank, bits=None, dtype=dtype)
    state = FRAGMENTS.prepare(packed)
    restored = FRAGMENTS.restore((packed.format,), FRAGMENTS.tensors(state), 0)
    assert same(restored.tensors(), packed.tensors())


def test_values_lie_as_the_registers_of_a_product() -> None:
    values = torch.arange(32 * 128, dtype=torch.int16).view(torch.bfloat16).view(32, 128)
    words = value_words(values)
    assert words.shape == (2, 2, 4, 32, 4)
    tile, unit, instruction, g, t = 1, 1, 2, 5, 3
    for register in range(4):
        row, column = 16 * tile + g + 8 * (register % 2), 64 * unit + 16 * instruction + 8 * (register // 2) + 2 * t
        word = int(words[tile, unit, instruction, 4 * g + t, register])
        assert word == (128 * row + column) | (128 * row + column + 1) << 16


def test_values_are_not_stacked_with_codes(make_packed: Make) -> None:
    layers = [FRAGMENTS.prepare(make_packed(256, 128, 20, bits=bits)) for bits in (4, None)]
    with pytest.raises(KernelError, match="different bits"):
        stack(layers)


def test_siblings_of_values_share_and_are_cast(make_packed: Make, cpu_kernels: Table, check: Any) -> None:
    packed = [make_packed(rows, 128, 20, bits=None, seed=rows) for rows in (256, 48)]
    layers = [SlimLinear(one, kernels=cpu_kernels) for one in packed]
    assert share(layers)
    x = torch.randn(3, 128).bfloat16()
    for layer, one in zip(layers, packed, strict=True):
        check(layer(x), x, one)
        assert same(layer.state_dict(), one.tensors())
        assert torch.equal(layer.half().values, one.weight.values.half())


def test_a_layer_holds_one_copy_and_shows_the_canonical_one(make_packed: Make, cpu_kernels: Table) -> None:
    packed = make_packed(256, 512, 64)
    before = SlimLinear(packed, torch.rand(256).bfloat16())
    layer = SlimLinear(packed, before.bias, kernels=cpu_kernels)
    assert same(layer.state_dict(), before.state_dict())
    assert list(layer.state_dict()) == list(before.state_dict())
    assert held(layer) == packed.format.nbytes() + before.bias.nbytes
    assert all(name.startswith("resident_") for name, _ in layer.named_buffers())
    assert same(layer.packed.tensors(), packed.tensors())
    assert torch.equal(layer.weight, before.weight)
    assert torch.equal(layer.values, packed.weight.values)
    assert layer.zero_point is None


def test_it_computes_with_what_it_holds(
    make_packed: Make, cpu_kernels: Table, calls_made: list[int], check: Any
) -> None:
    packed = make_packed(64, 128, 20)
    layer = SlimLinear(packed, kernels=cpu_kernels)
    x = torch.randn(3, 128).bfloat16()
    check(layer(x), x, packed)
    assert calls_made == [64]
    # A dtype that the kernel refuses is computed by the reference, exactly as without a kernel.
    assert torch.equal(layer(x.float()), apply_packed(x.float(), packed))
    assert calls_made == [64]
    assert layer(x[:0]).shape == (0, 64)


def test_gradients_flow_through_the_reference(make_packed: Make, cpu_kernels: Table) -> None:
    packed = make_packed(64, 128, 20)
    x = torch.randn(3, 128).bfloat16().requires_grad_()
    (ours,) = torch.autograd.grad(SlimLinear(packed, kernels=cpu_kernels)(x).sum(), x)
    (theirs,) = torch.autograd.grad(apply_packed(x, packed).sum(), x)
    assert torch.equal(ours, theirs)


def test_moves_casts_and_loads_change_what_is_held(make_packed: Make, cpu_kernels: Table) -> None:
    packed, other = make_packed(64, 128, 20), make_packed(64, 128, 20, seed=1)
    layer = SlimLinear(packed, kernels=cpu_kernels)
    first = layer.resident_codes
    assert layer.to("cpu").bfloat16().resident_codes is first
    assert layer.to("meta").values.is_meta
    layer = SlimLinear(packed, kernels=cpu_kernels)
    assert layer.half().resident_codes.dtype == torch.int32
    assert layer.scale.dtype == torch.float16
    assert torch.equal(layer.scale, packed.weight.scale.half())
    layer.bfloat16()
    layer.load_state_dict(SlimLinear(other).state_dict())
    assert same(layer.packed.tensors(), other.tensors())
    layer.scale = packed.weight.scale
    assert torch.equal(layer.scale, packed.weight.scale)
    layer(torch.zeros(1, 128).bfloat16())
    assert "resident_codes" in dict(layer.named_buffers())
    assert torch.equal(layer.scale, packed.weight.scale)
    layer.hold_canonical()
    assert list(dict(layer.named_buffers())) == list(packed.tensors())
    layer.use_kernels(())
    assert list(dict(layer.named_buffers())) == list(packed.tensors())


def test_copies_and_pickles(make_packed: Make, cpu_kernels: Table) -> None:
    packed = make_packed(64, 128, 20)
    layer = SlimLinear(packed, kernels=cpu_kernels)
    x = torch.randn(3, 128).bfloat16()
    twin = copy.deepcopy(layer)
    assert twin.resident_codes.data_ptr() != layer.resident_codes.data_ptr()
    assert torch.equal(twin(x), layer(x))
    twin.scale = twin.scale * 2
    assert same(layer.packed.tensors(), packed.tensors())
    file = io.BytesIO()
    layer.use_kernels(())
    plain = pickle.dumps(layer)
    layer.use_kernels(cpu_kernels[:0])
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert same(torch.load(file), packed.tensors())
    assert same(pickle.loads(plain).packed.tensors(), packed.tensors())


def test_a_copy_on_another_device_holds_what_that_one_wants(make_packed: Make, cpu_kernels: Table) -> None:
    packed = make_packed(64, 128, 20)
    twin = copy_to(SlimLinear(packed, kernels=cpu_kernels), torch.device("meta"))
    assert all(tensor.is_meta for tensor in twin.buffers())
    assert list(dict(twin.named_buffers())) == list(packed.tensors())


def test_a_pickle_holds_the_canonical_tensors(make_packed: Make, cpu_kernels: Table) -> None:
    packed = make_packed(64, 128, 20)
    layer = SlimLinear(packed, kernels=cpu_kernels)
    state = layer.__getstate__()
    assert same({name: t for name, t in state["_buffers"].items() if t is not None}, packed.tensors())
    assert state["_resident"] is None
    assert not state["_non_persistent_buffers_set"]
    assert "resident_codes" in layer._buffers


def test_a_weight_that_its_format_does_not_allow_keeps_its_bytes(make_packed: Make, cpu_kernels: Table) -> None:
    packed = make_packed(16, 128)
    packed.weight.pattern[0, 0] = 0b1111_0011
    layer = SlimLinear(packed, kernels=cpu_kernels)
    layer(torch.zeros(1, 128).bfloat16())
    assert same(layer.packed.tensors(), packed.tensors())
    assert list(dict(layer.named_buffers())) == list(packed.tensors())


def test_a_layer_with_two_names_is_stored_once(make_packed: Make, cpu_kernels: Table) -> None:
    layer = SlimLinear(make_packed(64, 128, 20), kernels=cpu_kernels)
    contents = collect(nn.ModuleDict({"a": layer, "b": layer}))
    assert contents.ties == {f"b.{name}": f"a.{name}" for name in layer.packed.tensors()}
    assert not contents.buffers


def test_what_is_made_for_a_reader_is_freed_with_it(make_packed: Make, cpu_kernels: Table) -> None:
    layer = SlimLinear(make_packed(64, 128, 20), kernels=cpu_kernels)
    made = layer.values
    assert layer.values is made
    del made
    gc.collect()
    assert not any(kept() is not None for kept in layer._made.values())


def test_readers_and_calls_at_once(make_packed: Make, cpu_kernels: Table) -> None:
    packed = make_packed(64, 128, 20)
    x = torch.randn(3, 128).bfloat16()
    layer = SlimLinear(packed, kernels=cpu_kernels)
    expected, failures = layer(x), []

    def work(index: int) -> None:
        try:
            for _ in range(10):
                if index == 0:
                    layer.hold_canonical()
                assert same(layer.packed.tensors(), packed.tensors())
                assert torch.equal(layer(x), expected)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Attention(nn.Module):
    """Three layers that read one input."""

    def __init__(self, *layers: SlimLinear) -> None:
        super().__init__()
        self.q, self.k, self.v = layers

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


SIBLINGS = [
    {"sparse": True, "group": None},
    {"sparse": True, "group": None, "per_tensor": False},
    {"sparse": False, "group": 64},
]


def siblings(make_packed: Make, ranks: tuple[int, ...] = (20, 130, 64), **form: Any) -> list[PackedLinear]:
    sizes = zip((512, 256, 100), ranks, strict=True)
    return [make_packed(rows, 256, rank, seed=seed, **form) for seed, (rows, rank) in enumerate(sizes)]


def attention(parts: list[PackedLinear], kernels: Table, *, bias: bool = True) -> Attention:
    biases = [torch.rand(512).bfloat16(), None, torch.rand(100).bfloat16()] if bias else [None] * 3
    return Attention(*(SlimLinear(one, own, kernels=kernels) for one, own in zip(parts, biases, strict=True)))


@pytest.mark.parametrize("form", SIBLINGS)
@pytest.mark.parametrize("ranks", [(20, 130, 64), (0, 0, 0)])
def test_a_stack_holds_one_copy_and_each_layer_its_own(
    make_packed: Make, cpu_kernels: Table, calls_made: list[int], form: dict[str, Any], ranks: tuple[int, ...]
) -> None:
    parts = siblings(make_packed, ranks, **form)
    model = attention(parts, cpu_kernels)
    x = torch.randn(3, 256).bfloat16()
    expected, alone, state = model(x), held(model), copy.deepcopy(model.state_dict())
    layers = [model.q, model.k, model.v]
    share(layers)
    # The narrowest factor is widened to the widest, and a scale a tensor becomes one a row.
    scales = 2 * 868 if form["group"] is None else 0
    widest = 868 * (-(-max(ranks) // 64) * 32 + -(-max(ranks) // 64) * 2)
    assert held(model) <= alone + scales + widest
    assert model.q.resident_codes is model.v.resident_codes
    assert same(model.state_dict(), state)
    for layer, part in zip(layers, parts, strict=True):
        assert same(layer.packed.tensors(), part.tensors())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model(x), expected, strict=True))
    assert calls_made[-3:] == [512, 256, 100]
    codes = model.q.resident_codes
    share(layers)
    assert model.q.resident_codes is codes


def test_a_stack_is_copied_as_one_and_left_by_what_changes(make_packed: Make, cpu_kernels: Table) -> None:
    parts = siblings(make_packed)
    model = attention(parts, cpu_kernels)
    state = copy.deepcopy(model.state_dict())
    share([model.q, model.k, model.v])
    twin = copy.deepcopy(model)
    assert twin.q.resident_codes is twin.k.resident_codes
    assert twin.q.resident_codes is not model.q.resident_codes
    assert same(twin.state_dict(), state)
    x = torch.randn(3, 256).bfloat16()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(twin(x), model(x), strict=True))
    twin.k.scale = twin.k.scale * 2
    twin.k(x)
    assert same(twin.q.state_dict(), model.q.state_dict())
    assert twin.k.resident_codes.shape[0] == 16
    assert same(pickle.loads(pickle.dumps(_without_kernels(twin))).q.state_dict(), model.q.state_dict())
    use_kernels(model, cpu_kernels)
    assert model.q.resident_codes is model.v.resident_codes
    model.half()
    assert model.q.resident_codes is not model.v.resident_codes
    assert model.v.bias.dtype == torch.float16


def _without_kernels(model: nn.Module) -> nn.Module:
    use_kernels(model, ())
    return model


def test_layers_that_cannot_be_stacked_stay_as_they_were(make_packed: Make, cpu_kernels: Table) -> None:
    parts = siblings(make_packed)
    model = attention(parts, cpu_kernels)
    layers = [model.q, model.k, model.v]
    assert not share([model.v, model.q])
    assert not share([model.q, SlimLinear(parts[1])])
    assert model.q.resident_codes.shape[0] == 32
    # Those that are in a stack already can join another.
    assert share(layers[:2])
    assert share(layers)
    assert model.q.resident_codes is model.v.resident_codes
    assert all(same(layer.packed.tensors(), part.tensors()) for layer, part in zip(layers, parts, strict=True))


@pytest.mark.parametrize("ranks", [(20, 130, 64), (0, 0, 0)])
def test_a_stack_of_a_stack_computes_what_its_layers_do(
    make_packed: Make, cpu_kernels: Table, calls_made: list[int], check: Any, ranks: tuple[int, ...]
) -> None:
    parts = siblings(make_packed, ranks)
    model = attention(parts, cpu_kernels, bias=False)
    x = torch.randn(3, 256).bfloat16()
    for layers in ([model.q, model.k], [model.q, model.k, model.v]):
        handles = [layer._handle for layer in layers]
        rows = [layer.out_features for layer in layers]
        assert share(layers)
        calls_made.clear()
        joint = calls.sibling_linears(x, handles, rows=sum(rows), columns=256)
        assert calls_made == [sum(rows)]
        for y, part in zip(joint.split(rows, dim=-1), parts, strict=False):
            check(y, x, part)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_stack_rounds_its_input_but_not_for_adapters(
    make_packed: Make, cpu_kernels: Table, calls_made: list[int], rounded_product: Any, kind: str
) -> None:
    parts = [replace(part, activation=kind) for part in siblings(make_packed)]
    model = attention(parts, cpu_kernels, bias=False)
    x = torch.randn(3, 256).bfloat16()
    layers = [model.q, model.k, model.v]
    assert share(layers)
    joint = calls.sibling_linears(x, [layer._handle for layer in layers], rows=868, columns=256)
    assert calls_made == [868]
    for layer, y, part in zip(layers, joint.split([512, 256, 100], dim=-1), parts, strict=True):
        ideal, bound = rounded_product(part, x)
        assert bool(((y.double() - ideal).abs() <= bound).all())
        assert bool(((layer(x).double() - ideal).abs() <= bound).all())
        assert layer.packed.format == part.format


@pytest.mark.parametrize("stacked", [False, True])
def test_compiled_it_runs_the_kernel(
    make_packed: Make, cpu_kernels: Table, calls_made: list[int], stacked: bool
) -> None:
    model = attention(siblings(make_packed), cpu_kernels)
    x = torch.randn(3, 256).bfloat16()
    if stacked:
        share([model.q, model.k, model.v])
    expected = model(x)
    torch._dynamo.reset()
    calls_made.clear()
    with torch.no_grad():
        results = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))
    assert calls_made == [512, 256, 100]


# torch.export copies its own pytree specs in a way that it has deprecated itself.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_it_is_slim_linear(make_packed: Make, cpu_kernels: Table, strict: bool) -> None:
    packed = make_packed(64, 128, 20)
    layer = SlimLinear(packed, kernels=cpu_kernels)
    x = torch.randn(3, 128).bfloat16()
    with torch.no_grad():
        program = torch.export.export(layer, (x,), strict=strict)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.slim.linear.default) == 1
    assert torch.equal(program.module()(x), apply_packed(x, packed))


def test_compiled_with_gradients(make_packed: Make, cpu_kernels: Table) -> None:
    packed = make_packed(64, 128, 20)
    layer = SlimLinear(packed, kernels=cpu_kernels)
    x = torch.randn(3, 128).bfloat16().requires_grad_()
    torch._dynamo.reset()
    (ours,) = torch.autograd.grad(torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum(), x)
    (theirs,) = torch.autograd.grad(apply_packed(x, packed).sum(), x)
    assert torch.equal(ours, theirs)
