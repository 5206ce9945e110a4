"""``cuda-decode``: a 4-bit linear layer with its adapters for few tokens, in one launch (``decode.cu``).

The layer's tensors are put into the order of the tensor cores once; a call chooses the shape of the launch by the
number of tokens and rows. Every shape computes the same sums in an order of its own, so results differ by rounding
between them and are the same from call to call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimc.backends.cuda import driver
from slimc.backends.cuda.fragments import TILE_ROWS
from slimc.backends.cuda.layer import (
    FACTOR_GROUP,
    FragmentLayer,
    padded_rank,
    pointer,
    prepare,
    refuses,
    source,
    stack_shared,
    unit_columns,
)
from slimc.backends.cuda.rounding import round_inputs
from slimc.errors import KernelError
from slimc.runtime.formats import LinearFormat
from slimc.runtime.select import Case, Kernel

__all__ = ["DECODE", "LaunchShape", "launch", "launch_shapes", "make_plan"]

KERNEL_NAME = "decode_linear"

MAX_TOKENS = 16
"""Beyond this each block would spend its time on copying activations.

On an H100, rank 0.1, microseconds for 1 and 16 tokens, cuBLAS bfloat16 in brackets: 4096 x 4096 10 and 15 (18, 19),
22016 x 4096 23 and 39 (75, 73), 57344 x 8192 87 and 337 (335, 337). 64 tokens take longer than the dense product.
"""

TOKEN_TILE = 8
WARP = 32

OWN_SHARED_BYTES = 1 << 10
"""Room for the kernel's own variables, of the shared memory of a block."""

PARTIAL_TOKENS = 8
"""The product with R is split by columns among blocks only as far as splits times tokens stays below this.

Each block sums the splits up for itself, which costs more than it saves where there are many.
"""


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "x", "y", "codes", "metadata", "scale", "bias", "right", "right_scale", "left", "left_scale",
            "partial", "counters", "rank_range",
        )),
        *((name, ctypes.c_int) for name in (
            "tokens", "rows", "columns", "row_tiles", "units", "groups", "row_scale", "ranks", "rank_tiles",
            "left_units", "left_steps", "splits", "split_units", "chunk", "steps", "chunks",
        )),
    ]  # fmt: skip


@dataclass(frozen=True)
class LaunchShape:
    """How a launch divides the work; see the head of ``decode.cu``.

    Attributes:
        row_tiles: tiles of 16 rows that a warp holds at once.
        warp_rows: warps side by side on different tiles.
        warp_columns: warps that share the columns of a tile.
        stages: units of the weight in flight in each warp.
    """

    row_tiles: int
    warp_rows: int
    warp_columns: int
    stages: int

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.warp_rows * self.warp_columns


@dataclass
class Plan:
    """One launch, ready but for its pointers."""

    arguments: _Arguments
    launcher: driver.Launcher
    grid: int
    threads: int
    shared_bytes: int
    partial_bytes: int
    programmatic: bool


