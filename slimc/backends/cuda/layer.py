"""A linear layer in the order of the tensor cores: one form on the GPU, for every kernel of this package.

Its weight is 4-bit codes or 16-bit values, 2:4 or dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from slimc.backends.cuda import compiler
from slimc.backends.cuda.counters import Counters
from slimc.backends.cuda.fragments import (
    TILE_ROWS,
    code_words,
    metadata_words,
    scale_groups,
    scale_words,
    value_words,
)
from slimc.errors import KernelError
from slimc.runtime.formats import NM, LinearFormat
from slimc.runtime.packing import PackedLinear, PackedWeight

__all__ = [
    "FACTOR_GROUP",
    "KERNEL_GROUPS",
    "FragmentLayer",
    "complete",
    "padded_rank",
    "pointer",
    "prepare",
    "refuses",
    "refuses_machine",
    "settle",
    "source",
    "stack",
    "stack_shared",
    "unit_columns",
]

FACTOR_GROUP = 64
"""Columns of a factor that share a scale, and ranks to which factors are padded."""

KERNEL_GROUPS = (128, 64, 32)
"""Columns of W that may share a scale."""

HEADERS = {
    "attend.cu": ("hopper.cuh",),
    "expand.cu": ("signs.cuh",),
    "prefill.cu": ("hopper.cuh",),
    "signs.cu": ("signs.cuh",),
    "stream.cu": ("hopper.cuh", "wgmma.cuh"),
    "unpack.cu": ("signs.cuh",),
}
"""What the source of a kernel needs besides what all of them share."""

MOST_STACKED = 8
"""Layers of a stack: a launch is told where each begins."""

STACKED_ROWS = 256
"""A block of rows, of any kernel, must not read the ranks of two layers."""


@dataclass(frozen=True)
class Member:
    """One layer of a stack.

    Attributes:
        first_row: of its rows among those of the stack.
        first_rank: of its ranks among those of the stack.
        rank_units: units of 64 ranks that its rows read.
    """

    first_row: int
    first_rank: int
    rank_units: int


@dataclass
class FragmentLayer:
    """A layer in the order of the tensor cores, as `slimc.backends.cuda.fragments` puts it.

    Attributes:
        format: what the layer stores.
        codes: of W, int32 [row tiles, units, 32, 4]; or its 16-bit values, int32 [row tiles, units, 4, 32, 4].
        metadata: of a 2:4 W, int32 [row tiles, units, 32, 2].
        scale: of W: 16-bit [1] or [rows], or words of groups, int32 [row tiles, groups, 8]; ones [rows] of values.
        right, left: codes of the factors, their rank padded to a multiple of 64.
        right_scale, left_scale: words of their groups of 64 columns.
        right_largest: the largest magnitude of a row's, 16-bit [ranks].
        rank_range: int32 [row tiles, 2], the first rank that a tile of L reads, and how many units of 64.
        members: the layers of a stack, or the one that this is.
        counters: for kernels that hand out work.
        plans: launches decided so far, by whatever a kernel distinguishes them.
    """

    format: LinearFormat
    codes: Tensor
    metadata: Tensor | None
    scale: Tensor
    right: Tensor | None = None
    right_scale: Tensor | None = None
    right_largest: Tensor | None = None
    left: Tensor | None = None
    left_scale: Tensor | None = None
    rank_range: Tensor | None = None
    members: tuple[Member, ...] = (Member(0, 0, 0),)
    counters: Counters | None = None
    plans: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @property
    def parts(self) -> list[tuple[slice, slice]]:
        """The rows and the ranks of each layer of a stack."""
        ends = [*(member.first_row for member in self.members[1:]), self.format.rows]
        return [
            (slice(one.first_row, end), slice(one.first_rank, one.first_rank + FACTOR_GROUP * one.rank_units))
            for one, end in zip(self.members, ends, strict=True)
        ]

    @property
    def row_tiles(self) -> int:
        """Tiles of 16 rows."""
        return self.codes.shape[0]

    @property
    def ranks(self) -> int:
        """Ranks of the factors, with their padding."""
        return 0 if self.right is None else self.right.shape[0] * TILE_ROWS

    @property
    def left_units(self) -> int:
        """Units of 64 ranks that a row of L has room for; `rank_range` says how many it reads."""
        return 0 if self.left is None else self.left.shape[1]

    @property
    def unit_columns(self) -> int:
        """Columns that a warp takes at a time."""
        return unit_columns(self.metadata is not None)

    @property
    def code_lines(self) -> Tensor:
        """Codes or values of W, int32 [row tiles, lines, 128]: a line is 16 bytes of each lane."""
        return self.codes.view(self.row_tiles, -1, 128)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that a launch reads."""
        tensors = (self.codes, self.metadata, self.scale, self.right, self.right_scale, self.left, self.left_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def prepare(packed: PackedLinear) -> FragmentLayer:
    """Put a layer into the order of the tensor cores."""
    spec, weight = packed.format, packed.weight
    layer = FragmentLayer(
        spec,
        codes=value_words(weight.values) if spec.weight.bits is None else code_words(weight.values),
        metadata=None if weight.pattern is None else metadata_words(weight.pattern),
        scale=_weight_scale(weight),
    )
    if packed.left is not None and packed.right is not None:
        ranks = padded_rank(spec)
        layer.right = code_words(_fill_rows(packed.right.values, ranks, 0x88))
        layer.right_scale = scale_words(_fill_rows(packed.right.scale, ranks, 0))  # type: ignore[arg-type]
        layer.left = code_words(packed.left.values)
        layer.left_scale = scale_words(packed.left.scale)  # type: ignore[arg-type]
    return complete(layer)


def complete(layer: FragmentLayer) -> FragmentLayer:
    """Derive what follows from the tensors of a layer that is no stack: ranks that it reads, their scales, counters."""
    if layer.right is not None and layer.right_scale is not None:
        scales = scale_groups(layer.right_scale, layer.ranks, layer.right_scale.shape[1], layer.format.weight.dtype)
        layer.right_largest = scales.abs().amax(1)
        layer.rank_range = _rank_range(layer, 0)
        layer.members = (Member(0, 0, layer.ranks // FACTOR_GROUP),)
        layer.counters = Counters(layer.codes.device)
    settle(layer.codes.device)
    return layer


def settle(device: torch.device) -> None:
    """Wait until a layer is written: kernels load weights before they wait for the launches ahead of them."""
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()


def _fill_rows(tensor: Tensor, rows: int, value: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[0]), value=value)


def _weight_scale(weight: PackedWeight) -> Tensor:
    if weight.scale is None:
        return torch.ones(weight.format.rows, dtype=weight.format.dtype, device=weight.values.device)
    return scale_words(weight.scale) if weight.format.group is not None else weight.scale.flatten().contiguous()


def padded_rank(spec: LinearFormat) -> int:
    """Return the ranks that the kernels have of a layer: its own, filled up to a multiple of `FACTOR_GROUP`."""
    return -(-spec.rank // FACTOR_GROUP) * FACTOR_GROUP


def unit_columns(sparse: bool) -> int:
    """Return the columns of a row whose codes are one unit of `UNIT_BYTES`."""
    return 128 if sparse else 64


def refuses(spec: LinearFormat, dtype: torch.dtype, device: torch.device) -> str | None:
    """Say why the kernels that read fragments cannot compute a layer, or return ``None``."""
    return refuses_machine(spec, dtype, device) or _refuses_values(spec, device) or _refuses_format(spec)


def refuses_machine(spec: LinearFormat, dtype: torch.dtype, device: torch.device) -> str | None:
    """Say why no kernel of this package can run on a device, or return ``None``."""
    if device.type != "cuda":
        return f"needs a CUDA GPU, not {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    if dtype not in (torch.bfloat16, torch.float16) or dtype != spec.weight.dtype:
        return "needs activations and scales of one 16-bit dtype"
    return _refuses_toolchain()


@cache
def _refuses_toolchain() -> str | None:
    """Say why nothing can be compiled here, or return ``None``."""
    try:
        compiler.version()
    except KernelError as error:
        return str(error)
    return None


def _refuses_values(spec: LinearFormat, device: torch.device) -> str | None:
    """Say why a weight of 16-bit values is for other kernels, or return ``None``."""
    if spec.weight.bits is None and torch.cuda.get_device_capability(device) != (9, 0):
        return "takes 16-bit values on Hopper GPUs only (compute capability 9.0)"
    return None


def _refuses_format(spec: LinearFormat) -> str | None:
    weight = spec.weight
    if weight.widths is not None:
        return f"needs codes of one width, not {weight.describe()}"
    if weight.bits not in (None, 4) or weight.asymmetric:
        return "needs symmetric 4-bit codes, or 16-bit values"
    if weight.bits is None and weight.sparsity is None and spec.left is None:
        return "is one dense product"
    if weight.sparsity not in (None, NM(2, 4)):
        return f"knows 2:4 and dense weights, not {weight.sparsity}"
    if weight.group not in (None, *KERNEL_GROUPS):
        return f"knows groups of 128, 64 and 32 columns, not {weight.group}"
    if weight.columns % 8:
        return "needs a multiple of 8 columns"
    if spec.input_scaled:
        return "does not scale its input"
    for factor in (spec.left, spec.right):
        if factor is not None and (factor.bits, factor.group, factor.dtype) != (4, FACTOR_GROUP, weight.dtype):
            return "needs adapters of 4 bits in groups of 64"
    return None


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's data, or ``None``."""
    return None if tensor is None else tensor.data_ptr()


@cache
def source(name: str) -> str:
    """Return the source of a kernel, with what it shares with others ahead of it."""
    parts = ("common.cuh", *HEADERS.get(name, ()), name)
    return "\n".join((files("slimc.backends.cuda") / part).read_text("utf-8") for part in parts)


def stack(layers: Sequence[FragmentLayer]) -> FragmentLayer:
    """Put layers that read the same input on top of each other: one layer with all their rows, in their order.

    Each keeps its own adapters: the ranks of all lie one after another in R, and a row of L reads those of its layer.

    Raises:
        KernelError: the layers do not fit each other, or one does not end with a tile.
    """
    if len(layers) > MOST_STACKED:
        raise KernelError(f"at most {MOST_STACKED} layers can be stacked, not {len(layers)}")
    first = layers[0]
    weights = [one.format.weight for one in layers]
    forms = {(weight.bits, weight.columns, weight.group, weight.sparsity, weight.dtype) for weight in weights}
    kinds = {(one.right is None, one.format.activation) for one in layers}
    if len(forms) > 1 or len(kinds) > 1:
        raise KernelError("layers of different bits, widths, groups, sparsities, dtypes or kinds cannot be stacked")
    if any(one.format.rows % STACKED_ROWS for one in layers[:-1]):
        raise KernelError(f"layers above others need a multiple of {STACKED_ROWS} rows to be stacked")
    rows = sum(one.format.rows for one in layers)
    weight = replace(first.format.weight, rows=rows, per_tensor=False)
    grouped = weight.group is not None
    stacked = FragmentLayer(
        LinearFormat(weight, activation=first.format.activation),
        codes=torch.cat([one.codes for one in layers]),
        metadata=None if first.metadata is None else torch.cat([_present(one.metadata) for one in layers]),
        scale=torch.cat([one.scale if grouped else one.scale.expand(one.format.rows) for one in layers]),
    )
    if first.right is None:
        settle(first.codes.device)
        return stacked
    units = max(one.left_units for one in layers)
    starts = list(accumulate((one.ranks for one in layers), initial=0))
    stacked.right = torch.cat([_present(one.right) for one in layers])
    stacked.right_scale = torch.cat([_present(one.right_scale) for one in layers])
    stacked.right_largest = torch.cat([_present(one.right_largest) for one in layers])
    stacked.left = torch.cat([_fill_units(_present(one.left), units) for one in layers])
    stacked.left_scale = torch.cat([_fill_units(_present(one.left_scale), units) for one in layers])
    stacked.rank_range = torch.cat([_rank_range(one, start) for one, start in zip(layers, starts, strict=False)])
    rows_before = accumulate((one.format.rows for one in layers), initial=0)
    stacked.members = tuple(
        Member(row, start, one.ranks // FACTOR_GROUP)
        for one, row, start in zip(layers, rows_before, starts, strict=False)
    )
    stacked.counters = Counters(first.codes.device)
    settle(first.codes.device)
    return stacked


def stack_shared(layers: Sequence[FragmentLayer]) -> tuple[FragmentLayer, list[FragmentLayer]]:
    """`stack` layers, and return with the result a layer in place of each, which reads its part of the same memory.

    Raises:
        KernelError: the layers do not fit each other.
    """
    stacked = stack(layers)
    parts = []
    tile = row = rank = 0
    for one in layers:
        tiles, rows = slice(tile, tile + one.row_tiles), slice(row, row + one.format.rows)
        grouped = one.format.weight.group is not None
        part = replace(
            one,
            format=replace(one.format, weight=replace(one.format.weight, per_tensor=False)),
            codes=stacked.codes[tiles],
            metadata=None if stacked.metadata is None else stacked.metadata[tiles],
            scale=stacked.scale[tiles if grouped else rows],
            plans={},
        )
        if stacked.right is not None:
            ranks = slice(rank // TILE_ROWS, (rank + one.ranks) // TILE_ROWS)
            part.right, part.right_scale = stacked.right[ranks], _present(stacked.right_scale)[ranks]
            part.left, part.left_scale = _present(stacked.left)[tiles], _present(stacked.left_scale)[tiles]
            part.rank_range = _rank_range(one, 0)
        parts.append(part)
        tile, row, rank = tiles.stop, rows.stop, rank + one.ranks
    settle(stacked.codes.device)
    return stacked, parts


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise KernelError("layers with and without a part cannot be stacked")
    return tensor


def _fill_units(words: Tensor, units: int) -> Tensor:
    """Give the rows of L room for as many units as the widest among them."""
    return torch.nn.functional.pad(words, (0, 0) * (words.dim() - 2) + (0, units - words.shape[1]))


def _rank_range(layer: FragmentLayer, first: int) -> Tensor:
    """Every tile of a layer whose ranks begin at ``first`` reads all of them."""
    own = torch.tensor([first, layer.ranks // FACTOR_GROUP], dtype=torch.int32, device=layer.codes.device)
    return own.expand(layer.row_tiles, 2).contiguous()
