"""``cuda-hopper``: a 4-bit linear layer with its adapters on the sparse tensor cores of Hopper (``hopper.cu``).

With adapters it is two launches of one kernel: t = x @ R^T, then the layer, of which all but the part that reads t
runs beside the first. Sums are taken in an order fixed by the shape of the launch, so results are the same from call
to call.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from slimc.backends.cuda import decode, driver
from slimc.backends.cuda.fragments import TILE_ROWS
from slimc.backends.cuda.layer import FACTOR_GROUP, FragmentLayer, pointer, prepare, refuses, source, stack_shared
from slimc.runtime.activations import round_inputs
from slimc.runtime.formats import LinearFormat
from slimc.runtime.select import Kernel

__all__ = ["HOPPER", "LaunchShape", "launch", "make_plan"]

KERNEL_NAME = "hopper_linear"

FEWEST_TOKENS = 16
"""Below, one launch with the adapters inside takes less time than two."""

STEP_COLUMNS = 128
"""Columns of activations that are brought to shared memory at a time."""

BOX_COLUMNS = 64
WARPGROUPS = 2
THREADS = 384
SHARED_BYTES = 228 << 10
"""Shared memory of a multiprocessor."""

RESERVED_BYTES = 3 << 10
"""What the system and the kernel's own variables take of it, a block."""

ALIGNMENT = 1024
SMALLEST_TOKEN_TILE = 16
LARGEST_TOKEN_TILE = 128
LARGEST_CLUSTER = 8
MOST_STAGES = 8


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of the source."""

    _fields_ = [
        ("x_map", driver.TensorMap),
        ("t_map", driver.TensorMap),
        *((name, ctypes.c_void_p) for name in (
            "y", "codes", "metadata", "scale", "bias", "left", "left_scale", "rank_range",
        )),
        *((name, ctypes.c_int) for name in (
            "tokens", "rows", "row_tiles", "units", "groups", "row_scale", "left_units", "steps",
            "token_tiles", "wait_first", "zero",
        )),
        ("padding", ctypes.c_int * 5),
    ]  # fmt: skip


@dataclass(frozen=True)
class LaunchShape:
    """How a launch divides the work; see the head of ``hopper.cu``.

    Attributes:
        tokens: of a block.
        row_tiles: tiles of 64 rows that a warpgroup holds at once.
        ahead: pieces of the weight in flight in each warp, beside the one in use.
        cluster: blocks that share the columns.
        blocks: blocks that a multiprocessor holds at once.
        multicast: blocks of other rows that bring activations for each other; 1 if ``cluster`` is not.
    """

    tokens: int
    row_tiles: int
    ahead: int
    cluster: int
    blocks: int
    multicast: int = 1

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return 64 * WARPGROUPS * self.row_tiles

    @property
    def slot_bytes(self) -> int:
        """Bytes of a piece of activations."""
        return self.tokens * STEP_COLUMNS * 2

    @property
    def stages(self) -> int:
        """Pieces of activations in shared memory, as many as fit."""
        room = SHARED_BYTES // self.blocks - RESERVED_BYTES - self._output_bytes - ALIGNMENT
        return min(room // self.slot_bytes, MOST_STAGES)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: activations, or the sums of a cluster in their place, and results."""
        sums = self.rows * self.tokens * 4 if self.cluster > 1 else 0
        return max(self.stages * self.slot_bytes, sums) + self._output_bytes + ALIGNMENT

    @property
    def _output_bytes(self) -> int:
        return WARPGROUPS * self.tokens * 128


@dataclass
class _Launch:
    """One launch, ready but for its pointers."""

    arguments: _Arguments
    launcher: driver.Launcher
    shape: LaunchShape
    grid: int


@dataclass
class Plan:
    """The launches of a layer for one number of tokens; ``right`` computes t if there are adapters."""

    main: _Launch
    right: _Launch | None


