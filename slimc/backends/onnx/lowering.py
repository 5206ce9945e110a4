"""What takes the place of placeholders: the nodes and constants of every matrix of a decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import FunctionProto, ModelProto, NodeProto, helper
from torch import Tensor, nn

from slimc.backends.onnx.initializers import Initializer, of_tensor
from slimc.backends.onnx.outline import PLACEHOLDER, Outline
from slimc.backends.onnx.weights import MICROSOFT, lower_linear

@dataclass
class Filling:
    """Nodes that take the place of one placeholder, and the constants that they read."""

    nodes: list[NodeProto]
    constants: dict[str, Initializer] = field(default_factory=dict)
    functions: list[FunctionProto] = field(default_factory=list)


Lower = Callable[[str, str, str], Filling]
"""Returns what computes the layer of a name (first argument) from one value into another (their names)."""


def fill(model: ModelProto, lowerings: dict[str, Lower]) -> dict[str, Initializer]:
    """Replace each placeholder of ``model`` by what the lowering of its kind returns; return the constants.

    Args:
        model: changed in place.
        lowerings: for each kind of placeholder (``Compressed``, ``Linear``, ``Embedding``).
    """
    constants: dict[str, Initializer] = {}
    nodes: list[NodeProto] = []
    functions = {(one.domain, one.name, one.overload): one for one in model.functions}
    for node in model.graph.node:
        if node.domain != PLACEHOLDER:
            nodes.append(node)
            continue
        layer = node.attribute[0].s.decode()
        filling = lowerings[node.op_type](layer, node.input[0], node.output[0])
        nodes += filling.nodes
        constants |= filling.constants
        functions |= {(one.domain, one.name, one.overload): one for one in filling.functions}
    del model.graph.node[:], model.functions[:]
    model.graph.node.extend(nodes)
    model.functions.extend(functions.values())
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    domains = {node.domain for node in nodes} - {""}
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", opset))
    model.opset_import.extend(helper.make_opsetid(domain, 1) for domain in sorted(domains))
    return constants


class CompressedMatrices:
    """Compressed layers as `slimc.backends.onnx.weights` lowers them."""

    def __init__(
        self, outline: Outline, target: str, dtype: torch.dtype, opset: int, *, accuracy_level: int = 0
    ) -> None:
        self._outline = outline
        self._target = target
        self._options: dict[str, Any] = {"dtype": dtype, "opset": opset, "accuracy_level": accuracy_level}
        self.notes: dict[str, list[str]] = {}

    def linear(self, layer: str, x: str, result: str) -> Filling:
        """Multiply by the packed weight, with what belongs to it."""
        module = self._outline.linears[layer]
        lowered = lower_linear(module.packed, module.bias, self._target, layer, **self._options)
        if lowered.notes:
            self.notes[layer] = lowered.notes
        names = {lowered.input: x, lowered.output: result}
        for node in lowered.nodes:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        return Filling(lowered.nodes, lowered.stored, lowered.functions)


class DenseMatrices:
    """Linear layers and embeddings that are not compressed, in the dtype of the export; tied ones are stored once."""

    def __init__(self, outline: Outline, dtype: torch.dtype, *, contrib: bool) -> None:
        self._outline = outline
        self._dtype = dtype
        self._contrib = contrib
        self._tables = {_storage(module.weight): name for name, module in outline.embeddings.items()}

    def embedding(self, layer: str, ids: str, result: str) -> Filling:
        """Look rows up."""
        table = self._table(layer)
        node = helper.make_node("Gather", [table, ids], [result], name=layer)
        return Filling([node], {table: of_tensor(self._outline.embeddings[layer].weight, self._dtype)})

    def linear(self, layer: str, x: str, result: str) -> Filling:
        """Multiply by the weight, and add the bias."""
        module = self._outline.dense[layer]
        product = result if module.bias is None else f"{layer}.product"
        filling = self._product(layer, module, x, product)
        if module.bias is not None:
            filling.nodes.append(helper.make_node("Add", [product, f"{layer}.bias"], [result], name=f"{layer}.add"))
            filling.constants[f"{layer}.bias"] = of_tensor(module.bias, self._dtype)
        return filling

    def _product(self, layer: str, module: nn.Linear, x: str, product: str) -> Filling:
        owner = self._tables.get(_storage(module.weight))
        if owner is None:
            weight = f"{layer}.weight"
            node = helper.make_node("MatMul", [x, weight], [product], name=layer)
            return Filling([node], {weight: of_tensor(module.weight, self._dtype, transposed=True)})
        table = self._table(owner)
        constants = {table: of_tensor(module.weight, self._dtype)}
        if self._contrib:
            node = helper.make_node("FusedMatMul", [x, table], [product], name=layer, domain=MICROSOFT, transB=1)
            return Filling([node], constants)
        turned = f"{table}.transposed"
        return Filling(
            [
                helper.make_node("Transpose", [table], [turned], name=turned, perm=[1, 0]),
                helper.make_node("MatMul", [x, turned], [product], name=layer),
            ],
            constants,
        )

    def _table(self, layer: str) -> str:
        """Return the name of the constant that holds an embedding: that of the first layer with this storage."""
        owner = self._tables[_storage(self._outline.embeddings[layer].weight)]
        return f"{owner}.weight"


def _storage(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)
