"""Inputs rounded to 8 bits on the GPU, in one launch (``quantize.cu``), for products in 16 bits."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from slimc.backends.cuda import driver
from slimc.backends.cuda.layer import source
from slimc.runtime import activations

__all__ = ["ACTIVATION_CODES", "THREAD_COLUMNS", "kept_for", "round_inputs", "threads_for"]

KERNEL_NAME = "round_tokens"

ACTIVATION_CODES: dict[str | None, int] = {None: 16, "int8": 8, "float8_e4m3fn": 80}
"""What the sources call the types of activations."""

THREADS = (128, 256, 512)
COLUMNS_AT_A_TIME = 8
MOST_KEPT = 8
THREAD_COLUMNS = MOST_KEPT * COLUMNS_AT_A_TIME
"""Columns of a token that a thread has registers for."""

FEW_TOKENS = 128
FEW_COLUMNS = 8
"""With few tokens there are threads to spare: a token is rounded sooner if each of them reads no more than this."""

HOPPER = 9
"""Architectures from this one on convert to float8, and begin a launch while the one before it ends."""


def round_inputs(x: Tensor, activation: str | None) -> Tensor:
    """Return what `slimc.runtime.activations.round_inputs` does, bit for bit, by one launch where there is a kernel.

    Args:
        x: [..., columns], of any dtype on any device.
        activation: what it is rounded to, or ``None``.

    Returns:
        The rounded inputs, of the shape and dtype of x; x itself without an ``activation``.
    """
    if activation is None or not _has_kernel(x, activation):
        return activations.round_inputs(x, activation)
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    columns = x.shape[-1]
    tokens = x.numel() // columns
    rounded = torch.empty_like(x)
    threads = threads_for(columns, FEW_COLUMNS if tokens <= FEW_TOKENS else THREAD_COLUMNS)
    _launcher(activation, x.dtype, threads, x.get_device())(
        x.data_ptr(),
        rounded.data_ptr(),
        columns,
        grid=(tokens, 1, 1),
        block=(threads, 1, 1),
        stream=torch.cuda.current_stream(x.device).cuda_stream,
        programmatic=torch.cuda.get_device_capability(x.device)[0] >= HOPPER,
    )
    return rounded


def threads_for(columns: int, of_a_thread: int = THREAD_COLUMNS) -> int:
    """Return how many threads round a token, so that each has no more columns than that if there can be so many."""
    return next((threads for threads in THREADS if threads * of_a_thread >= columns), THREADS[-1])


def kept_for(columns: int, threads: int) -> int:
    """Return how many times 8 columns of a token each of so many threads shall have in registers."""
    return min(-(-columns // (COLUMNS_AT_A_TIME * threads)), MOST_KEPT)


def _has_kernel(x: Tensor, activation: str) -> bool:
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or x.shape[-1] % 8 or not x.numel():
        return False
    return activation == "int8" or torch.cuda.get_device_capability(x.device)[0] >= HOPPER


@cache
def _launcher(activation: str, dtype: torch.dtype, threads: int, device_index: int) -> driver.Launcher:
    defines = {
        "BFLOAT16": int(dtype == torch.bfloat16),
        "ARCH": 10 * torch.cuda.get_device_capability(device_index)[0],
        "ACTIVATION": ACTIVATION_CODES[activation],
        "THREADS": threads,
        "KEPT": MOST_KEPT,
    }
    module = driver.load(source("quantize.cu"), "quantize_tokens", device_index, defines)
    return module.function(KERNEL_NAME).prepare([ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int])
