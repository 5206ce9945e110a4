"""``cuda-prefill``: a linear layer with its adapters for many tokens, on Hopper's tensor cores (``prefill.cu``).

With adapters it is two launches of one kernel: t = x @ R^T, then the layer, of which all but the part that reads t
runs beside the first. With activations of 8 bits a launch ahead of them rounds x (``quantize.cu``), and both multiply
bytes; t is rounded to 16 bits, and L multiplies in those. For int8 a row of R, whose codes have a scale every 64
columns, becomes integers of 8 bits with one scale: each differs from the number that it stands for by half a unit, of
which the largest code of the row, times its scale, has 127. Sums are taken in an order fixed by the shape of the
launch, so results are the same from call to call.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from slimc.backends.cuda import driver
from slimc.backends.cuda.counters import Counters
from slimc.backends.cuda.fragments import TILE_ROWS
from slimc.backends.cuda.layer import FACTOR_GROUP, FragmentLayer, pointer, prepare, refuses, source, stack_shared
from slimc.backends.cuda.rounding import ACTIVATION_CODES, kept_for, round_inputs, threads_for
from slimc.errors import KernelError
from slimc.runtime.formats import LinearFormat
from slimc.runtime.select import Kernel

__all__ = ["PREFILL", "Activation", "Form", "LaunchShape", "Plan", "defines", "launch", "make_plan"]

Activation = Literal["int8", "float8_e4m3fn"]

KERNEL_NAME = "prefill_linear"
QUANTIZER_NAME = "quantize_tokens"

BOX_BYTES = 128
"""Bytes of a token that the copy engine brings at a time."""

UNIT_CODE_BYTES = 512
UNIT_METADATA_BYTES = 256
SCALE_WORDS_BYTES = 32
"""Bytes of 16 rows in a piece: codes, metadata, and scales of a group."""

SHARED_BYTES = 228 << 10
"""Shared memory of a multiprocessor."""

RESERVED_BYTES = 4 << 10
"""What the system and the kernel's own variables take of it, a block."""

ALIGNMENT = 1024
MOST_STAGES = 8
SHARING_COST = 16
SHARING_COST_OF_LARGE_8_BIT_TILES = 40
"""Pieces that a block could multiply in the time that it takes to share tiles with others."""

SMALLEST_IDLE_SHARE = 0.05
"""Share of a launch's time that must be lost otherwise."""

ADDING_COST = 2
"""Pieces that it could multiply in the time that it takes to add another's sums."""

MOST_PLANS = 64
"""Numbers of tokens whose launches a layer remembers: prompts may have any length."""

QUANTIZER_THREADS = 1024
"""Of a multiprocessor, which the source bounds registers to."""

QUANTIZER_COLUMNS = 32
"""Of a token that a thread rounds, if a block can have so many threads: with 64 it takes up to a quarter longer."""

