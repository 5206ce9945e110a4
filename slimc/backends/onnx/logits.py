"""Which logits a decoder computes: by default those of every token that it reads, or of the last ones only.

Of a prompt only the last token's logits are needed, and in a small model the product by the output embedding is a
large part of reading one. So what goes into that product passes a Slice whose start is an input of the graph. It is 0
by default, so that callers who know nothing of it get all logits.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from slimc.backends.onnx.description import FIRST_LOGITS
from slimc.backends.onnx.outline import PLACEHOLDER

__all__ = ["let_logits_begin_later"]

_NUMBER_BY_NUMBER = {"Cast", "Div", "Mul", "Tanh"}
"""What may follow the output embedding: scales and softcaps."""


def let_logits_begin_later(model: ir.Model, layer: str | None) -> bool:
    """Add the input `FIRST_LOGITS` to a decoder; return whether that can be.

    Args:
        model: traced, with placeholders; its first output is the logits. Changed in place.
        layer: the name of the output embedding, None if there is none.
    """
    graph = model.graph
    named = [node for node in graph if node.domain == PLACEHOLDER and node.attributes.get_string("layer") == layer]
    if len(named) != 1 or not _leads_to(named[0].outputs[0], graph.outputs[0]):
        return False
    (product,) = named
    states = product.inputs[0]
    if states is None or states.shape is None or len(states.shape) != 3:
        return False
    first, last, axis = (
        ir.Value(name=name, const_value=ir.tensor(np.array([number], dtype=np.int64)))
        for name, number in (
            (FIRST_LOGITS, 0),
            (f"{FIRST_LOGITS}.end", np.iinfo(np.int64).max),
            (f"{FIRST_LOGITS}.axis", 1),
        )
    )
    for value in (first, last, axis):
        value.dtype, value.shape = ir.DataType.INT64, ir.Shape([1])
        graph.register_initializer(value)
    graph.inputs.append(first)
    kept = ir.node("Slice", [states, first, last, axis], name=f"{FIRST_LOGITS}.kept")
    kept.outputs[0].type, kept.outputs[0].shape = states.type, ir.Shape([states.shape[0], "kept", states.shape[2]])
    graph.insert_before(product, kept)
    product.replace_input_with(0, kept.outputs[0])
    return True


def _leads_to(value: ir.Value, output: ir.Value) -> bool:
    """Tell whether ``output`` is ``value``, or computed from it and constants alone, number by number."""
    while value is not output:
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            return False
        node = uses[0].node
        others = [one for one in node.inputs if one is not value]
        if node.op_type not in _NUMBER_BY_NUMBER or any(one is None or one.const_value is None for one in others):
            return False
        value = node.outputs[0]
    return True
