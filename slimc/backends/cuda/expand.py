"""Fragments to matrices of 16-bit numbers (``expand.cu``), for products that want a dense or a library's form."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from slimc.backends.cuda import driver
from slimc.backends.cuda.layer import FACTOR_GROUP, FragmentLayer, pointer, source

__all__ = ["expand_kept", "expand_left", "expand_right", "expand_weight", "order_metadata"]

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


class _MetadataArguments(ctypes.Structure):
    """``struct MetadataArguments`` of the source."""

    _fields_ = (
        ("metadata", ctypes.c_void_p),
        ("ordered", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("row_tiles", "units", "blocks")),
    )


def expand_weight(layer: FragmentLayer) -> Tensor:
    """Return the dense weight [rows, columns] of a layer or stack, without its adapters, as `decode` would."""
    weight = layer.format.weight
    dense = layer.scale.new_empty(weight.rows, weight.columns, dtype=weight.dtype)
    _expand(layer, layer.codes, layer.metadata, layer.scale, weight.group, dense)
    return dense


def expand_kept(layer: FragmentLayer, into: Tensor) -> None:
    """Write what a 2:4 weight keeps, as a dense matrix, ``into`` [rows, columns / 2]."""
    _expand(layer, layer.codes, None, layer.scale, layer.format.weight.group, into)


def expand_left(layer: FragmentLayer) -> Tensor:
    """Return L [rows, ranks of the layer, of a stack's layer with most, filled up to a multiple of 64]."""
    spec = layer.format.weight
    left = layer.scale.new_empty(spec.rows, layer.left_units * FACTOR_GROUP, dtype=spec.dtype)
    _expand_factor(layer, layer.left, layer.left_scale, left)
    return left


def expand_right(layer: FragmentLayer) -> Tensor:
    """Return R [ranks of all layers of a stack, each filled up to a multiple of 64, columns]."""
    spec = layer.format.weight
    right = layer.scale.new_empty(layer.ranks, spec.columns, dtype=spec.dtype)
    _expand_factor(layer, layer.right, layer.right_scale, right)
    return right


def order_metadata(layer: FragmentLayer, into: Tensor) -> None:
    """Write the metadata of a 2:4 weight of a multiple of 64 rows and 32 columns ``into`` cuSPARSELt's order."""
    metadata, device = layer.metadata, into.get_device()
    blocks = layer.format.columns // 32
    _launcher(METADATA_KERNEL, device, layer.format.weight.dtype, 0, FACTOR_GROUP, 0, 0)(
        _MetadataArguments(pointer(metadata), into.data_ptr(), layer.row_tiles, layer.codes.shape[1], blocks),
        grid=(-(-blocks // (THREADS // 8)), layer.row_tiles, 1),
        block=(THREADS, 1, 1),
        stream=torch.cuda.current_stream(into.device).cuda_stream,
    )


def _expand_factor(layer: FragmentLayer, codes: Tensor | None, scale: Tensor | None, into: Tensor) -> None:
    if codes is not None and scale is not None:
        _expand(layer, codes, None, scale, FACTOR_GROUP, into)


def _expand(
    layer: FragmentLayer, codes: Tensor, metadata: Tensor | None, scale: Tensor, group: int | None, into: Tensor
) -> None:
    """Launch the kernel; only W has metadata, and a unit of as many columns as it has places."""
    row_tiles, units = codes.shape[:2]
    of_weight = codes is layer.codes
    unit = layer.unit_columns if of_weight else FACTOR_GROUP
    values = int(of_weight and layer.format.weight.bits is None)
    arguments = _Arguments(
        codes=codes.data_ptr(),
        metadata=pointer(metadata),
        scale=scale.data_ptr(),
        dense=into.data_ptr(),
        stride=into.stride(0),
        rows=into.shape[0],
        columns=into.shape[1],
        row_tiles=row_tiles,
        units=units,
        groups=scale.shape[1] if group else 0,
        row_scale=int(scale.numel() > 1),
    )
    processors = torch.cuda.get_device_properties(into.device).multi_processor_count
    _launcher(MATRIX_KERNEL, into.get_device(), into.dtype, int(metadata is not None), unit, group or 0, values)(
        arguments,
        grid=(min(-(-row_tiles * units // WARPS), WAVES * processors), 1, 1),
        block=(THREADS, 1, 1),
        stream=torch.cuda.current_stream(into.device).cuda_stream,
    )


@cache
def _launcher(
    kernel: str, device_index: int, dtype: torch.dtype, places: int, unit: int, group: int, values: int
) -> driver.Launcher:
    defines = {
        "BFLOAT16": int(dtype == torch.bfloat16),
        "ARCH": 10 * torch.cuda.get_device_capability(device_index)[0],
        "PLACE": places,
        "UNIT": unit,
        "GROUP": group,
        "VALUES": values,
    }
    module = driver.load(source("expand.cu"), "expand", device_index, defines)
    return module.function(kernel).prepare([_Arguments if kernel == MATRIX_KERNEL else _MetadataArguments])
