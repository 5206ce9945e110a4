"""``cuda-stream``: a linear layer with its adapters on Hopper, for up to 256 tokens (``stream.cu``).

With adapters it is two launches of one kernel: t = x @ R^T, then the layer. Weights do not depend on what ran before,
so each launch begins to bring its own while the one before still computes. Sums are taken in an order fixed by the
shape of the launch and the number of its blocks, so results are the same from call to call.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from slimc.backends.cuda import driver, shapes
from slimc.backends.cuda.counters import Counters
from slimc.backends.cuda.layer import (
    FACTOR_GROUP,
    MOST_STACKED,
    FragmentLayer,
    padded_rank,
    pointer,
    prepare,
    refuses,
    source,
    stack_shared,
)
from slimc.backends.cuda.rounding import round_inputs
from slimc.backends.cuda.shapes import Form, LaunchShape
from slimc.errors import KernelError
from slimc.runtime.formats import LinearFormat
from slimc.runtime.select import Case, Kernel

__all__ = ["STREAM", "Plan", "defines_of", "launch", "make_plan"]

KERNEL_NAME = "stream_linear"

BOX_COLUMNS = 64
_MARKS = 1 << 16, 1 << 31
"""Numbers of launches: larger than any count that other kernels keep in the same place."""

_launches = count()


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of the source."""

    _fields_ = [
        *((name, driver.TensorMap) for name in (
            "x_map", "t_map", "codes_map", "metadata_map", "scale_map", "left_map", "left_scale_map",
        )),
        *((name, ctypes.c_void_p) for name in ("y", "scale", "bias", "flags", "parts", "shared")),
        *((name, ctypes.c_int) for name in (
            "tokens", "rows", "whole", "row_scale", "steps", "slots", "token_tiles", "tiles", "zero", "mark",
            "window", "turn", "members",
        )),
        *((name, ctypes.c_int * MOST_STACKED) for name in ("first_block", "first_row", "first_rank", "rank_units")),
        ("padding", ctypes.c_int * 7),  # a structure with tensor maps is a multiple of 64 bytes
    ]  # fmt: skip