def run(x: Tensor, layer: FragmentLayer, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns]."""
    tokens = x.numel() // layer.format.columns
    plan = layer.plans.get((KERNEL_NAME, tokens))
    if plan is None:
        plan = layer.plans[KERNEL_NAME, tokens] = make_plan(layer, x.dtype, tokens)
    x = round_inputs(x.contiguous(), layer.format.activation)
    # The kernel reads 16 bytes at a time; a view may begin anywhere.
    return launch(plan, x if x.data_ptr() % 16 == 0 else x.clone(), layer, bias)


def launch(plan: Plan, x: Tensor, layer: FragmentLayer, bias: Tensor | None) -> Tensor:
    """Run one launch on the current stream."""
    y = x.new_empty(*x.shape[:-1], layer.format.rows)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    # Another thread may launch the same plan.
    arguments = _Arguments.from_buffer_copy(plan.arguments)
    arguments.x, arguments.y = x.data_ptr(), y.data_ptr()
    arguments.bias = None if bias is None else bias.data_ptr()
    if layer.counters is not None:
        partial = torch.empty(plan.partial_bytes, dtype=torch.uint8, device=x.device)
        arguments.partial = partial.data_ptr()
        arguments.counters = layer.counters.of_launch(stream)
    plan.launcher(
        arguments,
        grid=(plan.grid, 1, 1),
        block=(plan.threads, 1, 1),
        shared_bytes=plan.shared_bytes,
        stream=stream,
        programmatic=plan.programmatic,
    )
    return y


def make_plan(
    layer: FragmentLayer, dtype: torch.dtype, tokens: int, shape: LaunchShape | None = None, splits: int | None = None
) -> Plan:
    """Decide the shape of the launch for ``tokens``, and compile its kernel if that was not done yet.

    ``shape`` and ``splits`` overrule the choice, to measure others.

    Raises:
        KernelError: the kernel cannot be compiled or loaded.
    """
    spec, device = layer.format, layer.codes.device
    major, _ = torch.cuda.get_device_capability(device)
    token_tiles = _token_tiles(tokens)
    row_tiles, units, ranks, left_units = layer.row_tiles, layer.codes.shape[1], layer.ranks, layer.left_units
    grid = _blocks(row_tiles, device)
    shape, staging = _fitting(
        [shape] if shape else launch_shapes(token_tiles, -(-row_tiles // grid)),
        spec.columns,
        layer.unit_columns,
        tokens,
        ranks,
        available_shared(device),
    )
    rank_tiles, column_units = ranks // TILE_ROWS, -(-spec.columns // FACTOR_GROUP)
    splits = splits or max(1, min(grid // max(rank_tiles, 1), PARTIAL_TOKENS // tokens))
    split_units = -(-column_units // splits)
    if staging.chunks > 1:
        split_units = min(split_units, staging.chunk // FACTOR_GROUP)
    splits = -(-column_units // split_units)
    arguments = _Arguments(
        codes=pointer(layer.codes),
        metadata=pointer(layer.metadata),
        scale=layer.scale.data_ptr(),
        right=pointer(layer.right),
        right_scale=pointer(layer.right_scale),
        left=pointer(layer.left),
        left_scale=pointer(layer.left_scale),
        rank_range=pointer(layer.rank_range),
        tokens=tokens,
        rows=spec.rows,
        columns=spec.columns,
        row_tiles=row_tiles,
        units=units,
        groups=layer.scale.shape[1] if spec.weight.group is not None else 0,
        row_scale=int(spec.weight.group is None and not spec.weight.per_tensor),
        ranks=ranks,
        rank_tiles=rank_tiles,
        left_units=left_units,
        left_steps=-(-left_units // (shape.warp_columns * shape.stages)) * shape.stages,
        splits=splits,
        split_units=split_units,
        chunk=staging.chunk,
        steps=staging.steps,
        chunks=staging.chunks,
    )
    defines = {
        "BFLOAT16": int(dtype == torch.bfloat16),
        "ARCH": 10 * major,
        "SPARSE": int(layer.metadata is not None),
        "GROUP": spec.weight.group or 0,
        "ADAPTERS": int(ranks > 0),
        "TOKEN_TILES": token_tiles,
        "ROW_TILES": shape.row_tiles,
        "WARP_ROWS": shape.warp_rows,
        "WARP_COLUMNS": shape.warp_columns,
        "STAGES": shape.stages,
    }
    module = driver.load(source("decode.cu"), KERNEL_NAME, layer.codes.get_device(), defines)
    function = module.function(KERNEL_NAME, shared_bytes=staging.shared_bytes)
    return Plan(
        arguments,
        function.prepare([_Arguments]),
        grid,
        WARP * shape.warps,
        staging.shared_bytes,
        partial_bytes=splits * tokens * ranks * 4,
        programmatic=major >= 9,
    )


@dataclass(frozen=True)
class Staging:
    """How x comes to shared memory: ``chunks`` pieces of ``chunk`` columns; a warp takes ``steps`` units of each."""

    chunk: int
    chunks: int
    steps: int
    shared_bytes: int


def available_shared(device: torch.device) -> int:
    """Return bytes of dynamic shared memory that a block can have: 226 KiB on Hopper, 162 on an A100, 98 on an L4."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - OWN_SHARED_BYTES


