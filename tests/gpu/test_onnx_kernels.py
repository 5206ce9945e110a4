"""The kernel library in ONNX Runtime's CUDA provider, against the product with the decoded weight in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from slimc.backends.onnx.kernels.build import Form, build_library
from slimc.backends.onnx.weights import lower_linear
from slimc.runtime.packing import PackedLinear, PackedWeight

FORMS = {
    "2:4": {"sparse": True},
    "2:4, a scale a row": {"sparse": True, "per_tensor": False},
    "2:4 in groups": {"sparse": True, "group": 128},
    "dense in groups": {"sparse": False, "group": 64},
    "dense in small groups": {"sparse": False, "group": 32},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    major, minor = torch.cuda.get_device_capability()
    kinds = ((True, 0), (True, 128), (False, 64), (False, 32))
    forms = [Form(sparse, group, adapters=True) for sparse, group in kinds]
    arch = "sm_90a" if major == 9 else f"sm_{major}{minor}"
    path = tmp_path_factory.mktemp("library") / "slim_kernels.so"
    return build_library([*forms, Form(True, 0, False)], path, architectures=[arch])


def on_cpu(packed: PackedLinear) -> PackedLinear:
    def moved(weight: PackedWeight | None) -> Any:
        return weight and PackedWeight(weight.format, **{name: one.cpu() for name, one in weight.tensors().items()})

    return replace(packed, weight=moved(packed.weight), left=moved(packed.left), right=moved(packed.right))


def open_layer(packed: PackedLinear, bias: Tensor | None, library: Path) -> Callable[[Tensor], Tensor]:
    """Return the layer as ONNX Runtime computes it."""
    lowered = lower_linear(on_cpu(packed), None if bias is None else bias.cpu(), "cuda", "layer", dtype=torch.float16)
    form = packed.format
    graph = helper.make_graph(
        lowered.nodes,
        "layer",
        [helper.make_tensor_value_info(lowered.input, TensorProto.FLOAT16, ["tokens", form.columns])],
        [helper.make_tensor_value_info(lowered.output, TensorProto.FLOAT16, ["tokens", form.rows])],
        list(lowered.initializers.values()),
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("slim", 1)]
    model = helper.make_model(graph, functions=lowered.functions, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
    )

    def run(x: Tensor) -> Tensor:
        (y,) = session.run(None, {lowered.input: x.cpu().numpy()})
        return torch.from_numpy(np.asarray(y)).cuda()

    return run


@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_tokens(random_layer: Any, check: Any, library: Path, form: str) -> None:
    packed = random_layer(272, 640, 57, dtype=torch.float16, **FORMS[form])
    run = open_layer(packed, None, library)
    for tokens in (1, 8, 9, 16, 17, 48, 49, 300, 1):
        x = torch.randn(tokens, 640, dtype=torch.float16, device="cuda")
        y = run(x)
        check(packed, x, None, y)
        assert torch.equal(y, run(x))


@pytest.mark.parametrize("rank", [0, 100])
def test_a_bias_and_no_adapters(random_layer: Any, check: Any, library: Path, rank: int) -> None:
    packed = random_layer(256, 1536, rank, dtype=torch.float16)
    bias = torch.randn(256, dtype=torch.float16, device="cuda")
    run = open_layer(packed, bias, library)
    for tokens in (1, 30, 70):
        x = torch.randn(tokens, 1536, dtype=torch.float16, device="cuda")
        check(packed, x, bias, run(x))


def test_a_form_that_the_library_was_not_built_for(random_layer: Any, library: Path) -> None:
    packed = random_layer(256, 640, 0, dtype=torch.float16, sparse=False, group=128)
    with pytest.raises(Exception, match="this library has no kernel for dense weights with groups of 128"):
        open_layer(packed, None, library)
