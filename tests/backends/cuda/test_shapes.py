"""Shapes of launches: what they take of a multiprocessor, and which one a layer gets."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slimc.backends import KERNELS
from slimc.backends.cuda import compiler, prefill, shapes, stream
from slimc.backends.cuda.layer import source
from slimc.backends.cuda.shapes import Form, LaunchShape
from slimc.backends.cuda.stream import KERNEL_NAME, defines_of
from slimc.bench import linear
from slimc.errors import KernelError
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.select import choose

LAYER = Form(sparse=True, group=0, adapters=True, dtype=torch.bfloat16)
FACTOR = Form(sparse=False, group=64, adapters=False, dtype=torch.bfloat16)
PROCESSORS = 132


def test_slots_hold_activations_and_codes_metadata_and_scales() -> None:
    shape = LaunchShape(8, 1, 2, 1, cluster=1, blocks=2, step=256)
    assert shape.rows == 128
    # 8 tokens of 256 columns in 16 bits; 128 rows of 256 columns in 3 bits.
    assert shape.input_bytes == 8 * 256 * 2
    assert shape.slot_bytes(LAYER) == 128 * 256 * 3 // 8
    # Dense codes, and 4 groups of 64 columns with a 16-bit scale a row; a multiple of 128 bytes.
    assert shape.slot_bytes(FACTOR) == 128 * 256 // 2 + 128 * 4 * 2


@pytest.mark.parametrize("tile", shapes.TOKEN_TILES)
def test_blocks_of_a_shape_fit_on_a_multiprocessor(tile: int) -> None:
    possible = list(shapes.suiting(shapes.CANDIDATES, tile, LAYER))
    assert possible
    for shape in possible:
        stages, inputs = shape.stages_of(LAYER)
        assert stages >= inputs >= 2 * shape.column_groups
        assert shape.blocks * (shape.shared_bytes(LAYER) + 1024) <= shapes.SHARED_BYTES


def test_a_ring_too_small_for_its_warpgroups_does_not_fit() -> None:
    shape = LaunchShape(8, 1, 1, 4, cluster=1, blocks=2, step=128, stages=8)
    assert shape.fits(LAYER)
    assert not replace(shape, stages=7).fits(LAYER)
    fitting = replace(shape, stages=0).stages_of(LAYER)
    assert replace(shape, stages=100).stages_of(LAYER) == fitting
    assert not replace(shape, tokens=128).fits(LAYER)


def test_blocks_of_more_threads_than_a_block_may_have_do_not_fit() -> None:
    shape = LaunchShape(32, 1, 1, 7, cluster=1, blocks=1, step=128)
    assert shape.threads <= shapes.MOST_THREADS
    assert shape.fits(LAYER)
    assert not replace(shape, column_groups=8).fits(LAYER)


def test_fewer_slots_of_activations_leave_room_for_weights() -> None:
    shape = LaunchShape(64, 1, 2, 1, cluster=1, blocks=1, step=128)
    stages, inputs = shape.stages_of(LAYER)
    assert stages == inputs
    more, three = replace(shape, inputs=3).stages_of(LAYER)
    assert three == 3
    assert more > stages
    # Weights are ahead of activations, never behind.
    assert replace(shape, stages=2, inputs=3).stages_of(LAYER) == (2, 2)


@pytest.mark.parametrize("column_groups", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [128, 256])
def test_a_slot_always_meets_the_same_warpgroup(column_groups: int, step: int) -> None:
    for tokens in shapes.TOKEN_TILES:
        for asked in range(12):
            shape = LaunchShape(tokens, 1, 1, column_groups, cluster=1, blocks=2, step=step, stages=asked)
            for inputs in (0, 3, 5):
                both = replace(shape, inputs=inputs)
                assert all(slots % column_groups == 0 for form in (LAYER, FACTOR) for slots in both.stages_of(form))


def test_blocks_that_divide_all_tiles_have_no_other_room_for_sums() -> None:
    shape = LaunchShape(64, 1, 2, 1, cluster=1, blocks=2, step=128, even=True)
    assert shape.fits(LAYER)
    assert not replace(shape, cluster=2).fits(LAYER)
    assert replace(shape, column_groups=2, even=False).fits(LAYER)
    assert not replace(shape, column_groups=2).fits(LAYER)


@pytest.mark.parametrize("rows", [4096, 22016])
def test_many_tokens_go_to_the_kernel_that_reads_weights_again(gpu: SimpleNamespace, rows: int) -> None:
    del gpu
    weight = WeightFormat(rows, 4096, 4, per_tensor=True, sparsity=NM(2, 4), dtype=torch.bfloat16)

    def chosen(tokens: int) -> object:
        return choose(KERNELS, LinearFormat(weight), torch.bfloat16, torch.device("cuda", 0), tokens)[0]

    assert [chosen(tokens) for tokens in (64, 128, 129)] == [stream.STREAM, stream.STREAM, prefill.PREFILL]


O_SHAPE, QKV_SHAPE = LaunchShape(128, 1, 1, 1, 1, 1, 256), LaunchShape(128, 1, 3, 1, 1, 1, 128)
RIGHT_SHAPE = LaunchShape(64, 1, 1, 3, 4, 1, 128)


@pytest.fixture
def two_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that o and q, k and v of Llama-2-7B were measured to be faster as two tiles of tokens."""
    now = shapes.measured()
    found = {table: [one for one in entries if one.tokens < shapes.MOST_TOKENS] for table, entries in now.items()}
    found["layers"] += [
        shapes.Measured(4096, 4096, 256, O_SHAPE, ranks=448),
        shapes.Measured(12288, 4096, 256, QKV_SHAPE, ranks=3 * 448),
    ]
    found["factors"] += [shapes.Measured(ranks, 4096, 256, RIGHT_SHAPE) for ranks in (448, 3 * 448)]
    monkeypatch.setattr(shapes, "measured", lambda: found)


