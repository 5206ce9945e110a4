"""Times of kernels on the GPUs of this machine: measured by `tune`, kept on disk, read where layers choose.

A time is that of one call which finds its weight in device memory, not in the cache, as the next layer of a model
does. It is kept for a form and shape of layer, so that the layers of a model that are alike are measured once, and
for what else decides it: the card, its driver, PyTorch, and the sources of the kernels. Each form has a file of its
own, which appears whole or not at all, so that many processes may measure and read at once.

Nothing is ever measured by a call of a layer: that would compile kernels which may never be used, and must not happen
while a CUDA graph is captured. Without times the kernels' own expectations decide.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from slimc.backends.cuda import driver
from slimc.backends.private_folder import PrivateFolder
from slimc.errors import InputError, KernelError
from slimc.runtime.formats import LinearFormat
from slimc.runtime.modules import SlimLinear
from slimc.runtime.prepared import usable_bias
from slimc.runtime.select import LARGEST_TIMED, Kernel, KernelTable, token_bucket

__all__ = ["TIMINGS", "TOKENS", "KernelTimings", "microseconds", "tune"]

log = logging.getLogger(__name__)

TOKENS = tuple(1 << power for power in range(LARGEST_TIMED.bit_length()))
"""Numbers of tokens that are measured."""

WARM_UP_CALLS = 2
TIMED_CALLS = 7

FLUSHES = 4
"""How often memory twice the size of the cache is gone through between two calls.

Once would do to empty the cache; this long the processor needs to put all launches of a call into the queue, so that
the device does not wait for it between them.
"""

_Times = dict[int, dict[str, float]]


class KernelTimings:
    """Times by form, dtype and device; those on disk are read once in a process.

    A `slimc.runtime.select.Timings`.
    """

    def __init__(self, folder: PrivateFolder) -> None:
        self._folder = folder
        self._known: dict[tuple[LinearFormat, torch.dtype, torch.device], _Times] = {}

    def of(self, spec: LinearFormat, dtype: torch.dtype, device: torch.device) -> Mapping[int, Mapping[str, float]]:
        """Return microseconds a call, by number of tokens and name of the kernel; infinite if it failed."""
        case = spec, dtype, device
        known = self._known.get(case)
        if known is None:
            place = describe(device)
            kept = None if place is None else self._folder.read(_key(spec, dtype, place))
            known = self._known[case] = {} if kept is None else _parse(kept)
        return known

    def keep(self, spec: LinearFormat, dtype: torch.dtype, device: torch.device, times: _Times) -> None:
        """Remember times in this process and on disk."""
        self._known[spec, dtype, device] = times
        place = describe(device)
        if place is not None:
            self._folder.write(_key(spec, dtype, place), json.dumps(times).encode())

    def __reduce__(self) -> str:
        """A copy in another process is that process's own."""
        return "TIMINGS"


TIMINGS = KernelTimings(PrivateFolder("timings", ".json", "times of kernels are not kept"))
"""What is known on this machine."""


def tune(
    model: nn.Module, *, tokens: Iterable[int] = TOKENS, dtype: torch.dtype | None = None, again: bool = False
) -> None:
    """Time the kernels of every form of layer in ``model`` that is on a GPU, and let the layers choose by it.

    Args:
        model: its `SlimLinear` layers are measured one form at a time; beside them, memory is needed for one layer in
            the layouts of all its kernels, and for its input and output.
        tokens: numbers of tokens, each rounded up to a power of two.
        dtype: of the inputs; the weights' own if it is left out.
        again: measure what is known already, too.

    Raises:
        InputError: a number of tokens is not positive.
        KernelError: a CUDA graph is being captured.
    """
    counts = _counts(tokens)
    layers = [module for module in model.modules() if isinstance(module, SlimLinear)]
    done: set[tuple[LinearFormat, torch.dtype, torch.device]] = set()
    for layer in layers:
        case = layer.format, dtype or layer.format.weight.dtype, layer.device
        known = layer.kernels.timings
        if not isinstance(known, KernelTimings) or describe(case[2]) is None:
            continue
        if case not in done:
            done.add(case)
            before = {} if again else known.of(*case)
            missing = [count for count in counts if count not in before]
            if missing:
                _refuse_capture()
                known.keep(*case, {**_copy(before), **_measure(layer, layer.kernels, case[1], missing)})
        layer.choose_again()


def microseconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Return the median time of a call on a GPU that does not find its weight in the cache."""
    for _ in range(WARM_UP_CALLS):
        call()
    properties = torch.cuda.get_device_properties(device)
    flushed = torch.zeros(2 * properties.L2_cache_size // 4, dtype=torch.int32, device=device)
    times: list[float] = []
    event: Any = partial(torch.cuda.Event, enable_timing=True)
    for _ in range(TIMED_CALLS):
        start, end = event(), event()
        for _ in range(FLUSHES):
            flushed.add_(1)
        # Read last: lines that are written back during the call would take its bandwidth.
        flushed.sum()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def _refuse_capture() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise KernelError("kernels cannot be timed while a CUDA graph is captured; call slimc.tune before the capture")


def _counts(tokens: Iterable[int]) -> list[int]:
    given = list(tokens)
    if not given or min(given) < 1:
        raise InputError(f"numbers of tokens to time kernels at must be positive, not {given}")
    return sorted({token_bucket(count) for count in given})


def _measure(layer: SlimLinear, kernels: KernelTable, dtype: torch.dtype, counts: Sequence[int]) -> _Times:
    """Time every kernel that accepts, at each number of tokens where there is more than one."""
    device = layer.device
    states: dict[Callable[..., Any], Any] = {}
    times: _Times = {}
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device if device.type == "cuda" else -1):
        for count in counts:
            rivals = [
                kernel
                for kernel in kernels
                if kernel.timed and kernel.refuses(layer.format, dtype, device, count) is None
            ]
            if len(rivals) < 2:
                times[count] = {}
                continue
            x = torch.randn(count, layer.in_features, device=device).to(dtype)
            times[count] = {kernel.name: _time(kernel, layer, x, states) for kernel in rivals}
            log.info("%s, %d tokens: %s", layer.format.describe(), count, times[count])
    return times


def _time(kernel: Kernel, layer: SlimLinear, x: Tensor, states: dict[Callable[..., Any], Any]) -> float:
    try:
        if kernel.prepare not in states:
            states[kernel.prepare] = layer.derive(kernel)
        state = states[kernel.prepare]
        bias = None if layer.bias is None else usable_bias(layer.bias, x, layer.out_features)
        return microseconds(lambda: kernel.run(x, state, bias), x.device)
    except (KernelError, RuntimeError) as error:
        # Not least there may be too little memory for it.
        log.info("%s failed at %d tokens of %s: %s", kernel.name, len(x), layer.format.describe(), error)
        return math.inf


def describe(device: torch.device) -> str | None:
    """Return what decides the speed of kernels on a device, or None if nothing is measured there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    card = properties.name, properties.multi_processor_count, properties.L2_cache_size
    return json.dumps([*card, driver.driver_version(), torch.__version__, _sources()])


@cache
def _sources() -> str:
    """Return a digest of all that kernels are made of."""
    digest = hashlib.sha256()
    backends = files("slimc.backends")
    for folder in (backends, backends / "cuda"):
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            if file.is_file():
                digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _key(spec: LinearFormat, dtype: torch.dtype, place: str) -> str:
    return hashlib.sha256(json.dumps([spec.to_json(), str(dtype), place]).encode()).hexdigest()


def _parse(kept: bytes) -> _Times:
    """Return the times in a file of ours; one that an older slimc wrote differently counts as none."""
    try:
        record = json.loads(kept)
        return {int(count): {name: float(taken) for name, taken in times.items()} for count, times in record.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _copy(times: Mapping[int, Mapping[str, float]]) -> _Times:
    return {count: dict(by_name) for count, by_name in times.items()}
