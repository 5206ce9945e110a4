"""Which launch shapes of ``cuda-stream`` take the least time: writes ``slimc/backends/cuda/stream_shapes.json``.

    python benchmarks/stream_shapes.py [--models llama-2-7b,llama-2-70b] [--tokens 1,16,32,64,128] [--json FILE]

Needs a Hopper GPU. Each layer is measured as in ``slimc bench`` (cold weights, calls of a CUDA graph, median): first
every shape of the layer's launch with one shape of the launch for t, then the best of them with all of that one, then
the best pair with fewer weights under way at once and with other first columns of its blocks. An even launch leaves to
the one for t the multiprocessors that it takes.

Measuring is done in a process of its own, which is ended if a launch does not: that shape is left out, and reported.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from slimc.backends.cuda import driver, shapes, stream
from slimc.backends.cuda.cache import cached_cubin
from slimc.backends.cuda.counters import Counters
from slimc.backends.cuda.layer import FragmentLayer, prepare, source, stack
from slimc.backends.cuda.shapes import Form, LaunchShape, Measured
from slimc.bench import check_words, no_gpu
from slimc.bench.linear import DTYPE, LAYERS, SERVED, copies, microseconds, random_layer
from slimc.errors import KernelError

LAYER = Form(sparse=True, group=0, adapters=True, dtype=DTYPE)
FACTOR = Form(sparse=False, group=64, adapters=False, dtype=DTYPE)
BEST = 3
"""Shapes of the layer's launch that are measured with every shape of the other."""

BLOCKS = (0.45, 2.1)
"""A launch has so many blocks a multiprocessor, or they are not worth measuring."""

LONGEST_RIGHT = 0.35
"""Share of the multiprocessors that an even launch may leave to the launch for t."""

WHOLE = 0.9
"""Share of the rest that it must keep, to have each tile divided among as many blocks as any other."""

BYTES_UNDER_WAY = (24 << 10, 40 << 10, 60 << 10)
"""Of weights, that a block brings at once."""

TURNS = (0, 1, 3, 5, 9, 13)
"""Slots between the first columns of a block and those of the next."""

ALONE = ((4, 1), (3, 1), (2, 1), (2, 2), (1, 3), (1, 4))
"""Warpgroups for rows and for columns of a launch for t whose blocks have a multiprocessor each."""

START_SECONDS, CASE_SECONDS = 60, 10
"""How long making the layers, and one measurement, may take."""


