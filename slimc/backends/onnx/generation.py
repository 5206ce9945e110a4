"""A causal language model with its cache as an ONNX graph: traced, fused, and filled with its weights."""

from __future__ import annotations

from typing import Any

import onnx_ir
import torch
from onnx import ModelProto, TensorProto, helper
from torch import nn

from slimc.backends.onnx.decoder import CacheGeometry, trace_decoder
from slimc.backends.onnx.description import CacheLayout, Description
from slimc.backends.onnx.exporters import check_exporter
from slimc.backends.onnx.files import OnnxGraph
from slimc.backends.onnx.fusions import fuse_for_onnxruntime, keep_rotations_apart, pack_projections
from slimc.backends.onnx.initializers import DATA_TYPES
from slimc.backends.onnx.logits import let_logits_begin_later
from slimc.backends.onnx.lowering import CompressedMatrices, DenseMatrices, fill
from slimc.backends.onnx.narrowing import narrow
from slimc.backends.onnx.weights import CONTRIB, check_options, opset_of
from slimc.errors import InputError
from slimc.runtime.modules import SlimLinear
from slimc.runtime.positions import positions_of

__all__ = ["decoder_graph"]


def decoder_graph(
    model: nn.Module,
    *,
    target: str = "portable",
    dtype: torch.dtype = torch.float32,
    opset: int | None = None,
    accuracy_level: int = 0,
    embedding_bits: int | None = None,
    exporter: str = "auto",
) -> OnnxGraph:
    """Return a causal language model of transformers as a graph that reads prompts and single tokens alike.

    Args:
        model: compressed or dense; left as it is.
        target: ``portable`` (standard operators, and functions of them), ``ort`` (ONNX Runtime's own operators),
            ``cuda`` (those, but for the layers, which are for a library of kernels) or ``dense`` (decoded weights).
        dtype: what the graph computes in, float32 or float16.
        opset: of the standard operators; None is the lowest that will do.
        accuracy_level: of MatMulNBits, see `slimc.backends.onnx.weights.lower_linear`.
        embedding_bits: 4 or 8 round the embedding of tokens, and the output embedding if it is the same weight; for
            ``ort`` and ``cuda`` only. None leaves them in ``dtype``.
        exporter: who traces the model, one of `slimc.backends.onnx.exporters.EXPORTERS`.

    Raises:
        InputError: the model cannot be exported with a cache, or an option is not known.
        CaptureError: it cannot be traced.
    """
    check_options(target, dtype, opset, accuracy_level)
    check_exporter(exporter)
    packed = [module.packed for module in model.modules() if isinstance(module, SlimLinear)]
    version = opset or opset_of(packed, target)
    contrib = target in CONTRIB
    rounded = _embedding_to_round(model, target, embedding_bits)
    decoder = trace_decoder(model, fused=contrib, dtype=dtype, opset=version, exporter=exporter)
    let_logits_begin_later(decoder.program.model, _output_embedding(model))
    positions = positions_of(model)
    if contrib:
        rows = _most_positions(model)
        if fuse_for_onnxruntime(decoder.program.model, rows)["GroupQueryAttention"]:
            positions = rows
    proto = onnx_ir.to_proto(decoder.program.model)
    compressed = CompressedMatrices(decoder.outline, target, dtype, version, accuracy_level=accuracy_level)
    dense = DenseMatrices(
        decoder.outline,
        dtype,
        contrib=contrib,
        rounded=rounded,
        bits=embedding_bits or 8,
        accuracy_level=accuracy_level,
    )
    constants = fill(proto, {"Compressed": compressed.linears, "Linear": dense.linears, "Embedding": dense.embeddings})
    if contrib:
        keep_rotations_apart(proto, constants)
        pack_projections(proto, constants)
    if dtype == torch.float32 and target != "dense":
        constants = narrow(proto.graph, constants, apart_from=compressed.sites)
    _declare_shapes(proto, decoder.cache, dtype)
    layout = CacheLayout(
        decoder.cache.layers, decoder.cache.heads, decoder.cache.size, str(dtype).removeprefix("torch."), contrib
    )
    description = Description(
        target=target,
        opset=version,
        inputs=tuple(one.name for one in proto.graph.input),
        outputs=tuple(one.name for one in proto.graph.output),
        cache=layout,
        positions=positions,
        accuracy_level=accuracy_level if contrib else 0,
        embedding_bits=embedding_bits,
    )
    return OnnxGraph(proto, constants, description, compressed.sites)


def _embedding_to_round(model: nn.Module, target: str, bits: int | None) -> str | None:
    """Return the name of the embedding of tokens if it is to be rounded and can be, None if it is not to be."""
    if bits is None:
        return None
    if bits not in (4, 8):
        raise InputError(f"embeddings can be rounded to 4 or 8 bits, not to {bits}")
    if target not in CONTRIB:
        raise InputError(
            f"the target {target!r} has no operator that looks up rows of codes; round embeddings with target='ort'"
        )
    core: Any = model
    table = core.get_input_embeddings()
    if type(table) is not nn.Embedding:
        raise InputError(
            f"the embedding of {type(model).__name__} is a {type(table).__name__}, which computes more than rows; "
            "export without rounding it"
        )
    names: list[str] = [name for name, module in model.named_modules() if module is table]
    return names[0]


def _most_positions(model: nn.Module) -> int | None:
    """Return how many positions a model was made for, None if its configuration does not say."""
    config: Any = model.config
    found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def _output_embedding(model: nn.Module) -> str | None:
    """Return the name of the layer that makes logits, None if the model does not say."""
    core: Any = model
    layer = core.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is layer), None)


def _declare_shapes(model: ModelProto, cache: CacheGeometry, dtype: torch.dtype) -> None:
    """Name the axes of inputs and outputs; forget those in between, which the trace named by numbers."""
    text = ["batch", "sequence"]
    shapes: dict[str, tuple[int, list[str | int]]] = {
        "input_ids": (TensorProto.INT64, [*text]),
        "attention_mask": (TensorProto.INT64, ["batch", "total"]),
        "position_ids": (TensorProto.INT64, [*text]),
    }
    for prefix, length in (("past_key_values", "past"), ("present", "total")):
        for name in cache.names(prefix):
            shapes[name] = (DATA_TYPES[dtype], ["batch", cache.heads, length, cache.size])
    for value in [*model.graph.input, *model.graph.output]:
        if value.name in shapes:
            value.CopyFrom(helper.make_tensor_value_info(value.name, *shapes[value.name]))
    logits = model.graph.output[0]
    width = logits.type.tensor_type.shape.dim[2].dim_value
    kept = [text[0], "kept", width]
    logits.CopyFrom(helper.make_tensor_value_info(logits.name, DATA_TYPES[dtype], kept))
    del model.graph.value_info[:]
    for name in ("producer_name", "producer_version", "doc_string"):
        model.ClearField(name)
    model.producer_name = "slimc"
