"""The graph of a causal language model with its cache: one that reads a prompt and single tokens alike."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimc.backends.hf_text import can_generate
from slimc.backends.onnx.attention import ATTENTION, DecodingStep, cache_of, register_attention, tracing
from slimc.backends.onnx.exporters import export_program
from slimc.backends.onnx.outline import Outline, outline_of
from slimc.backends.onnx.tracing import batch_experts, quiet
from slimc.backends.onnx.translation import simplify
from slimc.errors import CaptureError, InputError

__all__ = ["CacheGeometry", "Decoder", "cache_geometry", "trace_decoder", "why_without_cache"]


@dataclass(frozen=True)
class CacheGeometry:
    """Shape of the cache: ``layers`` pairs of [batch, ``heads``, length, ``size``]."""

    layers: int
    heads: int
    size: int

    def names(self, prefix: str) -> list[str]:
        """Return the names of the cache's tensors, ``prefix.0.key`` and so on, in the order of the graph."""
        return [f"{prefix}.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]


@dataclass(frozen=True)
class Decoder:
    """A traced decoder.

    Attributes:
        program: the graph; its calls are ``(input_ids, attention_mask, position_ids, *past)`` and its results
            ``(logits, *present)``.
        outline: what its placeholders stand for.
        cache: the shape of the cache.
    """

    program: torch.onnx.ONNXProgram
    outline: Outline
    cache: CacheGeometry


class _Step(nn.Module):
    """The call that is traced: everything in and out is a tensor."""

    def __init__(self, model: nn.Module, *, fused: bool) -> None:
        super().__init__()
        self.model = model
        self.fused = fused

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        pairs = list(zip(past[::2], past[1::2], strict=True))
        step = DecodingStep(self.fused, attention_mask, pairs, input_ids.shape[1])
        parameters = inspect.signature(self.model.forward).parameters
        arguments: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": True}
        if "position_ids" in parameters:
            arguments["position_ids"] = position_ids
        # transformers 5.24 renamed the argument, and warns where it is called by the old name.
        arguments["cache" if "cache" in parameters else "past_key_values"] = cache_of(step)
        with tracing(step):
            logits = self.model(input_ids, **arguments).logits
        if len(step.present) != len(pairs):
            raise CaptureError(
                f"{len(pairs) - len(step.present)} of {len(pairs)} layers did not use the cache; export the model "
                "without one"
            )
        return (logits, *(tensor for layer in range(len(pairs)) for tensor in step.present[layer]))


def cache_geometry(model: nn.Module) -> CacheGeometry:
    """Return the shape of a causal language model's cache.

    Raises:
        InputError: the model is not one whose layers keep keys and values of one shape.
    """
    reason = why_without_cache(model)
    if reason is not None:
        raise InputError(f"{reason}; export it without one")
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return CacheGeometry(config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, size)


def why_without_cache(model: nn.Module) -> str | None:
    """Return why ``model`` is not a causal language model whose cache is known, None if it is one."""
    config: Any = getattr(model, "config", None)
    if config is None or not can_generate(model) or not getattr(model, "_supports_attention_backend", False):
        return (
            f"a {type(model).__name__} cannot be exported with a cache: only causal language models of transformers "
            "that use its attention interface can"
        )
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others:
        return (
            f"a {type(model).__name__} cannot be exported with a cache: its layers of kind {', '.join(others)} keep no "
            "keys and values"
        )
    return None


def trace_decoder(model: nn.Module, *, fused: bool, dtype: torch.dtype, opset: int, exporter: str = "auto") -> Decoder:
    """Trace ``model`` once, for any batch, any number of new tokens and any length of the past.

    Args:
        model: a causal language model of transformers, compressed or dense; left as it is.
        fused: with ONNX Runtime's GroupQueryAttention, else in standard operators.
        dtype: what the graph computes in.
        opset: the version of the standard operators.
        exporter: one of `slimc.backends.onnx.exporters.EXPORTERS`.

    Raises:
        InputError: the model is not one whose cache is known.
        CaptureError: it cannot be traced.
    """
    geometry = cache_geometry(model)
    outline = outline_of(model, dtype)
    register_attention()
    core: Any = outline.model
    core.set_attn_implementation(ATTENTION)
    batch_experts(core)
    # No size is 1, which the trace would take for a constant, and no two are equal.
    batch, new, past = 2, 3, 5
    arguments = {
        "input_ids": torch.zeros(batch, new, dtype=torch.int64),
        "attention_mask": torch.ones(batch, past + new, dtype=torch.int64),
        "position_ids": torch.arange(past, past + new).repeat(batch, 1),
        "past": [
            torch.zeros(batch, geometry.heads, past, geometry.size, dtype=dtype) for _ in range(2 * geometry.layers)
        ],
    }
    # Names, where they can be given, say which axes are equal: far fewer symbols for the trace to reason about.
    rows, before = torch.export.Dim("batch", min=1), torch.export.Dim("past", min=1)
    asked = {0: rows, 1: torch.export.Dim.AUTO}
    axes = dict(zip(arguments, (asked, asked, asked, [{0: rows, 2: before}] * (2 * geometry.layers)), strict=True))
    names = [*list(arguments)[:-1], *geometry.names("past_key_values")]
    try:
        with torch.no_grad(), quiet():
            program = export_program(_Step(core, fused=fused).eval(), arguments, axes, exporter)
            exported = torch.onnx.export(
                program,
                input_names=names,
                output_names=["logits", *geometry.names("present")],
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            if exported is None:
                raise CaptureError("torch.onnx.export gave no graph")
            simplify(exported.model)
    except (CaptureError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise CaptureError(f"{type(model).__name__} cannot be traced with its cache: {reason}") from error
    return Decoder(exported, outline, geometry)
