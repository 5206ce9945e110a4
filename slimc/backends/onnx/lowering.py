"""What takes the place of placeholders: the nodes and constants of every matrix of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from slimc.backends.onnx.files import SiteSize
from slimc.backends.onnx.initializers import Initializer, of_tensor
from slimc.backends.onnx.outline import PLACEHOLDER, Outline
from slimc.backends.onnx.siblings import join
from slimc.backends.onnx.weights import MICROSOFT, LoweredLinear, lower_linear
from slimc.errors import InputError
from slimc.passes.solvers.quantization import quantize_absmax
from slimc.runtime.packing import PackedLinear, PackedWeight, pack_weight

_EMBEDDING_GROUPS = {4: (32, 16), 8: (64, 32, 16)}
"""Columns of an embedding that share a scale, for each number of bits, the most first."""


_AS_MANY_NODES = 2
"""How many products without adapters are as many nodes as one of them all and the Split of its result."""


@dataclass
class Filling:
    """Nodes that take the place of placeholders, the constants that they read, and what is worth a note."""

    nodes: list[NodeProto]
    constants: dict[str, Initializer] = field(default_factory=dict)
    functions: list[FunctionProto] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def extend(self, other: Filling) -> None:
        """Take over what ``other`` holds."""
        self.nodes += other.nodes
        self.constants |= other.constants
        self.functions += other.functions
        self.notes += other.notes


Lower = Callable[[Mapping[str, str], str], Filling]
"""Returns what computes layers from one value (its name); for each layer by name, the name of its result."""


def fill(model: ModelProto, lowerings: Mapping[str, Lower]) -> dict[str, Initializer]:
    """Replace each placeholder of ``model`` by what the lowering of its kind returns; return the constants.

    Constants that the trace left in the graph (norms, tables of positions) are taken out of it and returned, too.

    Args:
        model: changed in place.
        lowerings: for each kind of placeholder (``Compressed``, ``Linear``, ``Embedding``).
    """
    constants = {one.name: _kept(one) for one in model.graph.initializer}
    del model.graph.initializer[:]
    nodes: list[NodeProto] = []
    functions = {(one.domain, one.name, one.overload): one for one in model.functions}
    siblings = _siblings(model)
    for node in model.graph.node:
        # Where each node stood in the traced code, which is several times the rest of the graph.
        for told in ("metadata_props", "doc_string"):
            node.ClearField(told)
        if node.domain != PLACEHOLDER:
            nodes.append(node)
            continue
        together = siblings.get((node.op_type, node.input[0]), [])
        if not together or together[0] is not node:
            continue
        layers = {one.attribute[0].s.decode(): one.output[0] for one in together}
        filling = lowerings[node.op_type](layers, node.input[0])
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


def _siblings(model: ModelProto) -> dict[tuple[str, str], list[NodeProto]]:
    """Return the placeholders of each kind and input, in the graph's order."""
    found: dict[tuple[str, str], list[NodeProto]] = {}
    for node in model.graph.node:
        if node.domain == PLACEHOLDER:
            found.setdefault((node.op_type, node.input[0]), []).append(node)
    return found


def _kept(tensor: TensorProto) -> Initializer:
    content = numpy_helper.to_array(tensor).tobytes()
    return Initializer(tensor.data_type, tuple(tensor.dims), lambda: np.frombuffer(content, dtype=np.uint8))


