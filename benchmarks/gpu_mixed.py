"""Layers of Llama-2-7B whose groups of columns have 1 to 6 bits, on one GPU, against the dense product in bfloat16.

    python benchmarks/gpu_mixed.py [--tokens 1,4,8,16,32,64,128] [--mixtures "3 bits,2 bits"] [--shapes] [--json FILE]

Groups have 128 columns and a zero point; ``3 bits`` mixes 2, 3 and 4, ``2 bits`` 1, 2 and 3; wide ones have codes of
more than 4 bits among them, as ``mixed-w3`` and ``mixed-w4`` do. A call finds its weight in
device memory, not in the cache: it goes round among copies that together exceed 150 MB. Calls are captured into a CUDA
graph; a figure is the median of its replays, in microseconds a call. ``--shapes`` tries ways of dividing a launch, for
which kernels are compiled first, in several processes.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends.cuda import mixed
from slimc.bench import check_words, no_gpu
from slimc.bench.linear import copies, microseconds
from slimc.runtime.formats import LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear

LAYERS = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
MIXTURES = {
    "3 bits": (3, 2, 4, 3),
    "2 bits": (2, 1, 3, 2),
    "3 bits wide": (3, 2, 5, 2),
    "4 bits wide": (4, 3, 6, 3),
}
GROUP = 128
DTYPE = torch.bfloat16
SHAPES = [mixed.LaunchShape(tiles, warps) for tiles in (1, 2, 4) for warps in (4, 8, 16) if tiles * warps <= 32]


def random_layer(rows: int, columns: int, mixture: tuple[int, ...]) -> PackedLinear:
    """Return a layer of random codes."""
    widths = tuple(mixture[index % len(mixture)] for index in range(columns // GROUP))
    spec = LinearFormat(WeightFormat(rows, columns, max(widths), GROUP, asymmetric=True, dtype=DTYPE, widths=widths))
    named: dict[str, Tensor] = {}
    for name, (shape, dtype) in spec.tensor_specs().items():
        if dtype == torch.uint8:
            named[name] = torch.randint(0, 1 if name == "zero_point" else 256, shape, dtype=dtype, device="cuda")
        else:
            named[name] = ((torch.rand(shape, device="cuda") + 0.5) * 0.01).to(dtype)
    return PackedLinear.from_tensors(spec, named)


def compile_shape(shape: mixed.LaunchShape) -> None:
    """Compile the launches of one shape, for this process and those after it."""
    for widest in (4, 5, 6):
        layer = mixed.prepare(random_layer(16, GROUP, (widest,)))
        for tokens in (8, 16, 32):
            if mixed.fits(shape, tokens):
                launched(layer, torch.zeros(tokens, GROUP, dtype=DTYPE, device="cuda"), shape)


def launched(layer: mixed.MixedLayer, x: Tensor, shape: mixed.LaunchShape) -> Tensor:
    """Multiply by one launch of this shape."""
    y = x.new_empty(len(x), layer.format.rows)
    mixed.launch(layer, shape, x, None, y)
    return y


def main() -> None:
    """Measure, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,4,8,16,32,64,128")
    parser.add_argument("--mixtures", default=",".join(MIXTURES), help="only these, by name")
    parser.add_argument("--shapes", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = options.mixtures.split(",")
    check_words(parser, "--mixtures", names, MIXTURES)
    if reason := no_gpu():
        parser.exit(2, f"error: {reason}\n")
    counts = [int(count) for count in options.tokens.split(",")]
    if options.shapes:
        with ProcessPoolExecutor(len(SHAPES), get_context("spawn")) as pool:
            list(pool.map(compile_shape, SHAPES))
    print(torch.cuda.get_device_name())
    results: list[dict[str, object]] = []
    for name, (rows, columns) in LAYERS.items():
        dense = [torch.randn(rows, columns, dtype=DTYPE, device="cuda") for _ in range(copies(2 * rows * columns))]
        inputs = {count: torch.randn(count, columns, dtype=DTYPE, device="cuda") for count in counts}
        cublas = {
            count: microseconds([partial(functional.linear, x, weight) for weight in dense])
            for count, x in inputs.items()
        }
        for mixture, widths in ((name, MIXTURES[name]) for name in names):
            packed = random_layer(rows, columns, widths)
            nbytes = packed.format.nbytes()
            layers = [mixed.prepare(random_layer(rows, columns, widths)) for _ in range(copies(nbytes))]
            for count, x in inputs.items():
                row: dict[str, object] = {
                    "layer": name,
                    "mixture": mixture,
                    "tokens": count,
                    "cublas_us": cublas[count],
                    "mixed_us": microseconds([partial(mixed.run, x, layer, None) for layer in layers]),
                    "dense_us": microseconds([partial(mixed.run_dense, x, layer, None) for layer in layers]),
                }
                row["over_cublas"] = cublas[count] / row["mixed_us"]
                row["gigabytes_per_second"] = nbytes / row["mixed_us"] / 1e3
                if options.shapes and count <= mixed.LAUNCH_TOKENS:
                    row["shapes"] = {
                        f"{shape.tiles} x {shape.warps}": microseconds(
                            [partial(launched, one, x, shape) for one in layers]
                        )
                        for shape in SHAPES
                        if mixed.fits(shape, count)
                    }
                results.append(row)
                tried = " ".join(f"{key}: {value:.1f}" for key, value in row.get("shapes", {}).items())
                print(
                    f"{name:8} {mixture} {count:5} tokens: mixed {row['mixed_us']:7.1f} dense {row['dense_us']:7.1f} "
                    f"cuBLAS {row['cublas_us']:7.1f} ({row['over_cublas']:.2f} x, "
                    f"{row['gigabytes_per_second']:.0f} GB/s) {tried}",
                    flush=True,
                )
            del layers
        del dense
    if options.json:
        command = f'python benchmarks/gpu_mixed.py --tokens {options.tokens} --mixtures "{options.mixtures}"'
        command += " --shapes" * options.shapes
        record = {"command": command, "device": torch.cuda.get_device_name(), "rows": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
