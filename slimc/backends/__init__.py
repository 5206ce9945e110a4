"""Kernels and the outside world: what computes compressed layers, and what slimc reads from and writes to."""

from __future__ import annotations

from slimc.backends import cpu, cusparselt, reference
from slimc.backends.cpu_signs import INT4PACK_SIGNS
from slimc.backends.cuda import compose, decode, dense, layout, mixed, prefill, stored, stream
from slimc.backends.cuda.signs import SignProduct, StackedSigns
from slimc.backends.signed import signed, signed_layout
from slimc.backends.tuning import TIMINGS
from slimc.runtime.select import Kernel, KernelTable

__all__ = ["KERNELS", "LAYOUTS"]

FRAGMENT_KERNELS: tuple[Kernel, ...] = (
    cusparselt.DECODED,
    stream.STREAM,
    prefill.PREFILL,
    decode.DECODE,
    dense.DENSE,
)
"""Those that compute with fragments, best first as far as it is known without measuring."""

COMPOSED = compose.composed((*FRAGMENT_KERNELS, mixed.MIXED, mixed.MIXED_DENSE))

SIGNED_LAYOUTS = tuple(
    signed_layout(one, SignProduct) for one in (layout.FRAGMENTS, cusparselt.LAYOUT, compose.COMPOSED)
)

SIGNED: tuple[Kernel, ...] = (
    INT4PACK_SIGNS,
    signed("cuda-signs", FRAGMENT_KERNELS, SignProduct, SIGNED_LAYOUTS[0].prepare, StackedSigns, dense.run_with_signs),
    signed("cusparselt-signs", (cusparselt.CUSPARSELT,), SignProduct, SIGNED_LAYOUTS[1].prepare),
    signed("cuda-composed-signs", (COMPOSED,), SignProduct, SIGNED_LAYOUTS[2].prepare),
    signed("cuda-stored-signs", (stored.STORED,), SignProduct, together=stored.run_with_signs),
)
"""Those for layers with a binary part, each by the kernels of the others that hold a layer in the same order."""

KERNELS = KernelTable(
    (
        *cpu.KERNELS,
        *FRAGMENT_KERNELS,
        cusparselt.CUSPARSELT,
        mixed.MIXED,
        mixed.MIXED_DENSE,
        COMPOSED,
        stored.STORED,
        *SIGNED,
        compose.DECODED,
        *reference.KERNELS,
    ),
    TIMINGS,
    __name__,
)
"""The kernel table, best first as far as it is known without measuring; the last accepts everything."""

LAYOUTS = (layout.FRAGMENTS, cusparselt.LAYOUT, mixed.LAYOUT, compose.COMPOSED, *SIGNED_LAYOUTS)
"""The layouts that take the place of the canonical tensors where their kernels are the best."""
