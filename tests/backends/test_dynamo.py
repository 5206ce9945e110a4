"""``backend="slim"``: which layers become one, what happens to the rest, and that weights may change under a graph."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from slimc.backends import KERNELS, dynamo
from slimc.backends.dynamo import slim
from slimc.errors import KernelError
from slimc.runtime import calls
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.modules import SlimLinear, explain
from slimc.runtime.packing import PackedLinear
from slimc.runtime.select import Kernel

# What Dynamo and Inductor say about themselves is not slimc's; slimc's own warning is asked for by name.
pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH = 64


def stack_dense(weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    if len({weight.dtype for weight in weights}) > 1:
        raise KernelError("different dtypes")
    stacked = torch.cat(weights)
    return stacked, list(stacked.split([len(weight) for weight in weights]))


DENSE = Kernel(
    "dense",
    lambda *_case: None,
    lambda packed: packed.decode().to(packed.format.weight.dtype),
    lambda x, weight, bias: functional.linear(x, weight.to(x.dtype), bias),
    stack_dense,
)
"""A kernel that can be stacked and runs anywhere."""


def make_layer(
    rows: int,
    columns: int = WIDTH,
    *,
    seed: int = 0,
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    kernels: tuple[Kernel, ...] = (DENSE,),
) -> SlimLinear:
    spec = LinearFormat(WeightFormat(rows, columns, bits=4, per_tensor=True, sparsity=NM(2, 4), dtype=dtype))
    generator = torch.Generator().manual_seed(seed)
    values, pattern = (
        torch.randint(0, 256, spec.tensor_specs()[name][0], dtype=torch.uint8, generator=generator)
        for name in ("values", "pattern")
    )
    pattern = (pattern & 0x11) * 3 + (~pattern & 0x11) * 12
    scale = torch.ones(1, 1, dtype=dtype)
    packed = PackedLinear.assemble(spec, {"values": values, "pattern": pattern, "scale": scale})
    offset = torch.randint(-9, 9, (rows,), generator=generator).to(dtype) if bias else None
    return SlimLinear(packed, offset, kernels=kernels)


class Attention(nn.Module):
    """Three layers of one input, the second with a bias, and one that reads something else."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.q, self.k = make_layer(64, seed=1, **options), make_layer(32, seed=2, bias=True, **options)
        self.v, self.o = make_layer(32, seed=3, **options), make_layer(64, seed=4, **options)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q * torch.cat((k, v), dim=-1).tanh())


@pytest.fixture
def x() -> Tensor:
    """Small whole numbers: sums with the weights, which are whole numbers too, are exact in any order."""
    return torch.randint(-1, 2, (2, 3, WIDTH), generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    dynamo._warn_once.cache_clear()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        yield


def count(graph: fx.Graph, target: Any) -> int:
    return len(graph.find_nodes(op="call_function", target=target))


def unique_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_layers_of_one_input_become_one_call(graphs: list[fx.Graph], x: Tensor) -> None:
    model = Attention()
    compiled = torch.compile(model, backend=slim, fullgraph=True)
    assert list(explain(model)) == ["q", "k", "v", "o"]
    for _ in range(2):
        assert torch.equal(compiled(x), model(x))
    assert count(graphs[0], calls.sibling_linears) == 1
    assert count(graphs[0], calls.prepared_linear) == 1
    assert list(explain(model)) == ["q", "k", "v", "o", "q + k + v"]


def test_of_many_layers_of_one_input_some_at_a_time_become_one_call(graphs: list[fx.Graph], x: Tensor) -> None:
    layers = nn.ModuleList(make_layer(32, seed=seed) for seed in range(dynamo.MOST_SIBLINGS + 3))

    def run(x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in layers], dim=-1)

    assert torch.equal(torch.compile(run, backend=slim, fullgraph=True)(x), run(x))
    assert count(graphs[0], calls.sibling_linears) == 2
    assert count(graphs[0], calls.prepared_linear) == 0


def test_a_bias_of_another_dtype_leaves_the_dtype_of_the_result(graphs: list[fx.Graph], x: Tensor) -> None:
    model = Attention()
    model.k.bias = nn.Parameter(model.k.bias.float(), requires_grad=False)
    y = torch.compile(model, backend=slim, fullgraph=True)(x)
    assert count(graphs[0], calls.sibling_linears) == 1
    assert y.dtype == x.dtype
    assert torch.equal(y, model(x))


