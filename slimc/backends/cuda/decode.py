"""``cuda-decode``: a 4-bit linear layer with its adapters for few tokens, in one launch (``decode.cu``).

The layer's tensors are put into the order of the tensor cores once; a call chooses the shape of the launch by the
number of tokens and rows. Every shape computes the same sums in an order of its own, so results differ by rounding
between them and are the same from call to call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from slimc.backends.cuda import compiler, driver
from slimc.backends.cuda.fragments import TILE_ROWS, code_words, metadata_words, scale_words
from slimc.errors import KernelError
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear
from slimc.runtime.select import Kernel

__all__ = ["DECODE", "DecodeLayer", "LaunchShape", "launch", "make_plan", "prepare"]

KERNEL_NAME = "decode_linear"

MAX_TOKENS = 16
"""Beyond this the weight is decoded and multiplied densely.

On an H100, rank 0.1, microseconds for 1 and 16 tokens, cuBLAS bfloat16 in brackets: 4096 x 4096 10 and 15 (18, 19),
22016 x 4096 23 and 39 (75, 73), 57344 x 8192 87 and 337 (335, 337). 64 tokens take longer than the dense product.
"""

FACTOR_GROUP = 64
TOKEN_TILE = 8
WARP = 32

SHARED_BYTES = 226 << 10
"""Dynamic shared memory of a block: what compute capability 9.0 has, less the kernel's own variables."""

PARTIAL_TOKENS = 8
"""The product with R is split by columns among blocks only as far as splits times tokens stays below this.

Each block sums the splits up for itself, which costs more than it saves where there are many.
"""

COUNTER_SLOTS = 64
COUNTERS = 4


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "x", "y", "codes", "metadata", "scale", "bias", "right", "right_scale", "left", "left_scale",
            "partial", "counters", "rank_start",
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
        blocks: blocks that must fit on a multiprocessor, which caps the registers.
    """

    row_tiles: int
    warp_rows: int
    warp_columns: int
    stages: int
    blocks: int

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.warp_rows * self.warp_columns

    @property
    def pass_tiles(self) -> int:
        """Tiles that a block works on at once."""
        return self.warp_rows * self.row_tiles


class Counters:
    """Counters by which the blocks of a launch hand out work: zeros before it, and zeros again after it.

    Two launches that may run at once must not share them. Launches of one stream run one after another; what is
    captured into a graph may be replayed beside anything, so each captured launch has counters of its own for good.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Tensor] = []
        self._by_stream: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []
        self._refill()

    def of_launch(self, stream: int) -> int:
        """Return the address of the counters for a launch on ``stream``, which may be capturing."""
        if torch.cuda.is_current_stream_capturing():
            # Zeros made while capturing are made again by every replay: right, but a node more in the graph.
            taken = self._free.pop() if self._free else torch.zeros(COUNTERS, dtype=torch.int32, device=self._device)
            self._kept.append(taken)
            return taken.data_ptr()
        found = self._by_stream.get(stream)
        if found is None:
            if len(self._free) < COUNTER_SLOTS // 2:
                self._refill()
            found = self._by_stream[stream] = self._free.pop()
        return found.data_ptr()

    def _refill(self) -> None:
        slots = torch.zeros(COUNTER_SLOTS, COUNTERS, dtype=torch.int32, device=self._device)
        # Another stream may use them next.
        torch.cuda.current_stream(self._device).synchronize()
        self._free.extend(slots.unbind())


