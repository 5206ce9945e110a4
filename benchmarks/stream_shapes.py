"""Which launch shapes of ``cuda-stream`` take the least time: writes ``slimc/backends/cuda/stream_shapes.json``.

    python benchmarks/stream_shapes.py [--models llama-2-7b,llama-2-70b] [--tokens 1,16,32,64,128] [--seconds 300]
        [--in-step]

Needs a Hopper GPU. Each layer is measured as in ``slimc bench`` (cold weights, a CUDA graph of 32 calls, median), with
pairs of shapes: one for its own launch, one for the launch that computes t. The pair that slimc would take now is among
them, and is replaced only by one that is faster in the same run. First every shape of the layer's launch is tried
beside the present one for t, in few replays, and every shape for t beside the best of these; then the best of both
with each other; then, from the best pairs on, each field of their shapes is varied in turn, as long as that gains;
at last the best pairs and the present one are measured in turns. An even launch leaves to the one for t the
multiprocessors that it takes, and is also tried with a few more and less.

A shape whose results are not the same from call to call, bit for bit, or further from the product of the decoded
weights than roundings allow, is left out and reported. With more tokens than the largest block has (``--tokens 256``)
``cuda-prefill`` is measured in turns with the best pairs, and the file gets an entry only where it takes longer.

With ``--in-step`` times are those of a decoder of the model, in which the layer follows other kernels than its like.
Layers that were searched so are left out of other searches. Those of one size in two models share an entry: what was
found last stays.

Kernels are compiled many at a time, while others are measured; where the time ends, shapes that are most like the
present ones have been tried.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import TextIO

import torch
from launch_clock import Clock, Pair

from slimc.backends.cuda import driver, shapes, stream
from slimc.backends.cuda.cache import cached_cubin
from slimc.backends.cuda.layer import source
from slimc.backends.cuda.shapes import Form, LaunchShape, Measured
from slimc.bench import check_words, no_gpu
from slimc.bench.linear import DTYPE, LAYERS, SERVED
from slimc.errors import KernelError

ALL_LAYERS = sorted({name for layers in LAYERS.values() for name, _, _ in layers})
"""Names of layers that can be measured behind their like."""

WORKERS = os.cpu_count() or 1
"""Kernels that are compiled at once."""

LAYER = Form(sparse=True, group=0, adapters=True, dtype=DTYPE)
FACTOR = Form(sparse=False, group=64, adapters=False, dtype=DTYPE)

BLOCKS = (0.3, 2.1)
"""A launch has so many blocks a multiprocessor, or they are not worth measuring."""

LONGEST_RIGHT = 0.35
"""Share of the multiprocessors that an even launch may leave to the launch for t."""

ALONE = ((4, 1), (3, 1), (2, 1), (2, 2), (1, 2), (1, 3), (1, 4))
"""Warpgroups for rows and for columns of a launch for t whose blocks have a multiprocessor each."""

QUICK, THOROUGH = 5, 15
"""Replays of a graph, to rank pairs and to choose among the best."""

CROSSED = 8
"""Shapes of either launch that are measured with each other."""

STARTS = 3
"""Pairs from which on fields are varied."""

FINALISTS, TURNS = 6, 5
"""Pairs that are measured in turns with the present one, and how often."""

GAIN = 0.997
"""Of the time, from which on a pair counts as faster in few replays."""

STAGES = {"layer": 0.45, "t": 0.6, "both": 0.68, "fields": 0.94}
"""Shares of the time for a layer by which each stage ends."""

VARIED: dict[str, tuple[int, ...]] = {
    "window": (0, 2, 3, 4, 5, 6, 8, 10, 12, 16),
    "turn": (0, 1, 2, 3, 5, 7, 9, 13),
    "cluster": shapes.CLUSTERS,
    "apart": (False, True),
    "inputs": (0, 2, 3, 4, 5, 6, 8),
    "stages": (0, 3, 4, 6, 8, 10),
    "step": (128, 256),
    "row_groups": (1, 2, 3, 4),
    "row_tiles": (1, 2, 3, 4),
    "column_groups": (1, 2, 3, 4),
    "blocks": (1, 2),
    "by_memory": (False, True),
}
"""Values of the fields of a shape."""

SHARING = {"cluster", "even", "spared", "by_memory"}
"""Fields that say which blocks have parts of the same tile."""

SPARED = (-8, -6, -4, -3, -2, -1, 1, 2, 3, 4, 6, 8)
"""Multiprocessors that an even launch leaves free beyond those that the launch for t takes."""


# -------------------------------------------------------------------------------------------------------- candidates


def token_tiles(tokens: int) -> tuple[int, ...]:
    """Return tokens that a block may have, where a call has so many."""
    tile = shapes.token_tile(tokens)
    return (tile, tile // 2) if tile >= shapes.MANY_TOKENS else (tile,)


def has_registers(shape: LaunchShape) -> bool:
    """Whether sums, a set of operands and addresses find registers."""
    # A multiprocessor has four parts, each of which holds its share of the warps.
    own = shapes.REGISTERS // 4 // 32 // -(-shape.blocks * (shape.threads // 32) // 4)
    return (shape.registers[0] or own) >= shape.row_tiles * (shape.tokens // 2 + 16) + 24


def everything(tile: int) -> list[LaunchShape]:
    """Return shapes for blocks of so many tokens, most of which no layer will like; columns are not yet divided."""
    few = tile <= shapes.FEW_TOKENS
    # Columns of a slot, slots of activations.
    rings = [(128, 0), (256, 0)] if few else [(128, 0), (128, 4), (256, 0), (256, 2), (256, 3)]
    found = []
    for row_tiles, row_groups, column_groups in product(range(1, 5), repeat=3):
        if row_groups * column_groups > 4:
            continue
        for blocks, (step, inputs) in product((1, 2, 3) if few else (1, 2), rings):
            shape = LaunchShape(tile, row_tiles, row_groups, column_groups, 1, blocks, step, 0, inputs)
            choices = [shape, replace(shape, inputs=2 * column_groups) if few else replace(shape, apart=True)]
            if few and blocks == 2:
                choices += [replace(one, alone=True) for one in choices]
            found += filter(has_registers, choices)
    lone = [shape for shape in found if shape.column_groups == 1]
    return found + [replace(shape, even=True) for shape in lone] + [replace(shape, by_memory=True) for shape in lone]


def main_candidates(rows: tuple[int, ...], tokens: int, processors: int) -> list[LaunchShape]:
    """Return shapes of the layer's launch."""
    starts = [sum(rows[:one]) for one in range(1, len(rows))]
    found = {}
    for tile in token_tiles(tokens) if tokens > shapes.MANY_TOKENS else token_tiles(tokens)[:1]:
        for shape in shapes.suiting({tile: [*shapes.CANDIDATES[tile], *everything(tile)]}, tile, LAYER):
            waves = shapes.blocks_of(shape, sum(rows), starts) * math.ceil(tokens / shape.tokens) / processors
            most = 1 if shape.alone or shape.cluster > 1 else BLOCKS[1]
            if tile < shapes.token_tile(tokens) and (shape.even or not shape.apart):
                # Two blocks of half the tokens rarely pay: fewer of them are tried.
                continue
            # Fewer tiles than blocks are not divided.
            if waves > 1 - LONGEST_RIGHT if shape.even else BLOCKS[0] <= waves <= most * shape.blocks:
                found.setdefault(_resolved(shape, LAYER), shape)
    return list(found.values())


