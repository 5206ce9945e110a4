"""Products with a matrix of signs on a GPU: for a few tokens by a kernel that reads one bit a weight (``signs.cu``).

For more, ``(left @ right) (.) B`` is written out at every call, into memory of PyTorch's allocator, and cuBLAS
multiplies by it. Where the rest of the layer's weight is decoded too, that adds the signs while it writes (`Signs`), so
that one product does for both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from slimc.backends.cuda import driver
from slimc.backends.cuda.layer import MOST_STACKED, settle, source
from slimc.errors import KernelError
from slimc.runtime.packing import PackedBinary

__all__ = ["MOST_TOKENS", "SignProduct", "Signs", "StackedSigns", "are_few"]

PRODUCT_KERNEL = "add_signs"
MATRIX_KERNEL = "write_signs"

WARPS = 8
WORD_COLUMNS = 32
MOST_TOKENS = 16
"""Above, the kernel is slower than decoding the weight, signs included, and a dense product."""

MATRIX_THREADS, BYTE_COLUMNS = 128, 8
MOST_GRID_ROWS = 65535

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


class Signs(ctypes.Structure):
    """``struct Signs`` of ``signs.cuh``: the binary part of a weight, for kernels that add it to what they decode."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("signs", "left", "right")),
        *((name, ctypes.c_int) for name in ("rank", "columns")),
    )


class _MatrixArguments(ctypes.Structure):
    """``struct MatrixArguments`` of the source."""

    _fields_ = (
        ("signs", Signs),
        ("matrix", ctypes.c_void_p),
        ("rows", ctypes.c_int),
    )


class SignProduct:
    """The binary part of a layer, ready to be added to a result.

    Args:
        packed: signs and factors; nothing is copied unless it lies where the kernel cannot load it.
    """

    def __init__(self, packed: PackedBinary) -> None:
        """Compile nothing yet."""
        self.packed = PackedBinary(*(_aligned(tensor) for tensor in packed.tensors().values()))
        spec = packed.format
        self.rows, self.columns, self.rank = spec.rows, spec.columns, spec.rank
        settle(packed.signs.device)

    @property
    def products(self) -> tuple[SignProduct, ...]:
        """Itself: the only one of what is no stack."""
        return (self,)

    @property
    def arguments(self) -> Signs:
        """What kernels that decode the rest of the weight need to know."""
        tensors = (tensor.data_ptr() for tensor in self.packed.tensors().values())
        return Signs(*tensors, self.rank, self.columns)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Add ``sum_k ((x * right[k]) @ B^T) * left[:, k]`` to y [tokens, rows] and return it; x is [tokens, columns].

        All have the dtype of the factors. The sum is rounded once. For a few tokens (`are_few`)
        ``x * right[k]`` is rounded too, for others ``(left @ right) (.) B``, once a rank.
        """
        return _add_few((self,), y, x) if are_few(x) else self.add_dense(y, x)

    def add_dense(self, y: Tensor, x: Tensor) -> Tensor:
        """Do the same by a product of cuBLAS, in place."""
        return y.addmm_(x, self.matrix().t())

    def matrix(self) -> Tensor:
        """Return ``(left @ right) (.) B`` [rows, columns], rounded once a rank.

        Raises:
            KernelError: the kernel cannot be compiled or loaded.
        """
        matrix = self.packed.left.new_empty(self.rows, self.columns)
        if not matrix.is_cuda:
            return matrix.copy_(self.packed.decode())
        _matrix_launcher(matrix.get_device(), matrix.dtype)(
            _MatrixArguments(self.arguments, matrix.data_ptr(), self.rows),
            grid=(-(-self.columns // (BYTE_COLUMNS * MATRIX_THREADS)), min(self.rows, MOST_GRID_ROWS), 1),
            block=(MATRIX_THREADS, 1, 1),
            stream=torch.cuda.current_stream(matrix.device).cuda_stream,
        )
        return matrix


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
        if are_few(x):
            return _add_few(self.products, y, x)
        for one, part in zip(self.products, y.split_with_sizes([one.rows for one in self.products], 1), strict=True):
            one.add_dense(part, x)
        return y


def are_few(x: Tensor) -> bool:
    """Return whether a kernel reads the signs for x [tokens, columns], and not a matrix that is written of them."""
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
    return _load(device_index, dtype, token_tiles, row_tiles).function(PRODUCT_KERNEL).prepare([_Arguments])


@cache
def _matrix_launcher(device_index: int, dtype: torch.dtype) -> driver.Launcher:
    return _load(device_index, dtype, 1, 1).function(MATRIX_KERNEL).prepare([_MatrixArguments])


def _load(device_index: int, dtype: torch.dtype, token_tiles: int, row_tiles: int) -> driver.Module:
    major, _ = torch.cuda.get_device_capability(device_index)
    return driver.load(source("signs.cu"), "signs", device_index, launch_defines(dtype, major, token_tiles, row_tiles))


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