@dataclass
class _Launch:
    """One launch, ready but for its pointers."""

    arguments: _Arguments
    launcher: driver.Launcher
    shape: LaunchShape
    shared_bytes: int
    grid: int
    sharing: Counters | None
    part_bytes: int


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
    x = round_inputs(x, layer.format.activation)
    if plan.right is None or layer.counters is None:
        _start(plan.main, x, columns, None, y, bias, None, stream, _parts(plan.main, x.device))
        return y
    t = x.new_empty(x.numel() // columns, layer.ranks)
    flags = layer.counters.of_launch(stream), _next_mark()
    parts, parts_of_t = _parts(plan.main, x.device), _parts(plan.right, x.device)
    _start(plan.right, x, columns, None, t, None, flags, stream, parts_of_t)
    _start(plan.main, x, columns, t, y, bias, flags, stream, parts)
    return y


def _next_mark() -> int:
    first, end = _MARKS
    return first + next(_launches) % (end - first)


def _parts(step: _Launch, device: torch.device) -> Tensor | None:
    """Return memory for the sums of tiles that blocks share, if any are.

    Both launches have theirs before either is made, and until both are: W's sums may be written as soon as what was
    launched before t has ended, and another thread may launch something between the two.
    """
    if step.sharing is None:
        return None
    return torch.empty(step.grid * step.part_bytes // 4, dtype=torch.float32, device=device)


def _start(
    step: _Launch,
    x: Tensor,
    columns: int,
    t: Tensor | None,
    y: Tensor,
    bias: Tensor | None,
    flags: tuple[int, int] | None,
    stream: int,
    parts: Tensor | None,
) -> None:
    # Another thread may launch the same plan.
    arguments = _Arguments.from_buffer_copy(step.arguments)
    shape, tokens = step.shape, arguments.tokens
    if arguments.whole:
        boxes = shape.step // BOX_COLUMNS
        driver.encode_piece_map(arguments.x_map, x.data_ptr(), tokens, columns, shape.tokens, boxes)
    else:
        driver.encode_matrix_map(arguments.x_map, x.data_ptr(), tokens, columns, shape.tokens, BOX_COLUMNS)
    if t is not None:
        driver.encode_piece_map(arguments.t_map, t.data_ptr(), tokens, t.shape[1], shape.tokens, shape.left_units)
    arguments.y, arguments.bias = y.data_ptr(), pointer(bias)
    if flags is not None:
        arguments.flags, arguments.mark = flags
    if step.sharing is not None:
        arguments.parts, arguments.shared = pointer(parts), step.sharing.of_launch(stream)
    step.launcher(
        arguments,
        grid=(step.grid, 1, 1),
        block=(step.shape.threads, 1, 1),
        shared_bytes=step.shared_bytes,
        stream=stream,
        programmatic=True,
        cluster=1 if shape.by_memory else shape.cluster,
        spread=step.shape.tokens <= shapes.FEW_TOKENS,
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
    processors = torch.cuda.get_device_properties(device_index).multi_processor_count
    whole = int(spec.columns % BOX_COLUMNS == 0)
    values = spec.weight.bits is None
    form = Form(layer.metadata is not None, spec.weight.group or 0, layer.right is not None, dtype, values)
    starts = [] if layer.right is None else [rows.start for rows, _ in layer.parts[1:]]
    shape = shape or shapes.of_layer(spec.rows, spec.columns, tokens, form, starts, processors)
    arguments = _Arguments(
        scale=None if form.group else pointer(layer.scale),
        tokens=tokens,
        rows=spec.rows,
        whole=whole,
        row_scale=int(not spec.weight.per_tensor),
        steps=-(-spec.columns // shape.step),
        # Without adapters a block may hold rows of two.
        members=1 if layer.right is None else len(layer.parts),
    )
    blocks = shapes.first_blocks(shape, spec.rows, starts)
    for index, (rows, ranks) in enumerate(layer.parts[: arguments.members]):
        arguments.first_block[index] = blocks[index - 1] if index else 0
        arguments.first_row[index] = rows.start
        arguments.first_rank[index] = ranks.start
        arguments.rank_units[index] = (ranks.stop - ranks.start) // FACTOR_GROUP
    _describe_weight(arguments, form, shape, layer.code_lines, layer.metadata, layer.scale)
    if layer.left is not None and layer.left_scale is not None:
        driver.encode_word_map(arguments.left_map, layer.left.flatten(2), (shape.tiles, shape.left_units, 128))
        driver.encode_word_map(arguments.left_scale_map, layer.left_scale, (shape.tiles, shape.left_units, 8))
    main = _plan_launch(arguments, shape, form, blocks[-1], layer)
    if layer.right is None or layer.right_scale is None:
        return Plan(main, None)
    form = Form(False, FACTOR_GROUP, False, dtype)
    shape = right_shape or shapes.of_right(layer.ranks, spec.columns, tokens, form, processors, spec.rows)
    arguments = _Arguments(tokens=tokens, rows=layer.ranks, whole=whole, steps=-(-spec.columns // shape.step))
    _describe_weight(arguments, form, shape, layer.right.flatten(2), None, layer.right_scale)
    return Plan(main, _plan_launch(arguments, shape, form, -(-layer.ranks // shape.rows), layer))


def _describe_weight(
    arguments: _Arguments, form: Form, shape: LaunchShape, lines: Tensor, metadata: Tensor | None, scale: Tensor
) -> None:
    units = shape.step // (128 if form.sparse else 64)
    driver.encode_word_map(arguments.codes_map, lines, (shape.tiles, units * (4 if form.values else 1), 128))
    if metadata is not None:
        driver.encode_word_map(arguments.metadata_map, metadata.flatten(2), (shape.tiles, units, 64))
    if form.group:
        driver.encode_word_map(arguments.scale_map, scale, (shape.tiles, shape.step // form.group, 8))


def _plan_launch(arguments: _Arguments, shape: LaunchShape, form: Form, blocks: int, layer: FragmentLayer) -> _Launch:
    device_index = layer.codes.get_device()
    arguments.token_tiles = -(-arguments.tokens // shape.tokens)
    arguments.turn = shape.turn
    stages, _ = shape.stages_of(form)
    arguments.window = min(shape.window or stages, stages)
    if not shape.fits(form):
        raise KernelError(f"{shape} leaves too little shared memory for the ring of a {form}")
    module = driver.load(source("stream.cu"), KERNEL_NAME, device_index, defines_of(shape, form))
    shared_bytes = shape.shared_bytes(form)
    function = module.function(KERNEL_NAME, shared_bytes=shared_bytes)
    tiles = blocks * arguments.token_tiles
    grid, sharing = tiles * shape.cluster, None
    if shape.even:
        left_units = max(arguments.rank_units[: arguments.members]) if form.adapters else 0
        arguments.tiles, arguments.slots = tiles, arguments.steps + -(-left_units // shape.left_units)
        processors = torch.cuda.get_device_properties(device_index).multi_processor_count
        grid = min(tiles, max(processors - shape.spared, 1) * (1 if shape.alone else shape.blocks))
    if shape.even or shape.by_memory:
        sharing = _sharing(layer, 2 * tiles * shape.row_groups)
    launcher = function.prepare([_Arguments])
    return _Launch(arguments, launcher, shape, shared_bytes, grid, sharing, shape.part_bytes(form))


def _sharing(layer: FragmentLayer, count: int) -> Counters:
    """Return the counters of launches whose blocks share tiles, one set for layers of as many tiles."""
    key = (KERNEL_NAME, "sharing", count)
    if key not in layer.plans:
        layer.plans[key] = Counters(layer.codes.device, count)
    found: Counters = layer.plans[key]
    return found


def defines_of(shape: LaunchShape, form: Form) -> dict[str, int | str]:
    """Return what the kernel of a shape and a form is compiled with."""
    stages, inputs = shape.stages_of(form)
    return {
        "BFLOAT16": int(form.dtype == torch.bfloat16),
        "ARCH": 90,
        "SPARSE": int(form.sparse),
        "GROUP": form.group,
        "VALUES": int(form.values),
        "ADAPTERS": int(form.adapters),
        "TOKENS": shape.tokens,
        "ROW_TILES": shape.row_tiles,
        "ROW_GROUPS": shape.row_groups,
        "COLUMN_GROUPS": shape.column_groups,
        "STEP": shape.step,
        "STAGES": stages,
        "INPUTS": inputs,
        "CLUSTER": shape.cluster,
        "BY_MEMORY": int(shape.by_memory),
        "HALVES": int(shape.hands_halves(form)),
        "PART_BYTES": shape.part_bytes(form),
        "EVEN": int(shape.even),
        "REGISTERS": shape.registers[0],
        "FEW_REGISTERS": shape.registers[1],
        "BLOCKS": shape.blocks,
        "BRINGERS": shape.bringers,
    }


def _accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    if device.type == "cuda" and tokens > shapes.MOST_TOKENS:
        return f"is for {shapes.MOST_TOKENS} tokens at most"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        return "needs a Hopper GPU (compute capability 9.0)"
    return refuses(spec, dtype, device)


def _expects(case: Case) -> str | None:
    if case.tokens <= shapes.TOKEN_TILES[-1] or _was_faster(case):
        return None
    return f"is slower than cuda-prefill for more than {shapes.TOKEN_TILES[-1]} tokens"


def _was_faster(case: Case) -> bool:
    """Whether ``cuda-prefill`` took longer in layers of this size, with more tokens than a tile has.

    That was measured of 2:4 codes with 4-bit adapters and a scale for all columns, and in six of the 13 layers with one
    every 128 or 64: the rest are taken to be like these. With another form either kernel has other work.
    """
    members = case.members
    group = members[0].weight.group
    alike = all(
        one.weight.sparsity is not None
        and one.weight.bits is not None
        and one.weight.group == group
        and one.activation is None
        and one.right is not None
        for one in members
    )
    if not alike or group not in (None, 128, 64):
        return False
    ranks = sum(map(padded_rank, members))
    rows = [one.rows for one in members]
    form = Form(sparse=True, group=group or 0, adapters=True, dtype=case.dtype)
    processors = torch.cuda.get_device_properties(case.device).multi_processor_count
    return shapes.pays_for_two_tiles(rows, case.format.columns, ranks, form, processors)


STREAM = Kernel("cuda-stream", _accepts, prepare, run, stack_shared, expects=_expects)
