"""Replay of many small operations.

On a GPU they are recorded once as a CUDA graph, since launching them takes longer than computing them. On a CPU one
thread computes them, since threads would spend their time waiting for each other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

MOST_GRAPHS = 64
"""Graphs that are kept, each with buffers for its arguments and temporaries; the one used longest ago goes."""

FEWEST_SHARED = 2**19
"""Entries of the first argument from which on the threads of a CPU share the work.

Solving 1536 x 576 takes a busy CPU of two cores 0.2 s on one thread, 1.4 s on two.
"""

Outputs = tuple[Tensor, ...]

_graphs: OrderedDict[Hashable, _Recording] = OrderedDict()


def replay(function: Callable[..., Outputs], *arguments: Tensor | float | None) -> Outputs:
    """Return ``function(*arguments)``.

    On a GPU the calls of a function with arguments of the same shapes are recorded at the second one, and replayed from
    then on. What is returned is the graph's own memory then: read it before the next call.

    Args:
        function: depends on nothing but its arguments, changes none of them, never waits for the device, and is
            defined at the top of a module.
        arguments: tensors on one device, and constants.
    """
    tensors = [one for one in arguments if isinstance(one, Tensor)]
    if tensors[0].device.type != "cuda":
        with _threads(1 if tensors[0].numel() < FEWEST_SHARED else torch.get_num_threads()):
            return function(*arguments)
    if torch.cuda.is_current_stream_capturing():
        return function(*arguments)
    key = (
        function,
        tensors[0].device,
        *((one.shape, one.dtype) if isinstance(one, Tensor) else one for one in arguments),
    )
    recording = _graphs.get(key)
    if recording is None:
        recording = _Recording()
        _graphs[key] = recording
        while len(_graphs) > MOST_GRAPHS:
            _graphs.popitem(last=False)
    _graphs.move_to_end(key)
    return recording.run(function, arguments)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Recording:
    """The graph of a function for one set of shapes."""

    def __init__(self) -> None:
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.outputs: Outputs = ()

    def run(self, function: Callable[..., Outputs], arguments: Sequence[Tensor | float | None]) -> Outputs:
        self.calls += 1
        # The first call is made as it is: libraries make their workspaces then, which a recording must not do.
        if self.calls == 1:
            return function(*arguments)
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        if self.graph is None:
            self._record(function, arguments)
        for buffer, tensor in zip(self.inputs, tensors, strict=True):
            buffer.copy_(tensor)
        if self.graph is not None:
            self.graph.replay()
        return self.outputs

    def _record(self, function: Callable[..., Outputs], arguments: Sequence[Tensor | float | None]) -> None:
        buffers = [
            one.clone(memory_format=torch.contiguous_format) if isinstance(one, Tensor) else one for one in arguments
        ]
        self.inputs = [one for one in buffers if isinstance(one, Tensor)]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.inputs[0].device)
        with torch.cuda.device(self.inputs[0].device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.outputs = function(*buffers)
        self.graph = graph