class CompressedMatrices:
    """Compressed layers as `slimc.backends.onnx.weights` lowers them; for ONNX Runtime joined where that pays."""

    def __init__(
        self, outline: Outline, target: str, dtype: torch.dtype, opset: int, *, accuracy_level: int = 0
    ) -> None:
        self._outline = outline
        self._target = target
        self._options: dict[str, Any] = {"dtype": dtype, "opset": opset, "accuracy_level": accuracy_level}
        self.sites: dict[str, SiteSize] = {}

    def linears(self, layers: Mapping[str, str], x: str) -> Filling:
        """Multiply x by the packed weights of all layers, with what belongs to them."""
        if self._target == "ort":
            joined = self._joined(layers, x)
            if joined is not None:
                return joined
        filling = Filling([])
        for layer, result in layers.items():
            alone = self._joined({layer: result}, x) if self._target == "ort" and len(layers) > 1 else None
            filling.extend(alone or self._single(layer, x, result))
        return filling

    def _single(self, layer: str, x: str, result: str) -> Filling:
        module = self._outline.linears[layer]
        packed = module.packed
        lowered = self._lowered(layer, packed, module.bias, x, result)
        self._account(layer, [packed], lowered)
        return lowered

    def _joined(self, layers: Mapping[str, str], x: str) -> Filling | None:
        """Return layers of one input as fewer products, None if `slimc.backends.onnx.siblings` advises against it."""
        modules = [self._outline.linears[layer] for layer in layers]
        if len(layers) == _AS_MANY_NODES and all(module.packed.left is None for module in modules):
            return None
        joined = join([module.packed for module in modules])
        if joined is None:
            return None
        name = joined_name(list(layers))
        wide, product = x, f"{name}.wide"
        filling = Filling([])
        if joined.right is not None:
            inner, wide = f"{name}.t", f"{name}.xt"
            filling.extend(self._lowered(f"{name}.right", PackedLinear(joined.right), None, x, inner))
            filling.nodes.append(helper.make_node("Concat", [x, inner], [wide], name=wide, axis=-1))
        results = [
            result if module.bias is None else f"{layer}.unbiased"
            for (layer, result), module in zip(layers.items(), modules, strict=True)
        ]
        whole = results[0] if len(layers) == 1 else product
        filling.extend(self._lowered(f"{name}.joined", PackedLinear(joined.weight), None, wide, whole))
        if len(layers) > 1:
            # Not among the layer's own constants, since it goes where attention reads the product as it is.
            sizes = f"rows of {name}"
            filling.nodes.append(helper.make_node("Split", [product, sizes], results, name=f"{name}.split", axis=-1))
            filling.constants[sizes] = of_tensor(torch.tensor(joined.rows))
        for (layer, result), module, unbiased in zip(layers.items(), modules, results, strict=True):
            if module.bias is not None:
                filling.nodes.append(
                    helper.make_node("Add", [unbiased, f"{layer}.bias"], [result], name=f"{layer}.add")
                )
                filling.constants[f"{layer}.bias"] = of_tensor(module.bias, self._options["dtype"])
        adapters = ["its adapters are part of its weight"] if joined.right is not None else []
        siblings = ["it is one product with its siblings"] if len(layers) > 1 else []
        filling.notes.append(", and ".join(adapters + siblings))
        form = modules[0].format.weight
        if any(module.format.weight.widths is not None for module in modules):
            filling.notes.append(f"weight: {form.describe()} is stored in codes of {form.bits} bits")
        if form.sparsity is not None:
            filling.notes.append(f"weight: {form.describe()} is stored without its pattern, as {form.bits}-bit codes")
        self._account(name, [module.packed for module in modules], filling)
        return filling

    def _account(self, name: str, layers: Sequence[PackedLinear], filling: Filling) -> None:
        """Note what layers take in the graph; biases, which are not compressed, do not count."""
        sizes = {one: constant.nbytes for one, constant in filling.constants.items() if one.startswith(f"{name}.")}
        biases = sum(size for one, size in sizes.items() if one.removeprefix(f"{name}.").partition(".")[0] == "bias")
        self.sites[name] = SiteSize(
            form=layers[0].format.describe(),
            shape=(sum(one.format.rows for one in layers), layers[0].format.columns),
            bytes=sum(sizes.values()) - biases,
            packed_bytes=sum(one.format.nbytes() for one in layers),
            notes=tuple(dict.fromkeys(filling.notes)),
        )

    def _lowered(self, name: str, packed: PackedLinear, bias: Tensor | None, x: str, result: str) -> Filling:
        lowered = lower_linear(packed, bias, self._target, name, **self._options)
        names = {lowered.input: x, lowered.output: result}
        for node in lowered.nodes:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        return Filling(lowered.nodes, lowered.stored, lowered.functions, lowered.notes)


@dataclass(frozen=True)
class _RoundedTable:
    """An embedding in few bits, as MatMulNBits and GatherBlockQuantized read it.

    Attributes:
        lowered: the table as a linear layer; its last node is the product.
        packed: what it is made of.
    """

    lowered: LoweredLinear
    packed: PackedWeight

    @property
    def product(self) -> NodeProto:
        """The product by the table."""
        return self.lowered.nodes[-1]


