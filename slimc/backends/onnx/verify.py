"""Checks an ONNX folder that slimc wrote: its files, its graph, and what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import GraphProto, ModelProto, TensorProto, helper
from onnx.external_data_helper import load_external_data_for_tensor
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor, nn

from slimc.backends.hf_library import require
from slimc.backends.onnx.description import Description
from slimc.backends.onnx.files import DATA, MODEL, open_folder
from slimc.backends.onnx.initializers import BITS
from slimc.backends.onnx.tracing import twin
from slimc.backends.onnx.weights import MICROSOFT
from slimc.errors import SlimError

__all__ = ["Check", "verify_folder"]

_OUTPUTS_WITHIN = {"float32": 1e-3, "float16": 5e-2}
"""How far ONNX Runtime may be from PyTorch, relative to the largest output, by what the graph computes in."""

_LAYER_WITHIN = {"float32": 1e-5, "float16": 2e-2}
"""The same for a layer alone in onnx.reference and in ONNX Runtime."""

_SAMPLES, _LENGTH = 2, 7
"""Sizes of the inputs that are tried."""

_GREEDY = 8
"""Tokens that a language model continues them by."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        passed: whether it is as it should be.
        detail: what was found.
    """

    name: str
    passed: bool
    detail: str


def verify_folder(path: Path, *, against: nn.Module | None = None) -> Iterator[Check]:
    """Yield the checks of a folder as they are done.

    Files and sizes; the rules of ONNX; that no constant is larger than promised; one layer of each form in the
    reference evaluator and in ONNX Runtime; and with ``against``, the model that it was exported from, ONNX Runtime's
    outputs and the tokens that they choose against PyTorch's.

    Args:
        path: the folder.
        against: the model in PyTorch; it is left as it is.

    Raises:
        InputError: it is no such folder, or ONNX Runtime is not installed.
        FormatError: a file is missing, of the wrong size, or damaged.
    """
    require("onnxruntime", "verifying an ONNX model", extra="onnx")
    model, description, record = open_folder(path)
    yield Check("files", True, f"{MODEL} and {DATA} have the sizes that they should have")
    yield _rules(path)
    yield _constants(model, record)
    yield from _layers(path, model, record)
    yield from _whole(path, description, record, against)


def _rules(path: Path) -> Check:
    try:
        onnx.checker.check_model(str(path / MODEL), full_check=True)
    except Exception as error:
        return Check("rules of ONNX", False, str(error).strip().splitlines()[0])
    return Check("rules of ONNX", True, "the checker finds nothing wrong")


def _constants(model: ModelProto, record: Mapping[str, Any]) -> Check:
    """Add up the constants of each layer, which must be what the description says, and not numbers instead of codes."""
    sizes = {}
    for constant in model.graph.initializer:
        sizes[constant.name] = size = (prod(constant.dims) * BITS[constant.data_type] + 7) // 8
        place = {entry.key: entry.value for entry in constant.external_data}
        outside = place.get("location") == DATA and place.get("length") == str(size)
        if not outside and len(constant.raw_data) != size:
            return Check("constants", False, f"{constant.name} is not {size} bytes of {DATA}, nor of {MODEL}")
    for name, site in record["sites"].items():
        found = sum(size for one, size in sizes.items() if one.startswith(f"{name}.") and not _is_bias(one, name))
        if found != site["bytes"]:
            return Check("constants", False, f"{name} has {found} bytes of constants, not the {site['bytes']} promised")
    total = sum(sizes.values())
    promised = record["sizes"]["layers"] + record["sizes"]["others"]
    if total != promised:
        return Check("constants", False, f"all constants are {total} bytes, not the {promised} promised")
    return Check("constants", True, f"{len(sizes)} constants of {total} bytes, none larger than promised")


def _is_bias(constant: str, site: str) -> bool:
    return constant.removeprefix(f"{site}.").partition(".")[0] == "bias"


# --------------------------------------------------------------------------------------------------------- layers


def _layers(path: Path, model: ModelProto, record: Mapping[str, Any]) -> Iterator[Check]:
    """Compute the smallest layer of each form by the reference evaluator and by ONNX Runtime."""
    smallest: dict[str, tuple[int, str]] = {}
    for name, site in record["sites"].items():
        candidate = (site["shape"][0] * site["shape"][1], name)
        smallest[site["form"]] = min(smallest.get(site["form"], candidate), candidate)
    for form, (_, name) in smallest.items():
        piece = _piece(path, model, name, record["sites"][name]["shape"][1])
        if piece is None:
            continue
        try:
            yield _compared(f"layer '{name}' ({form})", piece, record["sites"][name]["shape"][1])
        except Exception as error:
            yield Check(f"layer '{name}' ({form})", False, str(error).strip().splitlines()[0])


def _piece(path: Path, model: ModelProto, name: str, columns: int) -> ModelProto | None:
    """Cut the nodes of a layer out of the graph; None if the layer has none of its own."""
    start = f"{name}."
    constants = {constant.name: constant for constant in model.graph.initializer}
    nodes = [node for node in model.graph.node if any(one.startswith(start) for one in (*node.input, *node.output))]
    made = {one for node in nodes for one in node.output}
    read = {one for node in nodes for one in node.input if one}
    inputs = sorted(read - made - constants.keys())
    outputs = sorted(made - read)
    if len(inputs) != 1 or len(outputs) != 1:
        return None
    kind = _number_type(model)
    graph = GraphProto(name="layer", node=nodes)
    graph.input.append(helper.make_tensor_value_info(inputs[0], kind, ["samples", columns]))
    graph.output.append(helper.make_tensor_value_info(outputs[0], kind, None))
    for one in sorted(read & constants.keys()):
        constant = TensorProto()
        constant.CopyFrom(constants[one])
        if constant.data_location == TensorProto.EXTERNAL:
            load_external_data_for_tensor(constant, str(path))
            constant.ClearField("data_location")
            del constant.external_data[:]
        graph.initializer.append(constant)
    return ModelProto(
        ir_version=model.ir_version, graph=graph, opset_import=model.opset_import, functions=model.functions
    )


def _number_type(model: ModelProto) -> int:
    """Return the type of the model's numbers: that of its first output of numbers."""
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16)
    found = (value.type.tensor_type.elem_type for value in model.graph.output)
    return next((kind for kind in found if kind in kinds), TensorProto.FLOAT)


