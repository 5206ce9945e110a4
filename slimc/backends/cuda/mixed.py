"""``cuda-mixed``: a linear layer whose groups of columns have codes of 1 to 8 bits (``mixed.cu``).

Codes of one width are taken where they have more than 4 bits, which other kernels multiply by as sums of 4-bit codes.
Up to 32 tokens are one launch that multiplies by codes; more are taken 32 at a time while that is faster than decoding
the weight for cuBLAS (``cuda-mixed-dense``). Adapters and an input scale are products beside it.

The codes lie in an order of their own: tiles of 16 rows, and in them units of 64 columns, each in as many lines of 32
words as its codes have bits. The canonical bytes follow from it exactly, so that it takes their place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends.cuda import driver
from slimc.backends.cuda.layer import MOST_STACKED, pointer, refuses_machine, settle, source
from slimc.backends.cuda.rounding import round_inputs
from slimc.backends.cuda.stored import StoredAdapters
from slimc.backends.cuda.unpack import refuses_weight
from slimc.errors import KernelError
from slimc.runtime.decode import pack_groups, unpack_groups
from slimc.runtime.formats import LinearFormat, WeightFormat
from slimc.runtime.layouts import Formats, Layout, register_layout
from slimc.runtime.packing import PackedLinear
from slimc.runtime.select import Kernel

__all__ = [
    "LAYOUT",
    "MIXED",
    "MIXED_DENSE",
    "MixedLayer",
    "MixedStack",
    "prepare",
    "refuses_form",
    "run",
    "run_dense",
    "stack",
]

LINEAR_KERNEL = "mixed_linear"
EXPAND_KERNEL = "mixed_expand"

TILE_ROWS = 16
UNIT_COLUMNS = 64
LINE_WORDS = 32
TOKEN_TILE = 8
LAUNCH_TOKENS = 32
MOST_TOKENS = 64
"""Beyond this, 32 at a time, decoding the weight is faster."""

TILES_OF_MANY_ROWS = 4
"""Tiles of a layer for each multiprocessor, from which on it has many rows."""

RING_SLOTS = 64
"""Units that a block has under way."""

STATIC_SHARED_BYTES = 48 << 10

FEWEST_LINES = 4
"""Lines that a slot has room for, at least: fewer would be more kernels to compile."""

NARROW = 4
"""Codes of one width, of so many bits at most, are for other kernels."""

EXPAND_WARPS = 8
MOST_GRID_ROWS = 65535


class _Member(ctypes.Structure):
    """``struct Member`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "units")),
        *((name, ctypes.c_int) for name in ("lines", "row_tiles", "rows", "first_row", "first_block")),
    )


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y")),
        ("members", _Member * MOST_STACKED),
        *((name, ctypes.c_int) for name in ("member_count", "tokens", "rows", "columns", "unit_count", "groups")),
    )


@dataclass
class MixedLayer:
    """A layer in the order of ``mixed.cu``.

    Attributes:
        format: what the layer stores.
        codes: int32 [row tiles, lines, 32].
        scale: [row tiles, groups, 16].
        zero: uint8, shaped like ``scale``; None if there are no zero points.
        units: sixteen times the first line of each unit, and its width, int32 [units].
        rest: the other canonical tensors: the input scale, and the factors as they are stored.
    """

    format: LinearFormat
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    units: Tensor
    rest: dict[str, Tensor]
    adapters: StoredAdapters | None = field(init=False)

    def __post_init__(self) -> None:
        """Put the factors together."""
        self.adapters = None
        if self.format.left is not None:
            weightless = {name: torch.empty(0) for name in self.format.weight.tensor_specs()}
            self.adapters = StoredAdapters.of(PackedLinear.assemble(self.format, weightless | self.rest))


@dataclass
class MixedStack:
    """Layers that read the same inputs and are computed by one launch, each from memory of its own.

    Attributes:
        members: in the order of their rows.
    """

    members: tuple[MixedLayer, ...]


def stack(layers: Sequence[MixedLayer]) -> tuple[MixedStack, list[MixedLayer]]:
    """Put layers together; return with the result the layers themselves, whose memory it reads.

    Raises:
        KernelError: the layers do not fit each other.
    """
    kinds = {
        (one.format.columns, _group_units(one.format.weight), one.zero is None, one.format.activation, one.scale.dtype)
        for one in layers
    }
    if len(layers) > MOST_STACKED:
        raise KernelError(f"at most {MOST_STACKED} layers can be stacked, not {len(layers)}")
    if len(kinds) > 1 or any(one.format.input_scaled for one in layers):
        raise KernelError("layers of different columns, groups, dtypes or inputs cannot be stacked")
    return MixedStack(tuple(layers)), list(layers)


def by_groups(spec: WeightFormat) -> WeightFormat:
    """Return a weight with a width for each group where all have the same: groups of whole bytes lie alike in both."""
    if spec.widths is not None or spec.bits is None:
        return spec
    group = spec.group or spec.columns
    return replace(spec, group=group, widths=(spec.bits,) * -(-spec.columns // group))


def unit_widths(spec: WeightFormat) -> list[int]:
    """Return the width of each unit of 64 columns."""
    spec = by_groups(spec)
    widths, group = spec.widths or (), spec.group or spec.columns
    return [widths[start // group] for start in range(0, spec.columns, UNIT_COLUMNS)]


def code_lines(codes: Tensor, widths: list[int]) -> Tensor:
    """Put codes [rows, columns], of a width for each 64 columns, into the kernel's order: int32 [tiles, lines, 32]."""
    tiles = -(-codes.shape[0] // TILE_ROWS)
    filled = functional.pad(codes, (0, 0, 0, tiles * TILE_ROWS - codes.shape[0]))
    # A lane has rows r and r + 8 of a tile and 16 columns of a unit; its pairs are of adjacent columns.
    shaped = filled.view(tiles, 2, 8, len(widths), 4, 4, 2, 2)
    pairs = shaped.permute(0, 3, 2, 4, 5, 6, 1, 7).reshape(tiles, len(widths), LINE_WORDS, 16, 2).to(torch.int64)
    lines = codes.new_empty(tiles, sum(widths), LINE_WORDS, dtype=torch.int32)
    first = _first_lines(widths)
    for width in sorted(set(widths)):
        alike = [unit for unit, one in enumerate(widths) if one == width]
        words = torch.zeros(tiles, len(alike), width, LINE_WORDS, dtype=torch.int64, device=codes.device)
        for pair, word, bit, place in _bits(width):
            both = pairs[:, alike, :, pair] >> bit & 1
            words[:, :, word] |= both[..., 0] << place | both[..., 1] << (place + 16)
        where = [first[unit] + line for unit in alike for line in range(width)]
        lines[:, where] = words.flatten(1, 2).view(torch.int32)[..., ::2]
    return lines


def line_codes(lines: Tensor, widths: list[int], rows: int) -> Tensor:
    """Return the codes [rows, columns] of `code_lines`."""
    tiles = lines.shape[0]
    pairs = torch.zeros(tiles, len(widths), LINE_WORDS, 16, 2, dtype=torch.uint8, device=lines.device)
    first = _first_lines(widths)
    for width in sorted(set(widths)):
        alike = [unit for unit, one in enumerate(widths) if one == width]
        found = torch.zeros(tiles, len(alike), LINE_WORDS, 16, 2, dtype=torch.uint8, device=lines.device)
        for pair, word, bit, place in _bits(width):
            words = lines[:, [first[unit] + word for unit in alike]]
            for half in range(2):
                found[..., pair, half] |= ((words >> (place + 16 * half) & 1) << bit).to(torch.uint8)
        pairs[:, alike] = found
    shaped = pairs.view(tiles, len(widths), 8, 4, 4, 2, 2, 2).permute(0, 6, 2, 1, 3, 4, 5, 7)
    return shaped.reshape(tiles * TILE_ROWS, len(widths) * UNIT_COLUMNS)[:rows]


def _bits(width: int) -> list[tuple[int, int, int, int]]:
    """Return for each bit of each of a lane's pairs of codes: the pair, the bit, and the word and place it has there.

    Pairs lie as whole codes, as many a word as there is room for; bits of the last ones fill what words have left.
    """
    whole = 16 // width
    found = [
        (pair, pair // whole, bit, width * (pair % whole) + bit)
        for pair in range(min(16, whole * width))
        for bit in range(width)
    ]
    spare = range(16 % width)
    left = [(word, 16 - len(spare) + place) for place in spare for word in range(width)]
    pieces = [(pair, bit) for pair in range(whole * width, 16) for bit in range(width)]
    return found + [(pair, word, bit, place) for (pair, bit), (word, place) in zip(pieces, left, strict=True)]


def _first_lines(widths: list[int]) -> list[int]:
    return [0, *accumulate(widths)][:-1]


def prepare(packed: PackedLinear) -> MixedLayer:
    """Put a layer into the order of the kernel."""
    spec = packed.format
    weight = packed.weight
    if weight.scale is None:
        raise KernelError(f"a layer of {spec.describe()} has no codes")
    counts, widths = zip(*by_groups(spec.weight).group_streams(), strict=True)
    codes = unpack_groups(weight.values, counts, widths)
    own = set(spec.weight.tensor_specs())
    layer = MixedLayer(
        spec,
        codes=code_lines(codes, unit_widths(spec.weight)),
        scale=_by_tiles(weight.scale),
        zero=None if weight.zero_point is None else _by_tiles(weight.zero_point),
        units=_units(spec.weight, weight.values.device),
        rest={name: tensor for name, tensor in packed.tensors().items() if name not in own},
    )
    settle(layer.codes.device)
    return layer


def _units(spec: WeightFormat, device: torch.device) -> Tensor:
    widths = unit_widths(spec)
    places = [16 * first + width for first, width in zip(_first_lines(widths), widths, strict=True)]
    return torch.tensor(places, dtype=torch.int32, device=device)


def _by_tiles(per_group: Tensor) -> Tensor:
    """Return [rows, groups] as [row tiles, groups, 16]."""
    filled = functional.pad(per_group, (0, 0, 0, -per_group.shape[0] % TILE_ROWS))
    return filled.view(-1, TILE_ROWS, per_group.shape[1]).transpose(1, 2).contiguous()


def _by_rows(tiled: Tensor, rows: int) -> Tensor:
    """Return [row tiles, groups, 16] as [rows, groups]."""
    return tiled.transpose(1, 2).reshape(-1, tiled.shape[1])[:rows].clone()


def tensors(layer: MixedLayer | MixedStack) -> dict[str, Tensor]:
    """Return what of a layer, or of the layers of a stack, must be kept."""
    if isinstance(layer, MixedStack):
        parts = enumerate(layer.members)
        return {f"{name}_{part}": tensor for part, one in parts for name, tensor in tensors(one).items()}
    zero = {} if layer.zero is None else {"zero": layer.zero}
    return {"codes": layer.codes, "scale": layer.scale} | zero | layer.rest


def assemble(formats: Formats, named: Mapping[str, Tensor], part: int) -> MixedLayer:
    """Return a layer that reads the memory of the tensors given."""
    spec, named = formats[part], _own(formats, named, part)
    rest = {name: tensor for name, tensor in named.items() if name not in ("codes", "scale", "zero")}
    codes = named["codes"]
    layer = MixedLayer(spec, codes, named["scale"], named.get("zero"), _units(spec.weight, codes.device), rest)
    settle(codes.device)
    return layer


def restore(formats: Formats, named: Mapping[str, Tensor], part: int) -> PackedLinear:
    """Return the canonical tensors of a layer."""
    spec, named = formats[part], _own(formats, named, part)
    weight = spec.weight
    codes = line_codes(named["codes"], unit_widths(weight), weight.rows)
    counts, widths = zip(*by_groups(weight).group_streams(), strict=True)
    made = {
        "values": pack_groups(codes, counts, widths),
        "scale": _by_rows(named["scale"], weight.rows),
    }
    if weight.asymmetric:
        made["zero_point"] = _by_rows(named["zero"], weight.rows)
    rest = {name: tensor.clone() for name, tensor in named.items() if name not in ("codes", "scale", "zero")}
    return PackedLinear.assemble(spec, rest | made)


def _own(formats: Formats, named: Mapping[str, Tensor], part: int) -> Mapping[str, Tensor]:
    """Return the tensors of a part by the names that they have in a layer that is no stack."""
    if len(formats) == 1:
        return named
    ending = f"_{part}"
    return {name.removesuffix(ending): tensor for name, tensor in named.items() if name.endswith(ending)}


@dataclass(frozen=True)
class LaunchShape:
    """How a launch divides the work.

    Attributes:
        tiles: of 16 rows, of a block.
        warps: of a block, which share the columns.
    """

    tiles: int
    warps: int


def launch_shape(rows: int, tokens: int, processors: int) -> LaunchShape:
    """Return how to divide a layer: the tiles of a block share what is read of the activations, if there are many."""
    if -(-rows // TILE_ROWS) < TILES_OF_MANY_ROWS * processors:
        return LaunchShape(1, 16)
    return LaunchShape(4, 8) if tokens <= 2 * TOKEN_TILE else LaunchShape(2, 8)


def fits(shape: LaunchShape, tokens: int) -> bool:
    """Return whether the sums of a block's warps fit into its shared memory."""
    row = TOKEN_TILE * token_tiles(tokens) + 1
    return 4 * shape.warps * shape.tiles * TILE_ROWS * row <= STATIC_SHARED_BYTES


def run(x: Tensor, layer: MixedLayer | MixedStack, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns], 32 tokens at a time."""
    members = _members(layer)
    flat = x.reshape(-1, x.shape[-1])
    inputs = _rounded(flat, members[0])
    counts = [one.format.rows for one in members]
    y = x.new_empty(len(flat), sum(counts))
    shape = launch_shape(sum(counts), min(len(flat), LAUNCH_TOKENS), _processors(x.get_device()))
    for start in range(0, len(flat), LAUNCH_TOKENS):
        part = inputs[start : start + LAUNCH_TOKENS]
        launch(layer, shape, part, bias, y[start : start + LAUNCH_TOKENS])
    for one, rows in zip(members, y.split_with_sizes(counts, dim=1), strict=True):
        if one.adapters is not None:
            one.adapters.add(rows, _read_by_adapters(flat, inputs, one))
    return y.view(*x.shape[:-1], sum(counts))


def _members(layer: MixedLayer | MixedStack) -> tuple[MixedLayer, ...]:
    return layer.members if isinstance(layer, MixedStack) else (layer,)


def launch(layer: MixedLayer | MixedStack, shape: LaunchShape, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Compute y [tokens, rows] of up to 32 tokens x [tokens, columns], both contiguous."""
    members = _members(layer)
    spec = members[0].format.weight
    launcher = _launcher(
        LINEAR_KERNEL,
        x.get_device(),
        x.dtype,
        int(members[0].zero is not None),
        _widest(members),
        _group_units(spec),
        shape.tiles,
        token_tiles(len(x)),
        shape.warps,
    )
    launcher(
        _arguments(members, shape.tiles, x, bias, y),
        grid=(sum(_blocks(one, shape.tiles) for one in members), 1, 1),
        block=(32 * shape.warps, 1, 1),
        stream=torch.cuda.current_stream(x.device).cuda_stream,
        programmatic=True,
    )


def token_tiles(tokens: int) -> int:
    """Return how many tiles of 8 tokens a launch has: a power of two, so that few kernels are compiled."""
    return 1 << (-(-tokens // TOKEN_TILE) - 1).bit_length()


def run_dense(x: Tensor, layer: MixedLayer, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns] by cuBLAS, with a dense weight made for this call."""
    spec = layer.format
    flat = x.reshape(-1, spec.columns)
    inputs = _rounded(flat, layer)
    y = functional.linear(inputs, expand(layer), bias)
    if layer.adapters is not None:
        layer.adapters.add(y, _read_by_adapters(flat, inputs, layer))
    return y.view(*x.shape[:-1], spec.rows)


def expand(layer: MixedLayer) -> Tensor:
    """Return the dense weight [rows, columns] without adapters, as `PackedWeight.decode` would."""
    spec = layer.format.weight
    dense = layer.scale.new_empty(spec.rows, spec.columns)
    launcher = _launcher(
        EXPAND_KERNEL,
        dense.get_device(),
        spec.dtype,
        int(layer.zero is not None),
        _widest((layer,)),
        _group_units(spec),
        1,
        1,
        EXPAND_WARPS,
    )
    launcher(
        _arguments((layer,), 1, None, None, dense),
        grid=(-(-spec.columns // (UNIT_COLUMNS * EXPAND_WARPS)), min(layer.codes.shape[0], MOST_GRID_ROWS), 1),
        block=(32 * EXPAND_WARPS, 1, 1),
        stream=torch.cuda.current_stream(dense.device).cuda_stream,
    )
    return dense


def _rounded(flat: Tensor, layer: MixedLayer) -> Tensor:
    """Return what the weight is multiplied by, where the kernel can read 16 bytes at a time."""
    scale = layer.rest.get("input_scale")
    inputs = round_inputs(flat if scale is None else flat * scale, layer.format.activation).contiguous()
    return inputs if inputs.data_ptr() % 16 == 0 else inputs.clone()


def _read_by_adapters(flat: Tensor, rounded: Tensor, layer: MixedLayer) -> Tensor:
    return flat if layer.format.input_scaled else rounded


def _arguments(
    members: Sequence[MixedLayer], tiles: int, x: Tensor | None, bias: Tensor | None, y: Tensor
) -> _Arguments:
    first = members[0]
    arguments = _Arguments(
        x=pointer(x),
        bias=pointer(bias),
        y=y.data_ptr(),
        member_count=len(members),
        tokens=0 if x is None else len(x),
        columns=first.format.columns,
        unit_count=len(first.units),
        groups=first.scale.shape[1],
    )
    row = block = 0
    for index, one in enumerate(members):
        arguments.members[index] = _Member(
            codes=one.codes.data_ptr(),
            scale=one.scale.data_ptr(),
            zero=pointer(one.zero),
            units=one.units.data_ptr(),
            lines=one.codes.shape[1],
            row_tiles=one.codes.shape[0],
            rows=one.format.rows,
            first_row=row,
            first_block=block,
        )
        row, block = row + one.format.rows, block + _blocks(one, tiles)
    arguments.rows = row
    return arguments


def _blocks(layer: MixedLayer, tiles: int) -> int:
    """Return how many blocks a launch needs: none holds rows of two layers."""
    return -(-layer.codes.shape[0] // tiles)


def _group_units(spec: WeightFormat) -> int:
    return (spec.group or spec.columns) // UNIT_COLUMNS


@cache
def _processors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def _depth(tiles: int, warps: int, widest: int) -> int:
    """Return how many units of each tile a warp has under way: what fits into 48 KiB beside each other."""
    # Lines, and scales and zeros of the rows of a tile.
    slot_bytes = 4 * LINE_WORDS * widest + 3 * TILE_ROWS
    slots = min(RING_SLOTS, STATIC_SHARED_BYTES // slot_bytes)
    return max(1, min(8, slots // (tiles * warps)))


def _widest(members: Sequence[MixedLayer]) -> int:
    """Return for how many lines of a unit there must be room."""
    return max(FEWEST_LINES, *(one.format.weight.bits or 0 for one in members))


@cache
def _launcher(
    kernel: str,
    device_index: int,
    dtype: torch.dtype,
    asymmetric: int,
    widest: int,
    group_units: int,
    tiles: int,
    token_tiles: int,
    warps: int,
) -> driver.Launcher:
    defines = {
        "BFLOAT16": int(dtype == torch.bfloat16),
        "ARCH": 10 * torch.cuda.get_device_capability(device_index)[0],
        "ASYMMETRIC": asymmetric,
        "WIDEST": widest,
        "GROUP_UNITS": group_units,
        "TILES": tiles,
        "TOKEN_TILES": token_tiles,
        "WARPS": warps,
        "DEPTH": _depth(tiles, warps, widest),
    }
    return driver.load(source("mixed.cu"), "mixed", device_index, defines).function(kernel).prepare([_Arguments])


def refuses_form(spec: LinearFormat) -> str | None:
    """Say why the kernels cannot compute a layer of a form on any device, or return ``None``."""
    weight = spec.weight
    if weight.widths is None and (weight.bits or 0) <= NARROW:
        return f"is for groups of columns with codes of different widths, or of more than {NARROW} bits"
    if weight.widths is None and (weight.per_tensor or spec.left is not None or spec.activation is not None):
        return "takes codes of one width with scales for rows or groups, without adapters and without rounded inputs"
    if spec != LinearFormat(weight, spec.left, spec.right, spec.input_scaled, spec.activation):
        return f"computes codes and adapters, not all of {spec.describe()}"
    if weight.sparsity is not None:
        return f"knows dense weights, not {weight.describe()}"
    if weight.columns % UNIT_COLUMNS or (weight.group or weight.columns) % UNIT_COLUMNS:
        return f"needs columns and groups of multiples of {UNIT_COLUMNS}, not {weight.columns} in {weight.describe()}"
    factors = [factor for factor in (spec.left, spec.right) if factor is not None]
    if any(factor.dtype != weight.dtype for factor in factors):
        return "needs a weight and adapters of one dtype"
    return next((reason for reason in map(refuses_weight, factors) if reason), None)


def _refuses(spec: LinearFormat, dtype: torch.dtype, device: torch.device) -> str | None:
    return refuses_form(spec) or refuses_machine(spec, dtype, device)


def _accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    if tokens > MOST_TOKENS:
        return _refuses(spec, dtype, device) or f"decoding the weight is faster for more than {MOST_TOKENS} tokens"
    return _refuses(spec, dtype, device)


def _accepts_dense(spec: LinearFormat, dtype: torch.dtype, device: torch.device, _tokens: int) -> str | None:
    return _refuses(spec, dtype, device)


MIXED = Kernel("cuda-mixed", _accepts, prepare, run, stack)

MIXED_DENSE = Kernel("cuda-mixed-dense", _accepts_dense, prepare, run_dense)

LAYOUT = register_layout(Layout("mixed", prepare, tensors, assemble, restore))
"""What a layer of groups of different widths keeps on a GPU."""