def _blocks(row_tiles: int, device: torch.device) -> int:
    return min(row_tiles, torch.cuda.get_device_properties(device).multi_processor_count)


def _token_tiles(tokens: int) -> int:
    return 1 << max(-(-tokens // TOKEN_TILE) - 1, 0).bit_length()


def _fitting(
    shapes: Sequence[LaunchShape], columns: int, unit: int, tokens: int, ranks: int, available: int
) -> tuple[LaunchShape, Staging]:
    """Return the first shape for which x, or two pieces of it, fit in the shared memory that is available.

    Raises:
        KernelError: none fits.
    """
    token_tiles = _token_tiles(tokens)
    staged_tokens = tokens if token_tiles == 1 else token_tiles * TOKEN_TILE
    for shape in shapes:
        staging = _stage(columns, unit, staged_tokens, ranks, shape, available)
        if staging.shared_bytes <= available:
            return shape, staging
    raise KernelError(
        f"{tokens} tokens of {columns} columns and {ranks} ranks do not fit in {available >> 10} KiB of shared memory"
    )


def _stage(columns: int, unit: int, tokens: int, ranks: int, shape: LaunchShape, available: int) -> Staging:
    """Keep all of x in shared memory, or failing that, two pieces at a time, as large as fit."""

    def shared(chunk: int, whole: bool) -> int:
        x = tokens * (2 * chunk + 16)
        t = tokens * (2 * ranks + 16) if ranks else 0
        return 16 + shape.warps * shape.row_tiles * 512 + (x + t if whole else max(2 * x, t))

    step = unit * shape.warp_columns * shape.stages
    chunk = -(-columns // unit) * unit
    if shared(chunk, True) <= available:
        return Staging(chunk, 1, -(-chunk // step) * shape.stages, shared(chunk, True))
    chunk = step
    while shared(chunk + step, False) <= available:
        chunk += step
    return Staging(chunk, -(-columns // chunk), chunk // unit // shape.warp_columns, shared(chunk, False))


def launch_shapes(token_tiles: int, block_tiles: int) -> list[LaunchShape]:
    """Return shapes for blocks that have ``block_tiles`` tiles of rows, best first.

    Which shapes of 16 warps are best was measured on an H100. The last one needs the least shared memory, for GPUs that
    have less than half of Hopper's: half as many warps take pieces of x that are half as wide.
    """
    row_tiles = 4 if token_tiles == 1 and block_tiles > 2 else min(2, block_tiles)
    stages = 1 if row_tiles == 4 else 2
    return [LaunchShape(row_tiles, 1, warps, depth) for warps, depth in ((16, stages), (16, 1), (8, 1))]


def _accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    if device.type == "cuda" and tokens > MAX_TOKENS:
        return f"is for {MAX_TOKENS} tokens at most"
    if spec.weight.bits is None:
        return "takes 4-bit codes, not 16-bit values"
    return refuses(spec, dtype, device) or _refuses_size((spec,), device, tokens)


def _expects(case: Case) -> str | None:
    """Say that a stack finds no room, all of whose layers do: kernels are asked to accept them one by one."""
    return _refuses_size(case.members, case.device, case.tokens)


def _refuses_size(members: Sequence[LinearFormat], device: torch.device, tokens: int) -> str | None:
    """Say that layers that are run as one need more shared memory than a device has, or return ``None``."""
    row_tiles = -(-sum(spec.rows for spec in members) // TILE_ROWS)
    ranks = sum(map(padded_rank, members))
    shapes = launch_shapes(_token_tiles(tokens), -(-row_tiles // _blocks(row_tiles, device)))
    unit = unit_columns(members[0].weight.sparsity is not None)
    try:
        _fitting(shapes, members[0].columns, unit, tokens, ranks, available_shared(device))
    except KernelError:
        return f"needs more shared memory for {members[0].columns} columns and {ranks} ranks than this GPU has"
    return None


DECODE = Kernel("cuda-decode", _accepts, prepare, run, stack_shared, expects=_expects)
