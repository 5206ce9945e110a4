"""Products with a matrix of signs on a GPU: for a few tokens by a kernel that reads one bit a weight (``signs.cu``).

For many tokens, where a dense product of the tensor cores is not bound by memory, the signs are written out as numbers
at every call, into memory of PyTorch's allocator, and cuBLAS multiplies by them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends.cuda import driver
from slimc.backends.cuda.layer import MOST_STACKED, settle, source
from slimc.errors import KernelError
from slimc.runtime.decode import unpack_signs
from slimc.runtime.packing import PackedBinary

__all__ = ["MOST_TOKENS", "SignProduct", "StackedSigns"]

KERNEL_NAME = "add_signs"

WARPS = 8
WORD_COLUMNS = 32
MOST_TOKENS = 64
"""Above, each block would read more activations than signs, and a dense product should be less work (not measured)."""

TILE_ROWS, TILE_TOKENS = 16, 8
LOAD_BYTES = 16


class _Member(ctypes.Structure):
    """``struct Member`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("signs", "left", "right")),
        *((name, ctypes.c_int) for name in ("rank", "rows", "first_row", "first_block")),
    )


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        ("members", _Member * MOST_STACKED),
        *((name, ctypes.c_int) for name in ("member_count", "rows", "columns", "tokens")),
    )


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
        # Made here, where memory stays: a call may be captured, or take its memory from the pool of a graph.
        every_byte = torch.arange(256, dtype=torch.uint8, device=packed.signs.device)[:, None]
        self._numbers = unpack_signs(every_byte, 8, spec.dtype)
        settle(packed.signs.device)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Add ``sum_k ((x * right[k]) @ B^T) * left[:, k]`` to y [tokens, rows] and return it; x is [tokens, columns].

        All have the dtype of the factors. The sum is rounded once by the kernel, and for many tokens once a rank.
        """
        return _add_few((self,), y, x) if _are_few(x) else self.add_dense(y, x)

    def add_dense(self, y: Tensor, x: Tensor) -> Tensor:
        """Do the same by products of cuBLAS, in place."""
        matrix = self._dense()
        for column, row in zip(self.packed.left.unbind(1), self.packed.right.unbind(0), strict=True):
            y = y.addcmul_(functional.linear(x * row, matrix), column)
        return y

    def _dense(self) -> Tensor:
        """Return the matrix of +1 and -1, [rows, columns]."""
        numbers = functional.embedding(self.packed.signs.int(), self._numbers)
        return numbers.view(self.rows, -1)[:, : self.columns]


class StackedSigns:
    """The binary parts of layers that read the same inputs, added by one launch.

    Args:
        products: in the order of the rows.

    Raises:
        KernelError: they are too many, or of different widths.
    """

    def __init__(self, products: Sequence[SignProduct]) -> None:
        """Read the memory of the products; nothing is copied."""
        kinds = {(one.columns, one.packed.left.dtype) for one in products}
        if len(products) > MOST_STACKED or len(kinds) > 1:
            raise KernelError(f"up to {MOST_STACKED} binary parts of one width and dtype can be stacked, not these")
        self.products = tuple(products)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Add each product to its rows of y [tokens, rows of all] and return it; x is [tokens, columns]."""
        if _are_few(x):
            return _add_few(self.products, y, x)
        for one, part in zip(self.products, y.split_with_sizes([one.rows for one in self.products], 1), strict=True):
            one.add_dense(part, x)
        return y


def _are_few(x: Tensor) -> bool:
    return x.is_cuda and len(x) <= MOST_TOKENS and not x.shape[1] % WORD_COLUMNS


def _add_few(products: Sequence[SignProduct], y: Tensor, x: Tensor) -> Tensor:
    """Launch the kernel.

    Raises:
        KernelError: the kernel cannot be compiled or loaded.
    """
    y, x, tokens = y.contiguous(), _aligned(x), len(x)
    token_tiles = 1 if tokens <= TILE_TOKENS else 2
    rows = sum(one.rows for one in products)
    row_tiles = tiles_of_rows(rows, _processors(x.get_device()))
    arguments = _Arguments(
        x=x.data_ptr(), y=y.data_ptr(), member_count=len(products), rows=rows, columns=x.shape[1], tokens=tokens
    )
    row = block = 0
    for index, one in enumerate(products):
        arguments.members[index] = _Member(
            signs=one.packed.signs.data_ptr(),
            left=one.packed.left.data_ptr(),
            right=one.packed.right.data_ptr(),
            rank=one.rank,
            rows=one.rows,
            first_row=row,
            first_block=block,
        )
        row, block = row + one.rows, block + -(-one.rows // (TILE_ROWS * row_tiles))
    _launcher(x.get_device(), x.dtype, token_tiles, row_tiles)(
        arguments,
        grid=(block, -(-tokens // (TILE_TOKENS * token_tiles)), 1),
        block=(32 * WARPS, 1, 1),
        stream=torch.cuda.current_stream(x.device).cuda_stream,
        programmatic=True,
    )
    return y


@cache
def _processors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@cache
def _launcher(device_index: int, dtype: torch.dtype, token_tiles: int, row_tiles: int) -> driver.Launcher:
    major, _ = torch.cuda.get_device_capability(device_index)
    defines = launch_defines(dtype, major, token_tiles, row_tiles)
    module = driver.load(source("signs.cu"), KERNEL_NAME, device_index, defines)
    return module.function(KERNEL_NAME).prepare([_Arguments])


def tiles_of_rows(rows: int, processors: int) -> int:
    """Return how many tiles of 16 rows a block has: more read less of x, but each processor shall have a block."""
    return next((tiles for tiles in (4, 2) if -(-rows // (tiles * TILE_ROWS)) >= processors), 1)


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