def test_parts_look_like_results_of_their_own(graphs: list[fx.Graph], x: Tensor) -> None:
    def strides(model: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
        return model.q(x).view(-1), model.k(x).view(-1)

    model = Attention()
    compiled = torch.compile(strides, backend=slim, fullgraph=True)
    assert all(torch.equal(*pair) for pair in zip(compiled(model, x), strides(model, x), strict=True))
    assert count(graphs[0], calls.sibling_linears) == 1


def test_layers_share_the_memory_of_their_stack(graphs: list[fx.Graph], x: Tensor) -> None:
    model = Attention()
    torch.compile(model, backend=slim, fullgraph=True)(x)
    storages = {layer._prepared.state(DENSE).untyped_storage().data_ptr() for layer in (model.q, model.k, model.v)}
    assert len(storages) == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: functional.relu(x, inplace=True),
        lambda x: torch.add(x, 1, out=x),
        lambda x: x.__setitem__(0, 0),
        lambda x: torch.relu_(x),
    ],
)
def test_an_input_that_is_written_to_between_divides_them(graphs: list[fx.Graph], write: Any, x: Tensor) -> None:
    def run(model: Attention, x: Tensor) -> tuple[Tensor, ...]:
        x = x + 1
        q = model.q(x)
        write(x)
        return q, model.k(x), model.v(x)

    model = Attention()
    found = torch.compile(run, backend=slim, fullgraph=True)(model, x)
    for result, expected in zip(found, run(model, x), strict=True):
        assert torch.equal(result, expected)
    assert count(graphs[0], calls.prepared_linear) == 1
    assert count(graphs[0], calls.sibling_linears) == 1


def test_layers_that_do_not_fit_stay_alone(graphs: list[fx.Graph], x: Tensor) -> None:
    model = Attention()
    model.k = make_layer(32, dtype=torch.float32)
    assert torch.equal(torch.compile(model, backend=slim, fullgraph=True)(x), model(x))
    assert count(graphs[0], calls.prepared_linear) == 4


def test_kernels_of_the_processor_run_one_by_one(graphs: list[fx.Graph], x: Tensor) -> None:
    model = Attention(kernels=KERNELS)
    assert torch.equal(torch.compile(model, backend=slim, fullgraph=True)(x), model(x))
    assert count(graphs[0], calls.prepared_linear) == 4


def test_other_layers_behind_the_graph_of_siblings_run_one_by_one(graphs: list[fx.Graph], x: Tensor) -> None:
    first, second = Attention(), Attention(kernels=KERNELS)
    compiled = torch.compile(Attention.forward, backend=slim, fullgraph=True)
    for model in (first, second, first):
        assert torch.equal(compiled(model, x), model(x))
    assert unique_graphs() == 1


def test_changed_weights_are_never_stale(graphs: list[fx.Graph], x: Tensor) -> None:
    model = Attention()
    compiled = torch.compile(model, backend=slim, fullgraph=True)
    before = compiled(x)

    def changed() -> bool:
        nonlocal before
        now = compiled(x)
        assert torch.equal(now, model(x))
        before, different = now, not torch.equal(now, before)
        return different

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["q.values"], state["v.scale"] = state["q.values"].flip(0), state["v.scale"] * 2
    model.load_state_dict(state)
    assert changed()
    model.k.scale = model.k.scale * 2
    assert changed()
    model.v = make_layer(32, seed=9)
    assert changed()
    assert unique_graphs() == 1
    model.float()
    x = x.float()
    assert torch.equal(compiled(x), model(x))


def test_copies_are_models_of_their_own(graphs: list[fx.Graph], x: Tensor) -> None:
    model = Attention()
    compiled = torch.compile(Attention.forward, backend=slim, fullgraph=True)
    expected = compiled(model, x)
    twin = copy.deepcopy(model)
    twin.q.scale = twin.q.scale * 4
    assert torch.equal(compiled(twin, x), twin(x))
    del model, twin
    again = Attention()
    assert torch.equal(compiled(again, x), expected)
    assert unique_graphs() == 1


def test_any_batch_in_one_graph(graphs: list[fx.Graph]) -> None:
    model = Attention(kernels=KERNELS)
    compiled = torch.compile(model, backend=slim, fullgraph=True, dynamic=True)
    for tokens in (2, 5, 130, 300):
        x = torch.randn(tokens, WIDTH).bfloat16()
        assert torch.equal(compiled(x), model(x))
    assert unique_graphs() == 1


def test_layers_that_are_compiled_one_by_one_share_a_graph(graphs: list[fx.Graph], x: Tensor) -> None:
    layers = [make_layer(64, seed=seed) for seed in range(4)]
    with torch.inference_mode():
        for layer in layers:
            assert torch.equal(torch.compile(layer, backend=slim, fullgraph=True)(x), layer(x))
    assert unique_graphs() == 1


def test_no_tokens_and_autocast(graphs: list[fx.Graph], x: Tensor) -> None:
    model = Attention()
    compiled = torch.compile(model, backend=slim, fullgraph=True, dynamic=False)
    assert compiled(x[:0]).shape == (0, 3, WIDTH)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.compile(model.q, backend=slim, fullgraph=True)(x).dtype == model.q(x).dtype == torch.bfloat16


