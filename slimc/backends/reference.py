"""The kernel of last resort: decode the weight, multiply densely. Any format, device and dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimc.runtime import ops
from slimc.runtime.formats import LinearFormat
from slimc.runtime.packing import PackedLinear
from slimc.runtime.select import Kernel

__all__ = ["DECODE", "KERNELS"]

_State = tuple[tuple[Tensor | None, ...], dict[str, int]]


def _accepts(_spec: LinearFormat, _dtype: torch.dtype, _device: torch.device, _tokens: int) -> str | None:
    return None


def _prepare(packed: PackedLinear) -> _State:
    tensors = packed.tensors()
    return tuple(tensors.get(name) for name in ops.LINEAR_TENSORS), ops.linear_attributes(packed.format)


def _run(x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
    tensors, attributes = state
    return ops.OPS["slim::linear"].reference(x, *tensors, bias, **attributes)


DECODE = Kernel("decode", _accepts, _prepare, _run, transient=True, timed=False, binary=True)
"""Decodes all of the weight in every call, which pays off once many tokens share it."""

KERNELS = (DECODE,)