QUANTIZED_COLUMNS = 32
"""A rounded row is a multiple of this: within so many columns their order changes."""


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of the source."""

    _fields_ = [
        *((name, driver.TensorMap) for name in (
            "x_map", "t_map", "y_map", "codes_map", "metadata_map", "scale_map", "left_map", "left_scale_map",
        )),
        *((name, ctypes.c_void_p) for name in (
            "y", "scale", "bias", "rank_range", "token_scale", "parts", "ready",
        )),
        *((name, ctypes.c_uint) for name in (
            "tokens", "rows", "row_tiles", "pieces", "row_scale", "left_units",
            "token_tiles", "row_blocks", "shared_tiles", "share", "share_rest", "inverse",
            "wait_first", "zero", "band",
        )),
        ("padding", ctypes.c_uint * 3),
    ]  # fmt: skip


@dataclass(frozen=True)
class LaunchShape:
    """How a launch divides the work; see the head of ``prefill.cu``.

    Attributes:
        tokens: of a tile.
        row_tiles: tiles of 64 rows that a warpgroup holds at once.
        warpgroups: that multiply.
        blocks: blocks that a multiprocessor holds at once.
        share: whether blocks divide tiles among them where whole ones would leave some idle.
        multicast: blocks of a cluster, of neighbouring rows, that bring activations for each other.
        outputs: tokens of 64 rows, of a warpgroup, that have room in shared memory on their way out.
        beside: whether to leave the room of all blocks but one to the launches before and after.
    """

    tokens: int
    warpgroups: int
    row_tiles: int
    blocks: int = 1
    outputs: int = 64
    share: bool = True
    multicast: int = 1
    beside: bool = False

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 64 * self.warpgroups * self.row_tiles

    @property
    def threads(self) -> int:
        """Threads of a block: one more warpgroup has pieces brought."""
        return 128 * (self.warpgroups + 1)

    @property
    def output_bytes(self) -> int:
        """Shared memory for results on their way out."""
        return self.warpgroups * self.outputs * BOX_BYTES

    def divide(self, tiles: int, pieces: int, processors: int, cost: int) -> tuple[int, int]:
        """Return how many clusters to launch for tiles of so many pieces, and how many of the tiles they share.

        What is left over after whole tiles is shared together with one more for each cluster: so a tile has few shares,
        whose sums it costs time to add. ``cost`` is that time, in pieces.
        """
        clusters = processors * (1 if self.beside else self.blocks) // self.multicast
        rest = tiles % clusters
        idle = -tiles % clusters
        if not self.share or idle * pieces <= cost * clusters or idle <= SMALLEST_IDLE_SHARE * (tiles + idle):
            return min(tiles, clusters), 0
        if tiles < clusters:
            # More shares of a tile are done sooner and take longer to add: best at the root.
            return min(clusters, tiles * max(1, math.isqrt(pieces // ADDING_COST))), tiles
        return clusters, clusters + rest


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for, beside the shape of its launch.

    Attributes:
        sparse: whether W is 2:4.
        group: columns of W that share a scale, 0 for all of a row.
        adapters: whether there are t and L.
        activation: what x is rounded to.
        values: W is 16-bit values, in place of 4-bit codes.
    """

    sparse: bool
    group: int
    adapters: bool
    activation: Activation | None
    values: bool = False

    @property
    def columns(self) -> int:
        """Columns of a piece."""
        return 128 if self.sparse or self.activation is not None else 64

    @property
    def units(self) -> int:
        """Units of codes in a piece."""
        return self.columns // (128 if self.sparse else 64)

    @property
    def scale_groups(self) -> int:
        """Groups of W, with a scale each, in a piece."""
        return max(1, self.columns // self.group) if self.group else 0

    def slot_bytes(self, shape: LaunchShape) -> int:
        """Bytes of a piece in shared memory: activations, codes, metadata and scales."""
        boxes = 2 if self.sparse and self.activation is None else 1
        groups = max(self.scale_groups, int(self.adapters))
        codes = UNIT_CODE_BYTES * self.units * (4 if self.values else 1)
        unit = codes + UNIT_METADATA_BYTES * self.sparse + SCALE_WORDS_BYTES * groups
        return _round_up(boxes * shape.tokens * BOX_BYTES + shape.rows // TILE_ROWS * unit, ALIGNMENT)

    def stages(self, shape: LaunchShape) -> int:
        """Pieces in shared memory, as many as fit."""
        room = SHARED_BYTES // shape.blocks - RESERVED_BYTES - shape.output_bytes - ALIGNMENT
        return min(room // self.slot_bytes(shape), MOST_STAGES)

    def shared_bytes(self, shape: LaunchShape) -> int:
        """Dynamic shared memory of a block."""
        return self.stages(shape) * self.slot_bytes(shape) + shape.output_bytes + ALIGNMENT


@dataclass
class _Loaded:
    """What launches of one shape share, whatever the number of tokens: maps of the weight, and the kernel."""

    maps: dict[str, driver.TensorMap]
    launcher: driver.Launcher
    shared_bytes: int


@dataclass
class _Launch:
    """One launch, ready but for its pointers: its maps of activations are those of other memory of their sizes."""

    arguments: _Arguments
    launcher: driver.Launcher
    shape: LaunchShape
    shared_bytes: int
    grid: int
    ready: Counters | None


@dataclass
class _Quantizer:
    launcher: driver.Launcher
    columns: int
    threads: int
    blocks: int


@dataclass
class Plan:
    """The launches of a layer for one number of tokens.

    Attributes:
        main: computes y.
        right: computes t if there are adapters.
        quantizer: rounds x if activations have 8 bits.
    """

    main: _Launch
    right: _Launch | None
    quantizer: _Quantizer | None


def run(x: Tensor, layer: FragmentLayer, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns]."""
    tokens = x.numel() // layer.format.columns
    plans: dict[int, Plan] = layer.plans.setdefault((KERNEL_NAME, "plans"), {})
    plan = plans.get(tokens)
    if plan is None:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        plan = plans[tokens] = make_plan(layer, x.dtype, tokens, _multiplied(layer.format))
    x = x.contiguous()
    # The copy engine reads 16 bytes at a time; a view may begin anywhere.
    return launch(plan, x if x.data_ptr() % 16 == 0 else x.clone(), layer, bias)


def launch(plan: Plan, x: Tensor, layer: FragmentLayer, bias: Tensor | None) -> Tensor:
    """Run the launches of a plan on the current stream.

    Args:
        plan: for this layer, dtype and number of tokens.
        x: [..., columns], contiguous, beginning at a multiple of 16 bytes.
        layer: the weight.
        bias: [rows] or ``None``.

    Returns:
        y [..., rows] of the dtype of x.
    """
    columns = layer.format.columns
    stream = torch.cuda.current_stream(x.device).cuda_stream
    y = x.new_empty(*x.shape[:-1], layer.format.rows)
    tokens = x.numel() // columns
    if plan.quantizer is None:
        read, scales = round_inputs(x, layer.format.activation), None
    else:
        tile = max(step.shape.tokens for step in (plan.main, plan.right) if step is not None)
        read, scales = _quantize(plan.quantizer, x, tokens, columns, tile, stream)
    t, parts, parts_of_t = None, _parts(plan.main, x.device), None
    if plan.right is not None:
        t, parts_of_t = x.new_empty(tokens, layer.ranks), _parts(plan.right, x.device)
        _start(plan.right, read, None, t, None, scales, stream, parts_of_t)
    _start(plan.main, read, t, y, bias, scales, stream, parts)
    return y


def _quantize(
    quantizer: _Quantizer, x: Tensor, tokens: int, columns: int, tile: int, stream: int
) -> tuple[Tensor, Tensor]:
    rounded = torch.empty(tokens, quantizer.columns, dtype=torch.uint8, device=x.device)
    # A tile reads the scales of all its tokens, those that do not exist too.
    scales = torch.empty(_round_up(tokens, tile), dtype=torch.float32, device=x.device)
    quantizer.launcher(
        x.data_ptr(),
        rounded.data_ptr(),
        scales.data_ptr(),
        tokens,
        columns,
        quantizer.columns,
        grid=(min(tokens, quantizer.blocks), 1, 1),
        block=(quantizer.threads, 1, 1),
        stream=stream,
        programmatic=True,
    )
    return rounded, scales


def _parts(step: _Launch, device: torch.device) -> Tensor | None:
    """Return memory for the sums of tiles that blocks share, if any are.

    Both launches have theirs before either is made, and until both are: they run beside each other, and another thread
    may launch something between the two.
    """
    if step.ready is None:
        return None
    return torch.empty(step.grid * step.shape.rows * step.shape.tokens, dtype=torch.float32, device=device)


def _start(
    step: _Launch,
    x: Tensor,
    t: Tensor | None,
    y: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    stream: int,
    parts: Tensor | None,
) -> None:
    # Another thread may launch the same plan.
    arguments = _Arguments.from_buffer_copy(step.arguments)
    driver.replace_address(arguments.x_map, x.data_ptr())
    if t is not None:
        driver.replace_address(arguments.t_map, t.data_ptr())
    if arguments.rows % 8 == 0:
        driver.replace_address(arguments.y_map, y.data_ptr())
    arguments.y, arguments.bias, arguments.token_scale = y.data_ptr(), pointer(bias), pointer(scales)
    if step.ready is not None:
        arguments.parts, arguments.ready = pointer(parts), step.ready.of_launch(stream)
    step.launcher(
        arguments,
        grid=(step.grid, 1, 1),
        block=(step.shape.threads, 1, 1),
        shared_bytes=step.shared_bytes,
        stream=stream,
        programmatic=True,
        cluster=step.shape.multicast,
    )


def make_plan(
    layer: FragmentLayer,
    dtype: torch.dtype,
    tokens: int,
    activation: Activation | None = None,
    shape: LaunchShape | None = None,
    right_shape: LaunchShape | None = None,
) -> Plan:
    """Decide the shape of the launches for ``tokens``, and compile their kernels if that was not done yet.

    ``shape`` and ``right_shape`` overrule the choice, to measure others.

    Raises:
        KernelError: activations have 8 bits and W has groups, or a kernel cannot be compiled or loaded.
    """
    spec, device_index = layer.format, layer.codes.get_device()
    group = spec.weight.group or 0
    if activation is not None and group:
        raise KernelError(f"sums of 8-bit products cannot have a scale every {group} columns; use 16-bit activations")
    processors = torch.cuda.get_device_properties(device_index).multi_processor_count
    values = spec.weight.bits is None
    form = Form(layer.metadata is not None, group, layer.right is not None, activation, values)
    own_shape, own_right_shape = _shapes(spec.rows, spec.columns, tokens, activation, processors)
    if values:
        own_shape = for_values(own_shape, form, spec.rows, spec.columns)
    main = _plan_launch(
        _Arguments(
            scale=pointer(layer.scale),
            rank_range=pointer(layer.rank_range),
            tokens=tokens,
            rows=spec.rows,
            row_tiles=layer.row_tiles,
            pieces=-(-layer.codes.shape[1] // form.units),
            row_scale=int(not group and not spec.weight.per_tensor),
            left_units=layer.left_units,
            wait_first=int(layer.right is None),
        ),
        {
            "codes_map": (layer.code_lines, 1 if values else form.units),
            "metadata_map": (layer.metadata, 1),
            "scale_map": (layer.scale if group else None, form.scale_groups),
            "left_map": (layer.left, 1),
            "left_scale_map": (layer.left_scale, 1),
        },
        shape or own_shape,
        form,
        dtype,
        layer,
        processors,
    )
    right = None
    if layer.right is not None:
        right_form = Form(False, FACTOR_GROUP, False, activation)
        right = _plan_launch(
            _Arguments(
                scale=pointer(layer.right_largest),
                tokens=tokens,
                rows=layer.ranks,
                row_tiles=layer.ranks // TILE_ROWS,
                pieces=-(-layer.right.shape[1] // right_form.units),
                row_scale=1,
                wait_first=1,
            ),
            {
                "codes_map": (layer.right, right_form.units),
                "scale_map": (layer.right_scale, right_form.scale_groups),
            },
            right_shape or own_right_shape,
            right_form,
            dtype,
            layer,
            processors,
        )
    quantizer = None if activation is None else _plan_quantizer(form, spec.columns, dtype, device_index, processors)
    return Plan(main, right, quantizer)


def defines(form: Form, shape: LaunchShape, *, bfloat16: bool) -> dict[str, int | str]:
    """Return the macros that ``prefill.cu`` is compiled with."""
    return {
        "BFLOAT16": int(bfloat16),
        "ARCH": 90,
        "SPARSE": int(form.sparse),
        "GROUP": form.group,
        "VALUES": int(form.values),
        "ADAPTERS": int(form.adapters),
        "ACTIVATION": ACTIVATION_CODES[form.activation],
        "TOKENS": shape.tokens,
        "WARPGROUPS": shape.warpgroups,
        "ROW_TILES": shape.row_tiles,
        "STAGES": form.stages(shape),
        "BLOCKS": shape.blocks,
        "MULTICAST": shape.multicast,
        "OUTPUTS": shape.outputs,
    }


SMALL_TILES = LaunchShape(128, 2, 1)
LARGE_TILES = LaunchShape(128, 2, 2, outputs=128)
LARGE_TILES_TOGETHER = LaunchShape(128, 2, 2, outputs=128, multicast=2)
HALF_BLOCKS = LaunchShape(64, 2, 1, blocks=2, beside=True)
"""Of t and of a layer with very few tiles: blocks of one find room beside those of the other."""

BAND_TOKENS, BAND_TOKENS_OF_MANY_COLUMNS = 1024, 512
"""Tokens that all rows go through before the next ones, so that they stay in the cache."""

LARGE_LAYER = 8192
"""Rows and columns from which on it pays that two blocks bring activations for each other."""

MANY_ROWS = 16384
MANY_TOKENS = 1024
"""From which on four warpgroups are faster in 16 bit."""


def _shapes(
    rows: int, columns: int, tokens: int, activation: Activation | None, processors: int
) -> tuple[LaunchShape, LaunchShape]:
    """Choose the shapes of a layer's launch and of that for t, as measured on an H100."""
    tiles = -(-rows // LARGE_TILES.rows) * -(-tokens // LARGE_TILES.tokens)
    if 4 * tiles <= processors:
        return HALF_BLOCKS, HALF_BLOCKS
    together = min(rows, columns) >= LARGE_LAYER and max(rows, columns) >= MANY_ROWS
    if activation is not None:
        if 8 * tiles <= 5 * processors:
            return SMALL_TILES, HALF_BLOCKS
        return LARGE_TILES_TOGETHER if together else LARGE_TILES, SMALL_TILES
    if 2 * tiles <= processors and not together:
        many = tokens >= MANY_TOKENS or columns >= LARGE_LAYER
        return LaunchShape(64, 4, 1) if many else SMALL_TILES, HALF_BLOCKS
    if min(rows, columns) >= LARGE_LAYER:
        return LARGE_TILES_TOGETHER, SMALL_TILES
    if rows >= MANY_ROWS and tokens >= MANY_TOKENS:
        return LaunchShape(128, 4, 1), SMALL_TILES
    return LARGE_TILES, SMALL_TILES


def for_values(shape: LaunchShape, form: Form, rows: int, columns: int) -> LaunchShape:
    """Return the shape for a weight of values, whose pieces are larger, in place of the one for codes."""
    if shape.blocks > 1:
        return replace(shape, outputs=16)
    # It pays that blocks bring activations for each other where there are many columns, or many rows of a dense weight.
    if columns >= LARGE_LAYER or (rows >= LARGE_LAYER and not form.sparse):
        return replace(LARGE_TILES_TOGETHER, outputs=32)
    return replace(shape, outputs=32, multicast=1)


def _plan_launch(
    arguments: _Arguments,
    tensors: Mapping[str, tuple[Tensor | None, int]],
    shape: LaunchShape,
    form: Form,
    dtype: torch.dtype,
    layer: FragmentLayer,
    processors: int,
) -> _Launch:
    """Complete ``arguments`` with maps of tensors, words [row tiles, units, ...], and the units of their boxes."""
    key = (KERNEL_NAME, "loaded", form, shape)
    if key not in layer.plans:
        layer.plans[key] = _load(tensors, shape, form, dtype, layer.codes.get_device())
    loaded: _Loaded = layer.plans[key]
    for name, of_weight in loaded.maps.items():
        setattr(arguments, name, of_weight)
    arguments.token_tiles = -(-arguments.tokens // shape.tokens)
    arguments.row_blocks = -(-arguments.rows // (shape.rows * shape.multicast))
    band = BAND_TOKENS_OF_MANY_COLUMNS if layer.format.columns >= LARGE_LAYER else BAND_TOKENS
    arguments.band = min(band // shape.tokens, arguments.token_tiles)
    tiles = arguments.token_tiles * arguments.row_blocks
    pieces = arguments.pieces + arguments.left_units
    large = form.activation is not None and shape.rows > SMALL_TILES.rows
    cost = SHARING_COST_OF_LARGE_8_BIT_TILES if large else SHARING_COST
    clusters, arguments.shared_tiles = shape.divide(tiles, pieces, processors, cost)
    arguments.share, arguments.share_rest = divmod(arguments.shared_tiles * pieces, clusters)
    arguments.inverse = -(-(1 << 32) // pieces)
    _describe_activations(arguments, shape, form, layer)
    ready = _ready(layer, shape.warpgroups * processors * shape.blocks) if arguments.shared_tiles else None
    return _Launch(arguments, loaded.launcher, shape, loaded.shared_bytes, clusters * shape.multicast, ready)


def _load(
    tensors: Mapping[str, tuple[Tensor | None, int]],
    shape: LaunchShape,
    form: Form,
    dtype: torch.dtype,
    device_index: int,
) -> _Loaded:
    maps = {}
    for name, (tensor, units) in tensors.items():
        if tensor is not None:
            words = tensor[0, 0].numel()
            rows, columns = tensor.shape[0], tensor.shape[1] * words
            of_weight = maps[name] = driver.TensorMap()
            driver.encode_matrix_map(
                of_weight, tensor.data_ptr(), rows, columns, shape.rows // TILE_ROWS, units * words, 4
            )
    module = driver.load(
        source("prefill.cu"), KERNEL_NAME, device_index, defines(form, shape, bfloat16=dtype == torch.bfloat16)
    )
    shared_bytes = form.shared_bytes(shape)
    function = module.function(KERNEL_NAME, shared_bytes=shared_bytes)
    return _Loaded(maps, function.prepare([_Arguments]), shared_bytes)


def _describe_activations(arguments: _Arguments, shape: LaunchShape, form: Form, layer: FragmentLayer) -> None:
    """Complete the maps of x, t and y but for their addresses, which each launch puts in place of one that is there."""
    anywhere, tokens, columns = layer.codes.data_ptr(), arguments.tokens, layer.format.columns
    size, own = 2, shape.tokens // shape.multicast
    if form.activation is not None:
        size, columns = 1, _round_up(columns, QUANTIZED_COLUMNS)
    driver.encode_matrix_map(arguments.x_map, anywhere, tokens, columns, own, BOX_BYTES // size, size)
    if form.adapters:
        driver.encode_matrix_map(arguments.t_map, anywhere, tokens, layer.ranks, shape.tokens, BOX_BYTES // 2, 2)
    if arguments.rows % 8 == 0:
        driver.encode_matrix_map(arguments.y_map, anywhere, tokens, arguments.rows, shape.outputs, BOX_BYTES // 2, 2)


def _ready(layer: FragmentLayer, count: int) -> Counters:
    """Return the flags of launches that share tiles: one set for a layer, whatever the number of tokens."""
    key = (KERNEL_NAME, "ready", count)
    if key not in layer.plans:
        layer.plans[key] = Counters(layer.codes.device, count)
    found: Counters = layer.plans[key]
    return found


def _plan_quantizer(form: Form, columns: int, dtype: torch.dtype, device_index: int, processors: int) -> _Quantizer:
    threads = threads_for(columns, QUANTIZER_COLUMNS)
    defines = {
        "BFLOAT16": int(dtype == torch.bfloat16),
        "ARCH": 90,
        "ACTIVATION": ACTIVATION_CODES[form.activation],
        "THREADS": threads,
        "KEPT": kept_for(columns, threads),
    }
    function = driver.load(source("quantize.cu"), QUANTIZER_NAME, device_index, defines).function(QUANTIZER_NAME)
    function.leave_shared()
    kinds = [ctypes.c_void_p] * 3 + [ctypes.c_int] * 3
    blocks = QUANTIZER_THREADS // threads * processors
    return _Quantizer(function.prepare(kinds), _round_up(columns, QUANTIZED_COLUMNS), threads, blocks)


def _round_up(number: int, to: int) -> int:
    return -(-number // to) * to


def _multiplied(spec: LinearFormat) -> Activation | None:
    """Return what of 8 bits the tensor cores multiply; with groups, or values, they multiply the rounded ones in 16."""
    codes_of_rows = spec.weight.bits is not None and spec.weight.group is None
    return cast("Activation | None", spec.activation) if codes_of_rows else None


def _accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, _tokens: int) -> str | None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        return "needs a Hopper GPU (compute capability 9.0)"
    return refuses(spec, dtype, device)


PREFILL = Kernel("cuda-prefill", _accepts, prepare, run, stack_shared)