def right_candidates(ranks: int, tokens: int, processors: int) -> list[LaunchShape]:
    """Return shapes of the launch for t: of blocks beside those of the layer, or with a multiprocessor each."""
    tile = shapes.token_tile(tokens)
    found = {}
    for shape in shapes.suiting(shapes.RIGHT_CANDIDATES, tile, FACTOR):
        if shape.cluster > 2 and shapes.blocks_of(shape, ranks) <= 2 * processors:
            found.setdefault(_resolved(shape, FACTOR), shape)
    for part in token_tiles(tokens) if tile >= shapes.MANY_TOKENS else ():
        # Blocks that have a multiprocessor each take no more of them than they need, wherever they are launched.
        alone = [LaunchShape(part, 1, *groups, 1, 1, 128, apart=True) for groups in ALONE]
        for shape in shapes.suiting({part: alone}, part, FACTOR):
            if right_share(shape, ranks, tokens, processors) <= LONGEST_RIGHT:
                found.setdefault(_resolved(shape, FACTOR), shape)
    return list(found.values())


def _resolved(shape: LaunchShape, form: Form) -> LaunchShape:
    stages, inputs = shape.stages_of(form)
    return replace(shape, stages=stages, inputs=inputs)


def right_share(shape: LaunchShape, ranks: int, tokens: int, processors: int) -> float:
    """Return the share of the multiprocessors that the launch for t takes."""
    return math.ceil(shapes.blocks_of(shape, ranks) * math.ceil(tokens / shape.tokens) / shape.blocks) / processors