def run(x: Tensor, layer: FragmentLayer, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns]."""
    tokens = x.numel() // layer.format.columns
    plan = layer.plans.get((KERNEL_NAME, tokens))
    if plan is None:
        plan = layer.plans[KERNEL_NAME, tokens] = make_plan(layer, x.dtype, tokens)
    x = x.contiguous()
    # The copy engine reads 16 bytes at a time; a view may begin anywhere.
    return launch(plan, x if x.data_ptr() % 16 == 0 else x.clone(), layer, bias)


def launch(plan: Plan, x: Tensor, layer: FragmentLayer, bias: Tensor | None) -> Tensor:
    """Run the launches of a plan on the current stream."""
    columns = layer.format.columns
    stream = torch.cuda.current_stream(x.device).cuda_stream
    y = x.new_empty(*x.shape[:-1], layer.format.rows)
    tokens = x.numel() // columns
    # Ahead of both launches: the second waits for no other than the first.
    rounded = round_inputs(x, layer.format.activation)
    t = None
    if plan.right is not None:
        t = x.new_empty(tokens, layer.ranks)
        _start(plan.right, x, columns, None, t, None, stream)
    _start(plan.main, rounded, columns, t, y, bias, stream)
    return y


def _start(
    step: _Launch, x: Tensor, columns: int, t: Tensor | None, y: Tensor, bias: Tensor | None, stream: int
) -> None:
    # Another thread may launch the same plan.
    arguments = _Arguments.from_buffer_copy(step.arguments)
    box = step.shape.tokens // step.shape.multicast
    driver.encode_matrix_map(arguments.x_map, x.data_ptr(), arguments.tokens, columns, box, BOX_COLUMNS)
    if t is not None:
        driver.encode_matrix_map(arguments.t_map, t.data_ptr(), arguments.tokens, t.shape[1], box, BOX_COLUMNS)
    arguments.y, arguments.bias = y.data_ptr(), pointer(bias)
    step.launcher(
        arguments,
        grid=(step.grid, 1, 1),
        block=(THREADS, 1, 1),
        shared_bytes=step.shape.shared_bytes,
        stream=stream,
        programmatic=True,
        cluster=step.shape.cluster * step.shape.multicast,
    )


def make_plan(
    layer: FragmentLayer,
    dtype: torch.dtype,
    tokens: int,
    shape: LaunchShape | None = None,
    right_shape: LaunchShape | None = None,
) -> Plan:
    """Decide the shape of the launches for ``tokens``, and compile their kernels if that was not done yet.

    ``shape`` and ``right_shape`` overrule the choice, to measure others.

    Raises:
        KernelError: a kernel cannot be compiled or loaded.
    """
    spec, device_index = layer.format, layer.codes.get_device()
    steps = -(-spec.columns // STEP_COLUMNS)
    processors = torch.cuda.get_device_properties(device_index).multi_processor_count
    main = _plan_launch(
        _Arguments(
            codes=pointer(layer.codes),
            metadata=pointer(layer.metadata),
            scale=pointer(layer.scale),
            left=pointer(layer.left),
            left_scale=pointer(layer.left_scale),
            rank_range=pointer(layer.rank_range),
            tokens=tokens,
            rows=spec.rows,
            row_tiles=layer.row_tiles,
            units=layer.codes.shape[1],
            groups=layer.scale.shape[1] if spec.weight.group is not None else 0,
            row_scale=int(spec.weight.group is None and not spec.weight.per_tensor),
            left_units=layer.left_units,
            steps=steps,
            wait_first=int(layer.right is None),
        ),
        shape or _shape(spec.rows, tokens, processors),
        {
            "SPARSE": int(layer.metadata is not None),
            "GROUP": spec.weight.group or 0,
            "ADAPTERS": int(layer.right is not None),
        },
        dtype,
        device_index,
    )
    if layer.right is None:
        return Plan(main, None)
    units = layer.right.shape[1]
    right = _plan_launch(
        _Arguments(
            codes=pointer(layer.right),
            scale=pointer(layer.right_scale),
            tokens=tokens,
            rows=layer.ranks,
            row_tiles=layer.ranks // TILE_ROWS,
            units=units,
            groups=units,
            steps=steps,
            wait_first=1,
        ),
        right_shape or _right_shape(layer.ranks, tokens, processors),
        {"SPARSE": 0, "GROUP": FACTOR_GROUP, "ADAPTERS": 0},
        dtype,
        device_index,
    )
    return Plan(main, right)


def _plan_launch(
    arguments: _Arguments, shape: LaunchShape, form: dict[str, int], dtype: torch.dtype, device_index: int
) -> _Launch:
    arguments.token_tiles = -(-arguments.tokens // shape.tokens)
    defines = {
        "BFLOAT16": int(dtype == torch.bfloat16),
        "ARCH": 90,
        **form,
        "TOKENS": shape.tokens,
        "ROW_TILES": shape.row_tiles,
        "STAGES": shape.stages,
        "AHEAD": shape.ahead,
        "CLUSTER": shape.cluster,
        "BLOCKS": shape.blocks,
        "MULTICAST": shape.multicast,
    }
    module = driver.load(source("hopper.cu"), KERNEL_NAME, device_index, defines)
    function = module.function(KERNEL_NAME, shared_bytes=shape.shared_bytes)
    row_blocks = -(-arguments.rows // (shape.rows * shape.multicast)) * shape.multicast
    grid = row_blocks * arguments.token_tiles * shape.cluster
    return _Launch(arguments, function.prepare([_Arguments]), shape, grid)


def _shape(rows: int, tokens: int, processors: int) -> LaunchShape:
    """Choose the shape of a layer's launch, as measured on an H100: fill it, in one wave if there are few tokens."""
    tile = min(LARGEST_TOKEN_TILE, max(SMALLEST_TOKEN_TILE, 1 << (tokens - 1).bit_length()))
    blocks = 1 if tile == LARGEST_TOKEN_TILE else 2
    token_tiles = -(-tokens // tile)
    work = -(-rows // 128) * token_tiles
    row_tiles = 2 if blocks == 1 and work > processors else 1
    # Sums of larger tiles cost more to add up.
    cluster = _share_columns(work, processors, 2) if blocks == 1 else _share_columns(work, 3 * processors // 2, 4)
    return LaunchShape(tile, row_tiles, 2, cluster, blocks)


def _right_shape(ranks: int, tokens: int, processors: int) -> LaunchShape:
    """Choose the shape of the launch for t, which has few rows: it ends sooner the more blocks share its columns."""
    row_blocks = -(-ranks // 128)
    if row_blocks * -(-tokens // LARGEST_TOKEN_TILE) >= processors // 2:
        return LaunchShape(LARGEST_TOKEN_TILE, 1, 2, 1, 1)
    tile = min(64, max(SMALLEST_TOKEN_TILE, 1 << (tokens - 1).bit_length()))
    work = row_blocks * -(-tokens // tile)
    return LaunchShape(tile, 1, 2, _share_columns(work, processors, LARGEST_CLUSTER), 2)


def _share_columns(work: int, blocks: int, most: int) -> int:
    """Return how many blocks share the columns: a power of two, so that there are no more than ``blocks``."""
    cluster = 1
    while 2 * cluster <= most and 2 * cluster * work <= blocks:
        cluster *= 2
    return cluster


def _accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, _tokens: int) -> str | None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        return "needs a Hopper GPU (compute capability 9.0)"
    return refuses(spec, dtype, device)


def _expects(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    if tokens < FEWEST_TOKENS and decode.DECODE.accepts(spec, dtype, device, tokens) is None:
        return f"is slower for fewer than {FEWEST_TOKENS} tokens"
    return None


HOPPER = Kernel("cuda-hopper", _accepts, prepare, run, stack_shared, expects=_expects)
