"""Kernels and the outside world: what computes compressed layers, and what slimc reads from and writes to."""

from __future__ import annotations

from slimc.backends import cpu, reference
from slimc.backends.cuda import compose, decode, hopper, layout
from slimc.runtime.select import Kernel

__all__ = ["KERNELS", "LAYOUTS"]

FRAGMENT_KERNELS: tuple[Kernel, ...] = (hopper.HOPPER, decode.DECODE)
"""Those that compute with fragments, best first."""

COMPOSED = compose.composed(FRAGMENT_KERNELS)

KERNELS: tuple[Kernel, ...] = (*cpu.KERNELS, *FRAGMENT_KERNELS, COMPOSED, compose.DECODED, *reference.KERNELS)
"""The kernel table, best first; the last accepts everything."""

LAYOUTS = (layout.FRAGMENTS, compose.COMPOSED)
"""The layouts that take the place of the canonical tensors where their kernels are the best."""
