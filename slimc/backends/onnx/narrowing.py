"""Stores numbers in 16 bits where those hold them exactly: the weights of a bfloat16 model in a graph of float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from onnx import GraphProto, NodeProto, TensorProto, helper
from torch import Tensor

from slimc.backends.onnx.initializers import DATA_TYPES, Initializer, of_tensor
from slimc.backends.onnx.weights import narrowest

__all__ = ["names_read", "narrow", "tensor_of"]

_WORTH_A_CAST = 4096
"""Elements below which a constant is not worth a node that widens it."""

_TYPES = {number: dtype for dtype, number in DATA_TYPES.items()}


def narrow(
    graph: GraphProto, stored: Mapping[str, Initializer], *, apart_from: Iterable[str] = ()
) -> dict[str, Initializer]:
    """Store constants of float32 in 16 bits where that is exact, and widen them when the model is loaded.

    Of a table whose rows are looked up only those rows are widened.

    Args:
        graph: changed in place.
        stored: its constants.
        apart_from: names of layers whose constants stay.

    Returns:
        The constants as they are then.
    """
    layers = tuple(f"{name}." for name in apart_from)
    kept: dict[str, Initializer] = {}
    casts: list[NodeProto] = []
    for name, constant in stored.items():
        elements = constant.nbytes // 4
        if constant.data_type != TensorProto.FLOAT or elements < _WORTH_A_CAST or name.startswith(layers):
            kept[name] = constant
            continue
        dtype = narrowest(tensor_of(constant))
        if dtype == torch.float32:
            kept[name] = constant
            continue
        kept[f"{name}.narrow"] = _cast(constant, dtype)
        _widen_rows(graph, name, f"{name}.narrow")
        if name in names_read(graph):
            casts.append(helper.make_node("Cast", [f"{name}.narrow"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return kept


def tensor_of(constant: Initializer) -> Tensor:
    """Return a constant as a tensor, without a copy if its content can be written to."""
    content = constant.content()
    flat = torch.from_numpy(content if content.flags.writeable else content.copy())
    return flat.view(_TYPES[constant.data_type]).reshape(constant.dims)


def names_read(graph: GraphProto) -> set[str]:
    """Return the names that a graph, and those inside its nodes, reads or returns."""
    names = {value.name for value in graph.output}
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                names |= names_read(inner)
    return names


def _cast(constant: Initializer, dtype: torch.dtype) -> Initializer:
    return Initializer(DATA_TYPES[dtype], constant.dims, lambda: of_tensor(tensor_of(constant), dtype).make())


def _widen_rows(graph: GraphProto, name: str, narrow: str) -> None:
    """Let those who look rows up (embeddings) widen the rows alone."""
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Gather" and node.input[0] == name:
            output = node.output[0]
            node.input[0], node.output[0] = narrow, f"{output}.narrow"
            nodes.append(helper.make_node("Cast", [f"{output}.narrow"], [output], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
