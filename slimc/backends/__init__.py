"""Kernels and the outside world: what computes compressed layers, and what slimc reads from and writes to."""

from __future__ import annotations

from slimc.backends import cpu, cusparselt, reference
from slimc.backends.cuda import decode, dense, hopper, stored
from slimc.backends.tuning import TIMINGS
from slimc.runtime.select import KernelTable

__all__ = ["KERNELS"]

KERNELS = KernelTable(
    (
        *cpu.KERNELS,
        cusparselt.DECODED,
        hopper.HOPPER,
        decode.DECODE,
        dense.DENSE,
        cusparselt.CUSPARSELT,
        stored.STORED,
        *reference.KERNELS,
    ),
    TIMINGS,
    __name__,
)
"""The kernel table, best first as far as it is known without measuring; the last accepts everything."""
