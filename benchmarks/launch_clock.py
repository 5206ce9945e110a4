"""Times calls of ``cuda-stream`` with launch shapes of choice, in a process of its own: one may fault or never end.

What is timed is the layer behind its like, or a whole decoding step that it is part of. Ahead of either, results of the
layer behind its like are compared with the product of the decoded weights, and from call to call.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection

import torch
from decoder_step import DECODERS, Pair, Step
from torch import Tensor

from slimc.backends.cuda import stream
from slimc.backends.cuda.layer import FragmentLayer, prepare, stack
from slimc.backends.cuda.prefill import PREFILL
from slimc.backends.cuda.shapes import MOST_BY_MEMORY, LaunchShape
from slimc.bench.exact import exact_product, exact_weights
from slimc.bench.linear import DTYPE, LAYERS, SERVED, copies, microseconds, random_layer
from slimc.errors import KernelError
from slimc.runtime.packing import PackedLinear

__all__ = ["Clock"]

START_SECONDS, CASE_SECONDS = 100, 10
"""How long making the layers, and one measurement, may take."""

Place = tuple[str, str]
"""A model, and one of the layers that it is served with."""


class Clock:
    """Measures calls of one layer in a process of its own, and starts another when one does not answer.

    The layers are made meanwhile; `ranks` and `time` wait for them.

    Args:
        rows: of the layers that are stacked.
        columns: of the layer.
        place: the layer's model and name in `LAYERS`, to time a decoder of it; None to time the layer.
    """

    def __init__(self, rows: tuple[int, ...], columns: int, place: Place | None = None) -> None:
        self.layer, self._place = (rows, columns), place
        self._context = multiprocessing.get_context("spawn")
        self._ranks: int | None = None
        self._start()

    def _start(self) -> None:
        self._is_ready = False
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, *self.layer, self._place), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def ranks(self) -> int:
        """Ranks of the factors of all of the layers.

        Raises:
            KernelError: the layers could not be made, or not in time.
        """
        return self._await_layers() if self._ranks is None else self._ranks

    def _await_layers(self) -> int:
        if self._ranks is None or not self._is_ready:
            if not self._connection.poll(START_SECONDS):
                raise KernelError(f"layers of {self.layer} were not made within {START_SECONDS} seconds")
            try:
                self._ranks, self._is_ready = int(self._connection.recv()), True
            except (EOFError, OSError) as error:
                raise KernelError(f"the process that makes layers of {self.layer} ended: {error!r}") from error
        return self._ranks

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def time(self, tokens: int, main: LaunchShape, right: LaunchShape, replays: int) -> float:
        """Return microseconds of a call, or infinity if it fails or does not end."""
        return self._ask(tokens, (main, right), replays)

    def time_prefill(self, tokens: int, replays: int) -> float:
        """Return microseconds of a call of ``cuda-prefill``, or infinity if it fails or does not end."""
        return self._ask(tokens, None, replays)

    def _ask(self, tokens: int, pair: Pair | None, replays: int) -> float:
        try:
            self._await_layers()
            self._connection.send((tokens, pair, replays))
            if self._connection.poll(CASE_SECONDS):
                taken, trouble, goes_on = self._connection.recv()
            else:
                taken, trouble, goes_on = math.inf, f"no end after {CASE_SECONDS} seconds", False
        except KernelError as error:
            taken, trouble, goes_on = math.inf, str(error), False
        except (EOFError, OSError) as error:
            taken, trouble, goes_on = math.inf, f"the process ended: {error!r}", False
        if trouble:
            print(f"# {tokens} tokens, {pair or PREFILL.name}: {trouble}", flush=True)
        if not goes_on:
            self.close()
            self._start()
        return float(taken)


def _serve(connection: Connection, rows: tuple[int, ...], columns: int, place: Place | None) -> None:
    packed = _parts(rows, columns, 0)
    first = _join(packed)
    layers = [first, *(_join(_parts(rows, columns, copy)) for copy in range(1, copies(first.nbytes)))]
    step = None if place is None else _step(place, layers)
    expected: dict[int, tuple[Tensor, Tensor]] = {}
    torch.cuda.synchronize()
    connection.send(first.ranks)
    while True:
        tokens, pair, replays = connection.recv()
        generator = torch.Generator("cuda").manual_seed(tokens)
        x = torch.randn(tokens, columns, dtype=DTYPE, device="cuda", generator=generator)
        try:
            if tokens not in expected:
                expected[tokens] = product(packed, x)
            calls = _checked(layers, expected[tokens], x, pair, replays)
            taken = step.time(pair, tokens, replays) if step and pair else microseconds(calls, replays)
            connection.send((taken, "", True))
        except KernelError as error:
            connection.send((math.inf, str(error)[:200], True))
        except RuntimeError as error:
            # After a fault a process has no working device, after a wrong result counters that are not zero.
            connection.send((math.inf, str(error)[:200], False))


def _parts(rows: tuple[int, ...], columns: int, copy: int) -> list[PackedLinear]:
    return [exact_weights(random_layer(part, columns, 100 * copy + seed)) for seed, part in enumerate(rows)]


def _join(packed: Sequence[PackedLinear]) -> FragmentLayer:
    parts = [prepare(one) for one in packed]
    return stack(parts) if len(parts) > 1 else parts[0]


def _step(place: Place, layers: list[FragmentLayer]) -> Step:
    model, name = place
    sizes = {one: (rows, columns) for one, rows, columns in LAYERS[model] if one in SERVED}
    made = {one: [_join(_parts(*size, copy)) for copy in range(DECODERS)] for one, size in sizes.items() if one != name}
    return Step(made | {name: layers}, sizes["qkv"][0], name)


def product(packed: Sequence[PackedLinear], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what layers give that are run as one, and how far from it a result may be: both float32 [tokens, rows]."""
    # Whatever the shape of a launch.
    most = {"blocks": MOST_BY_MEMORY, "blocks_of_t": MOST_BY_MEMORY}
    exact, bounds = zip(*(exact_product(one, x, **most) for one in packed), strict=True)
    return torch.cat(exact, 1).float(), torch.cat(bounds, 1).float()


def _checked(
    layers: list[FragmentLayer], expected: tuple[Tensor, Tensor], x: Tensor, pair: Pair | None, replays: int
) -> list[partial[Tensor]]:
    """Return calls of the layers.

    Raises:
        RuntimeError: they are further from what is expected than roundings allow, or not always the same.
    """

    def call(layer: FragmentLayer) -> partial[Tensor]:
        if pair is None:
            return partial(PREFILL.run, x, layer, None)
        return partial(stream.launch, stream.make_plan(layer, DTYPE, len(x), *pair), x, layer, None)

    calls = [call(layer) for layer in layers]
    eager = [call() for call in calls]
    wanted, bound = expected
    if not bool(((eager[0].float() - wanted).abs() <= bound).all()):
        raise RuntimeError("the result is further from the product of the decoded weights than roundings allow")
    if not _always(eager, calls, replays):
        raise RuntimeError("results differ from call to call")
    return calls


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
