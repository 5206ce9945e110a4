"""Decoding steps as CUDA graphs: ONNX Runtime captures the launches of one step and replays them in the next.

A step of a small model is hundreds of launches, each of which takes the processor longer than the GPU. A captured graph
is bound to addresses and shapes, so inputs, logits and cache are buffers that stay, and the mask is as long as the
cache: GroupQueryAttention reads from its sum how many tokens there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from slimc.backends.onnx.description import CacheLayout

__all__ = ["CAPACITY_MULTIPLE", "Replay", "Replays"]

Array = npt.NDArray[Any]

CAPACITY_MULTIPLE = 256
"""To which the room of a cache is rounded up, so that texts of other lengths find a graph that was captured before."""

_NOT_CAPTURED = -1


@dataclass
class Replay:
    """The buffers of one number of texts and one capacity, and what runs a step in them.

    Attributes:
        past: the cache, in the graph's order.
    """

    session: Any
    binding: Any
    options: Any
    past: list[Any]
    inputs: dict[str, Any]
    logits: Any
    capacity: int

    def step(self, ids: Array, positions: Array) -> Array:
        """Read the next token of each text, int64 [batch, 1], at its position; return logits [batch, 1, vocabulary]."""
        mask = (np.arange(self.capacity)[None] <= positions).astype(np.int64)
        values = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for name, buffer in self.inputs.items():
            buffer.update_inplace(np.ascontiguousarray(values[name]))
        self.session.run_with_iobinding(self.binding, self.options)
        logits: Array = self.logits.numpy()
        return logits


class Replays:
    """What a session has captured, by the number of texts and the room of their caches."""

    def __init__(self, runtime: Any, session: Any, cache: CacheLayout, device: str) -> None:
        self._runtime = runtime
        self._device = device
        self._session = session
        self._cache = cache
        self._dtype = np.dtype(cache.dtype)
        self._vocabulary = int(session.get_outputs()[0].shape[-1])
        self._known: dict[tuple[int, int], Replay] = {}
        # ONNX Runtime keeps 0 for itself.
        self._numbers = count(1)
        self.not_captured = self._options(_NOT_CAPTURED)

    def of(self, batch: int, capacity: int) -> Replay:
        """Return the buffers for ``batch`` texts of ``capacity`` tokens at most; what the cache holds is undefined."""
        capacity += -capacity % CAPACITY_MULTIPLE
        if (batch, capacity) not in self._known:
            self._known[batch, capacity] = self._make(batch, capacity)
        return self._known[batch, capacity]

    def _make(self, batch: int, capacity: int) -> Replay:
        cache = self._cache
        shapes = {"input_ids": (batch, 1), "attention_mask": (batch, capacity), "position_ids": (batch, 1)}
        wanted = {value.name for value in self._session.get_inputs()}
        inputs = {name: self._buffer(shape, np.dtype(np.int64)) for name, shape in shapes.items() if name in wanted}
        names, results = cache.names("past_key_values"), cache.names("present")
        past = [self._buffer((batch, cache.heads, capacity, cache.size), self._dtype) for _ in names]
        logits = self._buffer((batch, 1, self._vocabulary), self._dtype)
        binding = self._session.io_binding()
        for name, buffer in [*inputs.items(), *zip(names, past, strict=True)]:
            binding.bind_ortvalue_input(name, buffer)
        binding.bind_ortvalue_output("logits", logits)
        for name, buffer in zip(results, past, strict=True):
            binding.bind_ortvalue_output(name, buffer)
        return Replay(self._session, binding, self._options(next(self._numbers)), past, inputs, logits, capacity)

    def _buffer(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        return self._runtime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=dtype), self._device, 0)

    def _options(self, graph: int) -> Any:
        options = self._runtime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options
