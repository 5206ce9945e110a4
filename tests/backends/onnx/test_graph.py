"""Whole models as ONNX graphs: what they compute in ONNX Runtime, for sizes other than those of the example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc.errors import CaptureError, InputError
from slimc.ir.capture import capture
from slimc.passes import Activations, AllocateBits, Calibrate, Decompose, Fuse, LowRank, Prune, Quantize
from slimc.passes.pipeline import run
from slimc.progress import SilentProgress
from slimc.runtime.modules import SlimLinear

onnx = pytest.importorskip("onnx")
transformers = pytest.importorskip("transformers")

from slimc.backends.onnx.graph import export_module, export_program  # noqa: E402 - after the check that onnx is there
from slimc.backends.onnx.packed_nodes import lower  # noqa: E402
from slimc.backends.onnx.tracing import trace, twin  # noqa: E402
from slimc.backends.onnx.translation import to_onnx  # noqa: E402
from slimc.backends.onnx.weights import TARGETS  # noqa: E402

Runtime = Callable[[bytes | Path, Mapping[str, Any]], list[np.ndarray]]

WITHIN = 1e-5
"""Relative to the largest output: some hundred roundings of 2^-24, in sums of fewer than a hundred terms."""

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
VISION = {
    name: SMALL[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}

# The class, its options, and how many linear layers are compressed.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}, 7),
    "Qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, 7),
    "Gemma3": ("Gemma3ForCausalLM", {**GROUPED, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 16}, 14),
    "OPT": ("OPTForCausalLM", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, 6),
    "GPT2": (
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "vocab_size": 64, "eos_token_id": 2},
        4,
    ),
    "GPTNeoX": ("GPTNeoXForCausalLM", SMALL, 4),
    "Phi3": ("Phi3ForCausalLM", GROUPED, 4),
    "Bert": ("BertModel", SMALL, 7),
    "ViT": ("ViTModel", {**VISION, "image_size": 16, "patch_size": 8}, 7),
    "Mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}, 4),
}


def build(name: str) -> nn.Module:
    class_name, options, _ = MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model: nn.Module = model_class(model_class.config_class(**options)).eval()
    return model


def inputs_of(name: str, samples: int, length: int) -> dict[str, Tensor]:
    if name == "ViT":
        return {"pixel_values": torch.randn(samples, 3, 16, 16)}
    ids = torch.randint(3, 60, (samples, length))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # the first sample is padded
    return {"input_ids": ids, "attention_mask": mask}


def compressed(model: nn.Module, inputs: Any) -> nn.Module:
    passes = [Quantize(bits=4, group=16, method="absmax"), LowRank(rank=4, bits=4, method="svd"), Fuse()]
    return slimc.compile(model, [inputs], passes=passes)


def real(outputs: np.ndarray | Tensor, inputs: dict[str, Tensor]) -> Any:
    """Leave out the outputs at padding, which attends to nothing: what comes of that is not defined."""
    return outputs[inputs["attention_mask"].bool().numpy()] if "attention_mask" in inputs else outputs


def relative_error(found: np.ndarray, expected: Tensor) -> float:
    assert found.shape == tuple(expected.shape)
    return float(np.abs(found - expected.numpy()).max() / expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_kind(name: str, in_runtime: Runtime) -> None:
    model = compressed(build(name), inputs_of(name, 2, 9))
    traced = trace(twin(model, torch.float32), ((), inputs_of(name, 2, 9)))
    translated = to_onnx(traced, 21)
    inputs = inputs_of(name, 3, 12)
    with torch.no_grad():
        expected = model(**inputs)[0]
    rows = 3 * 12 if name != "ViT" else 3 * 5
    for target in TARGETS:
        graph = lower(*translated, target, torch.float32)
        assert len(graph.sites) == MODELS[name][2]
        whole = graph.whole()
        onnx.checker.check_model(whole, full_check=True)
        found = in_runtime(whole.SerializeToString(), {name: inputs[name].numpy() for name in graph.description.inputs})
        assert relative_error(real(found[0], inputs), real(expected, inputs)) < WITHIN, target
    assert expected.shape[:-1].numel() == rows, "the sizes differ from those of the example"
    assert graph.description.outputs[0] in ("logits", "last_hidden_state")


class TwoWays(nn.Module):
    """A module with a layer that is called twice, nested inputs and nested results."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(32, 32)
        self.last = nn.Linear(32, 24, bias=False)

    def forward(self, x: Tensor, others: dict[str, Tensor], scale: float) -> dict[str, Any]:
        hidden = self.shared(torch.relu(self.shared(x))) + others["shift"]
        return {"result": self.last(hidden) * scale, "hidden": [hidden]}


