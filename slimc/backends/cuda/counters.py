"""Counters by which the blocks of a launch hand out work among themselves."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from threading import Lock

import torch
from torch import Tensor

from slimc.runtime.prepared import derive

__all__ = ["Counters"]

COUNTERS = 4
TURNS = 16
"""Launches of a stream until counters are used again."""

FEWEST_SLOTS, MOST_SLOTS, SLOT_BYTES = 2 * TURNS, 1024, 64 << 10
"""Launches that counters are made for at a time: as many as fit in some memory, within bounds."""


class Counters:
    """Counters by which the blocks of a launch hand out work: zeros before it, and zeros again after it.

    Two launches that may run at once must not share them. Launches of one stream overlap with few of those before
    them, so they take turns at a number of counters; what is captured into a graph may be replayed beside anything, so
    each captured launch has counters of its own for good. Threads may ask for counters at the same time.

    Args:
        device: where they are.
        count: counters of a launch.
    """

    def __init__(self, device: torch.device, count: int = COUNTERS) -> None:
        self._device = device
        self._count = count
        self._free: list[Tensor] = []
        self._by_stream: dict[int, Iterator[Tensor]] = {}
        self._lock = Lock()
        if device.type == "cuda":
            self._refill()

    def of_launch(self, stream: int) -> int:
        """Return the address of the counters for a launch on ``stream``, which may be capturing."""
        with self._lock:
            return self._next(stream).data_ptr()

    def _next(self, stream: int) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            # Zeros made while capturing are made again by every replay: right, but a node more in the graph.
            taken = self._free.pop() if self._free else torch.zeros(self._count, dtype=torch.int32, device=self._device)
            _captured.append(taken)
            return taken
        turns = self._by_stream.get(stream)
        if turns is None:
            turns = self._by_stream[stream] = cycle([self._take() for _ in range(TURNS)])
        if len(self._free) < FEWEST_SLOTS // 2:
            # Graphs that are captured next take some for good.
            self._refill()
        return next(turns)

    def _take(self) -> Tensor:
        if not self._free:
            self._refill()
        return self._free.pop()

    def _refill(self) -> None:
        slots = max(FEWEST_SLOTS, min(SLOT_BYTES // (4 * self._count), MOST_SLOTS))

        def make() -> Tensor:
            return torch.zeros(slots, self._count, dtype=torch.int32, device=self._device)

        self._free.extend(derive(self._device, make).unbind())


_captured: list[Tensor] = []
"""What graphs may still use when the layer that they were captured from is gone."""
