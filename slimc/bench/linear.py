"""Linear layers of language models on one GPU: slimc's kernels against cuBLAS in bf16 and other people's kernels.

    slimc bench linear [--models llama-2-7b,llama-2-70b] [--tokens 1,16,64,128,2048] [-o FOLDER]
    python -m slimc.bench.linear --help    (more options: peers, layers, a plot, selection by the times of this run)

slimc's layer is 2:4 sparse, 4 bit with one scale a tensor, with 4-bit adapters of rank 0.1; stacked ones (q, k and v,
or gate and up) keep the adapters of each. Every kernel of slimc's that accepts is measured, and ``slimc`` is the one
that its selection takes: by expectations, or with ``--tuned`` by the times of this run, as after `slimc.tune`.
With ``--chosen`` nothing is measured of slimc's but that one and ``cuda-dense``, which decodes the weight at every
call and multiplies densely: what a layer falls back on where no other kernel runs.
A kernel that cannot stack layers computes one after another. With ``--activations`` the same layers are also measured
with inputs that are rounded to 8 bits.

Peers have no adapters; those that are installed are measured. Int4 with a scale every 128 columns: humming-kernels,
gemlite, and torch's own `_weight_int4pack_mm` (tinygemm). 2:4 in 16 bits: cuSPARSELt, its best algorithm.

A call finds its weight in device memory, not in the cache: it goes round among copies that together exceed 150 MB.
At least 32 calls are captured into a CUDA graph, as a model's step is; a figure is the median of its replays, in
microseconds a call. All columns of a row are taken one after another in the same process, each after a rest: a card
that has reached its power limit lowers its clock, and what was measured before would count (``--rest 0`` measures so).
Bytes are those of the packed layer, of x and of y; beside the bandwidth of a large copy on the same card, which reads
and writes, stands the byte limit: what the memory's clock and width would allow.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimc.backends import KERNELS, cusparselt
from slimc.backends.cuda.dense import DENSE
from slimc.backends.cuda.layer import prepare as fragments
from slimc.backends.cuda.layer import stack
from slimc.bench import check_words, no_gpu
from slimc.runtime.formats import ACTIVATIONS, NM, LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear, PackedWeight
from slimc.runtime.select import Kernel, KernelTable, choose

COLD_BYTES = 150e6
GRAPH_CALLS = 32
REPLAYS = 15
RANK = 0.1
INT4_BITS = 4.125
SPARSE_16_BITS = 9
DTYPE = torch.bfloat16

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
    "llama-3.2-1b": [
        ("qkv", (2048, 512, 512), 2048),
        ("o", (2048,), 2048),
        ("gate_up", (8192, 8192), 2048),
        ("down", (2048,), 8192),
    ],
}
"""For each model its layers: name, rows of the layers that are stacked, columns."""

SHOWN = ("llama-2-7b", "llama-2-70b")
"""The models that are measured unless others are asked for."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048)
"""Tokens of a call that are measured unless others are asked for."""

SERVED = ("qkv", "o", "gate_up", "down")
"""The layers as they are served: means are taken over these."""

REST = 0.5
"""Seconds before each measurement."""

Call = Callable[[], object]
Layer = Callable[[Tensor], object]
Row = dict[str, Any]