def layer_format(rows: int = 4096, rank: int = 409, **changed: Any) -> LinearFormat:
    weight = {"bits": 4, "per_tensor": True, "sparsity": NM(2, 4), "dtype": torch.bfloat16} | changed
    factors = [WeightFormat(*size, 4, group=64, dtype=torch.bfloat16) for size in ((rows, rank), (rank, 4096)) if rank]
    return LinearFormat(WeightFormat(rows, 4096, **weight), *factors)


def chosen(tokens: int, *members: LinearFormat) -> object:
    widest, stack = max(members, key=lambda form: form.rows), members if len(members) > 1 else ()
    return choose(KERNELS, widest, torch.bfloat16, torch.device("cuda", 0), tokens, stack)[0]


@pytest.mark.usefixtures("two_tiles")
def test_two_tiles_of_tokens_for_the_layers_and_stacks_that_were_measured(gpu: SimpleNamespace) -> None:
    o, gate = layer_format(), layer_format(11008)
    for measured in (
        [o],
        [layer_format(per_tensor=False)],
        [o] * 3,
        *([layer_format(group=group, per_tensor=False)] * 3 for group in (128, 64)),
    ):
        assert [chosen(tokens, *measured) for tokens in (128, 129, 256)] == [stream.STREAM] * 3
        assert chosen(257, *measured) == prefill.PREFILL
    # Neither a stack of which one layer was measured, nor layers of which a stack was.
    assert shapes.pays_for_two_tiles([4096] * 3, 4096, 1344, LAYER, PROCESSORS)
    assert not shapes.pays_for_two_tiles([64] * 192, 4096, 1344, LAYER, PROCESSORS)  # blocks are two rounds
    for others in ([o] * 2, [gate] * 2, [layer_format(12288)], [layer_format(6144), layer_format(6144)]):
        assert [chosen(tokens, *others) for tokens in (128, 129)] == [stream.STREAM, prefill.PREFILL]
    gpu.multi_processor_count = PROCESSORS - 1
    assert chosen(256, o) == chosen(256, o, o, o) == prefill.PREFILL