def two_ways() -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    return TwoWays(), (torch.randn(2, 5, 32), {"shift": torch.randn(2, 5, 32)}, 0.5)


def test_nested_calls_and_a_layer_that_is_called_twice(in_runtime: Runtime) -> None:
    model, example = two_ways()
    small = compressed(model, example)
    translated = to_onnx(trace(twin(small, torch.float32), (example, {})), 21)
    inputs = {"x": torch.randn(3, 5, 32), "others.shift": torch.randn(3, 5, 32)}
    with torch.no_grad():
        expected = small(inputs["x"], {"shift": inputs["others.shift"]}, 0.5)
    for target in TARGETS:
        graph = lower(*translated, target, torch.float32)
        assert (graph.description.inputs, graph.description.outputs) == (("x", "others.shift"), ("result", "hidden.0"))
        found = in_runtime(graph.whole().SerializeToString(), {name: value.numpy() for name, value in inputs.items()})
        assert relative_error(found[0], expected["result"]) < WITHIN
        assert relative_error(found[1], expected["hidden"][0]) < WITHIN
        codes = [name for name in graph.stored if name.startswith("shared.") and name.endswith(".weight")]
        assert codes == ["shared.weight"], "a layer that is called twice is stored once"


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.GELU())))


DOMAINS = {
    "portable": {"", "slim"},
    "dense": {"", "com.microsoft"},
    "ort": {"", "com.microsoft"},
    "cuda": {"", "slim", "com.microsoft"},
}
"""Where the operators of a target come from."""


@pytest.mark.parametrize(
    "passes",
    [
        [Quantize(bits=3, group=32, method="absmax"), Prune("2:4", method="magnitude"), LowRank(rank=4, method="svd")],
        [Quantize(bits=4, group="channel", method="absmax"), Prune(0.5, method="magnitude"), Activations(kind="int8")],
        [Prune("2:4", method="magnitude")],
        [Calibrate(), Decompose(ratio=None, pattern="2:4", bits=4, group=16)],
        [Calibrate(), Decompose(rank=2)],
        [Calibrate(), AllocateBits(2, 8, "output", widest=4), Quantize("gptq")],
        [Calibrate(), AllocateBits(2.5, 8, "output", widest=4), Quantize("gptq", symmetric=True), Prune("2:4")],
    ],
    ids=[
        *("3 bits, 2:4, low-rank", "unstructured, int8 inputs", "2:4 numbers"),
        *("signs, 2:4 codes", "signs of 2 ranks", "widths", "symmetric widths, 2:4"),
    ],
)
@pytest.mark.parametrize("fused", [False, True], ids=["stages", "fused"])
def test_programs_at_every_stage(passes: list[Any], fused: bool, in_runtime: Runtime) -> None:
    x = torch.randn(4, 64)
    program = capture(mlp(64, 48, 32), [((x,), {})])
    batches = [[torch.randn(96, 64)], [torch.randn(96, 64)]]
    run(program, [*passes, *([Fuse()] if fused else [])], batches, progress=SilentProgress())
    translated = to_onnx(trace(twin(program.module, torch.float32), ((x,), {})), 21)
    x = torch.randn(7, 64)
    expected = program.run(x)
    for target in TARGETS:
        graph = lower(*translated, target, torch.float32)
        whole = graph.whole()
        onnx.checker.check_model(whole, full_check=True)
        (found,) = in_runtime(whole.SerializeToString(), {graph.description.inputs[0]: x.numpy()})
        assert relative_error(found, expected) < WITHIN
        domains = {node.domain for node in whole.graph.node}
        assert domains <= DOMAINS[target]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_an_example_in_another_dtype_says_nothing_about_the_graph(dtype: torch.dtype, in_runtime: Runtime) -> None:
    """Without a bias, compressed layers have no parameter that could say what the model computes in."""
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).to(torch.bfloat16)
    small = slimc.compile(model, x, [Quantize("absmax", 4, 32)])
    assert not list(small.parameters())
    whole = export_module(small, ((x,), {}), dtype=dtype).whole()
    (found,) = in_runtime(whole.SerializeToString(), {whole.graph.input[0].name: x.to(dtype).numpy()})
    # Sums of 64 terms: ten roundings to the dtype of the graph, as elsewhere in this file some hundred to float32.
    exact = twin(small, torch.float32)(x.float())
    assert relative_error(found.astype(np.float32), exact) < (WITHIN if dtype == torch.float32 else 10 * 2**-11)


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.relu(self.shared(x)))