def sparing(main: LaunchShape, right: LaunchShape, ranks: int, tokens: int, processors: int) -> LaunchShape:
    """Return the shape of a layer's launch beside one for t: an even one leaves multiprocessors to that."""
    share = right_share(right, ranks, tokens, processors)
    if not main.even or share > LONGEST_RIGHT:
        return main
    return replace(main, spared=round(share * processors))


def likeness(shape: LaunchShape, other: LaunchShape) -> int:
    """Return in how many fields two shapes differ, but for how blocks share columns, which is tried first.

    Before all that they should have blocks of as many tokens.
    """
    ours, theirs = asdict(shape), asdict(other)
    differ = sum(ours[name] != theirs[name] for name in ours.keys() - SHARING)
    return differ + 10 * (shape.tokens != other.tokens)


# ------------------------------------------------------------------------------------------------------------ search


class Kernels:
    """Kernels that are compiled into the cache, many at a time, while others are measured."""

    def __init__(self) -> None:
        # Below what is measured meanwhile: on Linux a thread has a priority of its own.
        self._pool = ThreadPoolExecutor(WORKERS, initializer=os.nice, initargs=(10,))
        self._asked: dict[tuple[object, ...], Future[bool]] = {}

    def ask(self, wanted: Iterable[LaunchShape], form: Form) -> list[Future[bool]]:
        """Have kernels of shapes compiled, if that was not asked for before; say of each when the assembler took it."""
        found = []
        for shape in wanted:
            key = tuple(stream.defines_of(shape, form).items())
            if key not in self._asked:
                self._asked[key] = self._pool.submit(_compiles, shape, form)
            found.append(self._asked[key])
        return found

    def ready(self, wanted: Iterable[LaunchShape], form: Form, until: float) -> Iterator[LaunchShape]:
        """Yield shapes as their kernels are there, until so late; leave out those that do not compile."""
        wanted = list(wanted)
        waiting = list(zip(wanted, self.ask(wanted, form), strict=True))
        try:
            while waiting and time.monotonic() < until:
                place = next((place for place, (_, future) in enumerate(waiting) if future.done()), None)
                if place is None:
                    wait([future for _, future in waiting], until - time.monotonic(), FIRST_COMPLETED)
                    continue
                shape, future = waiting.pop(place)
                if future.result():
                    yield shape
        finally:
            # What was not reached is not to delay what is asked for next.
            dropped = {future for _, future in waiting if future.cancel()}
            self._asked = {key: future for key, future in self._asked.items() if future not in dropped}

    def close(self) -> None:
        """Compile no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _compiles(shape: LaunchShape, form: Form) -> bool:
    defines = stream.defines_of(shape, form)
    name, version = stream.KERNEL_NAME, driver.driver_version()
    try:
        cached_cubin(source("stream.cu"), name=name, arch="sm_90a", defines=defines, driver=version)
    except KernelError as error:
        print(f"# {shape} is left out: {str(error)[-200:]}")
        return False
    return True


class Search:
    """Pairs of shapes of one layer at one number of tokens, and what was measured of them.

    Args:
        clock: of the layer.
        kernels: that compiles.
        tokens: of a call.
        until: when to end, by `time.monotonic`.
        processors: multiprocessors of the device.
        log: takes every time, a line each.
    """

    def __init__(
        self, clock: Clock, kernels: Kernels, tokens: int, until: float, processors: int, log: TextIO | None
    ) -> None:
        self._clock, self._kernels, self._tokens, self._log = clock, kernels, tokens, log
        self._begin, self._until, self._processors = time.monotonic(), until, processors
        self._rows, columns = clock.layer
        starts = [sum(self._rows[:one]) for one in range(1, len(self._rows))]
        self.present: Pair = (
            shapes.of_layer(sum(self._rows), columns, tokens, LAYER, starts, self._processors),
            shapes.of_right(clock.ranks, columns, tokens, FACTOR, self._processors, sum(self._rows)),
        )
        self.times: dict[Pair, float] = {}
        self.rival: float | None = None
        """Microseconds of ``cuda-prefill``, with more tokens than the largest block has."""

    def run(self) -> tuple[float, float, Pair]:
        """Return microseconds of the present pair and of the best one, and that; `rival` is measured meanwhile."""
        main, right = self.present
        mains = self._alike(main_candidates(self._rows, self._tokens, self._processors), main)
        rights = self._alike(right_candidates(self._clock.ranks, self._tokens, self._processors), right)
        self._kernels.ask([main, *(one for one in mains if one.tokens == main.tokens)], LAYER)
        self._kernels.ask([right, *rights], FACTOR)
        # Its process would have to compile what is not there yet.
        for _ in (*self._ready([main], LAYER, "layer"), *self._ready([right], FACTOR, "layer")):
            self._time(self.present)
        self._measure(((one, right) for one in self._ready(mains, LAYER, "layer")), "layer")
        best = self._best(2)
        self._measure(((main, one) for one in self._ready(rights, FACTOR, "t") for main, _ in best), "t")
        ranked = self._best(len(self.times))
        some_mains = list(dict.fromkeys(replace(main, spared=0) for main, _ in ranked))[:CROSSED]
        some_rights = list(dict.fromkeys(right for _, right in ranked))[:CROSSED]
        self._measure(product(some_mains, some_rights), "both")
        # The best pairs of all are alike: others are better to start from, too.
        starts = {
            (main.tiles, main.column_groups, main.cluster, main.even): (main, right)
            for main, right in reversed(self._best(len(self.times)))
        }
        for start in sorted(starts.values(), key=self.times.__getitem__)[:STARTS]:
            self._vary(start)
        return self._choose()

    def _end(self, stage: str) -> float:
        return self._begin + STAGES[stage] * (self._until - self._begin)

    def _alike(self, candidates: list[LaunchShape], present: LaunchShape) -> list[LaunchShape]:
        return sorted(candidates, key=lambda shape: likeness(shape, present))

    def _ready(self, wanted: Iterable[LaunchShape], form: Form, stage: str) -> Iterator[LaunchShape]:
        return self._kernels.ready(wanted, form, self._end(stage))

    def _best(self, count: int) -> list[Pair]:
        return sorted(self.times, key=self.times.__getitem__)[:count]

    def _sparing(self, main: LaunchShape, right: LaunchShape) -> LaunchShape:
        return sparing(main, right, self._clock.ranks, self._tokens, self._processors)

    def _measure(self, pairs: Iterable[Pair], stage: str) -> None:
        """Measure pairs, until the stage has to end; even launches spare what the other takes."""
        for main, right in pairs:
            if time.monotonic() > self._end(stage):
                return
            self._time((self._sparing(main, right), right))

    def _time(self, pair: Pair) -> float:
        if pair not in self.times:
            self.times[pair] = self._clock.time(self._tokens, *pair, QUICK)
            self._write(pair, self.times[pair], QUICK)
        return self.times[pair]

    def _write(self, pair: Pair, taken: float, replays: int) -> None:
        if self._log is not None:
            shapes_of_pair = [asdict(shape) for shape in pair]
            self._log.write(json.dumps([*self._clock.layer, self._tokens, taken, replays, *shapes_of_pair]) + "\n")
            self._log.flush()

    def _vary(self, pair: Pair) -> None:
        """Vary the fields of both shapes in turn, and go on from what is faster, until nothing is."""
        gains = True
        while gains and time.monotonic() < self._end("fields"):
            gains = False
            main, right = pair
            for one in (main, right):
                form = LAYER if one is main else FACTOR
                self._kernels.ask((shape for name in VARIED for shape in varied(one, name, form)), form)
            for name in ("spared", *VARIED):
                for options in (self._other_mains, self._other_rights):
                    tried = [one for one in options(pair, name) if one == pair or self._time(one) < math.inf]
                    found = min(tried, key=self.times.__getitem__, default=pair)
                    if self.times[found] < GAIN * self.times[pair]:
                        pair, gains = found, True

    def _other_mains(self, pair: Pair, name: str) -> Iterator[Pair]:
        main, right = pair
        if name == "spared":
            if main.even:
                for spared in sorted({self._sparing(main, right).spared, *(main.spared + more for more in SPARED)}):
                    if 0 <= spared < self._processors // 2:
                        yield replace(main, spared=spared), right
            return
        for shape in self._ready(varied(main, name, LAYER), LAYER, "fields"):
            yield shape, right

    def _other_rights(self, pair: Pair, name: str) -> Iterator[Pair]:
        main, right = pair
        for shape in self._ready(varied(right, name, FACTOR), FACTOR, "fields"):
            yield main, shape
            if self._sparing(main, shape) != main:
                yield self._sparing(main, shape), shape

    def _choose(self) -> tuple[float, float, Pair]:
        pairs = [self.present, *(pair for pair in self._best(FINALISTS + 1) if pair != self.present)]
        taken: dict[Pair, list[float]] = {pair: [] for pair in pairs}
        rival = []
        for _ in range(TURNS):
            for pair, times in taken.items():
                times.append(self._clock.time(self._tokens, *pair, THOROUGH))
            if self._tokens > shapes.TOKEN_TILES[-1]:
                rival.append(self._clock.time_prefill(self._tokens, THOROUGH))
        self.rival = statistics.median(rival) if rival else None
        medians = {pair: statistics.median(times) for pair, times in taken.items()}
        for pair, median in medians.items():
            self._write(pair, median, TURNS * THOROUGH)
        best = min(medians, key=medians.__getitem__)
        return medians[self.present], medians[best], best


def varied(shape: LaunchShape, name: str, form: Form) -> list[LaunchShape]:
    """Return the shapes that differ in this field alone, as far as a form fits and threads have registers."""
    if name not in VARIED:
        return []
    others = (replace(shape, **{name: value}) for value in VARIED[name] if value != getattr(shape, name))
    return [other for other in others if other.fits(form) and has_registers(other)]


def is_ready(clock: Clock) -> bool:
    """Whether there are layers to measure; say it if there are not."""
    try:
        return clock.ranks > 0
    except KernelError as error:
        print(f"# left out: {error}", flush=True)
        return False


# ------------------------------------------------------------------------------------------------------------- table


class Found:
    """Shapes by table, layer and tokens of a block: those that a file has, and what is measured."""

    def __init__(self, path: Path, *, in_step: bool = False) -> None:
        self._path, self._in_step = path, in_step
        self._entries: dict[str, dict[tuple[object, ...], dict[str, object]]] = {"layers": {}, "factors": {}}
        self._note = ""
        if path.exists():
            content = json.loads(path.read_text())
            self._note = content.get("note", "")
            for table, entries in content["measured"].items():
                for entry in entries:
                    self.add(table, entry)

    def add(self, table: str, entry: dict[str, object]) -> None:
        """Take a shape, in place of one of the same layer and tokens."""
        self._entries[table][tuple(entry.get(name) for name in ("rows", "columns", "tokens", "beside"))] = entry

    def unsettled(self, layer: tuple[str, tuple[int, ...], int], tokens: Sequence[int]) -> list[int]:
        """Return the numbers of tokens to search for a layer: not those that a step has settled, if this is none."""
        name, rows, columns = layer
        found = []
        for count in tokens:
            entry = self._entries["layers"].get((sum(rows), columns, shapes.token_tile(count), None), {})
            if self._in_step or count > shapes.TOKEN_TILES[-1] or not entry.get("in_step"):
                found.append(count)
            else:
                print(f"# {name}, {sum(rows)} x {columns}, {count} tokens: found with --in-step, left as it is")
        return found

    def take(self, clock: Clock, tokens: int, pair: Pair, taken: float, rival: float | None) -> None:
        """Take the shapes of a layer; for two tiles of tokens only if that was faster than ``cuda-prefill``."""
        (parts, columns), (main, right) = clock.layer, pair
        rows, size, ranks = sum(parts), shapes.token_tile(tokens), None
        if tokens > size:
            size, ranks = shapes.MOST_TOKENS, clock.ranks
            if rival is None or not taken < rival < math.inf:
                self._entries["layers"].pop((rows, columns, size, None), None)
                self._entries["factors"].pop((clock.ranks, columns, size, rows), None)
                return
        layer = Measured(rows, columns, size, main, ranks, in_step=self._in_step)
        factor = Measured(clock.ranks, columns, size, right, beside=rows, in_step=self._in_step)
        self.add("layers", shapes.as_entry(layer))
        self.add("factors", shapes.as_entry(factor))

    def write(self) -> None:
        """Write the file, an entry a line."""
        tables = []
        for table, entries in self._entries.items():
            lines = ",\n".join(f"   {json.dumps(entry)}" for entry in entries.values())
            tables.append(f'  "{table}": [\n{lines}\n  ]')
        body = ",\n".join(tables)
        card = torch.cuda.get_device_name()
        head = f' "card": "{card}",\n "note": {json.dumps(self._note)},\n'
        self._path.write_text(f'{{\n{head} "measured": {{\n{body}\n }}\n}}\n')


def main() -> None:
    """Measure what the command line asks for, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-2-7b,llama-2-70b", help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--tokens", default="1,16,32,64,128", help="one for each size of block that is wanted")
    parser.add_argument("--layers", default=",".join(SERVED), help="only layers of these names")
    parser.add_argument("--seconds", type=float, default=3600, help="how long all of it may take")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path(shapes.__file__).with_name("stream_shapes.json"),
        help="the file that takes the shapes, in place of those of the same layers and tokens; by default the one that "
        "slimc chooses launch shapes by",
    )
    parser.add_argument(
        "--in-step",
        action="store_true",
        help="measure a decoding step that the layer is part of, a token of each of as many sequences",
    )
    parser.add_argument("--log", type=argparse.FileType("w"), help="write every time here, a line each")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    check_words(parser, "--models", options.models.split(","), LAYERS)
    tokens = [int(count) for count in options.tokens.split(",")]
    names = options.layers.split(",")
    check_words(parser, "--layers", names, SERVED if options.in_step else ALL_LAYERS)
    if options.in_step and max(tokens) > shapes.TOKEN_TILES[-1]:
        parser.error(f"--in-step is for --tokens up to {shapes.TOKEN_TILES[-1]}")
    if reason := no_gpu():
        parser.exit(2, f"error: {reason}\n")
    found, kernels = Found(options.json, in_step=options.in_step), Kernels()
    processors = torch.cuda.get_device_properties().multi_processor_count
    layers = {model: [layer for layer in LAYERS[model] if layer[0] in names] for model in options.models.split(",")}
    wanted = {model: [(layer, found.unsettled(layer, tokens)) for layer in named] for model, named in layers.items()}
    left = sum(len(counts) for named in wanted.values() for _, counts in named)
    for model, named in wanted.items():
        # All are made before any is measured: that would disturb it.
        clocks = [
            (name, Clock(rows, columns, (model, name) if options.in_step else None), counts)
            for (name, rows, columns), counts in named
            if counts
        ]
        ready = [one for one in clocks if is_ready(one[1])]
        jobs = [(name, clock, count) for name, clock, counts in ready for count in counts]
        left -= sum(len(counts) for _, _, counts in clocks) - len(jobs)
        for name, clock, count in jobs:
            share = (until - time.monotonic()) / left
            search = Search(clock, kernels, count, time.monotonic() + share, processors, options.log)
            before, taken, pair = search.run()
            rival = "" if search.rival is None else f" (cuda-prefill {search.rival:.2f})"
            print(
                f"{model} {name} {count} tokens: {before:.2f} to {taken:.2f} us{rival}, {len(search.times)} pairs in "
                f"{share:.0f} s, {pair[0]}, {pair[1]}",
                flush=True,
            )
            found.take(clock, count, pair, taken, search.rival)
            # An interrupted run has measured something too.
            found.write()
            left -= 1
        for _, clock, _ in clocks:
            clock.close()
    kernels.close()


if __name__ == "__main__":
    main()
