"""A compressed model as an ONNX graph: traced, translated, lowered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from slimc.backends.onnx.files import OnnxGraph
from slimc.backends.onnx.packed_nodes import lower
from slimc.backends.onnx.tracing import trace, twin
from slimc.backends.onnx.translation import to_onnx
from slimc.backends.onnx.weights import check_options, opset_of
from slimc.errors import InputError
from slimc.ir.capture import Batch
from slimc.ir.program import Program
from slimc.runtime.formats import LinearFormat
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear

__all__ = ["export_module", "export_program"]


def export_module(
    model: nn.Module,
    example: Batch,
    *,
    target: str = "portable",
    dtype: torch.dtype = torch.float32,
    opset: int | None = None,
    accuracy_level: int = 0,
) -> OnnxGraph:
    """Return a model, its `SlimLinear` layers lowered for ``target``, as an ONNX graph that computes what it computes.

    Args:
        model: any module; it is left as it was.
        example: a call of it, which shows the inputs.
        target: one of `slimc.backends.onnx.weights.TARGETS`.
        dtype: what the graph computes in, float32 or float16.
        opset: of the graph; None is the lowest that has what the layers need.
        accuracy_level: see `slimc.backends.onnx.weights.lower_linear`.

    Raises:
        InputError: an option is not known, or the example does not fit the model.
        CaptureError: PyTorch cannot trace the model, or not translate it to ONNX.
    """
    check_options(target, dtype, opset)
    copied = twin(model, dtype)
    layers = {name: module for name, module in copied.named_modules() if isinstance(module, SlimLinear)}
    formats = {name: module.format for name, module in model.named_modules() if isinstance(module, SlimLinear)}
    packed = [layer.packed for layer in layers.values()]
    return _exported(copied, example, packed, formats, target, dtype, opset, accuracy_level)


def export_program(
    program: Program,
    example: Batch,
    *,
    target: str = "portable",
    dtype: torch.dtype = torch.float32,
    opset: int | None = None,
    accuracy_level: int = 0,
) -> OnnxGraph:
    """Return a captured program, in whatever form its passes left it, as an ONNX graph; see `export_module`.

    Raises:
        InputError: an option is not known, the example does not fit, or the program computes in another dtype, which
            is written into its graph.
        CaptureError: PyTorch cannot translate the program to ONNX.
    """
    check_options(target, dtype, opset)
    others = {site.dtype for site in program.sites.values()} - {dtype}
    if others:
        raise InputError(
            f"the program was captured in {others.pop()}; capture the model in {dtype}, to export it in it"
        )
    packed = {name: site.packed for name, site in program.sites.items() if site.packed is not None}
    formats = {name: layer.format for name, layer in packed.items()}
    copied = twin(program.module, dtype)
    layers = list(packed.values())
    return _exported(copied, example, layers, formats, target, dtype, opset, accuracy_level)


def _exported(
    model: nn.Module,
    example: Batch,
    layers: Sequence[PackedLinear],
    formats: dict[str, LinearFormat],
    target: str,
    dtype: torch.dtype,
    opset: int | None,
    accuracy_level: int,
) -> OnnxGraph:
    proto, stored = to_onnx(trace(model, example, dtype), opset or opset_of(layers, target))
    return lower(proto, stored, target, dtype, formats=formats, accuracy_level=accuracy_level)