def everything(tile: int) -> list[LaunchShape]:
    """Return shapes beyond those that slimc considers, many of which no layer will like."""
    groups = [
        (1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 2, 1), (1, 2, 2), (1, 3, 1), (1, 4, 1), (2, 1, 1), (2, 1, 2), (2, 2, 1),
        (3, 1, 1), (3, 2, 1), (4, 2, 1),
    ]  # fmt: skip
    # Steps, slots of weights, slots of activations.
    few = [(128, 0, 0), (256, 0, 0)]
    many = [(128, stages, inputs) for stages in (0, 8) for inputs in (3, 4, 6)] + [(256, 0, 2), (256, 0, 3)]
    found = []
    for (row_tiles, row_groups, column_groups), blocks in itertools.product(groups, (1, 2, 3)):
        for rest in few if tile <= 16 else many:
            shape = LaunchShape(tile, row_tiles, row_groups, column_groups, 1, blocks, *rest)
            rings = [shape, replace(shape, inputs=2 * column_groups)] if tile <= shapes.FEW_TOKENS else [shape]
            # A multiprocessor has four parts, each of which holds its share of the warps.
            registers = shape.registers[0] or (1 << 14) // 32 // -(-blocks * (shape.threads // 32) // 4)
            if registers >= row_tiles * (tile // 2 + 16) + 24 and (tile <= 16 or blocks < 3):
                found += rings
    if tile <= shapes.FEW_TOKENS:
        alone = [replace(shape, alone=True) for shape in found if shape.blocks == 2]
        found += alone
    return found + [replace(shape, even=True) for shape in found if shape.column_groups == 1]


def candidates(
    possible: dict[int, list[LaunchShape]], rows: tuple[int, ...], tokens: int, processors: int
) -> list[LaunchShape]:
    """Return shapes of the layer's launch."""
    starts = [sum(rows[:one]) for one in range(1, len(rows))]
    tile, total = shapes.token_tile(tokens), sum(rows)
    found = {}
    for shape in shapes.suiting(possible, tile, LAYER):
        waves = shapes.blocks_of(shape, total, starts) / processors
        if shape.alone and waves > 1 and not shape.even:
            continue
        if shape.even or BLOCKS[0] <= waves <= BLOCKS[1] or (shape.cluster == 1 and waves > BLOCKS[0]):
            stages, inputs = shape.stages_of(LAYER)
            found[replace(shape, stages=stages, inputs=inputs)] = shape
    return list(found.values())


def bringing_otherwise(shape: LaunchShape) -> Iterator[LaunchShape]:
    """Yield shapes of the same kernel that bring weights in other portions, or from other columns on."""
    stages, _ = shape.stages_of(LAYER)
    windows = {max(2, round(wanted / shape.slot_bytes(LAYER))) for wanted in BYTES_UNDER_WAY}
    for window, turn in itertools.product((0, *sorted(one for one in windows if one < stages)), TURNS):
        if window or turn:
            yield replace(shape, window=window, turn=turn)


def right_candidates(
    possible: dict[int, list[LaunchShape]], ranks: int, tokens: int, processors: int
) -> list[LaunchShape]:
    """Return shapes of the launch for t."""
    tile = shapes.token_tile(tokens)
    suiting = shapes.suiting(possible, tile, FACTOR)
    found = [shape for shape in suiting if shape.cluster > 2 and shapes.blocks_of(shape, ranks) <= 2 * processors]
    if tile < 64:
        return found
    # Blocks that have a multiprocessor each take no more of them than they need, wherever they are launched.
    alone = {tile: [LaunchShape(tile, 1, *groups, 1, 1, 128) for groups in ALONE]}
    return found + [
        shape
        for shape in shapes.suiting(alone, tile, FACTOR)
        if shape.cluster > 1 and right_share(shape, ranks, tokens, processors) <= LONGEST_RIGHT
    ]


def right_share(shape: LaunchShape, ranks: int, tokens: int, processors: int) -> float:
    """Return the share of the multiprocessors that the launch for t takes."""
    return math.ceil(shapes.blocks_of(shape, ranks) * math.ceil(tokens / shape.tokens) / shape.blocks) / processors


def sparing(
    main: LaunchShape, right: LaunchShape, rows: tuple[int, ...], ranks: int, tokens: int, processors: int
) -> LaunchShape:
    """Return the shape of a layer's launch beside one for t: an even one leaves multiprocessors to that."""
    share = right_share(right, ranks, tokens, processors)
    if not main.even or share > LONGEST_RIGHT:
        return main
    rest = processors - round(share * processors)
    starts = [sum(rows[:one]) for one in range(1, len(rows))]
    tiles = shapes.blocks_of(main, sum(rows), starts) * math.ceil(tokens / main.tokens)
    whole = rest // tiles * tiles
    return replace(main, spared=processors - (whole if whole >= WHOLE * rest else rest))


def compiling(wanted: Iterable[LaunchShape], form: Form) -> list[LaunchShape]:
    """Compile the kernels into the cache, many at a time; return the shapes that the assembler has registers for."""

    def compiles(shape: LaunchShape) -> bool:
        defines = stream.defines_of(shape, form)
        name, version = stream.KERNEL_NAME, driver.driver_version()
        try:
            cached_cubin(source("stream.cu"), name=name, arch="sm_90a", defines=defines, driver=version)
        except KernelError as error:
            print(f"# {shape} is left out: {str(error)[-200:]}")
            return False
        return True

    shapes_wanted = list(wanted)
    with ThreadPoolExecutor() as pool:
        return [shape for shape, able in zip(shapes_wanted, pool.map(compiles, shapes_wanted), strict=True) if able]


class Clock:
    """Measures calls of one layer in a process of its own, and starts another when one does not answer.

    Args:
        rows: of the layers that are stacked.
        columns: of the layer.

    Attributes:
        ranks: of the factors of all of them.
    """

    def __init__(self, rows: tuple[int, ...], columns: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._layer = rows, columns
        self._start()

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, *self._layer), daemon=True)
        self._process.start()
        theirs.close()
        if not self._connection.poll(START_SECONDS):
            raise KernelError(f"layers of {self._layer} were not made within {START_SECONDS} seconds")
        self.ranks = int(self._connection.recv())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def time(self, tokens: int, main: LaunchShape, right: LaunchShape) -> float:
        """Return microseconds of a call, or infinity if it fails or does not end."""
        try:
            self._connection.send((tokens, main, right))
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
        return taken


def _serve(connection: Connection, rows: tuple[int, ...], columns: int) -> None:
    first = _make(rows, columns, 0)
    layers = [first, *(_make(rows, columns, copy) for copy in range(1, copies(first.nbytes)))]
    expected: dict[int, Tensor] = {}
    connection.send(first.ranks)
    while True:
        tokens, main, right = connection.recv()
        try:
            connection.send((_measure(layers, expected, tokens, main, right), "", True))
        except KernelError as error:
            connection.send((math.inf, str(error)[:200], True))
        except RuntimeError as error:
            # After a fault a process has no working device.
            connection.send((math.inf, str(error)[:200], False))


