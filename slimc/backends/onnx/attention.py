"""Attention over a cache, as the exported decoder computes it.

transformers asks the cache for all keys and the attention function for the result; between the two lies every model's
own code. So one cache layer and one attention function serve every model that uses transformers' attention interface,
and no graph need be searched for an attention afterwards. While a decoder is traced, `DecodingStep` says what they
belong to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimc.backends.hf_library import transformers
from slimc.errors import CaptureError

__all__ = ["ATTENTION", "DecodingStep", "cache_of", "register_attention", "tracing"]

ATTENTION = "slimc_onnx"
"""The name under which transformers finds `attend`."""

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

_MEANINGLESS = {"position_ids", "use_cache", "output_attentions", "position_embeddings", "cu_seq_lens_q", "is_causal"}
"""Arguments of an attention function that say nothing that is not known already."""

_current: ContextVar[DecodingStep] = ContextVar("slimc_onnx_step")


@dataclass
class DecodingStep:
    """One call of a decoder while it is traced.

    Attributes:
        fused: use ONNX Runtime's GroupQueryAttention; otherwise standard operators.
        attention_mask: int64 [batch, past + new], 1 where there is a token. Padding is on the right of a prompt.
        past: keys and values of each layer, [batch, key heads, past, head size].
        new: how many tokens are read.
    """

    fused: bool
    attention_mask: Tensor
    past: Sequence[tuple[Tensor, Tensor]]
    new: int
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _biases: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)
    _lengths: tuple[Tensor, Tensor] | None = None
    _updated: tuple[int, Tensor] | None = None

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values; return those that its attention is to read."""
        if self.fused:
            # GroupQueryAttention appends them itself.
            self._updated = (layer, keys)
            return keys, values
        past_keys, past_values = self.past[layer]
        self.present[layer] = (torch.cat((past_keys, keys), dim=2), torch.cat((past_values, values), dim=2))
        return self.present[layer]

    def take_updated(self, keys: Tensor) -> int:
        """Return the layer that these keys were just handed to the cache for."""
        if self._updated is None or self._updated[1] is not keys:
            raise CaptureError(
                "an attention reads keys that did not come from the cache as they were stored there (shared by layers, "
                "or changed on the way), so it cannot become a GroupQueryAttention; export with target='portable'"
            )
        return self._updated[0]

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Return the last token's index in each row, int32 [batch], and the longest row's length, int32 []."""
        if self._lengths is None:
            last = (self.attention_mask.sum(dim=1) - 1).to(torch.int32)
            total = torch.full((), self.attention_mask.shape[1], dtype=torch.int32)
            self._lengths = last, total
        return self._lengths

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores, [batch, 1, new, past + new]: 0 where a token may be read, else the lowest."""
        if (window, dtype) not in self._biases:
            total = self.attention_mask.shape[1]
            readers = torch.arange(total - self.new, total)[:, None]
            read = torch.arange(total)[None, :]
            visible = (read <= readers) & (self.attention_mask[:, None, None, :] > 0)
            if window is not None:
                # Padding of a short prompt lies between its tokens and later ones, and is no distance.
                places = self.attention_mask.cumsum(dim=1)
                visible = visible & (places[:, None, None, :] > places[:, None, -self.new :, None] - window)
            self._biases[window, dtype] = torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)
        return self._biases[window, dtype]


@contextmanager
def tracing(step: DecodingStep) -> Iterator[None]:
    """Make `attend` and the cache of `cache_of` work on ``step`` inside the block."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def cache_of(step: DecodingStep) -> Any:
    """Return a transformers cache that hands what it is given to ``step``."""
    library = transformers()
    mixin = library.cache_utils.CacheLayerMixin

    class Layer(mixin):  # type: ignore[misc, valid-type]
        """One layer of the cache; its length is that of the past."""

        is_sliding = False
        is_compileable = False

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index
            self.keys, self.values = step.past[index]
            self.is_initialized = True

        def lazy_initialization(self, *_: Any) -> None:
            """Do nothing: the past is there from the start."""

        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return step.update(self.index, keys, values)

        def get_seq_length(self, *_: Any) -> int:
            return self.keys.shape[2]

        def get_mask_sizes(self, new: int) -> tuple[int, int]:
            return self.get_seq_length() + new, 0

        def get_max_length(self) -> int:
            return -1

        get_max_cache_shape = get_max_length

    return library.cache_utils.Cache(layers=[Layer(index) for index in range(len(step.past))])


def register_attention() -> None:
    """Make `attend` known to transformers; doing it again changes nothing."""
    transformers().AttentionInterface.register(ATTENTION, attend)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - transformers passes it in this place
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - transformers passes it by this name
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention's result, [batch, new, heads, head size], as transformers' attention functions do.

    Args:
        module: the attention layer.
        query: [batch, heads, new, head size].
        key: [batch, key heads, length, head size], what the cache returned.
        value: like ``key``.
        attention_mask: not read; what may be read is known from the step.
        scaling: of the scores, 1 / sqrt(head size) by default.
        dropout: none happens in evaluation.
        sliding_window: how many tokens back may be read.
        softcap: bound of the scores' tanh.
        others: what only other implementations read.

    Raises:
        CaptureError: the model asks for something that this function does not compute.
    """
    step = _current.get()
    asked = {name for name, one in others.items() if one is not None and one is not False}
    meant = sorted(asked - _MEANINGLESS)
    if meant:
        raise CaptureError(
            f"{type(module).__name__} asks its attention for {', '.join(meant)}, which has no ONNX form here; export "
            "the model without a cache"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if step.fused:
        return _grouped(step, query, key, value, scale, sliding_window, softcap), None
    return _composed(step, query, key, value, scale, sliding_window, softcap), None


def _grouped(
    step: DecodingStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Write one GroupQueryAttention, which appends the new keys and values to the cache and masks by lengths."""
    layer = step.take_updated(key)
    batch, heads, new, size = query.shape
    key_heads = key.shape[1]
    past = step.past[layer]
    last, total = step.lengths()
    cache = (batch, key_heads, step.attention_mask.shape[1], size)
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": key_heads, "scale": scale}
    if window is not None:
        attributes["local_window_size"] = window
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    result, keys, values = torch.onnx.ops.symbolic_multi_out(
        f"{CONTRIB}::GroupQueryAttention",
        (_flat(query), _flat(key), _flat(value), *past, last, total),
        attributes,
        dtypes=(query.dtype, key.dtype, value.dtype),
        shapes=((batch, new, heads * size), cache, cache),
        version=1,
    )
    step.present[layer] = (keys, values)
    return result.view(batch, new, heads, size)


def _flat(states: Tensor) -> Tensor:
    """Put the heads of a token side by side: [batch, heads, new, size] becomes [batch, new, heads * size]."""
    batch, heads, new, size = states.shape
    return states.transpose(1, 2).reshape(batch, new, heads * size)


def _composed(
    step: DecodingStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Write the attention in standard operators; query heads that share a key head are rows of one product."""
    batch, heads, new, size = query.shape
    key_heads, total = key.shape[1], step.attention_mask.shape[1]
    shared = heads // key_heads
    rows = (query * scale).reshape(batch, key_heads, shared * new, size)
    scores = rows @ key.transpose(2, 3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(batch, key_heads, shared, new, total) + step.bias(window, scores.dtype)[:, :, None]
    weights = torch.softmax(scores.float(), dim=-1).to(query.dtype)
    read = weights.view(batch, key_heads, shared * new, total) @ value
    return read.view(batch, heads, new, size).transpose(1, 2)
