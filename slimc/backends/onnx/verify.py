"""Checks an ONNX folder that slimc wrote: its files, its graph, and what it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.external_data_helper import load_external_data_for_tensor
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn

from slimc.backends.check import Check
from slimc.backends.onnx.compare import Difference, compare_decoder, compare_outputs, open_session, relative_error
from slimc.backends.onnx.description import Description
from slimc.backends.onnx.files import DATA, MODEL, damaged_files, open_folder
from slimc.backends.onnx.initializers import BITS
from slimc.backends.onnx.session import import_runtime
from slimc.backends.onnx.weights import MICROSOFT
from slimc.errors import SlimError
from slimc.runtime.modules import SlimLinear

__all__ = ["TOKENS", "verify_folder"]

_OUTPUTS_WITHIN, _ROUNDED_OUTPUTS_WITHIN = 1e-3, 1e-1
"""How far ONNX Runtime may be from PyTorch: in float32 the largest difference relative to the largest output; in fewer
bits, where a single token may happen to fall on the other side of something, the root mean squares of both."""

_LAYER_WITHIN, _ROUNDED_LAYER_WITHIN = 1e-5, 2e-2
"""The same for a layer alone in onnx.reference and in ONNX Runtime."""

_INT8 = 4
"""The accuracy level from which on ONNX Runtime rounds the inputs of products to 8 bits."""

TOKENS = 64
"""How many tokens a language model chooses greedily, to be compared."""

_SAMPLES, _LENGTH = 2, 7
"""Sizes of the inputs that a layer is tried with."""

Array = npt.NDArray[Any]


def verify_folder(path: Path, *, against: nn.Module | None = None, tokens: int = TOKENS) -> Iterator[Check]:
    """Yield the checks of a folder as they are done.

    Files, sizes and digests; the rules of ONNX; that no constant is larger than promised; one layer of each form in
    the reference evaluator and in ONNX Runtime; and with ``against``, the model that it was exported from, ONNX
    Runtime's outputs and the tokens that they choose against PyTorch's. A graph that computes in float16, or with
    inputs rounded to 8 bits, may choose other tokens: they are counted only.

    Args:
        path: the folder.
        against: the model in PyTorch; it is left as it is.
        tokens: how many a language model is asked for.

    Raises:
        InputError: it is no such folder, or ONNX Runtime is not installed.
        FormatError: a file is missing, of the wrong size, or damaged.
    """
    import_runtime()
    model, description, record = open_folder(path)
    yield Check("files", True, f"{MODEL} and {DATA} have the sizes that they should have")
    damaged = damaged_files(path, record)
    wrong = f"not the bytes that were written: {', '.join(damaged)}"
    yield Check("digests", not damaged, wrong if damaged else "all files have the SHA-256 that they were written with")
    yield _rules(path)
    yield _constants(model, record)
    yield from _layers(path, model, record, rounded=description.accuracy_level >= _INT8)
    yield from _whole(path, description, record, against, tokens)


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
        if constant.data_type not in BITS:
            return Check(
                "constants", False, f"{constant.name} is of a type {constant.data_type} that slimc never writes"
            )
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


def _layers(path: Path, model: ModelProto, record: Mapping[str, Any], *, rounded: bool) -> Iterator[Check]:
    """Compute the smallest layer of each form by the reference evaluator and by ONNX Runtime."""
    smallest: dict[str, tuple[int, str]] = {}
    for name, site in record["sites"].items():
        candidate = (site["shape"][0] * site["shape"][1], name)
        smallest[site["form"]] = min(smallest.get(site["form"], candidate), candidate)
    for form, (_, name) in smallest.items():
        try:
            piece = _piece(path, model, name, record["sites"][name]["shape"][1])
            if piece is None:
                continue
            yield _compared(f"layer '{name}' ({form})", piece, record["sites"][name]["shape"][1], rounded=rounded)
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
        ir_version=model.ir_version,
        graph=graph,
        opset_import=model.opset_import,
        functions=_functions_of(nodes, model.functions),
    )


def _functions_of(nodes: Iterable[NodeProto], functions: Iterable[FunctionProto]) -> list[FunctionProto]:
    """Return the functions that nodes call, and those that these call: onnx.reference takes no heed of overloads."""
    known = {(one.domain, one.name, one.overload): one for one in functions}
    called: dict[tuple[str, str, str], FunctionProto] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        key = (node.domain, node.op_type, node.overload)
        if key in known and key not in called:
            called[key] = known[key]
            waiting += known[key].node
    return list(called.values())


def _number_type(model: ModelProto) -> int:
    """Return the type of the model's numbers: that of its first output of numbers."""
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16)
    found = (value.type.tensor_type.elem_type for value in model.graph.output)
    return next((kind for kind in found if kind in kinds), TensorProto.FLOAT)


def _compared(what: str, piece: ModelProto, columns: int, *, rounded: bool) -> Check:
    kind = helper.tensor_dtype_to_np_dtype(piece.graph.input[0].type.tensor_type.elem_type)
    x = np.random.default_rng(0).standard_normal((_SAMPLES * _LENGTH, columns)).astype(kind)
    inputs = {piece.graph.input[0].name: x}
    evaluator: Any = ReferenceEvaluator(piece, new_ops=[MatMulNBits])
    (expected,) = evaluator.run(None, inputs)
    (found,) = open_session(piece.SerializeToString()).run(None, inputs)
    error = relative_error(found, expected)
    limit = _ROUNDED_LAYER_WITHIN if rounded or kind == np.float16 else _LAYER_WITHIN
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


def _whole(
    path: Path, description: Description, record: Mapping[str, Any], against: nn.Module | None, tokens: int
) -> Iterator[Check]:
    try:
        session = open_session(str(path / MODEL), record.get("session"))
    except SlimError:
        raise
    except Exception as error:
        yield Check("ONNX Runtime", False, f"cannot load it: {str(error).strip().splitlines()[0]}")
        return
    yield Check("ONNX Runtime", True, f"{import_runtime().__version__} loads it")
    if against is None:
        return
    try:
        if description.cache is not None:
            found: Difference | None = compare_decoder(path, against, tokens=tokens)
        else:
            found = compare_outputs(session, against, tokens=tokens)
    except SlimError:
        raise
    except Exception as error:
        yield Check("outputs", False, str(error).strip().splitlines()[0])
        return
    if found is None:
        yield Check("outputs", True, "not compared, because the model's inputs are nested")
        return
    kind = session.get_outputs()[0].type
    rounded = description.accuracy_level >= _INT8 or "float16" in kind or _rounds_inputs(against)
    if rounded:
        detail = f"ONNX Runtime and PyTorch differ by {found.typical:.1e} (root mean square, relative to the outputs')"
        yield Check("outputs", found.typical <= _ROUNDED_OUTPUTS_WITHIN, detail)
    else:
        detail = f"ONNX Runtime and PyTorch differ by {found.largest:.1e} of the largest output"
        yield Check("outputs", found.largest <= _OUTPUTS_WITHIN, detail)
    if found.tokens is not None:
        detail = f"{found.equal_tokens} of {found.tokens} greedy tokens are PyTorch's"
        yield Check("tokens", rounded or found.equal_tokens == found.tokens, detail)


def _rounds_inputs(model: nn.Module) -> bool:
    """Tell whether a layer rounds its inputs itself, where sums in another order may choose other codes."""
    return any(isinstance(module, SlimLinear) and module.packed.activation is not None for module in model.modules())
