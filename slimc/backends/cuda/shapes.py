"""How the launches of ``stream.cu`` divide their work: shapes that were measured, and a rule for other layers.

``stream_shapes.json`` holds, for layers of well-known models, the shapes that took the least time on an H100
(``benchmarks/stream_shapes.py`` writes it). A layer takes those of the measured one that is nearest in rows and
columns, if they suit it (divided evenly if its blocks would take a second round; with more tokens than a tile, first
those of two tiles); else one of `RULE_SHAPES`, found on an H200 (`_by_rule`), or, with few tokens and many rows, the
one of `CANDIDATES` that fills the device best. The launch for t takes those of the factor that is nearest in ranks and
columns, of several the one whose layer is nearest in rows. A layer of 16-bit values takes one of `VALUE_SHAPES` or
`DENSE_VALUE_SHAPES`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import accumulate, pairwise

import torch

from slimc.backends.cuda.fragments import TILE_ROWS
from slimc.errors import KernelError

__all__ = [
    "CANDIDATES",
    "RIGHT_CANDIDATES",
    "Form",
    "LaunchShape",
    "Measured",
    "measured",
    "of_layer",
    "of_right",
    "pays_for_two_tiles",
    "suiting",
    "token_tile",
]

SHARED_BYTES = 228 << 10
"""Shared memory of a multiprocessor."""

REGISTERS = 1 << 16
"""Of a multiprocessor."""

MOST_THREADS = 1024
"""Of a block."""

MOVED_REGISTERS = {2: (240, 24), 3: (160, 32), 4: (112, 32)}
"""By the warpgroups that multiply: registers of their threads, and of those of one more."""

RESERVED_BYTES = 2 << 10
"""What the system and the kernel's own variables take of it, a block."""

ALIGNMENT = 1024
SLOT_ALIGNMENT = 128
MOST_STAGES = 24
TOKEN_TILES = (8, 16, 32, 64, 128)
MOST_TOKENS = 2 * TOKEN_TILES[-1]
"""Of a call: two tiles, the second of which finds weights in the cache."""

CLUSTERS = (1, 2, 3, 4, 5, 6, 7, 8)
FILLING = (0.85, 2.1, 1.2)
"""Blocks a multiprocessor: the fewest and the most that fill a device, and how many it had best be."""

MOST_BY_MEMORY = 4
"""Blocks that share columns and exchange their sums through device memory, at most: each has code of its own."""

WHOLE_TILES = 5 / 6
"""Share of the multiprocessors that is enough for an even launch whose blocks then have whole tiles, where nothing runs
beside it: 112 of 132 were faster than all of them."""

ENOUGH_BLOCKS = 0.8
"""Blocks of values a multiprocessor, from which on all of its memory's bandwidth is used."""

ROOM_BESIDE_T, ROOM_ALONE = 0.61, 0.75
"""Blocks of values that share columns, a multiprocessor, at most."""

RULE_ROOM = {8: 0.75, 16: 0.75, 32: 0.75, 64: 0.75, 128: 0.61}
"""Share of the device for a layer unlike the measured ones beside a launch for t, by the tokens of a block."""

RULE_SHARED_ROOM_ALONE = {8: 1.0, 16: 1.0, 32: 0.75, 64: 0.75, 128: 0.75}
"""Blocks that share the columns of such a layer where there is no t, a multiprocessor, at most."""

MOST_SHARES = 4
"""Blocks that share the columns of a tile of such a layer, at most."""

FEWEST_COLUMNS_BESIDE_T, FEWEST_COLUMNS_ALONE = 1280, 1024
"""Columns of such a layer that each of the blocks that share them has, at least."""

FEW_TOKENS = 16
"""Of a block, up to which two warps bring what it reads, and blocks of a cluster are spread over multiprocessors."""

MANY_TOKENS = 64
"""Of a block, from which on the sums that a cluster exchanges take the place of its rings."""

ROUNDS_TOKENS = 64
"""Of a block, from which on a layer of too many rows is faster in the largest of `RULE_SHAPES` than in `CANDIDATES`."""

