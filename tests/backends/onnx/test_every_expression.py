"""Every expression that passes can make, through the public interface: exported, and compared with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc.passes import (
    Activations,
    AllocateBits,
    Calibrate,
    Compensate,
    Decompose,
    Fuse,
    LowRank,
    Pass,
    PerSite,
    Prune,
    Quantize,
)
from slimc.runtime.modules import SlimLinear

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from slimc.backends.onnx.verify import verify_folder  # noqa: E402 - after the check that onnx is there
from slimc.backends.onnx.weights import TARGETS  # noqa: E402

Runtime = Callable[[bytes | Path, Mapping[str, Any]], list[np.ndarray]]

COLUMNS, ROWS = 64, 48
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 24, "channel", None)

EXPRESSIONS: dict[str, list[Pass]] = {
    **{f"int{bits}/{group}": [Quantize("absmax", bits, group)] for bits in BITS for group in GROUPS},
    **{f"int{bits}/32 zero points": [Quantize("absmax", bits, 32, symmetric=False)] for bits in BITS},
    "int4/tensor zero points": [Quantize("absmax", 4, symmetric=False)],
    **{f"gptq int{bits}": [Quantize("gptq", bits, 32)] for bits in (1, 4, 7)},
    "gptq int4/channel": [Quantize("gptq", 4, "channel", symmetric=True)],
    "slim": [Quantize("slim")],
    "input scale": [Quantize("slim", activation_aware=True)],
    "2:4 numbers": [Prune("2:4")],
    "unstructured numbers": [Prune(0.5)],
    "2:4 int4": [Quantize("slim"), Prune("2:4")],
    "1:4 int8": [Quantize("absmax", 8, 32), Prune("1:4")],
    "3:8 int3": [Quantize("absmax", 3, 32), Prune("3:8", method="magnitude")],
    "2:4 int2": [Quantize("absmax", 2, 32), Prune("2:4", method="sparsegpt")],
    "unstructured int4": [Quantize("absmax", 4, 32), Prune(0.5)],
    "adapters": [Quantize("slim"), Prune("2:4"), LowRank(rank=7)],
    "4-bit adapters": [Quantize("absmax", 4, 64), LowRank(rank=0.1, bits=4)],
    "4-bit adapters, groups": [Quantize("slim"), Prune("2:4"), LowRank(rank=9, bits=4, group=16)],
    "4-bit adapters, input scale": [Quantize("slim", activation_aware=True), LowRank(rank=5, bits=4, group=64)],
    "8-bit adapters on 2 bits": [Quantize("absmax", 2, 16), LowRank(rank=5, bits=8, method="svd")],
    "numbers and adapters": [Prune("2:4"), LowRank(rank=5)],
    "joint": [
        Compensate(strength=0.5),
        Quantize("slim", 4, 32),
        Prune("2:4", method="joint"),
        LowRank(method="covariance", rank=0.1, bits=4, group=64),
    ],
    "widths": [AllocateBits(2, 16, "output", widest=4), Quantize("gptq", calibrate="sqc")],
    "symmetric widths": [AllocateBits(3, 16, "output"), Quantize("absmax", symmetric=True)],
    "widths 2:4 adapters": [AllocateBits(3, 16, "output"), Quantize("absmax"), Prune("2:4"), LowRank(rank=5, bits=4)],
    "signs": [Decompose(ratio=0.5, rounds=1)],
    "signs 2:4 int4": [Decompose(ratio=None, pattern="2:4", bits=4, group=16, rounds=1)],
    "signs 2 ranks": [Decompose(ratio=0.5, rounds=1, rank=2)],
    "int8 inputs": [Quantize("absmax", 4, 32), Activations(kind="int8")],
    "float8 inputs": [Quantize("slim"), Prune("2:4"), LowRank(rank=7, bits=4), Activations(kind="fp8")],
}


class OneOfEach(nn.Module):
    """A layer for every expression, each with an input of its own, so that none has siblings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(COLUMNS, ROWS, bias=index % 2 > 0) for index in range(len(EXPRESSIONS)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x * (1 + index)) for index, layer in enumerate(self.layers))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    sites = {f"layers.{index}": name for index, name in enumerate(EXPRESSIONS)}
    passes = [Calibrate(), PerSite(EXPRESSIONS, sites), Fuse()]
    return slimc.compile(OneOfEach(), [torch.randn(96, COLUMNS)], passes=passes)


