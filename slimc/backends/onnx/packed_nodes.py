"""Puts the lowered forms of slimc's operators in the place of the nodes that the exporter left for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, helper
from torch import Tensor

from slimc.backends.onnx.description import Description
from slimc.backends.onnx.files import OnnxGraph, site_sizes
from slimc.backends.onnx.functions import DOMAIN, low_rank_function, round_activations_function, round_nodes
from slimc.backends.onnx.initializers import Initializer
from slimc.backends.onnx.narrowing import names_read, narrow, tensor_of
from slimc.backends.onnx.translation import PACKED
from slimc.backends.onnx.weights import CALLING, LoweredLinear, lower_linear, lower_signs, lower_weight
from slimc.errors import CaptureError
from slimc.runtime.activations import ACTIVATION_NAMES
from slimc.runtime.decode import unpack_mask
from slimc.runtime.formats import NM, BinaryFormat, LinearFormat, Sparsity, Unstructured, WeightFormat
from slimc.runtime.ops import LINEAR_TENSORS, OPS
from slimc.runtime.packing import PackedBinary, PackedLinear, PackedWeight

__all__ = ["lower"]


def lower(
    model: ModelProto,
    stored: Mapping[str, Initializer],
    target: str,
    dtype: torch.dtype,
    *,
    formats: Mapping[str, LinearFormat] | None = None,
    accuracy_level: int = 0,
) -> OnnxGraph:
    """Lower every operator of slimc in a model that `slimc.backends.onnx.translation.to_onnx` made.

    Other constants that 16 bits hold exactly are stored in 16, and widened when the model is loaded (not for
    ``"dense"``, whose reader looks at them itself).

    Args:
        model: the model.
        stored: its constants.
        target: one of `slimc.backends.onnx.weights.TARGETS`.
        dtype: what the model computes in.
        formats: of the layers by name, as they were before they were brought to ``dtype``; for the sizes.
        accuracy_level: see `slimc.backends.onnx.weights.lower_linear`.

    Raises:
        CaptureError: an operator reads packed tensors that are not constants.
    """
    whole, model = model, ModelProto()
    model.CopyFrom(whole)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    lowering = _Lowering(stored, target, dtype, opset, accuracy_level, dict(formats or {}))
    lowering.lower_graph(model.graph)
    lowering.drop_unused(model.graph)
    if dtype == torch.float32 and target != "dense":
        lowering.kept = narrow(model.graph, lowering.kept, apart_from=lowering.notes)
    del model.opset_import[:]
    domains = {"": opset} | lowering.domains
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in domains.items())
    model.functions.extend(lowering.functions.values())
    model.ir_version = helper.find_min_ir_version_for([helper.make_opsetid("", opset)])
    description = Description(
        target=target,
        opset=opset,
        inputs=tuple(value.name for value in model.graph.input),
        outputs=tuple(value.name for value in model.graph.output),
        accuracy_level=accuracy_level if target == "ort" else 0,
    )
    return OnnxGraph(model, lowering.kept, description, site_sizes(lowering.formats, lowering.kept, lowering.notes))


@dataclass
class _Lowering:
    """A model while it is being lowered.

    Attributes:
        stored: constants of the model as it came.
        kept: constants of the model as it will be.
        functions: what its nodes call, by domain, name and overload.
        transposed: for a decoded weight [rows, columns] the name of the same as [columns, rows].
    """

    stored: Mapping[str, Initializer]
    target: str
    dtype: torch.dtype
    opset: int
    accuracy_level: int
    formats: dict[str, LinearFormat]
    kept: dict[str, Initializer] = field(init=False)
    functions: dict[tuple[str, str], FunctionProto] = field(default_factory=dict)
    domains: dict[str, int] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    transposed: dict[str, str] = field(default_factory=dict)
    _uses: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept = dict(self.stored)

    def lower_graph(self, graph: GraphProto) -> None:
        """Replace the packed nodes of a graph and of those inside its nodes."""
        nodes: list[NodeProto] = []
        renamed: dict[str, str] = {}
        for node in graph.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            for attribute in node.attribute:
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    self.lower_graph(inner)
            if node.domain == PACKED:
                nodes += self._lowered(node)
            elif node.op_type == "Transpose" and node.input[0] in self.transposed:
                renamed[node.output[0]] = self.transposed[node.input[0]]
            else:
                self._read_transposed(node)
                nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)

    def _read_transposed(self, node: NodeProto) -> None:
        """Let a Gemm that transposes a decoded weight read it as it is held."""
        if node.op_type == "Gemm" and node.input[1] in self.transposed:
            for attribute in node.attribute:
                if attribute.name == "transB" and attribute.i:
                    attribute.i = 0
                    node.input[1] = self.transposed[node.input[1]]

    def _lowered(self, node: NodeProto) -> list[NodeProto]:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        widths = tuple(width for attribute in node.attribute if attribute.name == "widths" for width in attribute.ints)
        names = [name.rstrip("?") for name in OPS[f"slim::{node.op_type}"].inputs]
        inputs = {name: value for name, value in zip(names, node.input, strict=False) if value}
        output = node.output[0]
        if node.op_type == "linear":
            return self._linear(inputs, attributes, widths, output)
        if node.op_type == "sign_low_rank":
            return self._sign_low_rank(inputs, output)
        if node.op_type == "low_rank":
            return self._low_rank(inputs, output)
        if node.op_type == "round_activations":
            return self._round(inputs["x"], ACTIVATION_NAMES[attributes["activation"]], output)
        return self._weight(inputs, attributes, widths, output)

    def _linear(
        self, inputs: dict[str, str], attributes: dict[str, int], widths: tuple[int, ...], output: str
    ) -> list[NodeProto]:
        tensors = {name: self._tensor(inputs[name]) for name in LINEAR_TENSORS if name in inputs}
        name = inputs["values"].removesuffix(".values").removesuffix("_values")
        packed = PackedLinear.from_tensors(_linear_format(tensors, attributes, widths), tensors)
        bias = self._tensor(inputs["bias"]) if "bias" in inputs else None
        self.formats.setdefault(name, packed.format)
        lowered = lower_linear(packed, bias, self.target, self._next_call(name), **self._options())
        return self._called(lowered, name, name, inputs["x"], output)

    def _options(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "opset": self.opset, "accuracy_level": self.accuracy_level}

    def _next_call(self, name: str) -> str:
        """Return how this call of a layer is named: the first as the layer itself."""
        count = self._uses[name] = self._uses.get(name, 0) + 1
        return name if count == 1 else f"{name}.call_{count}"

    def _called(self, lowered: LoweredLinear, name: str, layer: str, x: str, output: str) -> list[NodeProto]:
        """Set a call in; the constants are stored, and noted at ``layer``, once for all calls of ``name``."""
        renamed = {lowered.input: x, lowered.output: output}
        if lowered.name != name:
            renamed |= _constants_of_first_call(lowered, name)
        else:
            self.kept |= lowered.stored
            self.notes.setdefault(layer, []).extend(lowered.notes)
        return self._adopted(lowered, renamed)

    def _weight(
        self, inputs: dict[str, str], attributes: dict[str, int], widths: tuple[int, ...], output: str
    ) -> list[NodeProto]:
        tensors = {name: self._tensor(value) for name, value in inputs.items()}
        packed = PackedWeight.from_tensors(_weight_format(tensors, attributes, widths), tensors)
        name = inputs["values"].removesuffix("values").rstrip("._")
        lowered = lower_weight(packed, self.target, name, dtype=self.dtype, opset=self.opset)
        self.kept |= lowered.stored
        self.notes.setdefault(name, []).extend(lowered.notes)
        self.transposed[output] = lowered.output
        return [*self._adopted(lowered, {}), helper.make_node("Transpose", [lowered.output], [output], perm=[1, 0])]

    def _sign_low_rank(self, inputs: dict[str, str], output: str) -> list[NodeProto]:
        binary = PackedBinary(*(self._tensor(inputs[name]) for name in ("signs", "left", "right")))
        layer = inputs["signs"].removesuffix("signs").rstrip("._")
        name = f"{layer}.sign_low_rank"
        lowered = lower_signs(binary, self.target, self._next_call(name), **self._options())
        return self._called(lowered, name, layer, inputs["x"], output)

    def _low_rank(self, inputs: dict[str, str], output: str) -> list[NodeProto]:
        nodes: list[NodeProto] = []

        def held(factor: str) -> str:
            """Return the factor transposed, the way MatMul reads it."""
            if factor not in self.transposed:
                self.transposed[factor] = f"{factor}.transposed"
                nodes.append(helper.make_node("Transpose", [factor], [f"{factor}.transposed"], perm=[1, 0]))
            return self.transposed[factor]

        x, left, right = inputs["x"], held(inputs["left"]), held(inputs["right"])
        if self.target in CALLING:
            return [*nodes, self._call(low_rank_function(self.opset), [x, left, right], output)]
        inner = f"{output}.inner"
        return [
            *nodes,
            helper.make_node("MatMul", [x, right], [inner]),
            helper.make_node("MatMul", [inner, left], [output]),
        ]

    def _round(self, x: str, kind: str, output: str) -> list[NodeProto]:
        if self.target in CALLING:
            return [self._call(round_activations_function(kind, self.opset), [x], output)]
        return round_nodes(x, output, kind, f"{output}.")

    def _call(self, function: FunctionProto, inputs: list[str], output: str) -> NodeProto:
        self._need(function)
        node = helper.make_node(function.name, inputs, [output], domain=DOMAIN)
        node.overload = function.overload
        return node

    def _need(self, function: FunctionProto) -> None:
        self.functions.setdefault((function.name, function.overload), function)
        self.domains[DOMAIN] = 1

    def _adopted(self, lowered: LoweredLinear, renamed: Mapping[str, str]) -> list[NodeProto]:
        self.domains |= lowered.domains
        for function in lowered.functions:
            self._need(function)
        for node in lowered.nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
        return lowered.nodes

    def _tensor(self, name: str) -> Tensor:
        """Return a constant as a tensor.

        Raises:
            CaptureError: it is computed by the model.
        """
        if name not in self.stored:
            raise CaptureError(f"the packed tensor '{name}' is computed by the model; only constants can be exported")
        return tensor_of(self.stored[name])

    def drop_unused(self, graph: GraphProto) -> None:
        """Drop constants and transpositions that nothing reads any more."""
        needed = names_read(graph)
        spare = [node for node in graph.node if node.op_type == "Transpose" and node.output[0] not in needed]
        for node in spare:
            graph.node.remove(node)
        needed = names_read(graph) - {name for node in graph.node for name in node.output}
        self.kept = {name: constant for name, constant in self.kept.items() if name in needed}


def _weight_format(
    tensors: Mapping[str, Tensor], attributes: Mapping[str, int], widths: tuple[int, ...] = ()
) -> WeightFormat:
    """Return the format of a weight from its tensors and from the attributes of its operator."""
    values, pattern, scale = tensors["values"], tensors.get("pattern"), tensors.get("scale")
    bits, group, m = attributes["bits"], attributes["group"], attributes.get("m", 0)
    sparsity: Sparsity = None
    nonzeros = None
    if pattern is not None and m:
        sparsity = NM(attributes["n"], m)
    elif pattern is not None:
        sparsity, nonzeros = Unstructured(), int(unpack_mask(pattern, attributes["columns"]).sum())
    return WeightFormat(
        rows=(values if pattern is None else pattern).shape[0],
        columns=attributes["columns"],
        bits=bits or None,
        group=group or None,
        per_tensor=scale is not None and scale.numel() == 1 and not group,
        asymmetric="zero_point" in tensors,
        sparsity=sparsity,
        nonzeros=nonzeros,
        dtype=(values if scale is None else scale).dtype,
        widths=widths or None,
    )


def _linear_format(
    tensors: Mapping[str, Tensor], attributes: Mapping[str, int], widths: tuple[int, ...]
) -> LinearFormat:
    def factor(side: str, columns: int) -> WeightFormat | None:
        parts = {name.removeprefix(side): part for name, part in tensors.items() if name.startswith(side)}
        sizes = {"bits": attributes[f"{side}bits"], "group": attributes[f"{side}group"], "columns": columns}
        return _weight_format(parts, sizes) if parts else None

    weight = _weight_format(tensors, attributes, widths)
    binary = None
    if "signs" in tensors:
        left = tensors["sign_left"]
        binary = BinaryFormat(weight.rows, weight.columns, left.shape[1], left.dtype)
    return LinearFormat(
        weight,
        factor("left_", attributes["rank"]),
        factor("right_", attributes["columns"]),
        "input_scale" in tensors,
        ACTIVATION_NAMES.get(attributes["activation"]),
        binary,
    )


def _constants_of_first_call(lowered: LoweredLinear, name: str) -> dict[str, str]:
    """Return new names for a layer that is called again: it has values of its own, but the constants of ``name``."""
    return {again: name + again.removeprefix(lowered.name) for again in lowered.stored}
