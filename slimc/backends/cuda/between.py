"""A compressed layer with what a decoder does ahead of it, a residual and a norm or a gate (``between.cu``).

As one operator, because the launches of the layer may then begin while what is ahead still runs, and those before it:
they bring weights to the multiprocessors meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends.cuda import driver
from slimc.backends.cuda.layer import source
from slimc.runtime import calls
from slimc.runtime.calls import run_layers

__all__ = ["add_norm", "gate_by", "gated_linears", "normed_linears", "refuses"]

CHUNK = 8
"""Columns that a thread loads at once."""

MOST_THREADS, GATE_THREADS = 1024, 64
MOST_CHUNKS = 4
WARP = 32
HOPPER = 9


def refuses(x: Tensor, columns: int) -> str | None:
    """Say why there is no kernel for tokens like x, or return ``None``."""
    if x.device.type != "cuda":
        return f"needs a CUDA GPU, not {x.device.type}"
    if torch.cuda.get_device_capability(x.device)[0] < HOPPER:
        return "needs a GPU of compute capability 9.0 or more"
    return _refuses_sizes(x, columns)


def _refuses_sizes(x: Tensor, columns: int) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return "needs a 16-bit dtype"
    if columns % CHUNK or columns > CHUNK * MOST_CHUNKS * MOST_THREADS:
        return f"needs a multiple of {CHUNK} columns, {CHUNK * MOST_CHUNKS * MOST_THREADS} at most"
    return None


def _normed(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, handles: Sequence[Tensor], *, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    given = (x, residual, weight)
    if not x.numel() or refuses(x, columns) or not all(_lies_in_one_piece(one) for one in given):
        total = x + residual
        exact = total.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)
        return total, run_layers(weight * exact.to(x.dtype), handles, rows)
    total, normed = add_norm(x, residual, weight, epsilon)
    return total, run_layers(normed, handles, rows)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return ``total = x + residual`` and ``weight * total / sqrt(mean(total^2) + epsilon)``, in one launch.

    Args:
        x: [..., columns], which `refuses` does not, in one piece of memory that begins at a multiple of 16 bytes.
        residual: like x.
        weight: of the norm [columns], of x's dtype, in one piece like x.
        epsilon: of the norm.
    """
    columns = x.shape[-1]
    total, normed = torch.empty_like(x), torch.empty_like(x)
    threads = min(MOST_THREADS, -(-columns // (CHUNK * WARP)) * WARP)
    _launcher("add_norm", x.dtype, -(-columns // (CHUNK * threads)), x.get_device())(
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        total.data_ptr(),
        normed.data_ptr(),
        columns,
        epsilon,
        grid=(x.numel() // columns, 1, 1),
        block=(threads, 1, 1),
        stream=torch.cuda.current_stream(x.device).cuda_stream,
        programmatic=True,
    )
    return total, normed


def _gated(gate: Tensor, up: Tensor, handles: Sequence[Tensor], *, rows: int, columns: int) -> Tensor:
    product = None if not gate.numel() or refuses(gate, columns) else gate_by(gate, up)
    return run_layers(functional.silu(gate) * up if product is None else product, handles, rows)


def gate_by(gate: Tensor, up: Tensor) -> Tensor | None:
    """Return ``silu(gate) * up`` in one launch, or None if the kernel cannot read one of them as it lies in memory.

    Args:
        gate: [..., columns], which `refuses` does not. Neighbouring columns lie side by side, neighbouring tokens
            equally far from each other, a multiple of 16 bytes, as is where it begins.
        up: like gate, of the same shape.
    """
    strides = _token_stride(gate), _token_stride(up)
    if None in strides:
        return None
    columns, y = gate.shape[-1], gate.new_empty(gate.shape)
    _launcher("gate", gate.dtype, 1, gate.get_device())(
        gate.data_ptr(),
        up.data_ptr(),
        y.data_ptr(),
        columns,
        *strides,
        grid=(-(-columns // (CHUNK * GATE_THREADS)), gate.numel() // columns, 1),
        block=(GATE_THREADS, 1, 1),
        stream=torch.cuda.current_stream(gate.device).cuda_stream,
        programmatic=True,
    )
    return y


def _lies_in_one_piece(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % (2 * CHUNK) == 0


def _token_stride(tensor: Tensor) -> int | None:
    """Return how far tokens are apart, if all neighbours are as far and a kernel can read 16 bytes of each."""
    columns = tensor.shape[-1]
    if tensor.stride(-1) != 1 or tensor.data_ptr() % (2 * CHUNK):
        return None
    try:
        stride = tensor.view(-1, columns).stride(0) if tensor.numel() > columns else 0
    except RuntimeError:
        return None
    return None if stride % CHUNK else stride


@cache
def _launcher(name: str, dtype: torch.dtype, chunks: int, device_index: int) -> driver.Launcher:
    arch = 10 * torch.cuda.get_device_capability(device_index)[0]
    defines = {"BFLOAT16": int(dtype == torch.bfloat16), "ARCH": arch, "CHUNKS": chunks}
    tensors: dict[str, list[type]] = {
        "add_norm": [*[ctypes.c_void_p] * 5, ctypes.c_int, ctypes.c_float],
        "gate": [*[ctypes.c_void_p] * 3, ctypes.c_int, *[ctypes.c_longlong] * 2],
    }
    return driver.load(source("between.cu"), "between", device_index, defines).function(name).prepare(tensors[name])


def _infer_normed(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,  # noqa: ARG001
    epsilon: float,  # noqa: ARG001
    handles: Sequence[Tensor],  # noqa: ARG001
    *,
    rows: int,
    columns: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, x.new_empty((*total.shape[:-1], rows))


def _infer_gated(gate: Tensor, up: Tensor, handles: Sequence[Tensor], *, rows: int, columns: int) -> Tensor:  # noqa: ARG001
    return gate.new_empty((*gate.shape[:-1], rows))


calls.define(
    "slim::normed_linears",
    "(Tensor x, Tensor residual, Tensor weight, float epsilon, Tensor[] handles, *, int rows, int columns) "
    "-> (Tensor, Tensor)",
    _normed,
    _infer_normed,
)
calls.define(
    "slim::gated_linears",
    "(Tensor gate, Tensor up, Tensor[] handles, *, int rows, int columns) -> Tensor",
    _gated,
    _infer_gated,
)

normed_linears = torch.ops.slim.normed_linears.default
"""``total = x + residual`` and the layers' results for ``weight * total / sqrt(mean(total^2) + epsilon)``.

Args:
    x, residual: [..., columns], of the same shape and a 16-bit dtype.
    weight: of the norm [columns].
    epsilon: of the norm.
    handles: of the layers, which read the same input.
    rows: of all layers.
    columns: of their input.

Returns:
    total [..., columns] and the results [..., rows], without biases.
"""

gated_linears = torch.ops.slim.gated_linears.default
"""The layers' results [..., rows] for ``silu(gate) * up``, each [..., columns] of a 16-bit dtype, without biases."""
