"""The attention of a new token of each sequence over a static cache, as decoders have it (``attend.cu``).

One launch turns q and k by the position, puts k and v into the cache, and attends. PyTorch takes some eight: for the
rotation, the cache, a mask of numbers, and attention in which each head is read by one block, hidden keys too.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import scaled_dot_product_attention

from slimc.backends.cuda import driver
from slimc.backends.cuda.layer import source
from slimc.runtime import calls

__all__ = ["attend_next", "keep", "refuses"]

KERNEL_NAME = "attend"

HEADS = (64, 128)
"""Numbers of a query that the kernel is made for."""

MOST_ROWS = 8
"""Heads of queries that read the same keys."""

MOST_WARPS, PIECE = 8, 16
"""Of a block, and keys that a warp takes at a time."""

MOST_BLOCKS = 8
"""That share a head: what a cluster may have on every card."""

BLOCKS_PER_PROCESSOR = 2
"""From this many on, heads are not shared any further."""

HOPPER = 9


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "q", "k", "v", "cos", "sin", "keys", "values", "position", "mask", "y",
        )),
        *((f"{name}_strides", ctypes.c_longlong * 2) for name in ("q", "k", "v", "turn")),
        *((f"{name}_strides", ctypes.c_longlong * 3) for name in ("keys", "values", "mask")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("heads", "length", "run")),
    ]  # fmt: skip


def refuses(tensors: Sequence[Tensor], mask: Tensor | None) -> str | None:
    """Say why there is no kernel for a case, or return ``None``.

    Args:
        tensors: q, k, v, cos, sin, keys and values of `attend_next`.
        mask: the mask, if there is one.
    """
    device = tensors[0].device
    if device.type != "cuda":
        return f"needs a CUDA GPU, not {device.type}"
    if torch.cuda.get_device_capability(device)[0] < HOPPER:
        return "needs a GPU of compute capability 9.0 or more"
    return _refuses_sizes(tensors, mask)


def _refuses_sizes(tensors: Sequence[Tensor], mask: Tensor | None) -> str | None:
    """Say what of the sizes and dtypes it cannot compute; a size that is not known before a call may be any."""
    q, k, v, cos, sin, keys, values = tensors
    if any(one.dim() != 4 for one in tensors):
        return "needs tensors of four axes"
    if q.dtype not in (torch.bfloat16, torch.float16) or any(one.dtype != q.dtype for one in tensors):
        return "needs tensors of one 16-bit dtype"
    batch, heads, length = k.shape[0], k.shape[1], keys.shape[2]
    if not any(all(_same(one.shape[3], numbers) for one in tensors) for numbers in HEADS):
        return f"needs heads of {' or '.join(map(str, HEADS))} numbers"
    if not _are(q, batch, q.shape[1], 1) or not _are(k, batch, heads, 1) or not _are(v, batch, heads, 1):
        return "is for one new token of each sequence"
    if not any(_same(q.shape[1], rows * heads) for rows in range(1, MOST_ROWS + 1)):
        return f"needs 1 to {MOST_ROWS} heads of queries for each of keys"
    if not _are(keys, batch, heads, length) or not _are(values, batch, heads, length):
        return "needs a cache of as many sequences and heads as there are keys"
    if not all(_are(one, batch, 1, 1) or _are(one, 1, 1, 1) for one in (cos, sin)):
        return "needs one rotation for all heads of a token"
    if mask is not None and not _is_mask(mask, batch, q.shape[1], length):
        return "needs a mask of bools that says of each key who sees it"
    return None


def _are(tensor: Tensor, *sizes: int) -> bool:
    return all(_same(size, wanted) for size, wanted in zip(tensor.shape, sizes, strict=False))


def _is_mask(mask: Tensor, batch: int, heads: int, length: int) -> bool:
    if mask.dtype != torch.bool or mask.dim() != 4 or not _same(mask.shape[3], length):
        return False
    return all(_same(size, 1) or _same(size, whole) for size, whole in zip(mask.shape, (batch, heads, 1), strict=False))


def _same(size: int, wanted: int) -> bool:
    """Whether two sizes are the same at every call, which of those of a graph may not be known."""
    return bool(statically_known_true(size == wanted))


def _attend_next(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    heads, rows = k.shape[1], q.shape[1] // k.shape[1]
    tensors = (q, k, v, cos, sin, keys, values)
    if refuses(tensors, mask) or not all(map(_can_be_read, tensors)) or position.dtype != torch.int64:
        return _by_pytorch(q, k, v, cos, sin, keys, values, position, mask, scale)
    batch, length, numbers, device_index = q.shape[0], keys.shape[2], q.shape[3], q.get_device()
    y = _empty_like(q)
    blocks = _blocks(batch * heads, length, device_index)
    pieces = -(-length // (blocks * PIECE))
    mask_strides: tuple[int, ...] = (0, 0, 0)
    if mask is not None:
        mask_strides = tuple(mask.expand(batch, q.shape[1], 1, length).stride(axis) for axis in (0, 1, 3))
    arguments = _Arguments(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(),
        keys=keys.data_ptr(), values=values.data_ptr(), position=position.data_ptr(),
        mask=None if mask is None else mask.data_ptr(), y=y.data_ptr(),
        q_strides=q.stride()[:2], k_strides=k.stride()[:2], v_strides=v.stride()[:2],
        turn_strides=tuple(one.expand(batch, -1, -1, -1).stride(0) for one in (cos, sin)),
        keys_strides=keys.stride()[:3], values_strides=values.stride()[:3], mask_strides=mask_strides,
        scale=scale * math.log2(math.e), heads=heads, length=length, run=pieces * PIECE,
    )  # fmt: skip
    _launcher(q.dtype, numbers, rows, blocks, mask is not None, device_index)(
        arguments,
        grid=(blocks, batch * heads, 1),
        block=(32 * min(pieces, MOST_WARPS), 1, 1),
        stream=torch.cuda.current_stream(q.device).cuda_stream,
        programmatic=True,
        cluster=blocks,
    )
    return y


def _blocks(heads: int, length: int, device_index: int) -> int:
    """Return how many blocks share a head of one sequence."""
    processors = torch.cuda.get_device_properties(device_index).multi_processor_count
    blocks = 1
    while blocks < MOST_BLOCKS and blocks * heads < BLOCKS_PER_PROCESSOR * processors and 2 * blocks * PIECE <= length:
        blocks *= 2
    return blocks


def _by_pytorch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    where = position.reshape(1)
    keys.index_copy_(2, where, _turn(k, cos, sin))
    values.index_copy_(2, where, v)
    rows = q.shape[1] // k.shape[1]
    every, of_all = keys.repeat_interleave(rows, 1), values.repeat_interleave(rows, 1)
    return _empty_like(q).copy_(scaled_dot_product_attention(_turn(q, cos, sin), every, of_all, mask, scale=scale))


def _keep(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _empty_like(q: Tensor) -> Tensor:
    """Return memory for a result, the heads of a token side by side, as PyTorch's kernels leave it for what follows."""
    batch, heads, rows, numbers = q.shape
    return q.new_empty(batch, rows, heads, numbers).transpose(1, 2)


