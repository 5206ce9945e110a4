"""Counters by which the blocks of a launch hand out work among themselves."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Counters"]

COUNTER_SLOTS = 64
COUNTERS = 4


class Counters:
    """Counters by which the blocks of a launch hand out work: zeros before it, and zeros again after it.

    Two launches that may run at once must not share them. Launches of one stream run one after another; what is
    captured into a graph may be replayed beside anything, so each captured launch has counters of its own for good.

    Args:
        device: where they are.
        count: counters of a launch.
    """

    def __init__(self, device: torch.device, count: int = COUNTERS) -> None:
        self._device = device
        self._count = count
        self._free: list[Tensor] = []
        self._by_stream: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []
        if device.type == "cuda":
            self._refill()

    def of_launch(self, stream: int) -> int:
        """Return the address of the counters for a launch on ``stream``, which may be capturing."""
        if torch.cuda.is_current_stream_capturing():
            # Zeros made while capturing are made again by every replay: right, but a node more in the graph.
            taken = self._free.pop() if self._free else torch.zeros(self._count, dtype=torch.int32, device=self._device)
            self._kept.append(taken)
            return taken.data_ptr()
        found = self._by_stream.get(stream)
        if found is None:
            if len(self._free) < COUNTER_SLOTS // 2:
                self._refill()
            found = self._by_stream[stream] = self._free.pop()
        return found.data_ptr()

    def _refill(self) -> None:
        slots = torch.zeros(COUNTER_SLOTS, self._count, dtype=torch.int32, device=self._device)
        # Another stream may use them next.
        torch.cuda.current_stream(self._device).synchronize()
        self._free.extend(slots.unbind())
