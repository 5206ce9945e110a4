"""The functions of the domain ``slim``: one for every operator of slimc, and what the rounding of inputs computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimc.runtime.activations import round_tokens
from slimc.runtime.formats import ACTIVATIONS
from slimc.runtime.ops import OPS

onnx = pytest.importorskip("onnx")

from onnx import FunctionProto, TensorProto, helper  # noqa: E402 - after the check that it is there
from onnx.reference import ReferenceEvaluator  # noqa: E402

from slimc.backends.onnx import functions  # noqa: E402

Runtime = Callable[[bytes | Path, Mapping[str, Any]], list[np.ndarray]]

OPSET = 21


def every_function() -> list[FunctionProto]:
    found = [functions.low_rank_function(OPSET)]
    found += [functions.sign_low_rank_function(OPSET, several=several) for several in (False, True)]
    found += [functions.round_activations_function(kind, OPSET) for kind in ACTIVATIONS]
    for name in ("dequant", "dequant_nm", "dequant_mask"):
        found.append(functions.dequant_function(name, codes=False, zero_point=False, opset=OPSET))
        found += [functions.dequant_function(name, codes=True, zero_point=zero, opset=OPSET) for zero in (False, True)]
    flags = (False, True)
    found += [
        functions.linear_function(overload, OPSET)
        for codes in flags
        for low_rank in flags
        for bias in flags
        for activation in (None, *ACTIVATIONS)
        for overload in (
            functions.LinearOverload(codes=codes, low_rank=low_rank, bias=bias, sign_ranks=1, activation=activation),
            functions.LinearOverload(codes=codes, low_rank=low_rank, bias=bias, sign_ranks=2, activation=activation),
            functions.LinearOverload(codes=codes, low_rank=low_rank, bias=bias, activation=activation),
            functions.LinearOverload(
                codes=codes,
                zero_point=codes,
                input_scale=True,
                low_rank=low_rank,
                left_codes=low_rank,
                right_codes=low_rank,
                bias=bias,
                activation=activation,
            ),
        )
    ]
    return found


def test_every_operator_has_a_function_and_every_function_its_own_name() -> None:
    found = every_function()
    assert {f"{one.domain}::{one.name}" for one in found} == set(OPS)
    names = [(one.name, one.overload) for one in found]
    assert len(set(names)) == len(names)
    for one in found:
        context = onnx.checker.C.CheckerContext()
        context.ir_version, context.opset_imports = 10, {"": OPSET}
        onnx.checker.check_function(one, context)
    assert all(list(one.input) == list(functions.INPUTS) for one in found if one.name == "linear")


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inputs_are_rounded_bit_for_bit(kind: str, dtype: torch.dtype, in_runtime: Runtime) -> None:
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([[1.0], [1e-3], [1e3], [0.0], [17.0]])
    x[4, 1:] *= 1e-4  # small beside the largest: subnormal codes of a float8
    x = x.to(dtype)
    number = TensorProto.FLOAT if dtype == torch.float32 else TensorProto.FLOAT16
    node = helper.make_node("round_activations", ["x"], ["y"], domain="slim")
    node.overload = kind
    graph = helper.make_graph(
        [node],
        "rounding",
        [helper.make_tensor_value_info("x", number, [5, 300])],
        [helper.make_tensor_value_info("y", number, [5, 300])],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("slim", 1)]
    function = functions.round_activations_function(kind, OPSET)
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    expected = round_tokens(x, kind)
    for (found,) in (
        ReferenceEvaluator(model).run(None, {"x": x.numpy()}),
        in_runtime(model.SerializeToString(), {"x": x.numpy()}),
    ):
        assert torch.equal(torch.from_numpy(found), expected)