class DenseMatrices:
    """Linear layers and embeddings that are not compressed, in the dtype of the export; tied ones are stored once.

    Args:
        outline: of the model.
        dtype: of the export.
        contrib: whether ONNX Runtime's own operators may be used.
        rounded: name of the embedding that is rounded, with what shares its weight; None for none.
        bits: to how many, 4 or 8.
        accuracy_level: of its product.

    Raises:
        InputError: rows of that embedding cannot be cut into groups of 16 or more.
    """

    def __init__(
        self,
        outline: Outline,
        dtype: torch.dtype,
        *,
        contrib: bool,
        rounded: str | None = None,
        bits: int = 8,
        accuracy_level: int = 0,
    ) -> None:
        self._outline = outline
        self._dtype = dtype
        self._contrib = contrib
        self._rounded_name = rounded
        self._rounded = None
        if rounded is not None:
            weight = outline.embeddings[rounded].weight
            self._rounded = _rounded_table(rounded, weight, bits, dtype, accuracy_level)
        self._tables = {_storage(module.weight): name for name, module in outline.embeddings.items()}

    def embeddings(self, layers: Mapping[str, str], ids: str) -> Filling:
        """Look rows up."""
        return _one_by_one(self._embedding, layers, ids)

    def linears(self, layers: Mapping[str, str], x: str) -> Filling:
        """Multiply by the weights, and add the biases."""
        return _one_by_one(self._linear, layers, x)

    def _embedding(self, layer: str, ids: str, result: str) -> Filling:
        table = self._table(layer)
        if self._rounded is not None and layer == self._rounded_name:
            return self._rounded_rows(layer, self._rounded, ids, result)
        node = helper.make_node("Gather", [table, ids], [result], name=layer)
        return Filling([node], {table: of_tensor(self._outline.embeddings[layer].weight, self._dtype)})

    def _linear(self, layer: str, x: str, result: str) -> Filling:
        module = self._outline.dense[layer]
        bias: Tensor | None = module.bias
        product = result if bias is None else f"{layer}.product"
        filling = self._product(layer, module, x, product)
        if bias is not None:
            filling.nodes.append(helper.make_node("Add", [product, f"{layer}.bias"], [result], name=f"{layer}.add"))
            filling.constants[f"{layer}.bias"] = of_tensor(bias, self._dtype)
        return filling

    def _product(self, layer: str, module: nn.Linear, x: str, product: str) -> Filling:
        owner = self._tables.get(_storage(module.weight))
        if owner is None:
            weight = f"{layer}.weight"
            node = helper.make_node("MatMul", [x, weight], [product], name=layer)
            return Filling([node], {weight: of_tensor(module.weight, self._dtype, transposed=True)})
        if self._rounded is not None and owner == self._rounded_name:
            node = NodeProto()
            node.CopyFrom(self._rounded.product)
            node.input[0], node.output[0] = x, product
            return Filling([node])
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

    def _rounded_rows(self, layer: str, table: _RoundedTable, ids: str, result: str) -> Filling:
        """Look rows up in the constants of the product, whose blocks are an axis of their own."""
        codes, scale = table.product.input[1:3]
        form = table.packed.format
        axis, shape = f"{layer}.axis", f"{layer}.shape"
        rows = helper.make_node(
            "GatherBlockQuantized",
            [codes, ids, f"{layer}.scales"],
            [f"{layer}.blocks"],
            domain=MICROSOFT,
            name=layer,
            bits=form.bits,
            block_size=form.group,
            gather_axis=0,
            quantize_axis=2,
        )
        nodes = [
            *table.lowered.nodes[:-1],
            helper.make_node("Unsqueeze", [scale, axis], [f"{layer}.scales"], name=f"{layer}.scales"),
            rows,
            helper.make_node("Reshape", [f"{layer}.blocks", shape], [result], name=f"{layer}.rows"),
        ]
        constants = {axis: of_tensor(torch.tensor([2])), shape: of_tensor(torch.tensor([0, 0, -1]))}
        return Filling(nodes, table.lowered.stored | constants)

    def _table(self, layer: str) -> str:
        """Return the name of the constant that holds an embedding: that of the first layer with this storage."""
        owner = self._tables[_storage(self._outline.embeddings[layer].weight)]
        return f"{owner}.weight"


def round_embedding(name: str, weight: Tensor, bits: int) -> PackedWeight:
    """Return an embedding in 4 or 8 bits, with a scale of 16 bits for every 32 or 64 columns if those divide it.

    Raises:
        InputError: rows cannot be cut into groups of 16 or more.
    """
    group = next((size for size in _EMBEDDING_GROUPS[bits] if weight.shape[1] % size == 0), None)
    if group is None:
        raise InputError(
            f"{name} has {weight.shape[1]} columns, no multiple of 16, so ONNX Runtime cannot hold it in {bits} bits; "
            "export without rounding it"
        )
    found = quantize_absmax(weight.detach().to("cpu"), bits, group, scale_dtype=torch.float16)
    return pack_weight(found.codes, bits=bits, scale=found.scale, group=group)


def _rounded_table(name: str, weight: Tensor, bits: int, dtype: torch.dtype, accuracy_level: int) -> _RoundedTable:
    packed = round_embedding(name, weight, bits)
    lowered = lower_linear(PackedLinear(packed), None, "ort", name, dtype=dtype, accuracy_level=accuracy_level)
    return _RoundedTable(lowered, packed)


def _storage(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


def joined_name(layers: Sequence[str]) -> str:
    """Return a name for layers of one parent: ``model.layers.0.self_attn.q_proj+k_proj+v_proj``."""
    return "+".join([layers[0], *(name.rpartition(".")[2] for name in layers[1:])])


def _one_by_one(lower: Callable[[str, str, str], Filling], layers: Mapping[str, str], x: str) -> Filling:
    filling = Filling([])
    for layer, result in layers.items():
        filling.extend(lower(layer, x, result))
    return filling