@pytest.mark.parametrize("fused", [False, True], ids=["stages", "fused"])
def test_signs_of_a_layer_that_is_called_twice_are_stored_once(fused: bool, in_runtime: Runtime) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 32)
    program = capture(Twice(), [((x,), {})])
    run(program, [Calibrate(), Decompose(), *([Fuse()] if fused else [])], [[x]], progress=SilentProgress())
    for target in TARGETS:
        graph = export_program(program, ((x,), {}), target=target)
        whole = graph.whole()
        onnx.checker.check_model(whole, full_check=True)
        (found,) = in_runtime(whole.SerializeToString(), {graph.description.inputs[0]: x.numpy()})
        assert relative_error(found, program.run(x)) < WITHIN
        signs = [name for name in graph.stored if name.endswith(".signs")]
        assert len(signs) == (0 if fused and target == "dense" else 1)
        assert graph.sites["shared"].bytes == sum(
            constant.nbytes for name, constant in graph.stored.items() if not name.endswith("bias")
        ), "all constants but the bias are the layer's"


def test_an_unfused_weight_reaches_its_product_without_a_transposition(in_runtime: Runtime) -> None:
    x = torch.randn(2, 3, 64)
    program = capture(mlp(64, 48), [((x,), {})])
    run(program, [Quantize(bits=4, group=32, method="absmax")], [], progress=SilentProgress())
    nodes = export_program(program, ((x,), {})).model.graph.node
    assert "Transpose" not in {node.op_type for node in nodes}
    assert "dequant" in {node.op_type for node in nodes}


def test_codes_of_2_bits_choose_the_opset_that_has_them(in_runtime: Runtime) -> None:
    x = torch.randn(4, 64)
    small = slimc.compile(mlp(64, 48), [x], passes=[Quantize(bits=2, group=32, method="absmax"), Fuse()])
    graph = export_module(small, ((x,), {}))
    assert graph.description.opset == 25
    assert graph.stored["0.weight"].nbytes == 64 * 48 // 4
    with torch.no_grad():
        expected = small(x)
    (found,) = in_runtime(graph.whole().SerializeToString(), {graph.description.inputs[0]: x.numpy()})
    assert relative_error(found, expected) < WITHIN
    assert export_module(small, ((x,), {}), opset=21).stored["0.weight"].nbytes == 64 * 48 // 2


def test_a_bfloat16_model_keeps_its_dense_weights_in_16_bits_and_itself(in_runtime: Runtime) -> None:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**GROUPED, "vocab_size": 256, "tie_word_embeddings": True})
    )
    model = compressed(model.to(torch.bfloat16).eval(), inputs_of("Llama", 2, 9))
    before = {name: (value, value.clone()) for name, value in model.state_dict().items()}
    graph = export_module(model, ((), inputs_of("Llama", 2, 9)))
    tables = {name: constant for name, constant in graph.stored.items() if constant.dims == (256, 32)}
    assert len(tables) == 1, "tied embeddings are stored once"
    assert next(iter(tables.values())).nbytes == 256 * 32 * 2
    for name, value in model.state_dict().items():
        assert value.dtype == before[name][0].dtype
        assert torch.equal(value, before[name][1])
    assert model.config.use_cache
    inputs = inputs_of("Llama", 3, 12)
    with torch.no_grad():
        expected = twin(model, torch.float32)(**inputs)[0]
    found = in_runtime(graph.whole().SerializeToString(), {name: inputs[name].numpy() for name in inputs})
    assert relative_error(real(found[0], inputs), real(expected, inputs)) < WITHIN