def _compared(what: str, piece: ModelProto, columns: int) -> Check:
    kind = helper.tensor_dtype_to_np_dtype(piece.graph.input[0].type.tensor_type.elem_type)
    x = np.random.default_rng(0).standard_normal((_SAMPLES * _LENGTH, columns)).astype(kind)
    inputs = {piece.graph.input[0].name: x}
    evaluator: Any = ReferenceEvaluator(piece, new_ops=[MatMulNBits])
    (expected,) = evaluator.run(None, inputs)
    (found,) = _session(piece.SerializeToString()).run(None, inputs)
    error = _relative_error(found, expected)
    limit = _LAYER_WITHIN[str(np.dtype(kind))]
    return Check(what, error <= limit, f"onnx.reference and ONNX Runtime differ by {error:.1e} of the largest output")


class MatMulNBits(OpRun):
    """ONNX Runtime's product by a matrix of packed codes, in numpy, from its documentation."""

    op_domain = MICROSOFT

    def _run(
        self,
        x: Array,
        codes: Array,
        scales: Array,
        *others: Array,
        K: int,
        N: int,
        bits: int,
        block_size: int,
        **_: Any,
    ) -> tuple[Array]:
        blocks = -(-K // block_size)
        unpacked = _unpacked(codes.reshape(N, -1), bits).reshape(N, blocks, block_size).astype(np.float64)
        zeros: Array = np.full((N, blocks), 2.0 ** (bits - 1))
        if others and others[0] is not None:
            zeros = _unpacked(others[0].reshape(N, -1), bits)[:, :blocks].astype(np.float64)
        weight = (unpacked - zeros[..., None]) * scales.reshape(N, blocks, 1).astype(np.float64)
        product = x.astype(np.float64) @ weight.reshape(N, -1)[:, :K].T
        return (product.astype(x.dtype),)


def _unpacked(packed: Array, bits: int) -> Array:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values: Array = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return values.reshape(*packed.shape[:-1], -1)


# ------------------------------------------------------------------------------------------------ the whole model


def _session(model: bytes | str, entries: Mapping[str, str] | None = None) -> Any:
    runtime = require("onnxruntime", "verifying an ONNX model", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    for key, value in ({"session.qdq_matmulnbits_accuracy_level": "0"} | dict(entries or {})).items():
        options.add_session_config_entry(key, value)
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _whole(
    path: Path, description: Description, record: Mapping[str, Any], against: nn.Module | None
) -> Iterator[Check]:
    try:
        session = _session(str(path / MODEL), record.get("session"))
    except Exception as error:
        yield Check("ONNX Runtime", False, f"cannot load it: {str(error).strip().splitlines()[0]}")
        return
    yield Check("ONNX Runtime", True, f"{require('onnxruntime', 'verifying', extra='onnx').__version__} loads it")
    if against is None or description.cache is not None:
        return
    try:
        yield from _against(session, against)
    except SlimError:
        raise
    except Exception as error:
        yield Check("outputs", False, str(error).strip().splitlines()[0])


def _against(session: Any, model: nn.Module) -> Iterator[Check]:
    exact = twin(model, torch.float32)
    if hasattr(exact, "config") and hasattr(exact.config, "use_cache"):
        exact.config.use_cache = False
    inputs = {value.name: _example(value, exact) for value in session.get_inputs()}
    expected, found = _torch_outputs(exact, inputs), _runtime_outputs(session, inputs)
    error = max(_relative_error(one.numpy(), other.numpy()) for one, other in zip(found, expected, strict=False))
    limit = _OUTPUTS_WITHIN[str(found[0].dtype).removeprefix("torch.")]
    yield Check("outputs", error <= limit, f"ONNX Runtime and PyTorch differ by {error:.1e} of the largest output")
    if "input_ids" not in inputs or session.get_outputs()[0].name != "logits":
        return
    ours, theirs = dict(inputs), dict(inputs)
    for _ in range(_GREEDY):
        ours = _longer(ours, _runtime_outputs(session, ours)[0])
        theirs = _longer(theirs, _torch_outputs(exact, theirs)[0])
    equal = torch.equal(ours["input_ids"], theirs["input_ids"])
    yield Check("tokens", equal, f"{_GREEDY} greedy tokens are {'equal' if equal else 'not equal'} to PyTorch's")


def _example(value: Any, model: nn.Module) -> Tensor:
    """Return an input of the shape and type that the graph asks for; open sizes are small numbers."""
    sizes = [size if isinstance(size, int) else (_SAMPLES, _LENGTH)[axis > 0] for axis, size in enumerate(value.shape)]
    generator = torch.Generator().manual_seed(0)
    if "float" in value.type:
        return torch.randn(sizes, generator=generator).to(torch.float16 if "16" in value.type else torch.float32)
    if "mask" in value.name:
        return torch.ones(sizes, dtype=torch.int64)
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 2))
    return torch.randint(0, vocabulary if value.name == "input_ids" else 1, sizes, generator=generator)


def _torch_outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        result = model(
            **{name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
        )
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _runtime_outputs(session: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return [torch.from_numpy(one) for one in session.run(None, {name: value.numpy() for name, value in inputs.items()})]


def _longer(inputs: Mapping[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
    """Append the likeliest token of each sample, and to a mask a one."""
    chosen = logits[:, -1].argmax(-1, keepdim=True)
    return {
        name: torch.cat([value, chosen if name == "input_ids" else torch.ones_like(chosen)], dim=1)
        for name, value in inputs.items()
    }


def _relative_error(found: Array, expected: Array) -> float:
    """Return the largest difference relative to the largest expected number; infinity for other shapes, or NaN."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0)
    return float(difference / max(np.abs(expected).max(initial=0.0), np.finfo(np.float32).tiny))