def random_masks(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return the bit mask of a random 2:4 pattern, uint8 [rows, columns / 8]."""
    masks = torch.tensor([3, 5, 9, 6, 10, 12], dtype=torch.uint8, device="cuda")
    nibbles = masks[torch.randint(6, (rows, columns // 8, 2), generator=generator, device="cuda")]
    return nibbles[..., 0] | (nibbles[..., 1] << 4)


def random_layer(rows: int, columns: int, seed: int) -> PackedLinear:
    """Return a layer of random codes."""
    rank = int(RANK * min(rows, columns))
    weight = WeightFormat(rows, columns, bits=4, per_tensor=True, sparsity=NM(2, 4), dtype=DTYPE)
    factors = [WeightFormat(*shape, bits=4, group=64, dtype=DTYPE) for shape in ((rows, rank), (rank, columns))]
    spec = LinearFormat(weight, factors[0], factors[1])
    generator = torch.Generator("cuda").manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (shape, kind) in spec.tensor_specs().items():
        if kind == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device="cuda")
        else:
            tensors[name] = ((torch.rand(shape, generator=generator, device="cuda") + 0.5) * 0.01).to(kind)
    tensors["pattern"] = random_masks(rows, columns, generator)
    return PackedLinear.assemble(spec, tensors)


def copies(nbytes: float) -> int:
    """Return how many copies of a weight exceed the cache."""
    return max(2, math.ceil(COLD_BYTES / nbytes))


def microseconds(calls: Sequence[Call], replays: int = REPLAYS) -> float:
    """Return the median time of a call, all of them replayed from one graph as often as told."""
    graph = CapturedCalls(calls)
    graph.replay()
    return float(statistics.median(graph.time() for _ in range(replays)))


class CapturedCalls:
    """Calls in a CUDA graph, each as often as it takes for ``GRAPH_CALLS`` of them.

    A step of a model is a graph of hundreds, in which a launch begins while the one before ends, and what lies between
    two graphs is not a layer's.

    Args:
        calls: what to capture; each is called once before.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call()
        torch.cuda.synchronize()
        rounds = math.ceil(GRAPH_CALLS / len(calls))
        self._count = rounds * len(calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(rounds):
                # Kept, so that no call of the next round writes where one of this round does.
                self._results = [call() for call in calls]

    def replay(self) -> None:
        """Make the calls, without waiting for their end."""
        self._graph.replay()

    def time(self) -> float:
        """Make the calls and return microseconds of one of them."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(1e3 * start.elapsed_time(end) / self._count)


def copy_bandwidth() -> float:
    """Return bytes a second of a large copy on the device, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds([lambda: target.copy_(source)] * 4) * 1e6


def peak_bandwidth() -> float | None:
    """Return bytes a second that the memory can move at its clock and width, if PyTorch tells them."""
    properties = torch.cuda.get_device_properties()
    clock, width = getattr(properties, "memory_clock_rate", None), getattr(properties, "memory_bus_width", None)
    # In kHz and bits; two transfers a clock.
    return 2e3 * clock * width / 8 if clock and width else None


# --------------------------------------------------------------------------------------------------------------- peers


def humming(rows: int, columns: int) -> Layer:
    """Return humming's int4 layer."""
    from humming.layer import HummingLayer

    config = {"dtype": "int4", "group_size": 128}
    layer: Any = HummingLayer(shape_n=rows, shape_k=columns, weight_config=config, torch_dtype=DTYPE).cuda()
    layer.load_from_unquantized(torch.randn(rows, columns, dtype=DTYPE, device="cuda"))
    layer.transform()
    return layer  # type: ignore[no-any-return]


def gemlite(rows: int, columns: int) -> Layer:
    """Return gemlite's int4 layer; shapes that its own table for the card lacks are tuned by it at their first call."""
    from gemlite.helper import A16Wn

    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device="cuda")
    scales = torch.rand(rows * columns // 128, 1, dtype=DTYPE, device="cuda")
    make: Any = A16Wn(device="cuda:0", dtype=DTYPE).from_weights
    return make(codes, scales, torch.full_like(scales, 8), W_nbits=4, group_size=128)  # type: ignore[no-any-return]


def tinygemm(rows: int, columns: int) -> Layer:
    """Return torch's int4 product."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(columns // 128, rows, 2, dtype=DTYPE, device="cuda")
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales)


def sparse_16(rows: int, columns: int) -> Layer:
    """Return cuSPARSELt's product with a 2:4 weight of 16 bits."""
    generator = torch.Generator("cuda").manual_seed(rows)
    spec = WeightFormat(rows, columns, sparsity=NM(2, 4), dtype=DTYPE)
    values = torch.randn(rows, columns // 2, dtype=DTYPE, device="cuda")
    packed = PackedWeight(spec, values, random_masks(rows, columns, generator))
    layer = cusparselt.prepare(PackedLinear(packed))
    return lambda x: cusparselt.run(x, layer, None)


@dataclass(frozen=True)
class Peer:
    """Somebody else's kernel: how to make a layer, bits a weight, the numbers of tokens it is for."""

    make: Callable[[int, int], Layer]
    bits: float
    fewest: int
    most: int


PEERS = {
    "humming": Peer(humming, INT4_BITS, 1, 1 << 14),
    "tinygemm": Peer(tinygemm, INT4_BITS, 1, 64),
    "gemlite": Peer(gemlite, INT4_BITS, 1, 1 << 14),
    "cusparselt-16bit": Peer(sparse_16, SPARSE_16_BITS, 128, 1 << 14),
}
INT4_PEERS = ("humming", "tinygemm", "gemlite")
QUICK_PEERS = ("humming", "tinygemm", "cusparselt-16bit")
"""Without gemlite, which tunes itself for a minute or so at every shape that is new to it."""


def peer_layers(names: Sequence[str], rows: int, columns: int) -> dict[str, list[Layer]]:
    """Return copies of each peer's layer, of those peers that work here."""
    made = {}
    for name in names:
        peer = PEERS[name]
        try:
            first = peer.make(rows, columns)
            others = copies(peer.bits / 8 * rows * columns) - 1
            made[name] = [first, *(_another(first, partial(peer.make, rows, columns)) for _ in range(others))]
        except Exception as error:
            print(f"# {name} is not measured: {type(error).__name__}: {str(error)[:200]}")
    return made


def _another(layer: Layer, make: Callable[[], Layer]) -> Layer:
    """Return a layer with memory of its own: a copy if it has one, which takes a library less time than to make it."""
    if not isinstance(layer, nn.Module):
        return make()
    try:
        return deepcopy(layer)
    except (TypeError, RuntimeError):
        return make()


# -------------------------------------------------------------------------------------------------------------- slimc's


class Subject:
    """Copies of a layer, or of several that read one input, in the form of each kernel."""

    def __init__(self, rows: tuple[int, ...], columns: int) -> None:
        first = [random_layer(part, columns, seed) for seed, part in enumerate(rows)]
        self.nbytes = sum(part.format.nbytes() for part in first)
        self.copies = [first]
        for copy in range(1, copies(self.nbytes)):
            self.copies.append([random_layer(part, columns, 100 * copy + seed) for seed, part in enumerate(rows)])
        self._states: dict[tuple[Callable[..., Any], str | None], list[list[Any]]] = {}
        self.formats = [part.format for part in first]

    def calls(self, kernel: Kernel, x: Tensor, activation: str | None = None) -> list[Call]:
        """Return a call for each copy, its inputs rounded if there is an ``activation``."""
        key = kernel.prepare, activation
        if key not in self._states:
            copies = [[replace(part, activation=activation) for part in parts] for parts in self.copies]
            prepared = [[kernel.prepare(part) for part in parts] for parts in copies]
            if kernel.prepare is fragments:
                prepared = [[stack(parts)] if len(parts) > 1 else parts for parts in prepared]
            self._states[key] = prepared
        states = self._states[key]
        return [partial(lambda parts: [kernel.run(x, part, None) for part in parts], parts) for parts in states]


def chosen_for(
    kernels: Sequence[Kernel], formats: Sequence[LinearFormat], device: torch.device, tokens: int
) -> tuple[Kernel | None, dict[str, str]]:
    """Return the kernel of slimc's for a layer, or for several that are stacked, and the reasons against others."""
    return choose(kernels, widest_of(formats), DTYPE, device, tokens, formats)


def widest_of(formats: Sequence[LinearFormat]) -> LinearFormat:
    """Return the format with most rows."""
    return max(formats, key=lambda form: form.rows)


class MeasuredHere:
    """The times of one row, for a selection that goes by them."""

    def __init__(self, tokens: int, times: Mapping[str, float]) -> None:
        self._times = {1 << (tokens - 1).bit_length(): times}

    def of(self, _spec: LinearFormat, _dtype: torch.dtype, _device: torch.device) -> Mapping[int, Mapping[str, float]]:
        """Return what was measured."""
        return self._times


def fastest_for(
    kernels: Sequence[Kernel],
    formats: Sequence[LinearFormat],
    device: torch.device,
    tokens: int,
    times: Mapping[str, float],
) -> tuple[Kernel | None, dict[str, str]]:
    """Return the kernel that took the least time for all layers as one, whatever kernels expect of a stack."""
    table = KernelTable(kernels, MeasuredHere(tokens, times))
    return choose(table, widest_of(formats), DTYPE, device, tokens)


def measure(
    rows: tuple[int, ...],
    columns: int,
    tokens: Sequence[int],
    bandwidth: float,
    *,
    peers: Sequence[str],
    tuned: bool = False,
    only_expected: bool = False,
    activations: Sequence[str] = (),
    rest: float = REST,
) -> list[Row]:
    """Measure one layer at every number of tokens; see `run`."""
    total = sum(rows)
    dense = [torch.randn(total, columns, dtype=DTYPE, device="cuda") for _ in range(copies(2 * total * columns))]
    subject = Subject(rows, columns)
    others = peer_layers(peers, total, columns)
    device, peak = torch.device("cuda", torch.cuda.current_device()), peak_bandwidth()
    results = []
    for count in tokens:
        x = torch.randn(count, columns, dtype=DTYPE, device=device)
        row: Row = {"rows": rows, "columns": columns, "tokens": count}
        row["cublas_us"] = _rested(rest, [partial(torch.nn.functional.linear, x, weight) for weight in dense])
        expected, _ = chosen_for(KERNELS, subject.formats, device, count)
        times: dict[str, float] = {}
        for kernel in KERNELS:
            wanted = kernel in (expected, DENSE) or (kernel.timed and not only_expected)
            if wanted and not any(kernel.refuses(form, DTYPE, device, count) for form in subject.formats):
                times[kernel.name] = _time(kernel.name, rest, subject.calls, kernel, x)
        if tuned:
            chosen, refusals = fastest_for(KERNELS, subject.formats, device, count, times)
        else:
            chosen, refusals = chosen_for(KERNELS, subject.formats, device, count)
        if chosen is None or times.get(chosen.name, math.inf) == math.inf:
            print(f"# no kernel of slimc's for {count} tokens: {refusals}")
            continue
        ours = times[chosen.name]
        needed = subject.nbytes + x.nbytes + count * total * DTYPE.itemsize
        row |= {f"{name}_us": taken for name, taken in times.items() if taken < math.inf}
        row |= {
            "kernel": chosen.name,
            "slimc_us": ours,
            "gigabytes_per_second": needed / ours / 1e3,
            "share_of_copy": needed / ours * 1e6 / bandwidth,
            "over_cublas": row["cublas_us"] / ours,
        }
        if times.get(DENSE.name, math.inf) < math.inf:
            row["fallback_over_cublas"] = row["cublas_us"] / times[DENSE.name]
        if peak is not None:
            row["share_of_byte_limit"] = needed / ours * 1e6 / peak
        for kind in activations:
            rounded = [replace(form, activation=kind) for form in subject.formats]
            best, _ = chosen_for(KERNELS, rounded, device, count)
            taken = math.inf if best is None else _time(best.name, rest, subject.calls, best, x, kind)
            if best is not None and taken < math.inf:
                row |= {f"{kind}_us": taken, f"{kind}_kernel": best.name}
                row[f"{kind}_over_cublas"] = row["cublas_us"] / taken
        for name, made in others.items():
            if PEERS[name].fewest <= count <= PEERS[name].most:
                taken = _time(name, rest, _peer_calls, made, x)
                if taken < math.inf:
                    row |= {f"{name}_us": taken, f"over_{name}": taken / ours}
        int4 = [row[f"over_{name}"] for name in INT4_PEERS if f"over_{name}" in row]
        if int4:
            row["over_int4"] = min(int4)
        results.append(row)
    return results


def _peer_calls(layers: Sequence[Layer], x: Tensor) -> list[Call]:
    return [partial(layer, x) for layer in layers]


def _rested(rest: float, calls: Sequence[Call]) -> float:
    """Return the time of a call on a card that has had nothing to do for so many seconds."""
    torch.cuda.synchronize()
    time.sleep(rest)
    return microseconds(calls)


def _time(name: str, rest: float, calls: Callable[..., Sequence[Call]], *subject: Any) -> float:
    """Return the time of one of the calls that are made of the subject, or infinity if they fail."""
    try:
        return _rested(rest, calls(*subject))
    except Exception as error:
        print(f"# {name}: {type(error).__name__}: {str(error)[:200]}")
        return math.inf


# -------------------------------------------------------------------------------------------------------------- showing


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def show(row: Row) -> str:
    """Return one row as a line."""
    times = "  ".join(
        f"{key[:-3]} {value:.1f}" for key, value in row.items() if key.endswith("_us") and key != "slimc_us"
    )
    over = "  ".join(f"{key[5:]} {value:.2f}x" for key, value in row.items() if key.startswith("over_"))
    rounded = "".join(
        f" | {row[f'{kind}_kernel']} with {kind} over cublas {row[f'{kind}_over_cublas']:.2f}x"
        for kind in ACTIVATIONS
        if f"{kind}_us" in row
    )
    return (
        f"{row['model']:12} {row['layer']:8} {sum(row['rows']):6} x {row['columns']:5} {row['tokens']:5} tokens: "
        f"{times} | {row['kernel']} over {over} | {row['gigabytes_per_second']:.0f} GB/s, "
        f"{100 * row['share_of_copy']:.0f} % of a copy, "
        f"{100 * row.get('share_of_byte_limit', math.nan):.0f} % of the byte limit{rounded}"
    )


def print_means(rows: Sequence[Row], layers: Collection[str] = SERVED) -> None:
    """Print, as a table, the mean ratios of each model over these layers, the least of them, and that of their sums."""
    names = {f"over_{name}": name for name in ("cublas", "int4", *PEERS)}
    names |= {f"{kind}_over_cublas": f"{kind} inputs: cublas" for kind in ACTIVATIONS}
    names["fallback_over_cublas"] = f"{DENSE.name}: cublas"
    present = [name for name in names if any(name in row for row in rows)]
    titles = [*(names[name] for name in present), "cublas, times added up"]
    print(f"\nHow many times as fast slimc is: the geometric mean of {', '.join(layers)} (and the least of them)")
    print(f"\n| model | tokens | {' | '.join(titles)} |\n|---|---|{'---|' * len(titles)}")
    of_layers = [row for row in rows if row["layer"] in layers]
    for model, count in dict.fromkeys((row["model"], row["tokens"]) for row in of_layers):
        of = [row for row in of_layers if (row["model"], row["tokens"]) == (model, count)]
        cells = []
        for name in present:
            values = [row[name] for row in of if name in row]
            whole = len(values) == len(of)
            cells.append(f"{geometric_mean(values):.2f}x (from {min(values):.2f}x)" if whole else "")
        added = [sum(row.get(key, math.nan) for row in of) for key in ("cublas_us", "slimc_us")]
        cells.append("" if math.isnan(sum(added)) else f"{added[0] / added[1]:.2f}x")
        print(f"| {model} | {count} | {' | '.join(cells)} |")


def ratios(rows: Sequence[Row], model: str) -> dict[str, dict[int, float]]:
    """Return for everything that was timed, by name and tokens, its mean ratio over cuBLAS in the layers as served.

    What was not timed in all layers of the model that were measured at so many tokens is left out there.
    """
    served = [row for row in rows if row["model"] == model and row["layer"] in SERVED]
    found: dict[str, dict[int, float]] = {}
    for count in dict.fromkeys(row["tokens"] for row in served):
        of = [row for row in served if row["tokens"] == count]
        for key in dict.fromkeys(key for row in of for key in row if key.endswith("_us") and key != "cublas_us"):
            if all(key in row for row in of):
                name = key.removesuffix("_us")
                mean = geometric_mean([row["cublas_us"] / row[key] for row in of])
                found.setdefault(f"slimc, {name} inputs" if name in ACTIVATIONS else name, {})[count] = mean
    return found


def _check_once(rows: Sequence[Row]) -> None:
    """Raise a `ValueError` if rows of several runs were put together, so that a layer would count twice in a mean."""
    times = Counter((row["model"], row["layer"], row["tokens"]) for row in rows)
    for (model, layer, count), number in times.items():
        if number > 1:
            raise ValueError(f"it has {layer} of {model} with {count} tokens {number} times")


def no_plots() -> str | None:
    """Say why nothing can be drawn here, or return ``None``."""
    if find_spec("matplotlib") is None:
        return "a plot needs matplotlib, which is not installed: pip install 'slimc[report]'"
    return None


def plot(rows: Sequence[Row], to: Path) -> None:
    """Draw the mean ratio over cuBLAS by tokens: a picture a model, a line for slimc's choice, each kernel and peer.

    A kernel that is slimc's choice wherever it was measured has no line of its own.
    """
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows if row["layer"] in SERVED))
    figure, axes = plt.subplots(1, len(models), figsize=(7 * len(models), 5), squeeze=False, sharey=True)
    lines: dict[str, Any] = {}
    for axis, model in zip(axes[0], models, strict=True):
        found = ratios(rows, model)
        for name, by_tokens in found.items():
            ours = name.startswith("slimc")
            if not ours and by_tokens.items() <= found["slimc"].items():
                continue
            (lines[name],) = axis.plot(
                list(by_tokens),
                list(by_tokens.values()),
                marker="o",
                color=lines[name].get_color() if name in lines else f"C{len(lines)}",
                linewidth=2.5 if ours else 1,
                linestyle="--" if name in PEERS else "-",
            )
        axis.axhline(1, color="grey", linewidth=1)
        counts = sorted({row["tokens"] for row in rows if row["model"] == model})
        axis.set(xscale="log", xlabel="tokens a call", title=f"{model} (dashed: kernels of others, without adapters)")
        axis.set_xticks(counts, map(str, counts))
        axis.minorticks_off()
    axes[0][0].set(ylabel="times as fast as cuBLAS in bf16, geometric mean")
    figure.legend(list(lines.values()), list(lines), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4)
    figure.savefig(to, bbox_inches="tight")
    plt.close(figure)


def run(
    models: Sequence[str],
    tokens: Sequence[int],
    *,
    layers: Sequence[str] = (),
    peers: Sequence[str] = QUICK_PEERS,
    tuned: bool = False,
    only_expected: bool = False,
    activations: Sequence[str] = (),
    rest: float = REST,
    save: Callable[[Row], None] = lambda _found: None,
) -> Row:
    """Measure the layers of models, print as it goes, and return every figure.

    Args:
        models: of `LAYERS`.
        tokens: of a call.
        layers: names of layers; all if it is empty.
        peers: of `PEERS`.
        tuned: select by the times of this run, not by expectations.
        only_expected: of slimc's kernels, measure the one that is expected to be the best, and what it falls back on.
        activations: of `ACTIVATIONS`, what inputs are rounded to for further measurements.
        rest: seconds before each measurement.
        save: takes the figures so far after every layer.
    """
    begun = time.perf_counter()
    bandwidth = copy_bandwidth()
    card = torch.cuda.get_device_name()
    print(f"# {card}, torch {torch.__version__}, copies run at {bandwidth / 1e12:.2f} TB/s")
    rows: list[Row] = []
    found: Row = {"card": card, "torch": torch.__version__, "copy_bytes_per_second": bandwidth, "rows": rows}
    for model in dict.fromkeys(models):
        for name, parts, columns in LAYERS[model]:
            if layers and name not in layers:
                continue
            made = measure(
                parts,
                columns,
                list(dict.fromkeys(tokens)),
                bandwidth,
                peers=peers,
                tuned=tuned,
                only_expected=only_expected,
                activations=activations,
                rest=rest,
            )
            for row in made:
                rows.append({"model": model, "layer": name, **row})
                print(show(rows[-1]), flush=True)
            torch.cuda.empty_cache()
            found["seconds"] = time.perf_counter() - begun
            print(f"# {found['seconds']:.0f} s")
            save(found)
    print_means(rows)
    return found


def _counts(text: str) -> list[int]:
    counts = [int(count) for count in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"a call has one token or more: {text!r}")
    return counts


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help=f"of {', '.join(LAYERS)}; by default {' and '.join(SHOWN)}")
    parser.add_argument("--layers", default="", help="only layers of these names, such as qkv,o,gate_up,down")
    parser.add_argument("--tokens", type=_counts, help=f"by default {','.join(map(str, TOKENS))}")
    parser.add_argument(
        "--peers", default=",".join(QUICK_PEERS), help=f"other people's kernels, of {', '.join(PEERS)}; empty for none"
    )
    parser.add_argument("--tuned", action="store_true", help="select by the times of this run")
    parser.add_argument("--chosen", action="store_true", help="of slimc's kernels only the expected one")
    parser.add_argument("--activations", default="", help=f"round inputs too, to some of {', '.join(ACTIVATIONS)}")
    parser.add_argument("--rest", type=float, default=REST, help="seconds before each measurement")
    parser.add_argument("--json", type=Path, help="write all figures here, after every layer")
    parser.add_argument("--plot", type=Path, help="draw the ratios over cuBLAS here (needs slimc[report])")
    parser.add_argument(
        "--read",
        type=Path,
        help="measure nothing: show, and draw, what an earlier --json wrote here, all of it or what --models, --layers "
        "and --tokens leave",
    )
    options = parser.parse_args()
    models = options.models.split(",") if options.models else list(SHOWN)
    check_words(parser, "--models", models, LAYERS)
    layers = [name for name in options.layers.split(",") if name]
    check_words(parser, "--layers", layers, dict.fromkeys(name for model in models for name, _, _ in LAYERS[model]))
    check_words(parser, "--peers", filter(None, options.peers.split(",")), PEERS)
    check_words(parser, "--activations", filter(None, options.activations.split(",")), ACTIVATIONS)
    if options.rest < 0:
        parser.error(f"--rest is a number of seconds: {options.rest} is none")
    if options.plot and (reason := no_plots()):
        parser.exit(2, f"error: {reason}\n")
    if options.read:
        try:
            rows = json.loads(options.read.read_text())["rows"]
            _check_once(rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.exit(2, f"error: {options.read} is no file of figures that --json wrote: {error}\n")
        asked = {"model": options.models and models, "layer": layers, "tokens": options.tokens}
        rows = [row for row in rows if all(row[key] in wanted for key, wanted in asked.items() if wanted)]
        if not rows:
            parser.exit(2, f"error: {options.read} has none of the layers that were asked for\n")
        print_means(rows, layers or SERVED)
        if options.plot:
            plot(rows, options.plot)
        return
    if reason := no_gpu():
        parser.exit(2, f"error: {reason}\n")

    def save(found: Row) -> None:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    found = run(
        models,
        options.tokens or TOKENS,
        layers=layers,
        peers=[name for name in options.peers.split(",") if name],
        tuned=options.tuned,
        only_expected=options.chosen,
        activations=[kind for kind in options.activations.split(",") if kind],
        rest=options.rest,
        save=save,
    )
    if options.plot:
        plot(found["rows"], options.plot)


if __name__ == "__main__":
    main()