MEASURED_PROCESSORS = 132
"""Multiprocessors of the cards on which the shapes of ``stream_shapes.json`` were measured."""

NEAR = 2.0
"""A measured layer says something of layers up to so many times smaller or larger, rows and columns together."""


@dataclass(frozen=True)
class Form:
    """What the kernel must know of a weight when it is compiled.

    Attributes:
        sparse: 2:4, or dense.
        group: columns that share a scale, 0 for all of a row.
        adapters: with t and L.
        dtype: of activations, scales and results.
        values: 16 bits each, in place of 4-bit codes.
    """

    sparse: bool
    group: int
    adapters: bool
    dtype: torch.dtype
    values: bool = False

    @property
    def bytes_of_64(self) -> int:
        """Bytes of 64 columns of a row: codes or values, and metadata."""
        kept = 32 if self.sparse else 64
        return (2 * kept if self.values else kept // 2) + (8 if self.sparse else 0)


@dataclass(frozen=True)
class LaunchShape:
    """How a launch divides the work; see the head of ``stream.cu``.

    A tile of results is `rows` rows by `tokens` tokens. One block computes it, or several share its columns, in one of
    three ways: as a cluster (`cluster` > 1); through device memory (`by_memory`: 2 to `MOST_BY_MEMORY` blocks of more
    than `FEW_TOKENS` tokens, one column group); or, where a layer has more tiles than blocks find room at once, as
    `even` says (no cluster, one column group, not `by_memory`). `fits` holds these rules.

    Attributes:
        tokens: of a block.
        row_tiles: tiles of 64 rows that a warpgroup holds at once.
        row_groups: warpgroups with rows of their own.
        column_groups: warpgroups that share the columns of the same rows.
        cluster: blocks that share the columns of a tile; they are launched as a cluster unless `by_memory`.
        blocks: blocks that a multiprocessor holds at once, of this launch and those around it.
        step: columns of a slot of the ring, 128 or 256.
        stages: slots of the ring of weights, at most; as many as fit beside the other blocks if 0.
        inputs: slots of the ring of activations, at most; as many as of weights if 0.
        alone: whether no two blocks of the launch run on one multiprocessor; they take two thirds of its shared memory.
        even: whether the launch has no more blocks than run at once, nor than tiles, and divides the columns (and
            ranks of L) of all tiles evenly among them. A block then ends a tile that another began, computes whole
            ones, and begins one, whose sums it hands on through device memory. A layer gets it, too, whose blocks
            would take a second round (`_in_one_round`, `_by_rule`).
        spared: multiprocessors on which an even launch has no blocks: for the launch for t, which runs meanwhile, or,
            without adapters, so that each block has whole tiles (`_idle`).
        window: slots of weights under way at once, at most; all of their ring if 0.
        turn: slots of W that each block's first one is further on than that of the block before it.
        apart: whether a warp brings weights and another activations, as it is with few tokens.
        by_memory: whether the blocks that share a tile exchange sums through device memory, as ordinary blocks, and
            not as a cluster, which must find room all at once.
    """

    tokens: int
    row_tiles: int
    row_groups: int
    column_groups: int
    cluster: int
    blocks: int
    step: int
    stages: int = 0
    inputs: int = 0
    alone: bool = False
    even: bool = False
    spared: int = 0
    window: int = 0
    turn: int = 0
    apart: bool = False
    by_memory: bool = False

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows of a block."""
        return 4 * self.row_tiles * self.row_groups

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return TILE_ROWS * self.tiles

    @property
    def left_units(self) -> int:
        """Units of L in a slot, 64 ranks each."""
        return self.step // 128

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of threads that multiply and of others, where those hand over some; zeros where all have the same.

        Without, the assembler would have products of few registers run one after another.
        """
        warpgroups = self.row_groups * self.column_groups
        if self.blocks > 1 or warpgroups not in MOVED_REGISTERS:
            return 0, 0
        # Each of the four parts of a multiprocessor holds its share of the warps.
        own = REGISTERS // 4 // 32 // -(-(4 * warpgroups + 1) // 4)
        needed = self.row_tiles * (self.tokens // 2 + 16) + (56 if self.even or self.by_memory else 40)
        return MOVED_REGISTERS[warpgroups] if needed > own else (0, 0)

    @property
    def bringers(self) -> int:
        """Warps that bring what the others read."""
        return 2 if self.apart or self.tokens <= FEW_TOKENS else 1

    @property
    def threads(self) -> int:
        """Threads of a block: warpgroups that multiply, and warps, or a warpgroup, that bring what they read."""
        return 128 * self.row_groups * self.column_groups + (128 if self.registers[0] else 32 * self.bringers)

    @property
    def input_bytes(self) -> int:
        """Bytes of a slot of activations."""
        return self.tokens * self.step * 2

    def slot_bytes(self, form: Form) -> int:
        """Bytes of a slot of weights: codes, metadata, scales."""
        weights = self.rows * self.step // 64 * form.bytes_of_64
        scales = self.rows * 2 * (self.step // form.group) if form.group else 0
        return -(-(weights + scales) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    def stages_of(self, form: Form) -> tuple[int, int]:
        """Slots of the rings of weights and of activations: multiples of the warpgroups that take turns at them.

        So a slot always meets the same warpgroup. One that waited for another's slot could be a whole turn ahead of
        what has arrived, and the parity by which it waits does not tell one turn from the last but one.
        """
        available = SHARED_BYTES * 2 // 3 if self.alone else SHARED_BYTES // self.blocks
        room = available - RESERVED_BYTES - self._output_bytes - ALIGNMENT
        if self.inputs:
            fitting = (room - self.inputs * self.input_bytes) // self.slot_bytes(form)
        else:
            fitting = room // (self.slot_bytes(form) + self.input_bytes)
        fitting = max(min(fitting, MOST_STAGES), 0)
        stages = min(self.stages or fitting, fitting) // self.column_groups * self.column_groups
        inputs = min(self.inputs or stages, stages) // self.column_groups * self.column_groups
        return stages, inputs

    def fits(self, form: Form) -> bool:
        """Whether blocks share columns in a way that the kernel knows, and have room for their threads and rings.

        Warpgroups must be able to wait for a slot while they hold another, and the rings to take their sums at the end.
        """
        _, inputs = self.stages_of(form)
        sums = self.column_groups * self.rows * self.tokens * 4 if self.column_groups > 1 else 0
        sums += self._sent_bytes if self.tokens >= MANY_TOKENS else 0
        fits = self.threads <= MOST_THREADS and self.shared_bytes(form) <= SHARED_BYTES - RESERVED_BYTES
        if self.even and (self.cluster > 1 or self.column_groups > 1):
            return False
        if self.by_memory and not (self._may_share and not self.even):
            return False
        return fits and inputs >= 2 * self.column_groups and self._ring_bytes(form) >= sums

    def shared_bytes(self, form: Form) -> int:
        """Dynamic shared memory of a block: rings, and sums that are sent to it; more than half if it is `alone`."""
        needed = self._ring_bytes(form) + self._output_bytes
        return max(needed, SHARED_BYTES // 2) if self.alone else needed

    def hands_halves(self, form: Form) -> bool:
        """Whether blocks exchange sums as float16 times a power of two: 11 bits, where results have 8."""
        return self.by_memory and form.dtype == torch.bfloat16

    def part_bytes(self, form: Form) -> int:
        """Bytes of device memory for the sums that a block hands to others: see `SharedTile` of the source."""
        pieces, threads = self.row_tiles * self.tokens // 8, 128 * self.row_groups
        if not self.by_memory:
            return pieces * threads * 16
        return (pieces * (8 if self.hands_halves(form) else 16) + -(-pieces // self.cluster) * 16 + 4) * threads

    def _ring_bytes(self, form: Form) -> int:
        stages, inputs = self.stages_of(form)
        weights = -(-stages * self.slot_bytes(form) // ALIGNMENT) * ALIGNMENT
        return inputs * self.input_bytes + weights

    @property
    def _may_share(self) -> bool:
        return 1 < self.cluster <= MOST_BY_MEMORY and self.column_groups == 1 and self.tokens > FEW_TOKENS

    @property
    def _sent_bytes(self) -> int:
        if self.by_memory:
            return 0
        pieces = -(-self.row_tiles * self.tokens // 8 // self.cluster)
        return pieces * self.cluster * 128 * self.row_groups * 16 if self.cluster > 1 else 0

    @property
    def _output_bytes(self) -> int:
        return ALIGNMENT + (0 if self.tokens >= MANY_TOKENS else self._sent_bytes)


@dataclass(frozen=True)
class Measured:
    """What was measured of one layer.

    Attributes:
        rows: of the layer (with those it is stacked with), or ranks of all its factors.
        columns: of the layer.
        tokens: of the call, rounded up to a size of `TOKEN_TILES`, or to `MOST_TOKENS`; for so many there are entries
            only where ``cuda-prefill`` took longer in the same run.
        shape: that took the least time.
        ranks: of all factors of the layer, each rounded up to whole units of L, where tokens are `MOST_TOKENS`; None
            for factors and for fewer tokens.
        beside: rows of the layer whose launch it was measured beside, for factors; None for layers. Two layers may have
            factors of one size, and leave them different shares of the device.
        in_step: found in a decoding step of a model, not behind its like.
    """

    rows: int
    columns: int
    tokens: int
    shape: LaunchShape
    ranks: int | None = None
    beside: int | None = None
    in_step: bool = False


def token_tile(tokens: int) -> int:
    """Return the tokens of a block: the least tile that holds ``tokens``, or the largest."""
    return next((tile for tile in TOKEN_TILES if tile >= tokens), TOKEN_TILES[-1])


def of_layer(rows: int, columns: int, tokens: int, form: Form, starts: Sequence[int], processors: int) -> LaunchShape:
    """Choose the shape of a layer's launch.

    Args:
        rows: of the layer, or of all layers of a stack.
        columns: of the layer.
        tokens: of the call.
        form: of the weight.
        starts: first rows of the members of a stack but the first; no block holds rows of two.
        processors: multiprocessors of the device.

    Raises:
        KernelError: no shape suits the layer.
    """
    if form.values:
        return _of_values(rows, tokens, form, starts, processors)
    return (
        _of_nearest("layers", rows, columns, tokens, form, starts, processors)
        or _by_rule(rows, columns, tokens, form, starts, processors)
        or _filling(CANDIDATES, rows, tokens, form, starts, processors)
    )


def of_right(ranks: int, columns: int, tokens: int, form: Form, processors: int, beside: int) -> LaunchShape:
    """Choose the shape of the launch for t, which has few rows: it ends sooner the more blocks share its columns.

    Args:
        ranks: of all factors of the layer, or of all layers of a stack.
        columns: of the layer.
        tokens: of the call.
        form: of R.
        processors: multiprocessors of the device.
        beside: rows of the layer, or of all layers of a stack, whose launch follows.

    Raises:
        KernelError: no shape suits the factor.
    """
    return _of_nearest("factors", ranks, columns, tokens, form, (), processors, beside) or _filling(
        RIGHT_CANDIDATES, ranks, tokens, form, (), processors
    )


def pays_for_two_tiles(rows: Sequence[int], columns: int, ranks: int, form: Form, processors: int) -> bool:
    """Return whether more tokens than a tile has take less time than in ``cuda-prefill``.

    It does only where just this layer was measured, and this card has no fewer multiprocessors than the one it was
    measured on.

    Args:
        rows: of each layer of a stack, or of the one.
        columns: of the layer.
        ranks: of all factors, each rounded up to whole units of L.
        form: of the weight.
        processors: multiprocessors of the device.
    """
    if processors < MEASURED_PROCESSORS:
        return False
    wanted, starts = (sum(rows), columns, MOST_TOKENS, ranks), list(accumulate(rows))[:-1]
    return any(
        (one.rows, one.columns, one.tokens, one.ranks) == wanted
        and _in_one_round("layers", one, one.rows, one.tokens, starts, form, processors) == one.shape
        for one in measured()["layers"]
    )


def suiting(candidates: dict[int, list[LaunchShape]], tile: int, form: Form) -> Iterator[LaunchShape]:
    """Yield the candidates, with every number of blocks that share columns, that a layer can be launched with."""
    for candidate in candidates[tile]:
        for cluster in CLUSTERS:
            shape = replace(candidate, cluster=cluster)
            if shape.fits(form):
                yield shape


def first_blocks(shape: LaunchShape, rows: int, starts: Sequence[int]) -> list[int]:
    """Return the first block of each member of a stack but the first, and how many all have, columns not divided."""
    bounds = [0, *starts, rows]
    return list(accumulate(-(-(end - start) // shape.rows) for start, end in pairwise(bounds)))


def blocks_of(shape: LaunchShape, rows: int, starts: Sequence[int] = ()) -> int:
    """Return how many blocks a launch has for one tile of tokens."""
    return first_blocks(shape, rows, starts)[-1] * shape.cluster


def _of_nearest(
    table: str,
    rows: int,
    columns: int,
    tokens: int,
    form: Form,
    starts: Sequence[int],
    processors: int,
    beside: int | None = None,
) -> LaunchShape | None:
    """Choose the shape of the nearest that was measured and whose shape suits; None if none is near."""
    tile = token_tile(tokens)
    for size in (MOST_TOKENS, tile) if tokens > tile else (tile,):
        of_this_size = [one for one in measured()[table] if one.tokens == size]
        for one in sorted(of_this_size, key=lambda one: (_distance(one, rows, columns), _distance_beside(one, beside))):
            if _distance(one, rows, columns) > math.log2(NEAR):
                break
            shape = _in_one_round(table, one, rows, tokens, starts, form, processors)
            if shape is not None and shape.fits(form):
                return shape
    return None


def _by_rule(
    rows: int, columns: int, tokens: int, form: Form, starts: Sequence[int], processors: int
) -> LaunchShape | None:
    """Choose the shape of a layer unlike the measured ones; None for few tokens and too many rows, or if none fits.

    Blocks that find no multiprocessor because the launch for t runs there wait for its end, and the others of their
    clusters with them. So the first shape is taken whose tiles all find room in a share of the device; of too many rows
    the largest does without, divided evenly if there are more tiles than multiprocessors.
    """
    tile, by_itself = token_tile(tokens), not form.adapters
    rounds = -(-tokens // tile)
    room = processors * (1 if by_itself else RULE_ROOM[tile])
    shared_room = processors * RULE_SHARED_ROOM_ALONE[tile] if by_itself else room
    fewest_columns = FEWEST_COLUMNS_ALONE if by_itself else FEWEST_COLUMNS_BESIDE_T
    for shape in RULE_SHAPES[tile]:
        tiles = blocks_of(shape, rows, starts) * rounds
        if shape.fits(form) and tiles <= room * shape.blocks:
            shares = min(int(shared_room) // tiles, columns // fewest_columns, MOST_SHARES)
            shared = (replace(shape, cluster=size) for size in range(shares, 1, -1))
            return next((one for one in shared if one.fits(form)), shape)
    largest = RULE_SHAPES[tile][-1]
    if tile < ROUNDS_TOKENS or not largest.fits(form):
        return None
    tiles = blocks_of(largest, rows, starts) * rounds
    if tiles <= processors:
        return largest
    # Blocks of t are on as many multiprocessors as there are, and not on those that would be left to them.
    return replace(largest, even=True, spared=_idle(tiles, processors) if by_itself else 0)


def _filling(
    candidates: dict[int, list[LaunchShape]],
    rows: int,
    tokens: int,
    form: Form,
    starts: Sequence[int],
    processors: int,
) -> LaunchShape:
    """Choose of the candidates the first that fills the device.

    Raises:
        KernelError: none can be launched.
    """
    tile = token_tile(tokens)
    possible = list(suiting(candidates, tile, form))
    if not possible:
        raise KernelError(f"no launch suits {rows} rows of a {form} in blocks of {tile} tokens")
    # Blocks of a second wave begin late; too few leave multiprocessors idle. Of one tile of tokens, as these numbers
    # were found.
    fewest, most, wanted = (round(share * processors) for share in FILLING)
    filling = [shape for shape in possible if fewest <= blocks_of(shape, rows, starts) <= most]
    if filling:
        like_the_first = [shape for shape in filling if replace(shape, cluster=1) == replace(filling[0], cluster=1)]
        return min(like_the_first, key=lambda shape: abs(blocks_of(shape, rows, starts) - wanted))
    return min(possible, key=lambda shape: abs(math.log2(blocks_of(shape, rows, starts) / wanted)))


def _of_values(rows: int, tokens: int, form: Form, starts: Sequence[int], processors: int) -> LaunchShape:
    """Choose the shape of a layer of 16-bit values, as measured on an H100.

    Raises:
        KernelError: no shape suits the layer.
    """
    in_order = (VALUE_SHAPES if form.sparse else DENSE_VALUE_SHAPES)[token_tile(tokens)]
    # Blocks of a second round would have the others wait for them.
    at_once = (one for one in in_order if one.fits(form) and blocks_of(one, rows, starts) <= processors * one.blocks)
    usual = next(at_once, in_order[0])
    possible = [shape for shape in (replace(usual, cluster=size) for size in CLUSTERS) if shape.fits(form)]
    if not possible:
        raise KernelError(f"no launch suits {rows} rows of a {form} in blocks of {usual.tokens} tokens")
    if usual.blocks > 1:
        # Few tokens wait for memory: there must be enough blocks to ask for all that it can bring.
        enough = [shape for shape in possible if blocks_of(shape, rows, starts) >= ENOUGH_BLOCKS * processors]
        return enough[0] if enough else possible[-1]
    room = processors * (ROOM_BESIDE_T if form.adapters else ROOM_ALONE)
    return [possible[0], *(shape for shape in possible if blocks_of(shape, rows, starts) <= room)][-1]


def _in_one_round(
    table: str, one: Measured, rows: int, tokens: int, starts: Sequence[int], form: Form, processors: int
) -> LaunchShape | None:
    """Return the shape of a measured layer for another, whose blocks must not take a second round if they took one.

    Those of an even launch never do. Layers were measured with adapters, factors beside their layers; a layer without
    adapters has no launch for t to leave room to.
    """
    shape, by_itself = one.shape, table == "layers" and not form.adapters
    blocks = blocks_of(shape, rows, starts) * -(-tokens // shape.tokens)
    if by_itself:
        shape = _by_itself(shape, blocks // shape.cluster, processors)
        blocks = blocks // one.shape.cluster * shape.cluster
    measured_blocks = blocks_of(shape, one.rows) * -(-one.tokens // shape.tokens)
    takes_all = shape.blocks == 1 and shape.tokens <= FEW_TOKENS
    enough = min(processors - processors // 2, MEASURED_PROCESSORS - measured_blocks)
    if takes_all and form.adapters and processors - blocks < enough:
        # Beside blocks that take all shared memory the launch for t finds no room: it has the other half of the device,
        # or as much of it as was left to it where they were measured.
        return None
    at_once = 1 if shape.alone else shape.blocks
    room, measured_room = processors * at_once, MEASURED_PROCESSORS * at_once
    # Blocks that run later would have the others wait for them.
    may_be_later = not (shape.alone or shape.by_memory)
    if shape.even or blocks <= room or (measured_blocks > measured_room and may_be_later):
        return shape
    if shape.alone or shape.cluster > 1 or shape.column_groups > 1 or shape.blocks > 1:
        return None
    # What that launch had left to the one for t, or on a smaller device a share that is enough for it.
    spared = max(processors - measured_blocks, processors // 8)
    return replace(shape, even=True, spared=_idle(blocks, processors) if by_itself else spared)


def _by_itself(shape: LaunchShape, tiles: int, processors: int) -> LaunchShape:
    """Return the shape of a layer's launch beside which none for t runs, whose share of the device it takes too."""
    if shape.by_memory:
        shares = max(min(processors * shape.blocks // tiles, MOST_BY_MEMORY), 1)
        return replace(shape, cluster=shares, by_memory=shares > 1)
    return replace(shape, spared=_idle(tiles, processors)) if shape.even else shape


def _idle(tiles: int, processors: int) -> int:
    """Return how many multiprocessors an even launch had best leave idle where no launch for t runs beside it.

    Blocks that have whole tiles hand nothing on.
    """
    a_block = -(-tiles // processors)
    blocks = 0 if tiles % a_block else tiles // a_block
    return processors - blocks if blocks >= WHOLE_TILES * processors else 0


def _distance(one: Measured, rows: int, columns: int) -> float:
    return abs(math.log2(one.rows / rows)) + abs(math.log2(one.columns / columns))


def _distance_beside(one: Measured, beside: int | None) -> float:
    if beside is None:
        return 0.0
    return math.inf if one.beside is None else abs(math.log2(one.beside / beside))


@cache
def measured() -> dict[str, list[Measured]]:
    """Return the shapes that were measured, of ``layers`` and of ``factors`` (for the launch that computes t)."""
    text = (files("slimc.backends.cuda") / "stream_shapes.json").read_text("utf-8")
    return {
        table: [Measured(**one | {"shape": LaunchShape(**one["shape"])}) for one in entries]
        for table, entries in json.loads(text)["measured"].items()
    }


def _of(tile: int, *rest: tuple[int, int, int, int, int, int, int]) -> list[LaunchShape]:
    """Return shapes from row tiles, row groups, column groups, blocks, columns of a slot, and slots of the rings."""
    return [
        LaunchShape(tile, row_tiles, row_groups, column_groups, 1, blocks, step, stages, inputs)
        for row_tiles, row_groups, column_groups, blocks, step, stages, inputs in rest
    ]


CANDIDATES = {
    8: _of(
        8,
        (1, 2, 1, 2, 256, 0, 0),
        (1, 2, 1, 3, 256, 0, 0),
        (1, 1, 4, 2, 256, 0, 0),
        (1, 1, 3, 3, 128, 0, 0),
        (2, 2, 1, 2, 128, 0, 0),
        (1, 2, 2, 2, 256, 0, 0),
        (1, 1, 1, 3, 256, 0, 0),
        (2, 1, 1, 2, 256, 0, 0),
        (2, 1, 2, 2, 256, 0, 0),
        (2, 1, 2, 3, 128, 0, 0),
    ),
    16: _of(
        16,
        (1, 2, 1, 2, 256, 0, 0),
        (1, 2, 1, 3, 128, 0, 0),
        (1, 1, 2, 2, 256, 0, 0),
        (1, 1, 4, 2, 128, 0, 0),
        (2, 2, 1, 2, 128, 0, 0),
        (1, 1, 1, 3, 256, 0, 0),
        (2, 1, 1, 2, 256, 0, 0),
        (2, 1, 2, 2, 256, 0, 0),
        (2, 1, 2, 2, 128, 0, 0),
    ),
    32: _of(
        32,
        (1, 2, 1, 2, 128, 0, 0),
        (2, 2, 1, 2, 128, 0, 0),
        (1, 1, 2, 2, 128, 0, 0),
        (1, 2, 1, 2, 256, 0, 0),
        (2, 1, 1, 2, 128, 0, 0),
        (1, 1, 1, 1, 256, 0, 0),
    ),
    64: _of(
        64,
        (1, 2, 1, 1, 128, 0, 0),
        (1, 1, 1, 1, 256, 0, 3),
        (1, 1, 1, 2, 128, 4, 0),
        (1, 2, 1, 1, 256, 0, 3),
        (1, 2, 1, 1, 256, 0, 0),
        (2, 1, 1, 2, 128, 0, 0),
        (2, 1, 1, 1, 128, 3, 0),
        (2, 1, 1, 1, 128, 4, 0),
        (2, 2, 1, 1, 256, 0, 3),
        (1, 4, 1, 1, 256, 0, 3),
        (1, 3, 1, 1, 256, 0, 3),
        (4, 2, 1, 1, 128, 0, 4),
    ),
    128: _of(
        128,
        (1, 2, 1, 1, 128, 0, 0),
        (1, 1, 1, 1, 256, 0, 3),
        (1, 1, 1, 2, 128, 8, 3),
        (1, 3, 1, 1, 128, 8, 3),
        (1, 3, 1, 1, 128, 8, 6),
        (1, 3, 1, 1, 128, 0, 0),
        (2, 1, 1, 1, 128, 4, 0),
        (1, 2, 1, 1, 128, 4, 0),
        (1, 4, 1, 1, 128, 4, 0),
        (2, 2, 1, 1, 128, 0, 0),
    ),
}
"""Shapes worth measuring, by the tokens of a block, those that suit most layers first; up to 32 tokens a layer of more
rows than `RULE_SHAPES` find room for takes one of them."""

RULE_SHAPES = {
    8: _of(8, (1, 1, 4, 2, 256, 0, 0), (2, 1, 2, 2, 256, 0, 0)),
    16: _of(16, (1, 1, 2, 2, 256, 0, 0), (2, 1, 2, 2, 256, 0, 0)),
    32: _of(32, (1, 1, 1, 1, 256, 0, 0), (1, 2, 1, 1, 256, 0, 0), (1, 3, 1, 1, 256, 0, 0)),
    64: _of(64, (1, 1, 1, 1, 256, 0, 3), (1, 2, 1, 1, 256, 0, 3), (1, 3, 1, 1, 256, 0, 3), (1, 4, 1, 1, 256, 0, 3)),
    128: _of(128, (1, 1, 1, 1, 256, 0, 3), (1, 2, 1, 1, 128, 0, 0), (1, 3, 1, 1, 128, 8, 6), (1, 4, 1, 1, 128, 4, 0)),
}
"""For layers unlike the measured ones, by the tokens of a block: the first whose tiles find room, or else the last."""

VALUE_SHAPES = {
    8: _of(8, (1, 2, 1, 2, 256, 0, 0)),
    16: _of(16, (1, 2, 1, 2, 256, 0, 0)),
    32: _of(32, (1, 2, 1, 2, 128, 0, 0)),
    64: _of(64, (1, 2, 1, 1, 256, 0, 0), (1, 3, 1, 1, 256, 0, 3)),
    128: _of(128, (1, 2, 1, 1, 128, 0, 0), (1, 3, 1, 1, 128, 0, 0)),
}
"""For 2:4 weights of 16-bit values: the first whose blocks run all at once, columns not divided."""

DENSE_VALUE_SHAPES = {
    **{tile: _of(tile, (1, 3, 1, 1, 128, 0, 0), (1, 2, 1, 2, 128, 0, 0)) for tile in (8, 16, 32)},
    **{tile: _of(tile, (1, 2, 1, 1, 128, 0, 0), (1, 3, 1, 1, 128, 0, 0)) for tile in (64, 128)},
}
"""The same for dense weights."""

RIGHT_CANDIDATES = {
    8: _of(8, (1, 1, 2, 3, 256, 0, 0), (1, 1, 4, 2, 128, 0, 0), (1, 1, 3, 3, 128, 0, 0)),
    16: _of(16, (1, 1, 2, 3, 256, 0, 0), (1, 1, 3, 3, 128, 0, 0), (1, 1, 2, 3, 128, 0, 0)),
    32: _of(32, (1, 2, 1, 2, 128, 3, 0), (1, 1, 2, 2, 128, 4, 0)),
    64: [
        *_of(64, (1, 2, 1, 2, 128, 2, 0), (1, 2, 1, 2, 128, 3, 0), (1, 1, 2, 2, 128, 4, 0)),
        *_of(32, (1, 2, 1, 2, 128, 3, 0), (1, 1, 2, 2, 128, 4, 0)),
    ],
    128: [
        *_of(64, (1, 2, 1, 2, 128, 2, 0), (1, 2, 1, 2, 128, 3, 0), (1, 1, 2, 2, 128, 4, 0)),
        *_of(32, (1, 2, 1, 2, 128, 3, 0), (1, 1, 2, 2, 128, 4, 0)),
    ],
}
"""Like `CANDIDATES`, for the launch that computes t: it ends sooner the more blocks there are, so they may take fewer
tokens."""


def as_entry(one: Measured) -> dict[str, object]:
    """Return an entry of the file of measured shapes."""
    left_out = (None, False)
    return {name: value for name, value in asdict(one).items() if value not in left_out}
