"""Fragments to matrices of 16-bit numbers (``expand.cu``), for products that want a dense or a library's form."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from slimc.backends.cuda import driver
from slimc.backends.cuda.fragments import TILE_ROWS
from slimc.backends.cuda.layer import FACTOR_GROUP, FragmentLayer, pointer, source
from slimc.backends.cuda.signs import SignProduct, Signs, StackedSigns

__all__ = [
    "expand_kept", "expand_left", "expand_right", "expand_weight", "expand_with_signs", "order_metadata",
]  # fmt: skip

MATRIX_KERNEL = "expand_fragments"
METADATA_KERNEL = "order_metadata"

THREADS = 256
WARPS = THREADS // 32
WAVES = 8
"""Blocks for each multiprocessor: so many can run on it at once."""


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of the source."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("stride", ctypes.c_uint32),
        *((name, ctypes.c_int) for name in ("rows", "columns", "row_tiles", "units", "groups", "row_scale")),
    )


class _SignedArguments(_Arguments):
    """The same with SIGNS."""

    _fields_ = (("signs", Signs),)


class _MetadataArguments(ctypes.Structure):
    """``struct MetadataArguments`` of the source."""

    _fields_ = (
        ("metadata", ctypes.c_void_p),
        ("ordered", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("row_tiles", "units", "blocks")),
    )


@dataclass(frozen=True)
class _Matrix:
    """Fragments of one matrix, or of some of its rows.

    Attributes:
        codes, metadata, scale: as in a `FragmentLayer`.
        unit: columns of a unit of codes.
        group: columns that share a scale, 0 for all of a row.
        values: 16 bits each, in place of codes.
    """

    codes: Tensor
    metadata: Tensor | None
    scale: Tensor
    unit: int = FACTOR_GROUP
    group: int = FACTOR_GROUP
    values: bool = False

    @classmethod
    def weight(cls, layer: FragmentLayer) -> _Matrix:
        """Return the weight of a layer or stack."""
        spec = layer.format.weight
        return cls(layer.codes, layer.metadata, layer.scale, layer.unit_columns, spec.group or 0, spec.bits is None)

    def rows(self, first: int, end: int) -> _Matrix:
        """Return some rows, whole tiles but for the last one of the matrix."""
        tiles = slice(first // TILE_ROWS, -(-end // TILE_ROWS))
        metadata = None if self.metadata is None else self.metadata[tiles]
        one_scale = not self.group and self.scale.numel() == 1
        scale = self.scale if one_scale else self.scale[tiles if self.group else slice(first, end)]
        return replace(self, codes=self.codes[tiles], metadata=metadata, scale=scale)


def expand_weight(layer: FragmentLayer) -> Tensor:
    """Return the dense weight [rows, columns] of a layer or stack, without its adapters, as `decode` would."""
    dense = _dense(layer)
    _expand(_Matrix.weight(layer), dense)
    return dense


def expand_with_signs(layer: FragmentLayer, signs: SignProduct | StackedSigns) -> Tensor:
    """Return the dense weight with the binary part, or those of a stack's layers: sums rounded once a rank."""
    dense, weight = _dense(layer), _Matrix.weight(layer)
    row = 0
    for one in signs.products:
        end = row + one.rows
        _expand(weight.rows(row, end), dense[row:end], one.arguments)
        row = end
    return dense


def expand_kept(layer: FragmentLayer, into: Tensor) -> None:
    """Write what a 2:4 weight keeps, as a dense matrix, ``into`` [rows, columns / 2]."""
    _expand(replace(_Matrix.weight(layer), metadata=None), into)


def expand_left(layer: FragmentLayer) -> Tensor:
    """Return L [rows, ranks of the layer, of a stack's layer with most, filled up to a multiple of 64]."""
    spec = layer.format.weight
    left = layer.scale.new_empty(spec.rows, layer.left_units * FACTOR_GROUP, dtype=spec.dtype)
    if layer.left is not None and layer.left_scale is not None:
        _expand(_Matrix(layer.left, None, layer.left_scale), left)
    return left


def expand_right(layer: FragmentLayer) -> Tensor:
    """Return R [ranks of all layers of a stack, each filled up to a multiple of 64, columns]."""
    spec = layer.format.weight
    right = layer.scale.new_empty(layer.ranks, spec.columns, dtype=spec.dtype)
    if layer.right is not None and layer.right_scale is not None:
        _expand(_Matrix(layer.right, None, layer.right_scale), right)
    return right


def order_metadata(layer: FragmentLayer, into: Tensor) -> None:
    """Write the metadata of a 2:4 weight of a multiple of 64 rows and 32 columns ``into`` cuSPARSELt's order."""
    metadata, device = layer.metadata, into.get_device()
    blocks = layer.format.columns // 32
    _launcher(METADATA_KERNEL, device, layer.format.weight.dtype)(
        _MetadataArguments(pointer(metadata), into.data_ptr(), layer.row_tiles, layer.codes.shape[1], blocks),
        grid=(-(-blocks // (THREADS // 8)), layer.row_tiles, 1),
        block=(THREADS, 1, 1),
        stream=torch.cuda.current_stream(into.device).cuda_stream,
    )


def _dense(layer: FragmentLayer) -> Tensor:
    weight = layer.format.weight
    return layer.scale.new_empty(weight.rows, weight.columns, dtype=weight.dtype)


def _expand(matrix: _Matrix, into: Tensor, signs: Signs | None = None) -> None:
    """Launch the kernel."""
    row_tiles, units = matrix.codes.shape[:2]
    arguments = (_Arguments if signs is None else _SignedArguments)(
        codes=matrix.codes.data_ptr(),
        metadata=pointer(matrix.metadata),
        scale=matrix.scale.data_ptr(),
        dense=into.data_ptr(),
        stride=into.stride(0),
        rows=into.shape[0],
        columns=into.shape[1],
        row_tiles=row_tiles,
        units=units,
        groups=matrix.scale.shape[1] if matrix.group else 0,
        row_scale=int(matrix.scale.numel() > 1),
    )
    if signs is not None:
        arguments.signs = signs
    processors = torch.cuda.get_device_properties(into.device).multi_processor_count
    places = matrix.metadata is not None
    _launcher(
        MATRIX_KERNEL,
        into.get_device(),
        into.dtype,
        (int(places), matrix.unit, matrix.group, int(matrix.values), int(signs is not None)),
    )(
        arguments,
        grid=(min(-(-row_tiles * units // WARPS), WAVES * processors), 1, 1),
        block=(THREADS, 1, 1),
        stream=torch.cuda.current_stream(into.device).cuda_stream,
    )


@cache
def _launcher(
    kernel: str,
    device_index: int,
    dtype: torch.dtype,
    form: tuple[int, int, int, int, int] = (0, FACTOR_GROUP, 0, 0, 0),
) -> driver.Launcher:
    """Return the launcher of a kernel for a form: PLACE, UNIT, GROUP, VALUES and SIGNS."""
    defines = {
        "BFLOAT16": int(dtype == torch.bfloat16),
        "ARCH": 10 * torch.cuda.get_device_capability(device_index)[0],
        **dict(zip(("PLACE", "UNIT", "GROUP", "VALUES", "SIGNS"), form, strict=True)),
    }
    kinds = {MATRIX_KERNEL: _SignedArguments if form[-1] else _Arguments, METADATA_KERNEL: _MetadataArguments}
    module = driver.load(source("expand.cu"), "expand", device_index, defines)
    return module.function(kernel).prepare([kinds[kernel]])
