"""Products with a matrix of signs on a GPU: for a few tokens by a kernel that reads one bit a weight (``signs.cu``).

For many tokens, where a dense product of the tensor cores is not bound by memory, the signs are written out as numbers
at every call, into memory of PyTorch's allocator, and cuBLAS multiplies by them.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends.cuda import driver
from slimc.backends.cuda.layer import source
from slimc.runtime.decode import unpack_signs
from slimc.runtime.packing import PackedBinary

__all__ = ["MOST_TOKENS", "SignProduct"]

KERNEL_NAME = "add_signs"

WARPS = 8
WORD_COLUMNS = 32
MOST_TOKENS = 64
"""Above, each block would read more activations than signs, and a dense product should be less work (not measured)."""

TILE_ROWS, TILE_TOKENS = 16, 8
LOAD_BYTES = 16


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "signs", "left", "right", "y")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "tokens", "rank")),
    ]  # fmt: skip


class SignProduct:
    """The binary part of a layer, ready to be added to a result.

    Args:
        packed: signs and factors; nothing is copied unless it lies where the kernel cannot load it.
    """

    def __init__(self, packed: PackedBinary) -> None:
        """Note how bytes of signs are written out; compile nothing yet."""
        self.packed = PackedBinary(*(_aligned(tensor) for tensor in packed.tensors().values()))
        spec = packed.format
        self.rows, self.columns, self.rank = spec.rows, spec.columns, spec.rank
        self._launchers: dict[tuple[int, int], driver.Launcher] = {}
        # Made here, where memory stays: a call may be captured, or take its memory from the pool of a graph.
        every_byte = torch.arange(256, dtype=torch.uint8, device=packed.signs.device)[:, None]
        self._numbers = unpack_signs(every_byte, 8, spec.dtype)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Add ``sum_k ((x * right[k]) @ B^T) * left[:, k]`` to y [tokens, rows] and return it; x is [tokens, columns].

        All have the dtype of the factors. The sum is rounded once by the kernel, and for many tokens once a rank.
        """
        if not x.is_cuda or len(x) > MOST_TOKENS or self.columns % WORD_COLUMNS:
            return self._add_dense(y, x)
        return self._add_few(y.contiguous(), _aligned(x))

    def _add_few(self, y: Tensor, x: Tensor) -> Tensor:
        """Launch the kernel.

        Raises:
            KernelError: the kernel cannot be compiled or loaded.
        """
        tokens = len(x)
        token_tiles = 1 if tokens <= TILE_TOKENS else 2
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        # Two tiles of rows halve what is read of x; one gives each processor a block in small layers.
        row_tiles = 2 if -(-self.rows // (2 * TILE_ROWS)) >= processors else 1
        packed = self.packed
        arguments = _Arguments(
            x=x.data_ptr(),
            signs=packed.signs.data_ptr(),
            left=packed.left.data_ptr(),
            right=packed.right.data_ptr(),
            y=y.data_ptr(),
            rows=self.rows,
            columns=self.columns,
            tokens=tokens,
            rank=self.rank,
        )
        self._launcher(token_tiles, row_tiles)(
            arguments,
            grid=(-(-self.rows // (TILE_ROWS * row_tiles)), -(-tokens // (TILE_TOKENS * token_tiles)), 1),
            block=(32 * WARPS, 1, 1),
            stream=torch.cuda.current_stream(x.device).cuda_stream,
        )
        return y

    def _launcher(self, token_tiles: int, row_tiles: int) -> driver.Launcher:
        key = token_tiles, row_tiles
        if key not in self._launchers:
            device = self.packed.signs.device
            major, _ = torch.cuda.get_device_capability(device)
            defines = launch_defines(self.packed.left.dtype, major, token_tiles, row_tiles)
            module = driver.load(source("signs.cu"), KERNEL_NAME, device.index or 0, defines)
            self._launchers[key] = module.function(KERNEL_NAME).prepare([_Arguments])
        return self._launchers[key]

    def _add_dense(self, y: Tensor, x: Tensor) -> Tensor:
        matrix = self._dense()
        for column, row in zip(self.packed.left.unbind(1), self.packed.right.unbind(0), strict=True):
            y = y.addcmul_(functional.linear(x * row, matrix), column)
        return y

    def _dense(self) -> Tensor:
        """Return the matrix of +1 and -1, [rows, columns]."""
        numbers = functional.embedding(self.packed.signs.int(), self._numbers)
        return numbers.view(self.rows, -1)[:, : self.columns]


def launch_defines(dtype: torch.dtype, major: int, token_tiles: int, row_tiles: int) -> dict[str, int | str]:
    """Return the macros that the source is compiled with."""
    return {
        "BFLOAT16": int(dtype == torch.bfloat16),
        "ARCH": 10 * major,
        "TOKEN_TILES": token_tiles,
        "ROW_TILES": row_tiles,
    }


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor with its rows one after another, from where the kernel can load 16 bytes on."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % LOAD_BYTES else tensor
