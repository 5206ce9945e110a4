"""Which launch shapes of ``cuda-stream`` take the least time: writes ``slimc/backends/cuda/stream_shapes.json``.

    python benchmarks/stream_shapes.py [--models llama-2-7b,llama-2-70b] [--tokens 1,16,32,64,128] [--json FILE]

Needs a Hopper GPU. Each layer is measured as in ``slimc bench`` (cold weights, calls of a CUDA graph, median): first
every shape of the layer's launch with one shape of the launch for t, then the best of them with all of that one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from slimc.backends.cuda import driver, shapes, stream
from slimc.backends.cuda.cache import cached_cubin
from slimc.backends.cuda.counters import Counters
from slimc.backends.cuda.layer import FragmentLayer, prepare, source, stack
from slimc.backends.cuda.shapes import Form, LaunchShape
from slimc.bench import check_words, no_gpu
from slimc.bench.linear import DTYPE, LAYERS, SERVED, copies, microseconds, random_layer
from slimc.errors import KernelError

LAYER = Form(sparse=True, group=0, adapters=True, dtype=DTYPE)
FACTOR = Form(sparse=False, group=64, adapters=False, dtype=DTYPE)
BEST = 3
"""Shapes of the layer's launch that are measured with every shape of the other."""

BLOCKS = (0.6, 2.1)
"""A launch has so many blocks a multiprocessor, or they are not worth measuring."""


def candidates(rows: tuple[int, ...], tokens: int, processors: int) -> list[LaunchShape]:
    """Return shapes of the layer's launch."""
    starts = [sum(rows[:one]) for one in range(1, len(rows))]
    tile, total = shapes.token_tile(tokens), sum(rows)
    found = []
    for shape in shapes.suiting(shapes.CANDIDATES, tile, LAYER, starts):
        waves = shapes.blocks_of(shape, total) / processors
        if BLOCKS[0] <= waves <= BLOCKS[1] or (shape.cluster == 1 and waves > BLOCKS[0]):
            found.append(shape)
    return found


def right_candidates(ranks: int, tokens: int, processors: int) -> list[LaunchShape]:
    """Return shapes of the launch for t."""
    tile = min(shapes.token_tile(tokens), 64)
    possible = shapes.suiting(shapes.RIGHT_CANDIDATES, tile, FACTOR, ())
    return [shape for shape in possible if shape.cluster > 2 and shapes.blocks_of(shape, ranks) <= 2 * processors]


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


def best_shapes(
    layers: list[FragmentLayer], rows: tuple[int, ...], tokens: int
) -> tuple[float, LaunchShape, LaunchShape]:
    """Return the least time of a call in microseconds, and the two shapes that take it."""
    processors = torch.cuda.get_device_properties().multi_processor_count
    columns = layers[0].format.weight.columns
    x = torch.randn(tokens, columns, dtype=DTYPE, device="cuda")
    mains = compiling(candidates(rows, tokens, processors), LAYER)
    rights = compiling(right_candidates(layers[0].ranks, tokens, processors), FACTOR)

    def time(main: LaunchShape, right: LaunchShape) -> float:
        def call(layer: FragmentLayer, plan: stream.Plan) -> Tensor:
            return stream.launch(plan, x, layer, None)

        for layer in layers:
            # Each captured launch takes counters for good; without any at hand the graph would have to make them.
            layer.counters = Counters(layer.codes.device)
        return microseconds(
            [partial(call, layer, stream.make_plan(layer, DTYPE, tokens, main, right)) for layer in layers]
        )

    ranked = sorted(mains, key=lambda main: time(main, rights[0]))
    pairs = [(main, right) for main in ranked[:BEST] for right in rights]
    times = {pair: time(*pair) for pair in pairs}
    best = min(times, key=times.__getitem__)
    return times[best], *best


class Found:
    """Shapes by table, layer and tokens of a block: those that a file has, and what is measured."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, dict[tuple[object, ...], dict[str, object]]] = {"layers": {}, "factors": {}}
        if path.exists():
            for table, entries in json.loads(path.read_text())["measured"].items():
                for entry in entries:
                    self.add(table, entry)

    def add(self, table: str, entry: dict[str, object]) -> None:
        """Take a shape, in place of one of the same layer and tokens."""
        shape = cast("dict[str, int]", entry["shape"])
        self._entries[table][entry["rows"], entry["columns"], shape["tokens"]] = entry

    def write(self) -> None:
        """Write the file, an entry a line."""
        tables = []
        for table, entries in self._entries.items():
            lines = ",\n".join(f"   {json.dumps(entry)}" for entry in entries.values())
            tables.append(f'  "{table}": [\n{lines}\n  ]')
        body = ",\n".join(tables)
        card = torch.cuda.get_device_name()
        self._path.write_text(f'{{\n "card": "{card}",\n "measured": {{\n{body}\n }}\n}}\n')


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
    options = parser.parse_args()
    check_words(parser, "--models", options.models.split(","), LAYERS)
    if reason := no_gpu():
        parser.exit(2, f"error: {reason}\n")
    found = Found(options.json)
    for model in options.models.split(","):
        for name, rows, columns in LAYERS[model]:
            if name not in SERVED:
                continue
            first = _make(rows, columns, 0)
            layers = [first, *(_make(rows, columns, copy) for copy in range(1, copies(first.nbytes)))]
            for tokens in map(int, options.tokens.split(",")):
                taken, main_shape, right_shape = best_shapes(layers, rows, tokens)
                print(f"{model} {name} {tokens} tokens: {taken:.1f} us, {main_shape}, {right_shape}", flush=True)
                found.add("layers", shapes.as_entry(sum(rows), columns, main_shape))
                found.add("factors", shapes.as_entry(first.ranks, columns, right_shape))
            # An interrupted run has measured something too.
            found.write()
            del first, layers
            torch.cuda.empty_cache()


def _make(rows: tuple[int, ...], columns: int, copy: int) -> FragmentLayer:
    parts = [prepare(random_layer(part, columns, 100 * copy + seed)) for seed, part in enumerate(rows)]
    return stack(parts) if len(parts) > 1 else parts[0]


if __name__ == "__main__":
    main()
