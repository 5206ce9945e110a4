"""From an exported program to ONNX by PyTorch's exporter, with the operators of slimc left as they are.

The exporter inlines functions that a translation returns, so an operator becomes a node of a domain of its own,
``slim.packed``, with the canonical packed tensors as inputs; `slimc.backends.onnx.packed_nodes` puts its lowered form
in its place afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxscript
import torch
from onnx import ModelProto, defs
from onnx.defs import OpSchema
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants_ir

from slimc.backends.onnx.initializers import DATA_TYPES, Initializer, of_tensor
from slimc.backends.onnx.tracing import PREFIX, Traced, quiet
from slimc.errors import CaptureError
from slimc.runtime.ops import OPS, Op

__all__ = ["PACKED", "simplify", "to_onnx"]

PACKED = "slim.packed"
"""The domain of operators that are yet to be lowered."""

_NUMBERS = [f"tensor({name})" for name in ("float", "float16", "bfloat16", "double")]


def to_onnx(traced: Traced, opset: int) -> tuple[ModelProto, dict[str, Initializer]]:
    """Translate a traced program; return the model without its constants, and these by name.

    Names are those of the model's own tensors. Where the program came from is not in the result.

    Raises:
        CaptureError: PyTorch's exporter does not know an operator of the program, or fails.
    """
    with torch.no_grad(), quiet():
        try:
            exported = torch.onnx.export(
                traced.program,
                (),
                dynamo=True,
                custom_translation_table=_translations(),
                opset_version=opset,
                input_names=list(traced.inputs),
                output_names=list(traced.outputs),
                optimize=False,
                verbose=False,
            )
            if exported is None:
                raise CaptureError("PyTorch's ONNX exporter returned nothing")
            simplify(exported.model)
        except CaptureError:
            raise
        except Exception as error:
            reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise CaptureError(
                f"PyTorch's ONNX exporter cannot translate the model: {reason[0]}. Another opset or another version of "
                "torch and onnxscript may know more operators."
            ) from error
    model, stored = _without_constants(exported.model)
    _forget_origin(model)
    _name_sizes(model)
    return model, stored


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    return {getattr(torch.ops.slim, op.name.partition("::")[2]).default: _translation(op) for op in OPS.values()}


def _translation(op: Op) -> Callable[..., Any]:
    name = op.name.partition("::")[2]
    node = onnxscript.values.Op(onnxscript.values.Opset(PACKED, 1), name, _schema(name, op))

    def translate(*inputs: Any, **attributes: int | list[int]) -> Any:
        return node(*inputs, **attributes)

    return translate


def _schema(name: str, op: Op) -> OpSchema:
    """Describe an operator to the exporter, which gives the result the type of the first input or of the scales."""

    def parameter(spelled: str) -> OpSchema.FormalParameter:
        options = OpSchema.FormalParameterOption
        option = options.Optional if spelled.endswith("?") else options.Single
        plain = spelled.rstrip("?")
        # One variable for each input: their types are checked by slimc's own operators.
        return OpSchema.FormalParameter(plain, f"T_{plain}", param_option=option)

    def attribute(spelled: str) -> OpSchema.Attribute:
        kinds = OpSchema.AttrType
        if spelled.endswith("[]"):
            return OpSchema.Attribute(spelled.removesuffix("[]"), kinds.INTS, "", required=False)
        return OpSchema.Attribute(spelled, kinds.INT, "")

    carrier = "x" if "x" in op.inputs else "scale" if "scale?" in op.inputs or "scale" in op.inputs else "values"
    plain = [spelled.rstrip("?") for spelled in op.inputs]
    return defs.OpSchema(
        name,
        PACKED,
        1,
        inputs=[parameter(spelled) for spelled in op.inputs],
        outputs=[OpSchema.FormalParameter("y", f"T_{carrier}")],
        type_constraints=[(f"T_{one}", [*_NUMBERS, "tensor(uint8)"], "") for one in plain],
        attributes=[attribute(spelled) for spelled in op.attributes],
    )


def simplify(model: onnx_ir.Model) -> None:
    """Fold what does not depend on the inputs, and drop what nobody reads.

    The exporter's own optimiser also tries some eighty patterns at every node, which takes longer than all else
    together and finds nothing that runtimes would not find when they load the model.
    """
    fold_constants_ir(model, onnx_shape_inference=True)
    for one in (
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        one(model)


def _without_constants(model: onnx_ir.Model) -> tuple[ModelProto, dict[str, Initializer]]:
    """Serialise a model without its constants, which stay where PyTorch has them until they are written."""
    stored = {}
    for name, value in model.graph.initializers.items():
        constant = value.const_value
        if constant is None:
            raise CaptureError(f"PyTorch's ONNX exporter left the constant {name} without a value")
        stored[name.removeprefix(PREFIX)] = initializer = _initializer(constant)
        value.const_value = onnx_ir.ExternalTensor(
            "", 0, initializer.nbytes, constant.dtype, shape=onnx_ir.Shape(initializer.dims), name=name
        )
    proto: ModelProto = onnx_ir.to_proto(model)
    del proto.graph.initializer[:]
    for node in _all_nodes(proto.graph):
        for names in (node.input, node.output):
            names[:] = [name.removeprefix(PREFIX) for name in names]
    return proto, stored


def _initializer(constant: onnx_ir.TensorProtocol) -> Initializer:
    """Return a constant of the exporter's; a tensor of PyTorch's is not copied."""
    raw = getattr(constant, "raw", None)
    if isinstance(raw, torch.Tensor) and DATA_TYPES.get(raw.dtype) == int(constant.dtype):
        return of_tensor(raw)
    dims = tuple(int(size) for size in constant.shape.numpy())
    return Initializer(int(constant.dtype), dims, lambda: np.frombuffer(constant.tobytes(), dtype=np.uint8))


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes of a graph and of all graphs inside its nodes."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found += _all_nodes(inner)
    return found


def _forget_origin(model: ModelProto) -> None:
    """Remove traces of this machine and of the exporter: stack traces, and what each node was."""
    model.ClearField("doc_string")
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    model.graph.name = "model"
    model.producer_name, model.producer_version = "slimc", ""
    for node in _all_nodes(model.graph):
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]


def _name_sizes(model: ModelProto) -> None:
    """Call the open sizes of inputs ``batch`` and ``length``, or by their input and axis, not ``s10`` and ``s21``."""
    usual: Mapping[int, str] = {0: "batch", 1: "length"}
    names: dict[str, str] = {}
    for value in model.graph.input:
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if size.dim_param and size.dim_param not in names:
                name = usual.get(axis, f"{value.name}_{axis}")
                names[size.dim_param] = f"{value.name}_{axis}" if name in names.values() else name
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), size.dim_param)
