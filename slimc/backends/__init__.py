"""Kernels and the outside world: what computes compressed layers, and what slimc reads from and writes to."""

from __future__ import annotations

from slimc.backends import cpu, cusparselt, reference
from slimc.backends.cuda import compose, decode, dense, layout, prefill, stored, stream
from slimc.backends.tuning import TIMINGS
from slimc.runtime.select import Kernel, KernelTable

__all__ = ["KERNELS", "LAYOUTS"]

FRAGMENT_KERNELS: tuple[Kernel, ...] = (
    cusparselt.DECODED,
    prefill.PREFILL,
    stream.STREAM,
    decode.DECODE,
    dense.DENSE,
)
"""Those that compute with fragments, best first as far as it is known without measuring."""

COMPOSED = compose.composed(FRAGMENT_KERNELS)

KERNELS = KernelTable(
    (
        *cpu.KERNELS,
        *FRAGMENT_KERNELS,
        cusparselt.CUSPARSELT,
        COMPOSED,
        stored.STORED,
        compose.DECODED,
        *reference.KERNELS,
    ),
    TIMINGS,
    __name__,
)
"""The kernel table, best first as far as it is known without measuring; the last accepts everything."""

LAYOUTS = (layout.FRAGMENTS, cusparselt.LAYOUT, compose.COMPOSED)
"""The layouts that take the place of the canonical tensors where their kernels are the best."""
