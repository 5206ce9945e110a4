"""What a card's power limit costs a layer: microseconds of a call, clock and power, from rest on under lasting load.

    python benchmarks/gpu_power.py [--model llama-2-70b] [--tokens 128] [--seconds 1.5] [--json FILE]

Each layer as it is served is called in a CUDA graph of 32 calls, again and again, after a rest: slimc's, cuBLAS in
bf16, and slimc's with inputs that are all zero. The last makes the same launches and moves the same bytes, so what it
is faster by is power alone. Clock and power are read from the driver's library every 20 ms; nothing is set.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slimc.backends import KERNELS
from slimc.bench import check_words, no_gpu
from slimc.bench.linear import DTYPE, LAYERS, SERVED, Call, CapturedCalls, Subject, chosen_for, copies

REST, PERIOD = 2.0, 0.02
"""Seconds before each load, and between two looks at the card."""

SHORTEST = 0.1
"""Seconds of a load, at least."""

SHOWN = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Seconds after its beginning at which the time of a call is shown."""

SM_CLOCK = 1
"""NVML's number of the clock of the multiprocessors."""


class Card:
    """The clock and power of the device that PyTorch uses, from NVIDIA's management library.

    Raises:
        RuntimeError: the library does not know the card.
    """

    def __init__(self) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        uuid = f"GPU-{torch.cuda.get_device_properties().uuid}".encode()
        self._handle = ctypes.c_void_p()
        if self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self._handle)):
            raise RuntimeError("the driver's management library does not know this card")
        self.limit = self._read("nvmlDeviceGetEnforcedPowerLimit") / 1e3

    def _read(self, function: str, *which: int) -> int:
        value = ctypes.c_uint()
        if getattr(self._nvml, function)(self._handle, *which, ctypes.byref(value)):
            raise RuntimeError(f"{function} failed: the driver does not tell this of the card")
        return value.value

    def look(self) -> tuple[int, float]:
        """Return the clock of the multiprocessors in MHz and the power in watts, an average of the last second.

        Raises:
            RuntimeError: the driver does not tell.
        """
        return self._read("nvmlDeviceGetClockInfo", SM_CLOCK), self._read("nvmlDeviceGetPowerUsage") / 1e3


def load(card: Card, calls: Sequence[Call], seconds: float) -> dict[str, Any]:
    """Return microseconds of a call by time since the beginning, and what the card did meanwhile."""
    graph = CapturedCalls(calls)
    torch.cuda.synchronize()
    time.sleep(REST)
    looks: list[tuple[int, float]] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(PERIOD):
            looks.append(card.look())

    watcher = threading.Thread(target=look)
    watcher.start()
    begun, taken = time.perf_counter(), []
    while time.perf_counter() - begun < seconds:
        microseconds = graph.time()
        taken.append((time.perf_counter() - begun, microseconds))
    ended.set()
    watcher.join()
    late = len(taken) * 2 // 3
    return {
        "us": [(at, next(each for since, each in taken if since >= at)) for at in SHOWN if at < seconds],
        "rested_us": statistics.median(each for _, each in taken[1:11]),
        "lasting_us": statistics.median(each for _, each in taken[late:]),
        "megahertz": statistics.median(clock for clock, _ in looks[len(looks) * 2 // 3 :]),
        "watts": statistics.median(power for _, power in looks[len(looks) * 2 // 3 :]),
    }


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-2-70b", help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--layers", default="o,gate_up,down", help=f"of {', '.join(SERVED)}")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each load")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    check_words(parser, "--model", [options.model], LAYERS)
    check_words(parser, "--layers", options.layers.split(","), SERVED)
    if options.seconds < SHORTEST:
        parser.error(f"--seconds is at least {SHORTEST}, to look at the card some times")
    if reason := no_gpu():
        parser.exit(2, f"error: {reason}\n")
    card, name = Card(), torch.cuda.get_device_name()
    print(f"# {name}, power limit {card.limit:.0f} W, torch {torch.__version__}")
    found: list[dict[str, Any]] = []
    for layer, rows, columns in LAYERS[options.model]:
        if layer not in options.layers.split(","):
            continue
        subject, total = Subject(rows, columns), sum(rows)
        x = torch.randn(options.tokens, columns, dtype=DTYPE, device="cuda")
        kernel, refusals = chosen_for(KERNELS, subject.formats, x.device, options.tokens)
        if kernel is None:
            print(f"# no kernel of slimc's for {options.tokens} tokens: {refusals}")
            continue
        dense = [torch.randn(total, columns, dtype=DTYPE, device="cuda") for _ in range(copies(2 * total * columns))]
        loads = {
            kernel.name: subject.calls(kernel, x),
            "cublas": [partial(torch.nn.functional.linear, x, weight) for weight in dense],
            f"{kernel.name}, x = 0": subject.calls(kernel, torch.zeros_like(x)),
        }
        for what, calls in loads.items():
            one = load(card, calls, options.seconds)
            found.append({"model": options.model, "layer": layer, "tokens": options.tokens, "load": what, **one})
            print(
                f"{layer:8} {what:20} {one['rested_us']:7.1f} us after a rest, {one['lasting_us']:7.1f} lasting, at "
                f"{one['megahertz']:.0f} MHz and {one['watts']:.0f} W",
                flush=True,
            )
            if options.json:
                content = {"card": name, "watts_at_most": card.limit, "torch": torch.__version__, "rows": found}
                options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