def test_gradients_flow_through_the_ops_that_have_them(graphs: list[fx.Graph], x: Tensor) -> None:
    model = Attention()
    with torch.enable_grad():
        inputs = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(torch.compile(model, backend="aot_eager", fullgraph=True)(inputs).sum(), inputs)
        (expected,) = torch.autograd.grad(model(inputs).sum(), inputs)
    torch.testing.assert_close(found, expected)


def test_inductor_compiles_the_rest(x: Tensor) -> None:
    model = Attention()
    compiled = torch.compile(model, backend=slim, fullgraph=True, options={"max-autotune": False})
    torch.testing.assert_close(compiled(x), model(x), rtol=0.02, atol=0.5)


def test_a_graph_without_layers_is_compiled_and_said_once(graphs: list[fx.Graph], x: Tensor) -> None:
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        for function in (torch.sin, torch.cos):
            assert torch.equal(torch.compile(lambda x, f=function: f(x) + 1, backend=slim)(x), function(x) + 1)
    assert sum("a graph without compressed layers" in str(each.message) for each in noted) == 1
    assert len(graphs) == 2


def test_gradients_are_named_as_what_keeps_layers_from_their_kernels(graphs: list[fx.Graph], x: Tensor) -> None:
    model = Attention()
    with torch.enable_grad(), pytest.warns(UserWarning, match=r"with gradients.* under torch\.no_grad\(\)") as noted:
        torch.compile(model, backend=slim)(x.clone().requires_grad_())
    assert not any("compress the model" in str(each.message) for each in noted)
    assert graphs


def test_mode_and_options_are_those_of_inductor(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    given: list[dict[str, Any]] = []

    def note(graph: fx.GraphModule, inputs: Any, settings: dict[str, Any]) -> Callable[..., Any]:
        given.append(settings)
        return graph.forward

    monkeypatch.setattr(dynamo, "_inductor", note)
    model = Attention()
    torch.compile(model, backend=slim, mode="reduce-overhead")(x)
    torch.compile(model, backend=slim, options={"triton.cudagraphs": True, "epilogue-fusion": False})(x)
    assert given == [{"triton.cudagraphs": True}, {"triton.cudagraphs": True, "epilogue_fusion": False}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "reduce-overhed"}, "did you mean 'reduce-overhead'"),
        ({"options": {"triton.cudagraph": True}}, "did you mean 'triton.cudagraphs'"),
    ],
)
def test_what_inductor_does_not_know_is_refused(settings: dict[str, Any], message: str, x: Tensor) -> None:
    with pytest.raises(Exception, match=message):
        torch.compile(Attention(), backend=slim, **settings)(x)


def test_a_handle_without_a_layer_is_an_error(x: Tensor) -> None:
    with pytest.raises(KernelError, match="a compressed layer that is gone"):
        calls.prepared_linear(x, torch.zeros(1, dtype=torch.uint8), None, rows=4, columns=WIDTH)


def test_a_compiled_call_says_what_does_not_fit(x: Tensor) -> None:
    with pytest.raises(Exception, match=r"x must be \[..., 64\], not \(2, 3, 32\)"):
        torch.compile(make_layer(32), backend="eager", fullgraph=True)(x[..., :32])


def test_static_generation_is_one_graph_for_any_prompt(graphs: list[fx.Graph], tiny_llama_folder: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.generation import CompileConfig

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.bfloat16)
    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, make_layer(child.out_features, child.in_features))
    compiling = CompileConfig(backend=slim, fullgraph=True, mode=None)
    compiling._compile_all_devices = True  # transformers compiles on accelerators only, but for its own tests

    def continued(prompt: Tensor, **how: Any) -> Tensor:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=1,
            **how,
        )

    for length in (12, 7):
        prompt = torch.randint(2, 384, (1, length), generator=torch.Generator().manual_seed(length))
        found = continued(prompt, cache_implementation="static", compile_config=compiling)
        assert torch.equal(found, continued(prompt))
    assert len(graphs) == 1
    assert count(graphs[0], calls.sibling_linears) == 4
    assert count(graphs[0], calls.prepared_linear) == 4


def test_it_is_found_by_name_without_an_import(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    information = tmp_path / "declared-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 1\n")
    lines = [f"{name} = {value}" for name, value in declared["torch_dynamo_backends"].items()]
    (information / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines]))
    script = (
        "import torch; from torch._dynamo import list_backends, lookup_backend; assert 'slim' in list_backends();"
        "print(lookup_backend('slim').__module__)"
    )
    paths = os.pathsep.join([str(tmp_path), str(root)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "slimc.backends.dynamo"
