"""Products with a matrix of signs on the CPU, by the kernel for 4-bit codes: signs are the codes of +1 and -1.

PyTorch has no kernel for bits. Its int4 kernel reads four times as many, a quarter of what 16-bit numbers take, and
multiplies by a scale a row, which is the left factor. The signs stay as they are stored beside them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends.cpu import INT4PACK
from slimc.backends.signed import signed
from slimc.runtime.decode import unpack_signs
from slimc.runtime.formats import LinearFormat
from slimc.runtime.packing import PackedBinary

__all__ = ["INT4PACK_SIGNS", "CodedSigns"]

GROUPS = (256, 128, 64, 32)
"""Columns that may share a scale in the int4 kernel, larger first."""

MOST_TOKENS = 32
"""2:4 int4 with signs, 576 x 1536, one thread of a CPU with AMX, ms a call (this, decoding, bfloat16 `Linear`): 1 token
0.15, 2.9, 0.14; 16 tokens 0.95, 3.4, 0.23; 64 tokens 3.7, 3.0, 0.24.
"""

ROW_MULTIPLE = 16
ZERO = 8
"""The code of zero."""

# `INT4PACK` refuses every case where a release of PyTorch lacks them.
_multiply: Any = getattr(torch, "_weight_int4pack_mm_for_cpu", None)
_pack: Any = getattr(torch, "_convert_weight_to_int4pack_for_cpu", None)


class CodedSigns:
    """The binary part of a layer, as codes of the int4 kernel.

    Args:
        packed: signs and factors.
    """

    def __init__(self, packed: PackedBinary) -> None:
        """Write the signs as codes, once for all ranks."""
        self.packed = packed
        spec = packed.format
        self._padding = -spec.columns % GROUPS[-1]
        width = spec.columns + self._padding
        self._group = next(group for group in GROUPS if width % group == 0)
        more_rows = -spec.rows % ROW_MULTIPLE
        signs = functional.pad(unpack_signs(packed.signs, spec.columns, torch.int32), (0, self._padding, 0, more_rows))
        self._codes: Tensor = _pack(signs + ZERO, 1)
        factors = functional.pad(packed.left, (0, 0, 0, more_rows)).to(torch.bfloat16).unbind(1)
        scales = (factor.expand(width // self._group, -1) for factor in factors)
        self._scales = [torch.stack((scale, torch.zeros_like(scale)), -1) for scale in scales]

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Add ``sum_k ((x * right[k]) @ B^T) * left[:, k]`` to y [tokens, rows], rounded once a rank; return it."""
        for row, scales in zip(self.packed.right.unbind(0), self._scales, strict=True):
            inputs = functional.pad(x * row, (0, self._padding))
            y = y.add_(_multiply(inputs, self._codes, self._group, scales)[:, : y.shape[1]])
        return y


def _accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    if tokens > MOST_TOKENS:
        return f"for more than {MOST_TOKENS} tokens decoding the weight and its signs is faster"
    return INT4PACK.accepts(spec, dtype, device, tokens)


INT4PACK_SIGNS = signed("int4pack-signs", (replace(INT4PACK, accepts=_accepts),), CodedSigns)
"""The int4 kernel for the rest of a layer and for its signs."""
