"""Kernels and the outside world: what computes compressed layers, and what slimc reads from and writes to."""

from __future__ import annotations

from slimc.backends import cpu, reference
from slimc.backends.cuda import decode, hopper, prefill
from slimc.runtime.select import Kernel

__all__ = ["KERNELS"]

KERNELS: tuple[Kernel, ...] = (*cpu.KERNELS, prefill.PREFILL, hopper.HOPPER, decode.DECODE, *reference.KERNELS)
"""The kernel table, best first; the last accepts everything."""