@pytest.mark.usefixtures("gpu", "two_tiles")
@pytest.mark.parametrize(
    "form",
    [
        layer_format(rank=0),
        layer_format(rank=200),
        layer_format(rank=512),
        layer_format(group=32, per_tensor=False),
        layer_format(sparsity=None),
        replace(layer_format(), activation="int8"),
    ],
    ids=["no adapters", "half the rank", "more ranks", "groups of 32", "dense", "rounded inputs"],
)
def test_another_form_than_that_which_was_measured_takes_no_two_tiles(form: LinearFormat) -> None:
    assert chosen(128, form) == stream.STREAM
    assert chosen(256, form) == prefill.PREFILL
    assert chosen(256, layer_format(), layer_format(), form) == prefill.PREFILL


@pytest.mark.usefixtures("two_tiles")
def test_two_tiles_of_tokens_have_shapes_of_their_own() -> None:
    for tokens in (129, 256):
        assert shapes.of_layer(4096, 4096, tokens, LAYER, (), PROCESSORS) == O_SHAPE
        assert shapes.of_layer(12288, 4096, tokens, LAYER, (4096, 8192), PROCESSORS) == QKV_SHAPE
        assert shapes.of_right(448, 4096, tokens, FACTOR, PROCESSORS, 4096) == RIGHT_SHAPE
    assert shapes.of_layer(4096, 4096, 128, LAYER, (), PROCESSORS) != O_SHAPE