def test_float16(in_runtime: Runtime) -> None:
    x = torch.randn(4, 64)
    small = compressed(mlp(64, 48, 32), x)
    graph = export_module(small, ((x,), {}), dtype=torch.float16)
    (found,) = in_runtime(graph.whole().SerializeToString(), {graph.description.inputs[0]: x.half().numpy()})
    assert found.dtype == np.float16
    with torch.no_grad():
        # Two layers, each with a handful of roundings to float16 and terms of both signs.
        assert relative_error(found.astype(np.float32), small(x)) < 32 * 2.0**-11


def test_nothing_of_this_machine_is_in_the_graph() -> None:
    x = torch.randn(4, 64)
    content = export_module(compressed(mlp(64, 48), x), ((x,), {})).model.SerializeToString()
    for trace_of in (str(Path(__file__).parents[3]).encode(), b"site-packages", b"stack_trace", b"torch"):
        assert trace_of not in content


def test_a_single_sample_leaves_the_batch_open(in_runtime: Runtime) -> None:
    x = torch.randn(1, 64)
    small = compressed(mlp(64, 48), x)
    graph = export_module(small, ((x,), {}))
    (found,) = in_runtime(graph.whole().SerializeToString(), {graph.description.inputs[0]: torch.randn(5, 64).numpy()})
    assert found.shape == (5, 48)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(x.sum()) > 0 else x


class Untranslatable(Untraceable):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.special.bessel_j0(x))


class Silent(Untraceable):
    def forward(self, x: Tensor) -> None:
        self.linear(x)


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        (Untraceable, torch.ones(2, 32), CaptureError, "torch.export cannot trace Untraceable"),
        (Untranslatable, torch.ones(2, 32), CaptureError, "cannot translate the model"),
        (Silent, torch.ones(2, 32), InputError, "Silent returns no tensor"),
        (Untraceable, torch.ones(2, 31), InputError, "fails on the example"),
        (Untraceable, 3, InputError, "has no tensor"),
    ],
)
def test_models_and_examples_that_cannot_be_exported(
    model: type[nn.Module], example: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        export_module(model(), ((example,), {}))


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"does not fit forward\(\) of Untraceable"):
        export_module(Untraceable(), ((torch.ones(2, 32), torch.ones(2)), {}))


def test_a_program_of_another_dtype() -> None:
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    program = capture(mlp(64, 48).to(torch.bfloat16), [((x,), {})])
    with pytest.raises(InputError, match=r"captured in torch.bfloat16; capture the model in torch.float32"):
        export_program(program, ((x,), {}))


def test_a_dense_model_is_exported_too(in_runtime: Runtime) -> None:
    x = torch.randn(4, 64)
    model = mlp(64, 48)
    graph = export_module(model, ((x,), {}))
    assert not graph.sites
    assert not any(isinstance(module, SlimLinear) for module in model.modules())
    (found,) = in_runtime(graph.whole().SerializeToString(), {graph.description.inputs[0]: x.numpy()})
    with torch.no_grad():
        assert relative_error(found, model(x)) < WITHIN


def test_layers_with_equal_codes_stay_apart(in_runtime: Runtime) -> None:
    """Equal constants may be merged, but a layer is known by the names of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False))
    with torch.no_grad():
        model[2].weight.copy_(2 * model[0].weight)
    x = torch.randn(4, 32)
    small = slimc.compile(model, [x], passes=[Quantize(bits=4, group=16, method="absmax"), Fuse()])
    assert torch.equal(small[0].values, small[2].values)
    graph = export_module(small, ((x,), {}))
    (found,) = in_runtime(graph.whole().SerializeToString(), {graph.description.inputs[0]: x.numpy()})
    with torch.no_grad():
        assert relative_error(found, small(x)) < WITHIN
    assert len(graph.sites) == 2
