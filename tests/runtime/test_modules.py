"""SlimLinear as a module: what it holds, how it moves, and that tracing sees one node."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from slimc.errors import FormatError
from slimc.runtime.calls import prepared_linear
from slimc.runtime.modules import SlimLinear, explain, use_kernels
from slimc.runtime.ops import apply_packed
from slimc.runtime.packing import NM, PackedLinear, Unstructured
from slimc.runtime.select import Kernel

BIAS = torch.arange(6).to(torch.bfloat16)


def counting_kernel(prepared: list[PackedLinear]) -> Kernel:
    """Computes like the reference, and notes each preparation."""

    def prepare(packed: PackedLinear) -> PackedLinear:
        prepared.append(packed)
        return packed

    return Kernel("counting", lambda *case: None, prepare, lambda x, packed, bias: apply_packed(x, packed, bias))


@pytest.fixture
def packed(make_linear: Callable[..., PackedLinear]) -> PackedLinear:
    return make_linear(6, 20, 4, rank=3, scaled=True, sparsity=NM(2, 4))


@pytest.fixture
def layer(packed: PackedLinear) -> SlimLinear:
    return SlimLinear(packed, BIAS)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 20).bfloat16()


def test_it_looks_like_a_linear_and_holds_only_packed_tensors(layer: SlimLinear, packed: PackedLinear) -> None:
    assert (layer.in_features, layer.out_features) == (20, 6)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not layer.bias.requires_grad
    assert list(layer.state_dict()) == ["bias", *packed.tensors()]
    assert torch.equal(layer.weight, packed.decode().to(torch.bfloat16))
    assert "format='2:4 int4 per channel scaled inputs + low-rank 3 int4/64'" in repr(layer)


def test_the_weight_cannot_be_set(layer: SlimLinear) -> None:
    for value in (torch.zeros(6, 20), nn.Parameter(torch.zeros(6, 20))):
        with pytest.raises(AttributeError, match="decoded from packed tensors and cannot be set"):
            layer.weight = value


def test_a_bias_must_fit(packed: PackedLinear) -> None:
    with pytest.raises(FormatError, match="the bias must have 6 entries, not the shape \\(5,\\)"):
        SlimLinear(packed, BIAS[:5])


def test_forward_is_the_op(layer: SlimLinear, packed: PackedLinear, x: torch.Tensor) -> None:
    expected = apply_packed(x, packed, BIAS)
    assert torch.equal(layer(x), expected)
    for row in (x[0, 0], x[:, ::2], x.transpose(0, 1)):
        assert torch.equal(layer(row), apply_packed(row, packed, BIAS))
    assert layer(x[:0]).shape == (0, 3, 6)
    with pytest.raises(RuntimeError, match=r"x must be \[..., 20\], not \(2, 3, 10\)"):
        layer(x[..., :10])


def test_state_dict_round_trip_into_a_skeleton(layer: SlimLinear, x: torch.Tensor) -> None:
    empty = SlimLinear.empty(layer.format, bias=True)
    assert empty.values.is_meta
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))
    filled = SlimLinear.empty(layer.format, bias=torch.bfloat16, device="cpu")
    filled.load_state_dict(layer.state_dict())
    assert torch.equal(filled(x), layer(x))


def test_loading_refuses_another_dtype_of_codes(layer: SlimLinear) -> None:
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"dtype of values: torch.float32 cannot be loaded into torch.uint8"):
        layer.load_state_dict(state | {"values": state["values"].float()})


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.float(),
        lambda m: m.to(torch.float32),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(torch.float32),
    ],
    ids=["float", "to", "half", "double", "type"],
)
def test_casts_leave_codes_alone_and_the_format_follows(layer: SlimLinear, cast, x: torch.Tensor) -> None:
    codes = {name: tensor.clone() for name, tensor in layer.state_dict().items() if tensor.dtype == torch.uint8}
    scale = layer.scale.clone()
    cast(layer)
    dtype = layer.scale.dtype
    assert dtype != torch.bfloat16
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in codes.items())
    assert torch.equal(layer.scale, scale.to(dtype))
    form = layer.format
    assert form.weight.dtype == form.left.dtype == form.right.dtype == layer.input_scale.dtype == dtype
    assert PackedLinear.from_tensors(form, layer.packed.tensors()).format == form
    assert layer(x.to(dtype)).dtype == layer.weight.dtype == dtype


def test_kernels_are_prepared_once_and_dropped_on_every_change(layer: SlimLinear, x: torch.Tensor) -> None:
    prepared: list[PackedLinear] = []
    model = nn.Sequential(layer)
    use_kernels(model, [counting_kernel(prepared)])
    with torch.inference_mode():
        model(x)
    assert not prepared[0].weight.decode().is_inference()
    model(x)
    model(x[:, :1])
    assert len(prepared) == 1
    assert [str(choice) for choice in explain(model)["0"]] == ["1 tokens or more: counting"]

    def prepares_anew(changed: nn.Module, dtype: torch.dtype = torch.bfloat16) -> bool:
        before = len(prepared)
        changed(x.to(dtype))
        return len(prepared) == before + 1

    twin = copy.deepcopy(model)
    assert prepares_anew(twin)
    assert torch.equal(twin(x), model(x))
    assert twin[0].values.data_ptr() != layer.values.data_ptr()
    assert prepares_anew(model.to(torch.float32), torch.float32)
    model.load_state_dict(twin.state_dict())
    assert prepares_anew(model, torch.float32)
    layer.scale = layer.scale * 2
    assert prepares_anew(model, torch.float32)
    assert not set(layer.state_dict()) - {"bias", *layer.packed.tensors()}


def test_kernels_stand_aside_for_gradients_and_autocast(layer: SlimLinear, x: torch.Tensor) -> None:
    prepared: list[PackedLinear] = []
    layer.use_kernels([counting_kernel(prepared)])
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert layer(x.detach()).dtype == torch.bfloat16
    assert not prepared
    with torch.no_grad():
        layer(x)
    assert len(prepared) == 1


def test_rounded_inputs_survive_casts_copies_and_a_state_dict(packed: PackedLinear, x: torch.Tensor) -> None:
    layer = SlimLinear(replace(packed, activation="int8"), BIAS)
    assert "format='2:4 int4 per channel, scaled int8 inputs + low-rank 3 int4/64'" in repr(layer)
    assert list(layer.state_dict()) == list(SlimLinear(packed, BIAS).state_dict())
    assert not torch.equal(layer(x), SlimLinear(packed, BIAS)(x))
    empty = SlimLinear.empty(layer.format, bias=True)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.float().format.activation == "int8"
    assert torch.equal(layer(x.float()), apply_packed(x.float(), layer.packed, layer.bias))
    assert torch.equal(layer.weight, layer.packed.decode())


def test_signs_survive_casts_copies_and_a_state_dict(make_linear: Callable[..., PackedLinear], x: torch.Tensor) -> None:
    packed = make_linear(6, 20, 4, rank=3, signs=2)
    layer = SlimLinear(packed, BIAS)
    assert list(layer.state_dict()) == ["bias", *packed.tensors()]
    assert torch.equal(layer(x), apply_packed(x, packed, BIAS))
    assert torch.equal(layer.weight, packed.decode().bfloat16())
    empty = SlimLinear.empty(layer.format, bias=True)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    signs = layer.signs.clone()
    assert layer.float().format.binary.dtype == torch.float32
    assert torch.equal(layer.signs, signs)
    assert torch.equal(layer(x.float()), apply_packed(x.float(), layer.packed, layer.bias))
    layer.signs = ~signs
    assert not torch.equal(layer.weight, packed.decode())


def test_a_kernel_that_knows_no_signs_is_never_asked(make_linear: Callable[..., PackedLinear], x: torch.Tensor) -> None:
    prepared: list[PackedLinear] = []
    layer = SlimLinear(make_linear(6, 20, 4, signs=1), BIAS, kernels=[counting_kernel(prepared)])
    with torch.no_grad():
        assert torch.equal(layer(x), apply_packed(x, layer.packed, BIAS))
    assert not prepared
    (choice,) = layer.choices()
    assert choice.kernel is None
    assert choice.refusals == {"counting": "does not compute the binary part (signs x rank 1 bf16)"}


class Block(nn.Module):
    """Two compressed layers around something else."""

    def __init__(self, first: SlimLinear, second: SlimLinear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(params=[None, "int8", "float8_e4m3fn", "signs"])
def block(request: pytest.FixtureRequest, packed: PackedLinear, make_linear) -> Block:
    if request.param == "signs":
        packed = make_linear(6, 20, None, rank=3, signs=2, sparsity=Unstructured())
    else:
        packed = replace(packed, activation=request.param)
    first = SlimLinear(packed, BIAS)
    return Block(first, SlimLinear(make_linear(4, 6, 8), kernels=[counting_kernel([])]))


def slim_nodes(graph: torch.fx.Graph, target: object = torch.ops.slim.linear.default) -> int:
    return sum(node.target is target for node in graph.nodes)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_keeps_one_node_a_layer(block: Block, x: torch.Tensor, backend: str) -> None:
    seen = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        seen.append((slim_nodes(graph.graph, prepared_linear), slim_nodes(graph.graph)))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=count, fullgraph=True)
    assert torch.equal(compiled(x), block(x))
    x.requires_grad_()
    (compiled_gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    (gradient,) = torch.autograd.grad(block(x).sum(), x)
    assert torch.equal(compiled_gradient, gradient)
    # Without gradients the kernels run; with them the op, which has a backward.
    assert set(seen) == {(2, 0), (0, 2)}


# torch.export copies its own pytree specs in a way that it has deprecated itself.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_one_node_a_layer(block: Block, x: torch.Tensor, strict: bool) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert slim_nodes(program.graph) == 2
    other = torch.randn(5, 3, 20).bfloat16()
    assert torch.equal(program.module()(other), block(other))
    assert slim_nodes(program.run_decompositions().graph) == 2


def test_a_meta_model_runs(layer: SlimLinear, x: torch.Tensor) -> None:
    assert layer.to("meta")(x.to("meta")).shape == (2, 3, 6)