def test_measured_shapes_for_two_tiles_are_taken_by_the_layers_they_were_measured_with() -> None:
    measured = {(one.rows, one.columns) for one in shapes.measured()["layers"] if one.tokens == shapes.MOST_TOKENS}
    taken = set()
    for _, rows, columns in (layer for layers in linear.LAYERS.values() for layer in layers):
        # Whole units of 64 ranks.
        ranks = sum(-(-int(linear.RANK * min(one, columns)) // 64) * 64 for one in rows)
        if shapes.pays_for_two_tiles(rows, columns, ranks, LAYER, PROCESSORS):
            taken.add((sum(rows), columns))
    assert taken == measured


def test_the_launch_for_t_is_no_layer_without_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    even = LaunchShape(128, 1, 4, 1, 1, 1, 128, even=True, spared=40)
    found = [shapes.Measured(57344, 4096, 128, even)]
    monkeypatch.setattr(shapes, "measured", lambda: {"layers": found, "factors": found})
    without = replace(FACTOR, sparse=True, group=0)
    assert shapes.of_right(57344, 4096, 128, FACTOR, PROCESSORS, 57344).spared == 40
    assert shapes.of_layer(57344, 4096, 128, without, (), PROCESSORS).spared == 20


def test_blocks_of_all_tiles_of_tokens_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = LaunchShape(64, 1, 1, 2, 1, 1, 128)
    monkeypatch.setattr(shapes, "measured", lambda: {"layers": [shapes.Measured(4096, 4096, 128, shape)]})
    # 64 and 66 blocks, twice.
    assert shapes.of_layer(4096, 4096, 128, LAYER, (), PROCESSORS) == shape
    assert shapes.of_layer(66 * 64, 4096, 128, LAYER, (), PROCESSORS) == shape
    assert shapes.of_layer(67 * 64, 4096, 128, LAYER, (), PROCESSORS) != shape
    assert shapes.of_layer(67 * 64, 4096, 100, LAYER, (), 134) == shape


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> LaunchShape:
    """Pretends that nothing but gate and up of Llama-2-7B was measured, whose blocks leave 17 multiprocessors idle."""
    found = LaunchShape(64, 1, 3, 1, 1, 1, 128, apart=True)
    monkeypatch.setattr(shapes, "measured", lambda: {"layers": [shapes.Measured(22016, 4096, 64, found)]})
    return found


def test_blocks_of_a_shape_measured_in_one_round_take_no_second_in_another_layer(one_round: LaunchShape) -> None:
    found = one_round
    assert shapes.blocks_of(found, 22016) <= PROCESSORS < shapes.blocks_of(found, 27648)
    shape = shapes.of_layer(27648, 5120, 64, LAYER, (13824,), PROCESSORS)
    assert shape == replace(found, even=True, spared=PROCESSORS - shapes.blocks_of(found, 22016))
    assert shapes.of_layer(22016, 4096, 64, LAYER, (11008,), PROCESSORS) == found


@pytest.mark.parametrize(
    ("tiles", "blocks"),
    [
        (224, 112),  # two whole tiles each
        (144, 132),  # neither leaves few idle: blocks share tiles
        (132, 132),
    ],
)
def test_a_layer_without_adapters_leaves_idle_what_would_only_share_tiles(tiles: int, blocks: int) -> None:
    assert PROCESSORS - shapes._idle(tiles, PROCESSORS) == blocks


@pytest.mark.parametrize("processors", [PROCESSORS, 78])
def test_a_layer_without_adapters_leaves_no_multiprocessor_to_a_launch_for_t(processors: int) -> None:
    without = replace(LAYER, adapters=False)
    for one in shapes.measured()["layers"]:
        for rows in (one.rows, one.rows * 5 // 4):
            found = shapes.of_layer(rows, one.columns, one.tokens, without, (), processors)
            assert found.spared <= processors * (1 - shapes.WHOLE_TILES)
            assert found.even or not found.spared


@pytest.mark.usefixtures("one_round")
def test_a_layer_without_adapters_has_as_many_blocks_in_one_round_as_there_are_multiprocessors() -> None:
    without = replace(LAYER, adapters=False)
    found = shapes.of_layer(27648, 5120, 64, without, (), PROCESSORS)
    assert found == replace(shapes.of_layer(27648, 5120, 64, LAYER, (), PROCESSORS), spared=0)
    assert found.even


def test_blocks_that_share_columns_through_memory_are_more_without_a_launch_for_t(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape, without = LaunchShape(128, 1, 4, 1, 3, 1, 128, by_memory=True), replace(LAYER, adapters=False)
    monkeypatch.setattr(shapes, "measured", lambda: {"layers": [shapes.Measured(8192, 8192, 128, shape)]})
    found = {rows: shapes.of_layer(rows, 8192, 128, without, (), PROCESSORS) for rows in (6144, 8192, 11264, 16384)}
    assert [one.cluster for one in found.values()] == [4, 4, 3, 2]
    assert all(one.by_memory and shapes.blocks_of(one, rows) <= PROCESSORS for rows, one in found.items())
    # Nobody shares a tile where there are as many as multiprocessors, or more.
    assert not shapes.of_layer(16640 + 256, 8192, 128, without, (), PROCESSORS).by_memory
    # Beside a launch for t it is as measured, or not taken.
    assert shapes.of_layer(8192, 8192, 128, LAYER, (), PROCESSORS) == shape
    assert not shapes.of_layer(16384, 8192, 128, LAYER, (), PROCESSORS).by_memory


def whole_multiprocessors() -> list[shapes.Measured]:
    """What was measured of layers whose blocks, of few tokens, take all of the shared memory."""
    return [one for one in shapes.measured()["layers"] if one.tokens <= shapes.FEW_TOKENS and one.shape.blocks == 1]


def test_blocks_of_the_whole_shared_memory_take_the_whole_device_without_a_launch_for_t(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = whole_multiprocessors()
    assert whole
    for one in whole:
        monkeypatch.setattr(shapes, "measured", lambda one=one: {"layers": [one]})
        without = replace(LAYER, adapters=False)
        rows = min(one.rows * 5 // 4, PROCESSORS * one.shape.rows // one.shape.cluster)
        assert shapes.of_layer(rows, one.columns, one.tokens, without, (), PROCESSORS) == one.shape


def test_threads_that_multiply_get_registers_of_others_where_they_need_them() -> None:
    many, few = LaunchShape(128, 1, 4, 1, 1, 1, 128), LaunchShape(64, 1, 2, 1, 1, 2, 128)
    assert (many.registers, many.threads) == ((112, 32), 5 * 128)
    assert (few.registers, few.threads) == ((0, 0), 2 * 128 + 32)
    # With few tokens there is a warp more.
    assert replace(few, tokens=16).threads == 2 * 128 + 64
    for groups, (own, others) in shapes.MOVED_REGISTERS.items():
        at_the_start = shapes.REGISTERS // (128 * (groups + 1)) // 8 * 8
        assert groups * own + others <= (groups + 1) * at_the_start


def test_a_multiprocessor_has_room_for_one_block_that_is_alone_and_one_for_t() -> None:
    for stages in (2, 0):
        shape = LaunchShape(8, 1, 2, 1, cluster=1, blocks=2, step=256, stages=stages, alone=True)
        taken, other = shape.shared_bytes(LAYER) + 1024, LaunchShape(8, 1, 1, 2, 8, blocks=3, step=256)
        assert 2 * taken > shapes.SHARED_BYTES
        assert taken + other.shared_bytes(FACTOR) + 1024 <= shapes.SHARED_BYTES


def test_blocks_that_run_alone_take_no_second_round() -> None:
    alone = [one for one in shapes.measured()["layers"] if one.shape.alone and not one.shape.even]
    assert alone
    for one in alone:
        blocks = shapes.blocks_of(one.shape, one.rows)
        assert blocks <= PROCESSORS
        assert shapes.of_layer(one.rows, one.columns, one.tokens, LAYER, (), PROCESSORS) == one.shape
        other = shapes.of_layer(one.rows, one.columns, one.tokens, LAYER, (), blocks - 1)
        assert not other.alone or shapes.blocks_of(other, one.rows) < blocks


def test_blocks_of_the_whole_shared_memory_leave_to_the_launch_for_t_what_they_left_when_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = whole_multiprocessors()
    assert whole
    for one in whole:
        monkeypatch.setattr(shapes, "measured", lambda one=one: {"layers": [one]})
        assert shapes.of_layer(one.rows, one.columns, one.tokens, LAYER, (), PROCESSORS) == one.shape
        for rows in (one.rows * 5 // 4, one.rows * 3 // 2):
            assert shapes.of_layer(rows, one.columns, one.tokens, LAYER, (), PROCESSORS).blocks > 1


@pytest.mark.parametrize(
    ("layer", "processors", "most_blocks"),
    [((15360, 5120), 132, 120), ((15360, 5120), 114, 102), ((4096, 4096), 132, 66), ((4096, 4096), 114, 57)],
)
def test_so_many_blocks_of_the_whole_shared_memory_leave_enough(
    layer: tuple[int, int], processors: int, most_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = next(one for one in whole_multiprocessors() if (one.rows, one.columns, one.tokens) == (*layer, 8))
    monkeypatch.setattr(shapes, "measured", lambda: {"layers": [one]})
    most = most_blocks * one.shape.rows
    assert shapes.of_layer(most, one.columns, 8, LAYER, (), processors) == one.shape
    assert shapes.of_layer(most + 1, one.columns, 8, LAYER, (), processors) != one.shape


@pytest.mark.parametrize("adapters", [True, False])
def test_on_a_smaller_card_blocks_that_were_measured_in_one_round_take_no_second(adapters: bool) -> None:
    for one in shapes.measured()["layers"]:
        form = replace(LAYER, adapters=adapters)
        found = shapes.of_layer(one.rows, one.columns, one.tokens, form, (), 114)
        at_once, tiles = 1 if found.alone else found.blocks, -(-one.tokens // found.tokens)
        blocks = shapes.blocks_of(found, one.rows) * tiles
        if found.even or replace(found, cluster=1, by_memory=False) != replace(one.shape, cluster=1, by_memory=False):
            continue
        assert blocks <= 114 * at_once or shapes.blocks_of(one.shape, one.rows) * tiles > PROCESSORS * at_once


def test_factors_of_one_size_take_what_was_measured_beside_their_own_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [
        shapes.Measured(896, 4096, 16, LaunchShape(16, 1, 1, 2, cluster, blocks=3, step=128), beside=rows)
        for cluster, rows in ((4, 22016), (2, 28672))
    ]
    unknown = replace(measured[0], shape=replace(measured[0].shape, cluster=8), beside=None)
    for order in ([unknown, *measured], [*measured[::-1], unknown]):
        monkeypatch.setattr(shapes, "measured", lambda order=order: {"factors": order})
        found = [shapes.of_right(896, 4096, 16, FACTOR, PROCESSORS, rows) for rows in (22016, 28672, 4096, 57344)]
        assert [shape.cluster for shape in found] == [4, 2, 4, 2]


def test_layers_that_were_measured_take_what_was_measured() -> None:
    stacks = {(sum(rows), columns): rows for layers in linear.LAYERS.values() for _, rows, columns in layers}
    for one in shapes.measured()["layers"]:
        starts = [*accumulate(stacks.get((one.rows, one.columns), (one.rows,)))][:-1]
        assert shapes.of_layer(one.rows, one.columns, one.tokens, LAYER, starts, PROCESSORS) == one.shape
    for one in shapes.measured()["factors"]:
        if one.beside is not None:
            found = shapes.of_right(one.rows, one.columns, one.tokens, FACTOR, PROCESSORS, one.beside)
            assert found == one.shape


def test_measured_shapes_can_be_launched() -> None:
    measured = shapes.measured()
    assert measured["layers"]
    assert all(one.shape.fits(LAYER) for one in measured["layers"])
    assert all(one.shape.fits(FACTOR) for one in measured["factors"])
    nearest = shapes.of_layer(4096, 4096, 1, LAYER, (), PROCESSORS)
    assert nearest in [one.shape for one in measured["layers"] if (one.rows, one.columns) == (4096, 4096)]


@pytest.mark.parametrize("tokens", [1, 8, 9, 40, 64, 128, 500])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (576, 576), (57344, 8192), (17, 136), (8192, 28672)])
def test_every_layer_gets_a_shape_for_its_tokens(rows: int, columns: int, tokens: int) -> None:
    shape = shapes.of_layer(rows, columns, tokens, LAYER, (), PROCESSORS)
    assert shape.tokens == shapes.token_tile(tokens) >= min(tokens, 128)
    assert shape.fits(LAYER)
    right = shapes.of_right(64, columns, tokens, FACTOR, PROCESSORS, rows)
    assert right.tokens <= 64
    assert right.fits(FACTOR)


SMALL_LAYERS = [
    ((2048, 512, 512), 2048),
    ((2048,), 2048),
    ((8192, 8192), 2048),
    ((2048,), 8192),
    ((8960, 8960), 1536),
    ((1536,), 8960),
    ((4864, 4864), 896),
    ((896,), 4864),
    ((1024,), 8192),
    ((576,), 576),
]
"""Rows of the layers that are stacked, and columns: none is like a measured one."""


@pytest.mark.parametrize("tokens", [8, 16, 32, 64, 128])
@pytest.mark.parametrize(("rows", "columns"), SMALL_LAYERS, ids=str)
def test_blocks_of_a_layer_leave_room_to_those_of_t(rows: tuple[int, ...], columns: int, tokens: int) -> None:
    """On the card that the rule was found on, whose share for t is enough for these."""
    starts, ranks = list(accumulate(rows))[:-1], sum(-(-min(size, columns) // 640) * 64 for size in rows)
    shape = shapes.of_layer(sum(rows), columns, tokens, LAYER, starts, PROCESSORS)
    right = shapes.of_right(ranks, columns, tokens, FACTOR, PROCESSORS, sum(rows))
    blocks_of_t = shapes.blocks_of(right, ranks) * -(-tokens // right.tokens)
    taken = shapes.blocks_of(shape, sum(rows), starts) / shape.blocks + blocks_of_t / right.blocks
    assert taken <= PROCESSORS
    assert shape.cluster <= shapes.MOST_SHARES
    assert shape.cluster == 1 or columns >= shapes.FEWEST_COLUMNS_BESIDE_T * shape.cluster


@pytest.mark.parametrize("adapters", [True, False])
def test_columns_are_shared_by_more_blocks_the_more_room_they_leave(adapters: bool) -> None:
    form = replace(LAYER, adapters=adapters)
    for tokens in (8, 32, 64, 128):
        found = [shapes.of_layer(64 * tiles, 8192, tokens, form, (), PROCESSORS) for tiles in range(1, 33)]
        assert [one.cluster for one in found] == sorted((one.cluster for one in found), reverse=True)
        assert found[0].cluster == shapes.MOST_SHARES
        assert all(one.column_groups == found[0].column_groups for one in found)


@pytest.mark.parametrize("tokens", [64, 128])
def test_tiles_that_find_no_room_at_once_are_divided_evenly(tokens: int) -> None:
    largest = shapes.RULE_SHAPES[tokens][-1]
    alone = replace(LAYER, adapters=False)
    for form in (LAYER, alone):
        assert shapes.of_layer(132 * 256, 1024, tokens, form, (), PROCESSORS) == largest
    # Without t, multiprocessors that tiles leave over have no block: 240 are 120 blocks of two.
    assert shapes.of_layer(133 * 256, 1024, tokens, LAYER, (), PROCESSORS) == replace(largest, even=True)
    assert shapes.of_layer(240 * 256, 1024, tokens, alone, (), PROCESSORS) == replace(largest, even=True, spared=12)


def test_two_tiles_of_tokens_take_twice_the_room() -> None:
    assert shapes.of_layer(72 * 256, 1024, 128, LAYER, (), PROCESSORS) == shapes.RULE_SHAPES[128][-1]
    assert shapes.of_layer(72 * 256, 1024, 256, LAYER, (), PROCESSORS).even
    one, two = (shapes.of_layer(1024, 8192, tokens, LAYER, (), PROCESSORS) for tokens in (128, 256))
    assert (one.cluster, two) == (4, replace(one, cluster=2))


@pytest.mark.parametrize("tile", shapes.TOKEN_TILES)
@pytest.mark.parametrize("adapters", [True, False])
def test_kernels_of_the_rule_compile_and_their_products_overlap(
    adapters: bool, tile: int, caplog: pytest.LogCaptureFixture
) -> None:
    form = replace(LAYER, adapters=adapters)
    largest = shapes.RULE_SHAPES[tile][-1]
    in_rounds = [replace(largest, even=True)] if tile >= shapes.ROUNDS_TOKENS else []
    for shape in [*(replace(one, cluster=2) for one in shapes.RULE_SHAPES[tile]), *in_rounds]:
        assert shape.fits(form)
        with caplog.at_level(logging.DEBUG, compiler.__name__):
            defines = defines_of(shape, form)
            compiler.compile_source(source("stream.cu"), name=KERNEL_NAME, arch="sm_90a", defines=defines)
    assert "serialized" not in caplog.text


def test_no_block_holds_rows_of_two_layers() -> None:
    shape = LaunchShape(8, 1, 3, 1, cluster=2, blocks=1, step=128)
    assert shape.rows == 192
    # 256, 512 and 300 rows: each begins a block of its own.
    assert shapes.first_blocks(shape, 1068, (256, 768)) == [2, 5, 7]
    assert shapes.blocks_of(shape, 1068, (256, 768)) == 14
    assert shapes.blocks_of(shape, 1068) == 12
    assert shapes.of_layer(1068, 4096, 1, LAYER, (256, 768), PROCESSORS).fits(LAYER)


def test_a_form_without_room_for_two_slots_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHARED_BYTES", 16 << 10)
    with pytest.raises(KernelError, match="no launch suits 1024 rows"):
        shapes.of_layer(1024, 4096, 128, LAYER, (), PROCESSORS)


ONE_AFTER_ANOTHER = {(1088, 8192, 16), (832, 8192, 256)}
"""Ranks, columns and tokens where t's few products wait for each other, and took the least time so."""


@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize("sparse", [True, False])
def test_kernels_for_values_compile_and_their_products_overlap(
    sparse: bool, tile: int, caplog: pytest.LogCaptureFixture
) -> None:
    form = Form(sparse, 0, adapters=True, dtype=torch.bfloat16, values=True)
    for shape in (shapes.VALUE_SHAPES if sparse else shapes.DENSE_VALUE_SHAPES)[tile]:
        assert shape.fits(form)
        with caplog.at_level(logging.DEBUG, compiler.__name__):
            compiler.compile_source(
                source("stream.cu"), name=KERNEL_NAME, arch="sm_90a", defines=defines_of(shape, form)
            )
    assert "serialized" not in caplog.text


def test_blocks_of_values_run_at_once() -> None:
    def blocks(rows: int, tokens: int, adapters: bool = True) -> float:
        form = Form(True, 0, adapters, torch.bfloat16, values=True)
        shape = shapes.of_layer(rows, 4096, tokens, form, (), 132)
        return shapes.blocks_of(shape, rows) / (132 * shape.blocks)

    # 18944 rows are 148 blocks of 128, or 99 of 192; 4096 are 32, whose columns two share, three where there is no t.
    assert blocks(18944, 128) == 99 / 132
    assert blocks(4096, 128) == 64 / 132
    assert blocks(4096, 128, adapters=False) == 96 / 132
    # Few tokens: enough blocks for the bandwidth of the memory.
    assert blocks(4096, 1) == 128 / 264


@pytest.mark.parametrize("tokens", [*shapes.TOKEN_TILES, shapes.MOST_TOKENS])
@pytest.mark.parametrize(("table", "form"), [("layers", LAYER), ("factors", FACTOR)], ids=["layers", "factors"])
def test_measured_kernels_compile_and_their_products_overlap(
    table: str, form: Form, tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    found = [one for one in shapes.measured()[table] if one.tokens == tokens]
    assert found
    for one in {tuple(defines_of(one.shape, form).items()): one for one in found}.values():
        caplog.clear()
        with caplog.at_level(logging.DEBUG, compiler.__name__):
            cubin = compiler.compile_source(
                source("stream.cu"), name=KERNEL_NAME, arch="sm_90a", defines=defines_of(one.shape, form)
            )
        assert cubin.startswith(b"\x7fELF")
        may_wait = form is FACTOR and (one.rows, one.columns, one.tokens) in ONE_AFTER_ANOTHER
        assert ("serialized" in caplog.text) == may_wait, one


def test_every_measured_layer_has_a_factor_that_was_measured_beside_it() -> None:
    layers, factors = (shapes.measured()[table] for table in ("layers", "factors"))
    beside = {(one.beside, one.columns, one.tokens): one.in_step for one in factors}
    assert len(beside) == len(factors)
    assert {(one.rows, one.columns, one.tokens): one.in_step for one in layers} == beside


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sparse", "group", "adapters"), [(True, 64, True), (True, 128, False), (False, 0, True)])
def test_every_form_compiles(sparse: bool, group: int, adapters: bool, dtype: torch.dtype) -> None:
    form = Form(sparse, group, adapters, dtype)
    shape = shapes.of_layer(4096, 4096, 1, form, (), PROCESSORS)
    defines = defines_of(shape, form)
    assert compiler.compile_source(source("stream.cu"), name=KERNEL_NAME, arch="sm_90a", defines=defines)
