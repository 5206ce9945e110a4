"""ONNX Runtime's own 4-bit quantiser, made to write folders that the benchmarks can open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from slimc.backends.onnx.description import DESCRIPTION


def quantise(source: Path, folder: Path, **options: Any) -> None:
    """Round every matrix of a folder of target ort to 4 bits, in the tool's symmetric form and blocks of 32.

    Args:
        source: what ``slimc.export_onnx`` wrote of the dense model.
        folder: written; its description is that of ``source``.
        options: of the tool that the description holds too, such as ``accuracy_level``.
    """
    model = onnx.load(source / "model.onnx")
    if json.loads((source / DESCRIPTION).read_text())["cache"]["dtype"] == "float32":
        _widen(model)
    constants = {one.name: one for one in model.graph.initializer}
    for node in model.graph.node:
        # Where embeddings are tied, the head reads their table transposed, which the tool does not know.
        if node.op_type == "FusedMatMul" and node.input[1] in constants:
            table = numpy_helper.to_array(constants[node.input[1]])
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(table.T), "head"))
            node.CopyFrom(helper.make_node("MatMul", [node.input[0], "head"], list(node.output), name=node.name))
    tool = MatMulNBitsQuantizer(
        model,
        bits=4,
        block_size=32,
        is_symmetric=True,
        op_types_to_quantize=("MatMul", "Gather"),
        quant_axes=(("MatMul", 0), ("Gather", 1)),
        **options,
    )
    tool.process()
    folder.mkdir(parents=True)
    tool.model.save_model_to_file(str(folder / "model.onnx"), True)
    described = json.loads((source / DESCRIPTION).read_text())
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / DESCRIPTION).write_text(json.dumps(described | {"files": files} | options))


def _widen(model: onnx.ModelProto) -> None:
    """Store as float32 what is float32 when it is read: the tool sees no constant behind a Cast."""
    names = set()
    for constant in model.graph.initializer:
        if constant.data_type in (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16):
            names.add(constant.name)
            wide = numpy_helper.to_array(constant).astype(np.float32)
            constant.CopyFrom(numpy_helper.from_array(wide, constant.name))
    casts = [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in names]
    widened = {node.output[0]: node.input[0] for node in casts}
    for node in casts:
        model.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = [widened.get(name, name) for name in node.input]
