"""Linear layers of Llama models on one GPU: slimc's kernels against cuBLAS in bf16 and other people's int4.

    python benchmarks/gpu_linear.py [--models llama-2-7b,llama-2-70b] [--tokens 1,16,64,128,2048] [--json FILE]

slimc's layer is 2:4 sparse, 4 bit with one scale a tensor, with 4-bit adapters of rank 0.1; stacked ones (q, k and v,
or gate and up) keep the adapters of each. Peers are int4 with a scale every 128 columns and have no adapters; those
that are installed are measured: humming-kernels, and torch's own `_weight_int4pack_mm`.

A call finds its weight in device memory, not in the cache: it goes round among copies that together exceed 150 MB.
Calls are captured into a CUDA graph; a figure is the median of its replays, in microseconds a call. All columns of a
row are taken one after another in the same process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from slimc.backends.cuda import decode, hopper, prefill
from slimc.backends.cuda.layer import FragmentLayer, prepare, stack
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear

COLD_BYTES = 150e6
REPLAYS = 15
RANK = 0.1
INT4_BITS = 4.125

LAYERS: dict[str, list[tuple[str, tuple[int, ...], int]]] = {
    "llama-2-7b": [
        ("qkv", (4096, 4096, 4096), 4096),
        ("o", (4096,), 4096),
        ("gate_up", (11008, 11008), 4096),
        ("down", (4096,), 11008),
        ("gate", (11008,), 4096),
    ],
    "llama-2-13b": [
        ("qkv", (5120, 5120, 5120), 5120),
        ("o", (5120,), 5120),
        ("gate_up", (13824, 13824), 5120),
        ("down", (5120,), 13824),
        ("gate", (13824,), 5120),
    ],
    "llama-2-70b": [
        ("qkv", (8192, 1024, 1024), 8192),
        ("o", (8192,), 8192),
        ("gate_up", (28672, 28672), 8192),
        ("down", (8192,), 28672),
        ("gate", (28672,), 8192),
        ("k", (1024,), 8192),
    ],
    "llama-3-8b": [
        ("qkv", (4096, 1024, 1024), 4096),
        ("o", (4096,), 4096),
        ("gate_up", (14336, 14336), 4096),
        ("down", (4096,), 14336),
        ("gate", (14336,), 4096),
        ("k", (1024,), 4096),
    ],
}
"""For each model its layers: name, rows of the layers that are stacked, columns."""

MEAN_OVER = ("qkv", "o", "gate_up", "down")
"""The layers as they are served."""


def random_layer(rows: int, columns: int, seed: int) -> FragmentLayer:
    """Return a layer of random codes in the kernels' form."""
    rank = int(RANK * min(rows, columns))
    dtype = torch.bfloat16
    weight = WeightFormat(rows, columns, bits=4, per_tensor=True, sparsity=NM(2, 4), dtype=dtype)
    factors = [WeightFormat(*shape, bits=4, group=64, dtype=dtype) for shape in ((rows, rank), (rank, columns))]
    spec = LinearFormat(weight, *factors)
    generator = torch.Generator("cuda").manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (shape, kind) in spec.tensor_specs().items():
        if kind == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device="cuda")
        else:
            tensors[name] = ((torch.rand(shape, generator=generator, device="cuda") + 0.5) * 0.01).to(kind)
    masks = torch.tensor([3, 5, 9, 6, 10, 12], dtype=torch.uint8, device="cuda")
    nibbles = masks[torch.randint(6, (rows, columns // 8, 2), generator=generator, device="cuda")]
    tensors["pattern"] = nibbles[..., 0] | (nibbles[..., 1] << 4)
    return prepare(PackedLinear.assemble(spec, tensors))


def copies(nbytes: float) -> int:
    """Return how many copies of a weight exceed the cache."""
    return max(2, math.ceil(COLD_BYTES / nbytes))


def microseconds(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Return the median time of a call, all of them replayed from one graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    del results
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Return bytes a second of a large copy on the device, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds([lambda: target.copy_(source)] * 4) * 1e6


def humming(rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    """Return humming's int4 layer."""
    from humming.layer import HummingLayer  # type: ignore[import-not-found]

    config = {"dtype": "int4", "group_size": 128}
    layer = HummingLayer(shape_n=rows, shape_k=columns, weight_config=config, torch_dtype=torch.bfloat16).cuda()
    layer.load_from_unquantized(torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda"))
    layer.transform()
    return layer


def tinygemm(rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    """Return torch's int4 product."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(columns // 128, rows, 2, dtype=torch.bfloat16, device="cuda")
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales)


PEERS = {"humming": (humming, 4096), "tinygemm": (tinygemm, 64)}
"""How to make each peer's layer, and the most tokens it is measured at."""


PREFILL_NAMES: dict[prefill.Activation | None, str] = {
    None: "cuda-prefill",
    "int8": "cuda-prefill-int8",
    "float8_e4m3fn": "cuda-prefill-float8",
}
"""What the kernel for many tokens is called, by what activations are rounded to."""


def launches(layer: FragmentLayer, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return slimc's kernels that compute this number of tokens."""
    found: dict[str, Callable[[], Tensor]] = {}
    tokens = len(x)
    if tokens <= decode.MAX_TOKENS:
        plan = decode.make_plan(layer, x.dtype, tokens)
        found["cuda-decode"] = lambda: decode.launch(plan, x, layer, None)
    if torch.cuda.get_device_capability()[0] == 9:
        if tokens < prefill.FEWEST_TOKENS:
            hopper_plan = hopper.make_plan(layer, x.dtype, tokens)
            found["cuda-hopper"] = lambda: hopper.launch(hopper_plan, x, layer, None)
        else:
            for activation, name in PREFILL_NAMES.items():
                plan_of_many = prefill.make_plan(layer, x.dtype, tokens, activation)
                found[name] = partial(prefill.launch, plan_of_many, x, layer, None)
    return found


def chosen(tokens: int) -> str:
    """Return the kernel that a layer takes for this number of tokens."""
    if tokens >= prefill.FEWEST_TOKENS:
        return PREFILL_NAMES[None]
    return "cuda-hopper" if tokens >= hopper.FEWEST_TOKENS else "cuda-decode"


def measure(
    rows: tuple[int, ...], columns: int, tokens: Sequence[int], bandwidth: float, peer_names: Sequence[str]
) -> list[dict[str, object]]:
    """Measure one layer at every number of tokens."""
    total = sum(rows)
    dense = [
        torch.randn(total, columns, dtype=torch.bfloat16, device="cuda") * 0.02
        for _ in range(copies(2 * total * columns))
    ]
    first = [random_layer(part, columns, seed) for seed, part in enumerate(rows)]
    layers = [stack(first) if len(rows) > 1 else first[0]]
    for copy in range(1, copies(layers[0].nbytes)):
        parts = [random_layer(part, columns, 100 * copy + seed) for seed, part in enumerate(rows)]
        layers.append(stack(parts) if len(rows) > 1 else parts[0])
    peers = {}
    for name in peer_names:
        make, most = PEERS[name]
        try:
            made = [make(total, columns) for _ in range(copies(INT4_BITS / 8 * total * columns))]
        except Exception as error:
            print(f"# {name} is not measured: {type(error).__name__}: {str(error)[:120]}")
            continue
        peers[name] = made, most
    results = []
    for count in tokens:
        x = torch.randn(count, columns, dtype=torch.bfloat16, device="cuda")
        row: dict[str, object] = {"rows": rows, "columns": columns, "tokens": count}
        bf16 = row["cublas_us"] = microseconds([partial(torch.nn.functional.linear, x, weight) for weight in dense])
        for name in launches(layers[0], x):
            row[f"{name}_us"] = microseconds([launches(layer, x)[name] for layer in layers])
        ours = float(row[f"{chosen(count)}_us"])  # type: ignore[arg-type]
        row |= {"kernel": chosen(count), "slimc_us": ours, "over_cublas": bf16 / ours}
        row |= {
            f"{kind}_over_cublas": bf16 / float(row[f"{name}_us"])  # type: ignore[arg-type]
            for kind, name in PREFILL_NAMES.items()
            if kind is not None and f"{name}_us" in row
        }
        row["gigabytes_per_second"] = layers[0].nbytes / ours / 1e3
        row["share_of_copy"] = layers[0].nbytes / ours * 1e6 / bandwidth
        for name, (made, most) in peers.items():
            if count <= most:
                try:
                    row[f"{name}_us"] = microseconds([partial(layer, x) for layer in made])
                    row[f"over_{name}"] = float(row[f"{name}_us"]) / ours  # type: ignore[arg-type]
                except Exception as error:
                    print(f"# {name} at {count} tokens: {type(error).__name__}: {str(error)[:120]}")
        results.append(row)
    return results


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def print_means(rows: Sequence[dict[str, object]], tokens: Sequence[int]) -> None:
    """Print the mean ratios of each model over the layers as they are served."""
    for model in dict.fromkeys(str(row["model"]) for row in rows):
        for count in tokens:
            of = [row for row in rows if (row["model"], row["tokens"]) == (model, count) and row["layer"] in MEAN_OVER]
            keys = [key for key in of[0] if "over_" in key and all(key in row for row in of)]
            means = (f"{key.replace('_', ' ')} {geometric_mean([float(row[key]) for row in of]):.2f}x" for key in keys)  # type: ignore[arg-type]
            print(f"{model} at {count} tokens, geometric means: {', '.join(means)}")


def plot(rows: Sequence[dict[str, object]], to: Path) -> None:
    """Draw the ratio over cuBLAS by tokens, a line a layer."""
    import matplotlib.pyplot as plt  # type: ignore[import-not-found]

    figure, axes = plt.subplots(figsize=(9, 5))
    for key in dict.fromkeys((row["model"], row["layer"]) for row in rows):
        of = [row for row in rows if (row["model"], row["layer"]) == key]
        axes.plot(
            [row["tokens"] for row in of], [row["over_cublas"] for row in of], marker="o", label=" ".join(map(str, key))
        )
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="tokens", ylabel="times as fast as cuBLAS in bf16")
    axes.legend(fontsize="x-small")
    figure.savefig(to, bbox_inches="tight")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-2-7b,llama-2-70b", help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--layers", default="", help="only layers of these names, such as qkv,o,gate_up,down")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,256,1024,2048")
    parser.add_argument("--peers", default=",".join(PEERS), help="other people's kernels; empty for none")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--plot", type=Path, help="draw the ratios over cuBLAS here (needs matplotlib)")
    options = parser.parse_args()
    tokens = [int(count) for count in options.tokens.split(",")]
    bandwidth = copy_bandwidth()
    card = torch.cuda.get_device_name()
    print(f"# {card}, torch {torch.__version__}, copies run at {bandwidth / 1e12:.2f} TB/s")
    rows: list[dict[str, object]] = []
    for model in options.models.split(","):
        for name, parts, columns in LAYERS[model]:
            if options.layers and name not in options.layers.split(","):
                continue
            for row in measure(parts, columns, tokens, bandwidth, options.peers.split(",") if options.peers else []):
                rows.append({"model": model, "layer": name, **row})
                shown = "  ".join(
                    f"{key[:-3]} {value:.1f}" for key, value in row.items() if key.endswith("_us") and key != "slimc_us"
                )
                over = "  ".join(
                    f"{key.replace('_', ' ')} {value:.2f}x" for key, value in row.items() if "over_" in key
                )
                print(
                    f"{model:12} {name:8} {sum(parts):6} x {columns:5} {row['tokens']:5} tokens: {shown} | {over}",
                    flush=True,
                )
            torch.cuda.empty_cache()
    print_means(rows, tokens)
    if options.json:
        about = {"card": card, "torch": torch.__version__, "copy_bytes_per_second": bandwidth}
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