def _measure(
    layers: list[FragmentLayer], expected: dict[int, Tensor], tokens: int, main: LaunchShape, right: LaunchShape
) -> float:
    columns = layers[0].format.columns
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, columns, dtype=DTYPE, device="cuda", generator=generator)

    def call(layer: FragmentLayer, plan: stream.Plan) -> Tensor:
        return stream.launch(plan, x, layer, None)

    calls = []
    for layer in layers:
        # Each captured launch takes counters for good; without any at hand the graph would have to make them.
        layer.counters = Counters(layer.codes.device)
        calls.append(partial(call, layer, stream.make_plan(layer, DTYPE, tokens, main, right)))
    y = calls[0]().float()
    wanted = expected.setdefault(tokens, y)
    if not bool((y - wanted).abs().max() <= 0.02 * wanted.abs().max()):
        raise KernelError("the result is not that of the shape before")
    return microseconds(calls)


def best_shapes(
    clock: Clock, rows: tuple[int, ...], tokens: int, *, wide: bool, log: TextIO | None
) -> tuple[float, LaunchShape, LaunchShape]:
    """Return the least time of a call in microseconds, and the two shapes that take it."""
    processors = torch.cuda.get_device_properties().multi_processor_count
    tile = shapes.token_tile(tokens)
    mains = candidates({tile: everything(tile)} if wide else shapes.CANDIDATES, rows, tokens, processors)
    rights = right_candidates(shapes.RIGHT_CANDIDATES, clock.ranks, tokens, processors)
    mains, rights = compiling(mains, LAYER), compiling(rights, FACTOR)

    def taken(main: LaunchShape, right: LaunchShape) -> float:
        main = sparing(main, right, rows, clock.ranks, tokens, processors)
        result = clock.time(tokens, main, right)
        if log is not None:
            log.write(json.dumps([rows, tokens, result, _short(main), main.alone, _short(right)]) + "\n")
            log.flush()
        return result

    ranked = sorted(mains, key=lambda main: taken(main, rights[0]))
    times = {(main, right): taken(main, right) for main in ranked[:BEST] for right in rights}
    main, right = min(times, key=times.__getitem__)
    for refined in bringing_otherwise(main):
        times[refined, right] = taken(refined, right)
    main, right = min(times, key=times.__getitem__)
    return times[main, right], sparing(main, right, rows, clock.ranks, tokens, processors), right


def _short(shape: LaunchShape) -> str:
    groups = f"{shape.row_tiles}.{shape.row_groups}.{shape.column_groups} cluster {shape.cluster} blocks {shape.blocks}"
    groups += f" even spared {shape.spared}" if shape.even else ""
    groups += f" window {shape.window} turn {shape.turn}"
    return f"{shape.tokens}: {groups} step {shape.step} stages {shape.stages} inputs {shape.inputs}"


class Found:
    """Shapes by table, layer and tokens of a block: those that a file has, and what is measured."""

    def __init__(self, path: Path) -> None:
        self._path = path
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
        self._entries[table][entry["rows"], entry["columns"], entry["tokens"]] = entry

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
    parser.add_argument(
        "--json",
        type=Path,
        default=Path(shapes.__file__).with_name("stream_shapes.json"),
        help="the file that takes the shapes, in place of those of the same layers and tokens; by default the one that "
        "slimc chooses launch shapes by",
    )
    parser.add_argument("--wide", action="store_true", help="measure many more shapes than slimc considers")
    parser.add_argument("--log", type=argparse.FileType("w"), help="write every time here, a line each")
    parser.add_argument("--layers", default=",".join(SERVED), help="only layers of these names")
    options = parser.parse_args()
    check_words(parser, "--models", options.models.split(","), LAYERS)
    if reason := no_gpu():
        parser.exit(2, f"error: {reason}\n")
    found = Found(options.json)
    for model in options.models.split(","):
        for name, rows, columns in LAYERS[model]:
            if name not in options.layers.split(","):
                continue
            clock = Clock(rows, columns)
            for tokens in map(int, options.tokens.split(",")):
                taken, main_shape, right_shape = best_shapes(clock, rows, tokens, wide=options.wide, log=options.log)
                print(f"{model} {name} {tokens} tokens: {taken:.1f} us, {main_shape}, {right_shape}", flush=True)
                tile = shapes.token_tile(tokens)
                found.add("layers", shapes.as_entry(Measured(sum(rows), columns, tile, main_shape)))
                found.add("factors", shapes.as_entry(Measured(clock.ranks, columns, tile, right_shape)))
            clock.close()
            # An interrupted run has measured something too.
            found.write()


def _make(rows: tuple[int, ...], columns: int, copy: int) -> FragmentLayer:
    parts = [prepare(random_layer(part, columns, 100 * copy + seed)) for seed, part in enumerate(rows)]
    return stack(parts) if len(parts) > 1 else parts[0]


if __name__ == "__main__":
    main()
