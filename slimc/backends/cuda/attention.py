"""Attention of a few queries over a cache of keys and values, as for each new token of a sequence (``attend.cu``).

PyTorch's kernels give a head to one block, which reads all of its keys alone, hidden ones too. Here blocks share the
keys of a head, and what the mask hides is not read.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from slimc.backends.cuda import driver
from slimc.backends.cuda.counters import Counters
from slimc.backends.cuda.layer import source

__all__ = ["attend", "refuses"]

KERNEL_NAME = "attend"

HEADS = (64, 128)
"""Numbers of a query that the kernel is made for."""

MOST_ROWS = 8
"""Queries of a head."""

THREADS = 128
KEYS = 64
"""Keys that a block takes at a time."""

WAVES = 8
"""Blocks for each multiprocessor, if there are keys for so many."""

_PARTS = 2
"""Numbers that a block leaves for a query beside those of a head."""


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "mask", "y", "found", "arrived")),
        *((f"{name}_strides", ctypes.c_longlong * 3) for name in ("q", "k", "v")),
        ("mask_strides", ctypes.c_longlong * 4),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("heads", "keys", "run")),
    ]  # fmt: skip


def refuses(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Say why the kernel cannot compute a case, or return ``None``.

    Args:
        q: queries [batch, heads, rows, numbers].
        k: keys [batch, heads, keys, numbers].
        v: values, like k.
        mask: bool, broadcast to [batch, heads, rows, keys], which keys a query sees; or ``None``.
    """
    if q.device.type != "cuda":
        return f"needs a CUDA GPU, not {q.device.type}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    return _refuses_sizes(q, k, v, mask)


def _refuses_sizes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Say what of the sizes and dtypes it cannot compute; a size that is not known before a call may be any."""
    if not q.dim() == k.dim() == v.dim() == 4:
        return "needs queries, keys and values of four axes"
    if q.dtype not in (torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        return "needs queries, keys and values of one 16-bit dtype"
    if not _is_among(q.shape[3], HEADS) or not q.shape[3] == k.shape[3] == v.shape[3]:
        return f"needs heads of {' or '.join(map(str, HEADS))} numbers"
    if not _is_among(q.shape[2], range(1, MOST_ROWS + 1)):
        return f"is for 1 to {MOST_ROWS} queries a head"
    if not q.shape[1] == k.shape[1] == v.shape[1] or k.shape[2] != v.shape[2]:
        return "needs as many heads of keys and values as of queries"
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4):
        return "needs a mask of bools with four axes"
    return None


def _is_among(size: int, known: Any) -> bool:
    return type(size) is int and size in known


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if not q.numel() or not k.numel() or refuses(q, k, v, mask) or not all(map(_can_be_read, (q, k, v))):
        return _empty_like(q).copy_(scaled_dot_product_attention(q, k, v, mask, scale=scale))
    batch, heads, rows, numbers = q.shape
    keys, device_index = k.shape[2], q.get_device()
    stream = torch.cuda.current_stream(q.device).cuda_stream
    processors = torch.cuda.get_device_properties(device_index).multi_processor_count
    run = KEYS * max(1, round(batch * heads * keys / (KEYS * WAVES * processors)))
    runs = -(-keys // run)
    y = _empty_like(q)
    arguments = _Arguments(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), y=y.data_ptr(),
        q_strides=q.stride()[:3], k_strides=k.stride()[:3], v_strides=v.stride()[:3],
        scale=scale * math.log2(math.e), heads=heads, keys=keys, run=run,
    )  # fmt: skip
    found = None
    if runs > 1:
        found = torch.empty(batch * heads * runs * rows * (numbers + _PARTS), dtype=torch.float32, device=q.device)
        arguments.found = found.data_ptr()
        arguments.arrived = _counters(device_index, 1 << (batch * heads - 1).bit_length()).of_launch(stream)
    if mask is not None:
        mask = mask.expand(batch, heads, rows, keys)
        arguments.mask, arguments.mask_strides = mask.data_ptr(), mask.stride()
    _launcher(q.dtype, numbers, rows, mask is not None, device_index)(
        arguments,
        grid=(runs, batch * heads, 1),
        block=(THREADS, 1, 1),
        stream=stream,
        programmatic=torch.cuda.get_device_capability(device_index)[0] >= 9,
    )
    return y


def _empty_like(q: Tensor) -> Tensor:
    """Return memory for a result, the heads of a token side by side, as PyTorch's kernels leave it for what follows."""
    batch, heads, rows, numbers = q.shape
    return q.new_empty(batch, rows, heads, numbers).transpose(1, 2)


def _can_be_read(tensor: Tensor) -> bool:
    """Whether each head of each token lies in one piece, for loads of 16 bytes."""
    steps = [step for step, size in zip(tensor.stride()[:3], tensor.shape, strict=False) if size > 1]
    return tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps)


@cache
def _counters(device_index: int, count: int) -> Counters:
    return Counters(torch.device("cuda", device_index), count)


@cache
def _launcher(dtype: torch.dtype, numbers: int, rows: int, masked: bool, device_index: int) -> driver.Launcher:
    defines = {
        "BFLOAT16": int(dtype == torch.bfloat16),
        "ARCH": 10 * torch.cuda.get_device_capability(device_index)[0],
        "HEAD": numbers,
        "ROWS": rows,
        "MASK": int(masked),
    }
    return (
        driver.load(source("attend.cu"), KERNEL_NAME, device_index, defines).function(KERNEL_NAME).prepare([_Arguments])
    )


def _infer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:  # noqa: ARG001
    return _empty_like(q)


torch.library.define(
    "slim::attend", "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)  # fmt: skip
torch.library.impl("slim::attend", "CompositeExplicitAutograd", _attend)
torch.library.register_fake("slim::attend", _infer)

attend = torch.ops.slim.attend.default
"""y [batch, heads, rows, numbers] = softmax(scale * q @ k^T, where the mask allows) @ v, zeros where it hides all keys.

It has no gradients. Where the kernel refuses (`refuses`), or keys lie in memory as it cannot read them, it is computed
by `torch.nn.functional.scaled_dot_product_attention`.
"""