@dataclass
class DecodeLayer:
    """A layer in the order of the tensor cores.

    ``rank_start`` and ``ranks`` follow the source: the ranks of siblings lie one after another, each padded to 64.
    """

    format: LinearFormat
    codes: Tensor
    metadata: Tensor | None
    scale: Tensor
    right: Tensor | None = None
    right_scale: Tensor | None = None
    left: Tensor | None = None
    left_scale: Tensor | None = None
    rank_start: Tensor | None = None
    counters: Counters | None = None
    plans: dict[int, Plan] = field(default_factory=dict)

    @property
    def unit_columns(self) -> int:
        """Columns that a warp takes at a time."""
        return 64 if self.metadata is None else 128

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that a launch reads."""
        tensors = (self.codes, self.metadata, self.scale, self.right, self.right_scale, self.left, self.left_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


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


def prepare(packed: PackedLinear) -> DecodeLayer:
    """Put a layer into the order of the tensor cores."""
    spec, weight = packed.format, packed.weight
    layer = DecodeLayer(
        spec,
        codes=code_words(weight.values),
        metadata=None if weight.pattern is None else metadata_words(weight.pattern),
        scale=_weight_scale(weight.scale, spec.weight),  # type: ignore[arg-type]
    )
    if packed.left is not None and packed.right is not None:
        ranks = -(-spec.rank // FACTOR_GROUP) * FACTOR_GROUP
        layer.right = code_words(_fill_rows(packed.right.values, ranks, 0x88))
        layer.right_scale = scale_words(_fill_rows(packed.right.scale, ranks, 0))  # type: ignore[arg-type]
        layer.left = code_words(packed.left.values)
        layer.left_scale = scale_words(packed.left.scale)  # type: ignore[arg-type]
        layer.rank_start = torch.zeros(layer.codes.shape[0], dtype=torch.int32, device=weight.values.device)
        layer.counters = Counters(weight.values.device)
    return layer


def _fill_rows(tensor: Tensor, rows: int, value: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[0]), value=value)


def _weight_scale(scale: Tensor, spec: WeightFormat) -> Tensor:
    return scale_words(scale) if spec.group is not None else scale.flatten().contiguous()


def run(x: Tensor, layer: DecodeLayer, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns]."""
    tokens = x.numel() // layer.format.columns
    plan = layer.plans.get(tokens)
    if plan is None:
        plan = layer.plans[tokens] = make_plan(layer, x.dtype, tokens)
    x = x.contiguous()
    # The kernel reads 16 bytes at a time; a view may begin anywhere.
    return launch(plan, x if x.data_ptr() % 16 == 0 else x.clone(), layer, bias)