def _can_be_read(tensor: Tensor) -> bool:
    """Whether each head of each token lies in one piece, for loads of 16 bytes."""
    steps = [step for step, size in zip(tensor.stride()[:3], tensor.shape, strict=False) if size > 1]
    return tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps)


@cache
def _launcher(
    dtype: torch.dtype, numbers: int, rows: int, blocks: int, masked: bool, device_index: int
) -> driver.Launcher:
    defines = {
        "BFLOAT16": int(dtype == torch.bfloat16),
        "ARCH": 10 * torch.cuda.get_device_capability(device_index)[0],
        "HEAD": numbers,
        "ROWS": rows,
        "MASK": int(masked),
        "BLOCKS": blocks,
    }
    return (
        driver.load(source("attend.cu"), KERNEL_NAME, device_index, defines).function(KERNEL_NAME).prepare([_Arguments])
    )


def _infer(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,  # noqa: ARG001
    cos: Tensor,  # noqa: ARG001
    sin: Tensor,  # noqa: ARG001
    keys: Tensor,  # noqa: ARG001
    values: Tensor,  # noqa: ARG001
    position: Tensor,  # noqa: ARG001
    mask: Tensor | None,  # noqa: ARG001
    scale: float,  # noqa: ARG001
) -> Tensor:
    return _empty_like(q)


calls.define(
    "slim::attend_next",
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor position, "
    "Tensor? mask, float scale) -> Tensor",
    _attend_next,
    _infer,
)

calls.define("slim::keep", "(Tensor x) -> Tensor", _keep, _keep)

attend_next = torch.ops.slim.attend_next.default
"""Attention of a new token of each sequence, whose key and value it puts into the cache.

Args:
    q: queries [batch, heads of queries, 1, numbers] of 16 bits, before they are turned by their position.
    k: the key [batch, heads, 1, numbers], before it is turned.
    v: the value, like k.
    cos, sin: the rotation [batch or 1, 1, 1, numbers].
    keys, values: the cache [batch, heads, length, numbers], which the launch before this one must not write.
    position: int64, one number: where in the cache the new token belongs; not written by the launch before, either.
    mask: bool, broadcast to [batch, heads of queries, 1, length], which keys a query sees; or ``None``.
    scale: of the scores.

Returns:
    y [batch, heads of queries, 1, numbers], zeros where the mask hides all keys. It has no gradients. Where the kernel
    refuses (`refuses`), or tensors lie in memory as it cannot read them, PyTorch's operators compute it.
"""

keep = torch.ops.slim.keep.default
"""A copy of x, for what many operators read: Inductor would compute it anew for each of them."""
