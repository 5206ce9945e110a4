"""What the plain forms of a layer cost on one GPU: each against the dense product in bfloat16.

    python benchmarks/gpu_forms.py [--layers 4096x4096 ...] [--tokens 1,16,128,2048] [--forms ...] [--json FILE]

A call finds its weight in device memory, not in the cache: it goes round among copies that together exceed 150 MB.
Calls are captured into a CUDA graph; a figure is the median of its replays, in microseconds a call, beside the kernel
that was chosen and the bytes that the layer holds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends import KERNELS
from slimc.bench import no_gpu
from slimc.runtime.bits import pack_bits
from slimc.runtime.formats import NM, BinaryFormat, LinearFormat, Unstructured, WeightFormat
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear

COLD_BYTES = 150e6
REPLAYS = 15
RANK = 0.1


def formats(rows: int, columns: int) -> dict[str, LinearFormat]:
    """Return the forms by name, adapters of rank 0.1 in all but the last ones."""
    rank = int(RANK * min(rows, columns))

    def form(
        factor: tuple[int | None, ...] = (4, 64), *, scaled: bool = False, bits: int | None = 4, **others: object
    ) -> LinearFormat:
        main = WeightFormat(rows, columns, bits, dtype=torch.bfloat16, **others)  # type: ignore[arg-type]
        shapes = ((rows, rank), (rank, columns)) if factor else ()
        factors = [WeightFormat(*shape, *factor, dtype=torch.bfloat16) for shape in shapes]
        return LinearFormat(main, *factors, input_scaled=scaled)

    sparse = {"sparsity": NM(2, 4), "per_tensor": True}
    slab = {
        "2:4 int4/64": form((), group=64, sparsity=NM(2, 4)),
        "2:4 bf16 alone": form((), bits=None, sparsity=NM(2, 4)),
        "44% bf16": form((), bits=None, sparsity=Unstructured(), nonzeros=int(0.437 * rows * columns)),
    }
    binary = BinaryFormat(rows, columns, 1, torch.bfloat16)
    return {
        "2:4 int4": form(**sparse),
        "2:4 int4/128": form(group=128, sparsity=NM(2, 4)),
        "int4/128": form(group=128),
        "int4/128, adapters a row": form((4, None), group=128),
        "2:4 int4, 16-bit adapters": form((None,), **sparse),
        "2:4 int4, scaled inputs": form(scaled=True, **sparse),
        "2:4 int3": form(bits=3, **sparse),
        "int4/32": form(group=32),
        "int8/128": form(bits=8, group=128),
        "int4/128 asymmetric": form(group=128, asymmetric=True),
        "2:4 bf16": form(bits=None, sparsity=NM(2, 4)),
        "2:4 int4, 8-bit adapters": form((8, 64), **sparse),
        "50% int4": form(sparsity=Unstructured(), nonzeros=rows * columns // 2, per_tensor=True),
        "bf16 + low-rank": form(bits=None),
        **slab,
        **{f"{name} + signs": replace(spec, binary=binary) for name, spec in slab.items()},
    }


def fill(spec: LinearFormat) -> PackedLinear:
    """Fill a format with random codes, on the GPU."""
    named: dict[str, Tensor] = {}
    for name, (shape, dtype) in spec.tensor_specs().items():
        if dtype == torch.uint8:
            named[name] = torch.randint(0, 256, shape, dtype=dtype, device="cuda")
        else:
            named[name] = ((torch.rand(shape, device="cuda") + 0.5) * 0.01).to(dtype)
    if spec.weight.sparsity is not None:
        kept = torch.zeros(spec.rows * spec.columns // 4, 4, dtype=torch.uint8, device="cuda")
        kept[:, 1::2] = 1
        if spec.weight.nonzeros is not None:
            kept.view(-1).fill_(0)[torch.randperm(kept.numel(), device="cuda")[: spec.weight.nonzeros]] = 1
        named["pattern"] = pack_bits(kept.view(spec.rows, spec.columns), 1)
    return PackedLinear.from_tensors(spec, named)


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median time of a call, all of them captured into one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def held(layer: SlimLinear) -> int:
    """Return the bytes of a layer's buffers and of a dense weight that was decoded."""
    states = sum(state.nbytes for state in layer._prepared._states.values() if isinstance(state, Tensor))
    return states + sum(tensor.nbytes for tensor in layer.buffers())


def measure(name: str, spec: LinearFormat, tokens: Sequence[int]) -> list[dict[str, object]]:
    """Return a row a number of tokens."""
    first = SlimLinear(fill(spec), kernels=KERNELS)
    first(torch.zeros(1, spec.columns, dtype=torch.bfloat16, device="cuda"))
    dense = torch.randn(spec.rows, spec.columns, dtype=torch.bfloat16, device="cuda") * 0.01
    layers = [first, *(SlimLinear(fill(spec), kernels=KERNELS) for _ in range(int(COLD_BYTES // held(first))))]
    others = [dense.clone() for _ in range(int(COLD_BYTES // dense.nbytes) + 1)]
    rows: list[dict[str, object]] = []
    for count in tokens:
        x = torch.randn(count, spec.columns, dtype=torch.bfloat16, device="cuda")
        with torch.no_grad():
            ours = microseconds([partial(layer, x) for layer in layers])
            theirs = microseconds([partial(functional.linear, x, other) for other in others])
        choice = next(one for one in first.choices() if one.last_tokens is None or count <= one.last_tokens)
        rows.append({
            "form": name, "tokens": count, "kernel": choice.kernel.name if choice.kernel else "slim::linear",
            "us": ours, "dense_us": theirs, "ratio": theirs / ours, "stored": spec.nbytes(), "held": held(first),
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="*", default=["4096x4096"], help="rows x columns")
    parser.add_argument("--tokens", default="1,16,128,2048")
    parser.add_argument("--forms", nargs="*", help="names of forms; all if left out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if reason := no_gpu():
        parser.exit(2, f"error: {reason}\n")
    tokens = [int(count) for count in options.tokens.split(",")]
    print(torch.cuda.get_device_name())
    print(f"{'layer':12} {'form':28} {'tokens':>6} {'kernel':20} {'us':>8} {'dense':>8} {'ratio':>6} {'held':>9}")
    results: list[dict[str, object]] = []
    for layer in options.layers:
        rows, columns = (int(side) for side in layer.split("x"))
        for name, spec in formats(rows, columns).items():
            if options.forms is not None and name not in options.forms:
                continue
            for row in measure(name, spec, tokens):
                results.append({"layer": layer} | row)
                print(
                    f"{layer:12} {name:28} {row['tokens']:6} {row['kernel']:20} {row['us']:8.1f} "
                    f"{row['dense_us']:8.1f} {row['ratio']:6.2f} {row['held']:9}",
                    flush=True,
                )
    if options.json:
        parts = ["python", "benchmarks/gpu_forms.py", "--layers", *options.layers, "--tokens", options.tokens]
        parts += [] if options.forms is None else ["--forms", *options.forms]
        record = {"command": shlex.join(parts), "device": torch.cuda.get_device_name(), "rows": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