def launch(plan: Plan, x: Tensor, layer: DecodeLayer, bias: Tensor | None) -> Tensor:
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
    layer: DecodeLayer, dtype: torch.dtype, tokens: int, shape: LaunchShape | None = None, splits: int | None = None
) -> Plan:
    """Decide the shape of the launch for ``tokens``, and compile its kernel if that was not done yet.

    ``shape`` and ``splits`` overrule the choice, to measure others.

    Raises:
        KernelError: the kernel cannot be compiled or loaded.
    """
    spec, device = layer.format, layer.codes.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    major, _ = torch.cuda.get_device_capability(device)
    token_tiles = 1 << max(-(-tokens // TOKEN_TILE) - 1, 0).bit_length()
    row_tiles, units = layer.codes.shape[:2]
    grid = min(row_tiles, processors)
    ranks = 0 if layer.right is None else layer.right.shape[0] * TILE_ROWS
    staged_tokens = tokens if token_tiles == 1 else token_tiles * TOKEN_TILE
    shape, staging = _fitting(
        [shape] if shape else _shapes(token_tiles, -(-row_tiles // grid)),
        spec.columns,
        layer.unit_columns,
        staged_tokens,
        ranks,
    )
    rank_tiles, column_units = ranks // TILE_ROWS, -(-spec.columns // FACTOR_GROUP)
    splits = splits or max(1, min(grid // max(rank_tiles, 1), PARTIAL_TOKENS // tokens))
    split_units = -(-column_units // splits)
    if staging.chunks > 1:
        split_units = min(split_units, staging.chunk // FACTOR_GROUP)
    splits = -(-column_units // split_units)
    left_units = 0 if layer.left is None else layer.left.shape[1]
    arguments = _Arguments(
        codes=layer.codes.data_ptr(),
        metadata=_pointer(layer.metadata),
        scale=layer.scale.data_ptr(),
        right=_pointer(layer.right),
        right_scale=_pointer(layer.right_scale),
        left=_pointer(layer.left),
        left_scale=_pointer(layer.left_scale),
        rank_start=_pointer(layer.rank_start),
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
        "BLOCKS": shape.blocks if staging.shared_bytes <= SHARED_BYTES // shape.blocks else 1,
    }
    module = driver.load(_source(), KERNEL_NAME, layer.codes.get_device(), defines)
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


def _fitting(
    shapes: Sequence[LaunchShape], columns: int, unit: int, tokens: int, ranks: int
) -> tuple[LaunchShape, Staging]:
    """Return the first shape for which x, or two pieces of it, fit in shared memory.

    Raises:
        KernelError: none fits.
    """
    for shape in shapes:
        staging = _stage(columns, unit, tokens, ranks, shape)
        if staging.shared_bytes <= SHARED_BYTES:
            return shape, staging
    raise KernelError(f"{tokens} tokens of {columns} columns and {ranks} ranks do not fit in shared memory")


def _stage(columns: int, unit: int, tokens: int, ranks: int, shape: LaunchShape) -> Staging:
    """Keep all of x in shared memory, or failing that, two pieces at a time, as large as fit."""

    def shared(chunk: int, whole: bool) -> int:
        x = tokens * (2 * chunk + 16)
        t = tokens * (2 * ranks + 16) if ranks else 0
        return 16 + shape.warps * shape.row_tiles * 512 + (x + t if whole else max(2 * x, t))

    step = unit * shape.warp_columns * shape.stages
    chunk = -(-columns // unit) * unit
    if shared(chunk, True) <= SHARED_BYTES:
        return Staging(chunk, 1, -(-chunk // step) * shape.stages, shared(chunk, True))
    chunk = step
    while shared(chunk + step, False) <= SHARED_BYTES:
        chunk += step
    return Staging(chunk, -(-columns // chunk), chunk // unit // shape.warp_columns, shared(chunk, False))


def _shapes(token_tiles: int, block_tiles: int) -> list[LaunchShape]:
    """Return shapes for blocks that have ``block_tiles`` tiles of rows, best first, as measured on an H100.

    The last one needs the least shared memory.
    """
    row_tiles = 4 if token_tiles == 1 and block_tiles > 2 else min(2, block_tiles)
    stages = 1 if row_tiles == 4 else 2
    return [LaunchShape(row_tiles, 1, 16, stages, 1), LaunchShape(row_tiles, 1, 16, 1, 1)]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _source() -> str:
    return (files("slimc.backends.cuda") / "decode.cu").read_text("utf-8")


def _accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA GPU, not {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    if dtype not in (torch.bfloat16, torch.float16) or dtype != spec.weight.dtype:
        return "needs activations and scales of one 16-bit dtype"
    if tokens > MAX_TOKENS:
        return f"is for {MAX_TOKENS} tokens at most"
    return _refuses_format(spec) or _refuses_toolchain()


@cache
def _refuses_toolchain() -> str | None:
    """Say why nothing can be compiled here, or return ``None``."""
    try:
        compiler.version()
    except KernelError as error:
        return str(error)
    return None


def _refuses_format(spec: LinearFormat) -> str | None:
    weight = spec.weight
    if weight.bits != 4 or weight.asymmetric:
        return "needs symmetric 4-bit codes"
    if weight.sparsity not in (None, NM(2, 4)):
        return f"knows 2:4 and dense weights, not {weight.sparsity}"
    if weight.group not in (None, 64, 128):
        return f"knows groups of 64 and 128 columns, not {weight.group}"
    if weight.columns % 8:
        return "needs a multiple of 8 columns"
    if spec.input_scaled:
        return "does not scale its input"
    for factor in (spec.left, spec.right):
        if factor is not None and (factor.bits, factor.group, factor.dtype) != (4, FACTOR_GROUP, weight.dtype):
            return "needs adapters of 4 bits in groups of 64"
    return None


DECODE = Kernel("cuda-decode", _accepts, prepare, run)
