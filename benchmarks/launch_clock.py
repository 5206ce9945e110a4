"""Times calls of ``cuda-stream`` with launch shapes of choice, in a process of its own: one may fault or never end."""

from __future__ import annotations

import math
import multiprocessing
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from slimc.backends.cuda import stream
from slimc.backends.cuda.layer import FragmentLayer, prepare, stack
from slimc.backends.cuda.shapes import LaunchShape
from slimc.bench.linear import DTYPE, copies, microseconds, random_layer
from slimc.errors import KernelError

__all__ = ["Clock"]

START_SECONDS, CASE_SECONDS = 100, 10
"""How long making the layers, and one measurement, may take."""


class Clock:
    """Measures calls of one layer in a process of its own, and starts another when one does not answer.

    The layers are made meanwhile; `ranks` and `time` wait for them.

    Args:
        rows: of the layers that are stacked.
        columns: of the layer.
    """

    def __init__(self, rows: tuple[int, ...], columns: int) -> None:
        self.layer = rows, columns
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self._ranks: int | None = None
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, *self.layer), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def ranks(self) -> int:
        """Ranks of the factors of all of the layers.

        Raises:
            KernelError: the layers were not made in time.
        """
        return self._await_layers()

    def _await_layers(self) -> int:
        if self._ranks is None:
            if not self._connection.poll(START_SECONDS):
                raise KernelError(f"layers of {self.layer} were not made within {START_SECONDS} seconds")
            self._ranks = int(self._connection.recv())
        return self._ranks

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def time(self, tokens: int, main: LaunchShape, right: LaunchShape, replays: int) -> float:
        """Return microseconds of a call, or infinity if it fails or does not end."""
        try:
            self._await_layers()
            self._connection.send((tokens, main, right, replays))
            if self._connection.poll(CASE_SECONDS):
                taken, trouble, goes_on = self._connection.recv()
            else:
                taken, trouble, goes_on = math.inf, f"no end after {CASE_SECONDS} seconds", False
        except (EOFError, OSError) as error:
            taken, trouble, goes_on = math.inf, f"the process ended: {error}", False
        if trouble:
            print(f"# {tokens} tokens, {main}, {right}: {trouble}", flush=True)
        if not goes_on:
            self.close()
            self._start()
        return float(taken)


def _serve(connection: Connection, rows: tuple[int, ...], columns: int) -> None:
    first = _make(rows, columns, 0)
    layers = [first, *(_make(rows, columns, copy) for copy in range(1, copies(first.nbytes)))]
    expected: dict[int, Tensor] = {}
    torch.cuda.synchronize()
    connection.send(first.ranks)
    while True:
        tokens, main, right, replays = connection.recv()
        try:
            connection.send((_measure(layers, expected, tokens, main, right, replays), "", True))
        except KernelError as error:
            connection.send((math.inf, str(error)[:200], True))
        except RuntimeError as error:
            # After a fault a process has no working device, after a wrong result counters that are not zero.
            connection.send((math.inf, str(error)[:200], False))


def _make(rows: tuple[int, ...], columns: int, copy: int) -> FragmentLayer:
    parts = [prepare(random_layer(part, columns, 100 * copy + seed)) for seed, part in enumerate(rows)]
    return stack(parts) if len(parts) > 1 else parts[0]


def _measure(
    layers: list[FragmentLayer],
    expected: dict[int, Tensor],
    tokens: int,
    main: LaunchShape,
    right: LaunchShape,
    replays: int,
) -> float:
    columns = layers[0].format.columns
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, columns, dtype=DTYPE, device="cuda", generator=generator)

    def call(layer: FragmentLayer, plan: stream.Plan) -> Tensor:
        return stream.launch(plan, x, layer, None)

    calls = [partial(call, layer, stream.make_plan(layer, DTYPE, tokens, main, right)) for layer in layers]
    eager = [call() for call in calls]
    y = eager[0].float()
    wanted = expected.setdefault(tokens, y)
    if not bool((y - wanted).abs().max() <= 0.02 * wanted.abs().max()):
        raise RuntimeError("the result is not that of the first shape")
    if not _always(eager, calls, replays):
        raise RuntimeError("results differ from call to call")
    return microseconds(calls, replays)


def _always(expected: list[Tensor], calls: list[partial[Tensor]], replays: int) -> bool:
    """Whether calls always have these results, bit for bit: a race shows now and then, most of all behind a call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [call() for call in calls]
    same = True
    for _ in range(replays):
        graph.replay()
        same = same and all(map(torch.equal, found, expected))
    return same