@pytest.mark.parametrize("target", TARGETS)
def test_every_expression_has_a_lowering(target: str, small: nn.Module, in_runtime: Runtime, tmp_path: Path) -> None:
    assert sum(isinstance(module, SlimLinear) for module in small.modules()) == len(EXPRESSIONS)
    report = slimc.export_onnx(small, tmp_path / "onnx", torch.randn(5, COLUMNS), target)
    assert len(report.sites) == len(EXPRESSIONS)
    x = torch.randn(3, COLUMNS)
    with torch.no_grad():
        expected = small(x)
    name = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.input[0].name
    found = in_runtime(tmp_path / "onnx" / "model.onnx", {name: x.numpy()})
    for expression, ours, theirs in zip(EXPRESSIONS, found, expected, strict=True):
        error = np.abs(ours - theirs.numpy()).max()
        # Sums of 64 terms and a few more in another order; an input may round to the next of its 8-bit codes.
        limit = 2**-5 if "inputs" in expression else 2**-17
        assert error <= limit * theirs.abs().max(), f"{expression}: {error:.1e}"


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("portable", {"dtype": "float16"}),
        ("portable", {"opset": 25}),
        ("portable", {"opset": 26}),
        ("ort", {"dtype": "float16"}),
        ("ort", {"accuracy_level": 4}),
        ("dense", {"dtype": "float16", "opset": 25}),
    ],
)
def test_every_expression_with_other_options(
    target: str, options: dict[str, Any], small: nn.Module, tmp_path: Path
) -> None:
    slimc.export_onnx(small, tmp_path / "onnx", torch.randn(5, COLUMNS), target, **options)
    assert [check for check in verify_folder(tmp_path / "onnx", against=small) if not check.passed] == []


@pytest.mark.parametrize("target", TARGETS)
def test_every_expression_is_verified(target: str, small: nn.Module, tmp_path: Path) -> None:
    slimc.export_onnx(small, tmp_path / "onnx", torch.randn(5, COLUMNS), target)
    checks = list(verify_folder(tmp_path / "onnx"))
    assert [check for check in checks if not check.passed] == []
    assert sum(check.name.startswith("layer ") for check in checks) > 30, "layers of one form are tried once"


SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {**SMALL, "vocab_size": 96, "max_position_embeddings": 64},
    "ViT": {**SMALL, "image_size": 16, "patch_size": 8},
}
PER_LAYER = {
    "attention": [Quantize("absmax", 3, 16, symmetric=False)],
    "adapted": [Quantize("slim"), Prune("2:4"), LowRank(rank=7, bits=4)],
    "wide": [Prune(0.5), LowRank(rank=5)],
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_verified(name: str, target: str, tmp_path: Path) -> None:
    """Models without a cache, whose layers are not all of one form."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Model")
    model = kind(kind.config_class(**ENCODERS[name])).eval()
    batch = (
        {"pixel_values": torch.randn(4, 3, 16, 16)} if name == "ViT" else {"input_ids": torch.arange(96).view(4, 24)}
    )
    sites = {"re:.*(query|key|value).*|.*[qkv]_proj.*": "attention", "re:.*layers?\\.0.*(output|mlp).*": "wide"}
    passes = [Calibrate(), PerSite(PER_LAYER, sites, default="adapted"), Fuse()]
    small = slimc.compile(model, [batch], passes=passes)
    report = slimc.export_onnx(small, tmp_path / "onnx", target=target)
    assert len({site.form for site in report.sites.values()}) == 3
    checks = {check.name: check for check in verify_folder(tmp_path / "onnx", against=small)}
    assert [check for check in checks.values() if not check.passed] == []
    assert "differ by" in checks["outputs"].detail


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    """A Llama of all expressions in turn, so that siblings differ; none of rounded inputs, whose codes may differ."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    chosen = {name: passes for name, passes in EXPRESSIONS.items() if "inputs" not in name}
    config = transformers.LlamaConfig(
        **{**SMALL, "num_hidden_layers": -(-len(chosen) // 7)},
        vocab_size=96,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    leaves += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    layers = [f"model.layers.{index}.{leaf}" for index in range(config.num_hidden_layers) for leaf in leaves]
    sites = dict(zip(layers, [*chosen, *chosen], strict=False))
    return slimc.compile(model, [torch.arange(96).view(4, 24)], passes=[Calibrate(), PerSite(chosen, sites), Fuse()])


@pytest.mark.parametrize("target", TARGETS)
def test_a_decoder_of_all_expressions(target: str, decoder: nn.Module, tmp_path: Path) -> None:
    slimc.export_onnx(decoder, tmp_path / "onnx", target=target)
    checks = {check.name: check for check in verify_folder(tmp_path / "onnx", against=decoder, tokens=16)}
    assert [check for check in checks.values() if not check.passed] == []
    assert checks["tokens"].detail.startswith("80 of 80")
