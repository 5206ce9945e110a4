"""The kernel that streams weights on Hopper, against the product with the decoded weight in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends import KERNELS
from slimc.backends.cuda import shapes, stream
from slimc.backends.cuda.layer import prepare, stack
from slimc.backends.cuda.prefill import PREFILL
from slimc.backends.cuda.shapes import LaunchShape
from slimc.backends.cuda.stream import STREAM, Plan, launch, make_plan
from slimc.bench.unwritten import into_nans
from slimc.runtime.modules import SlimLinear, explain
from slimc.runtime.packing import PackedLinear
from slimc.runtime.prepared import sibling_layers


def run(packed: PackedLinear, x: Tensor, bias: Tensor | None = None, shape: LaunchShape | None = None) -> Tensor:
    """Run the kernel in memory that holds NaN before, too, and return the result, which must not change."""
    layer = prepare(packed)
    return into_nans(launch, make_plan(layer, x.dtype, len(x), shape), x, layer, bias)


def sharing(plan: Plan) -> dict[str, int]:
    """Return how many blocks hand over sums of y and of t as float16, as `exact_product` takes it."""
    shapes_of = {"blocks": plan.main.shape} | ({"blocks_of_t": plan.right.shape} if plan.right else {})
    return {name: shape.cluster for name, shape in shapes_of.items() if shape.by_memory}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [*range(1, 18), 31, 33, 63, 64, 65, 127, 128, 129, 200, 255, 256])
def test_numbers_of_tokens(random_layer: Any, check: Any, tokens: int, dtype: torch.dtype) -> None:
    packed = random_layer(256, 640, 57, dtype=dtype)
    x, bias = torch.randn(tokens, 640, dtype=dtype, device="cuda"), torch.randn(256, dtype=dtype, device="cuda")
    shape = make_plan(prepare(packed), dtype, tokens).main.shape
    for blocks in (shape.cluster, 3):
        check(packed, x, bias, run(packed, x, bias, replace(shape, cluster=blocks)))


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(16, 128, 0), (1, 8, 0), (17, 136, 1), (1000, 4088, 57), (4096, 4096, 409), (4096, 11008, 409), (24000, 1024, 64)],
)
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_tails_of_rows_columns_and_ranks(
    random_layer: Any, check: Any, rows: int, columns: int, rank: int, tokens: int
) -> None:
    packed = random_layer(rows, columns, rank)
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    check(packed, x, None, run(packed, x))


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [
        (4096, 4096, 409),
        (4096, 11008, 409),
        (22016, 4096, 409),
        (5120, 5120, 512),
        (15360, 5120, 512),
        (5120, 13824, 512),
        (8192, 8192, 819),
    ],
)
@pytest.mark.parametrize("tokens", [1, 16, 32, 64, 128, 256])
def test_layers_of_a_models_size(
    exact_layer: Any, check_exactly: Any, rows: int, columns: int, rank: int, tokens: int
) -> None:
    packed, x = exact_layer(rows, columns, rank), torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    plan = make_plan(prepare(packed), x.dtype, tokens)
    check_exactly(packed, x, None, run(packed, x), **sharing(plan))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("group", "per_tensor"), [(None, True), (None, False), (32, False), (64, False), (128, False)])
@pytest.mark.parametrize("tokens", [5, 48, 128, 256])
def test_scales_and_forms(
    random_layer: Any, check: Any, tokens: int, group: int | None, per_tensor: bool, sparse: bool
) -> None:
    packed = random_layer(160, 1344, 130, group=group, per_tensor=per_tensor, sparse=sparse)
    x = torch.randn(tokens, 1344, dtype=torch.bfloat16, device="cuda")
    shape = make_plan(prepare(packed), x.dtype, tokens).main.shape
    for blocks in (shape.cluster, 2):
        check(packed, x, None, run(packed, x, None, replace(shape, cluster=blocks)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "sparse"), [(0, True), (130, True), (130, False)])
@pytest.mark.parametrize("tokens", [1, 5, 16, 32, 48, 128, 256])
def test_values(random_layer: Any, check: Any, tokens: int, rank: int, sparse: bool, dtype: torch.dtype) -> None:
    packed = random_layer(600, 1352, rank, bits=None, sparse=sparse, dtype=dtype)
    x, bias = (torch.randn(*shape, dtype=dtype, device="cuda") for shape in ((tokens, 1352), (600,)))
    check(packed, x, bias, run(packed, x, bias))


@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize("tile", shapes.TOKEN_TILES)
def test_shapes_of_a_launch(random_layer: Any, check: Any, tile: int, bits: int | None) -> None:
    packed = random_layer(600, 1344, 130, bits=bits)
    form = shapes.Form(True, 0, True, torch.bfloat16, values=bits is None)
    x = torch.randn(tile - 3, 1344, dtype=torch.bfloat16, device="cuda")
    for shape in shapes.suiting({tile: [*shapes.CANDIDATES[tile], *shapes.RULE_SHAPES[tile]]}, tile, form):
        check(packed, x, None, run(packed, x, None, shape))


SHAPES = [
    LaunchShape(8, 1, 3, 1, 6, 2, 256, inputs=2),
    LaunchShape(64, 1, 2, 1, 1, 1, 128, inputs=4),
    LaunchShape(64, 1, 1, 2, 2, 1, 256, inputs=4),
    LaunchShape(64, 1, 3, 1, 3, 1, 128, stages=7, inputs=3),
    LaunchShape(128, 1, 3, 1, 2, 1, 128, inputs=2),
    LaunchShape(8, 1, 2, 1, 1, 2, 256, even=True, spared=130),
    LaunchShape(8, 1, 1, 4, 2, 2, 256, alone=True),
    LaunchShape(16, 1, 1, 2, 2, 2, 256, alone=True),
    LaunchShape(16, 2, 2, 1, 1, 2, 256, alone=True, even=True, spared=130),
    LaunchShape(64, 1, 4, 1, 1, 1, 256, inputs=3, even=True, spared=127),
    LaunchShape(128, 1, 4, 1, 1, 1, 128, even=True, spared=128),
    LaunchShape(128, 2, 2, 1, 1, 1, 128, even=True, spared=127),
    LaunchShape(64, 1, 4, 1, 1, 1, 128, even=True),
    LaunchShape(128, 1, 3, 1, 1, 1, 128, even=True, spared=126),
    LaunchShape(64, 1, 2, 1, 1, 1, 256, inputs=3, apart=True),
    LaunchShape(64, 1, 1, 2, 2, 1, 256, inputs=4, apart=True),
    LaunchShape(64, 1, 2, 1, 1, 1, 256, inputs=3, even=True, spared=129, apart=True),
    LaunchShape(64, 4, 2, 1, 1, 1, 128, apart=True),
    LaunchShape(64, 1, 2, 2, 1, 1, 256, inputs=4, apart=True),
    LaunchShape(128, 2, 1, 2, 1, 1, 128, apart=True),
    LaunchShape(128, 1, 1, 2, 2, 1, 128, apart=True),
    LaunchShape(64, 1, 4, 1, 3, 1, 128),
    LaunchShape(64, 3, 2, 1, 5, 1, 256, inputs=3),
    LaunchShape(8, 2, 1, 2, 2, 2, 256, alone=True, window=3, turn=1),
    LaunchShape(8, 1, 1, 4, 1, 1, 256, inputs=8, turn=5),
    LaunchShape(16, 1, 1, 2, 1, 3, 256, window=2, turn=3),
    LaunchShape(16, 1, 2, 1, 1, 2, 256, even=True, spared=130, alone=True, window=2, turn=2),
    LaunchShape(64, 1, 2, 1, 1, 1, 128, stages=8, inputs=6, window=4, turn=7),
    LaunchShape(32, 1, 2, 1, 4, 2, 128, by_memory=True),
    LaunchShape(64, 1, 4, 1, 3, 1, 256, inputs=3, by_memory=True),
    LaunchShape(64, 1, 2, 1, 4, 2, 128, by_memory=True, turn=2),
    LaunchShape(128, 1, 3, 1, 2, 1, 128, apart=True, by_memory=True),
    LaunchShape(128, 2, 2, 1, 3, 1, 128, apart=True, by_memory=True),
    LaunchShape(128, 1, 4, 1, 4, 1, 256, inputs=2, window=2, by_memory=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rings_and_clusters(random_layer: Any, check: Any, shape: LaunchShape) -> None:
    for columns in (1344, 1352):
        packed = random_layer(600, columns, 130)
        x = torch.randn(shape.tokens + 5, columns, dtype=torch.bfloat16, device="cuda")
        check(packed, x, None, run(packed, x, None, shape))
    parts = [random_layer(rows, 640, rank) for rows, rank in ((512, 57), (256, 130), (300, 20))]
    layer = stack([prepare(part) for part in parts])
    x = torch.randn(shape.tokens, 640, dtype=torch.bfloat16, device="cuda")
    right = LaunchShape(min(shape.tokens, 64), 1, 1, 2, 2, 2, 128, 4, window=shape.window, turn=shape.turn)
    y = launch(make_plan(layer, x.dtype, len(x), shape, right), x, layer, None)
    for part, rows in zip(parts, (slice(512), slice(512, 768), slice(768, 1068)), strict=True):
        check(part, x, None, y[:, rows])


@pytest.mark.parametrize("shape", [one for one in SHAPES if one.by_memory], ids=str)
def test_blocks_that_share_a_tile_through_memory_need_not_wait_for_each_other(
    random_layer: Any, check: Any, shape: LaunchShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = stream.source("stream.cu")
    parts = [random_layer(rows, 640, rank) for rows, rank in ((512, 57), (256, 130), (300, 20))]
    sizes = ((600, 1344, 130), (600, 1344, 0), (4096, 4096, 409), (16, 128, 0))
    packed = [random_layer(*size) for size in sizes]
    layers = [stack([prepare(part) for part in parts]), *map(prepare, packed)]
    # As many tokens as a tile has, but for some, and then of two tiles.
    inputs = [
        torch.randn(tokens, layer.format.columns, dtype=torch.bfloat16, device="cuda")
        for layer in layers
        for tokens in (shape.tokens - 1, shape.tokens + 5)
    ]
    found: dict[int, list[Tensor]] = {}
    for patience in (0, 1000):
        monkeypatch.setattr(stream, "source", lambda _name, most=patience: f"#define PATIENCE {most}\n{text}")
        found[patience] = [
            launch(make_plan(layer, x.dtype, len(x), shape), x, layer, None)
            for layer, x in zip([layer for layer in layers for _ in range(2)], inputs, strict=True)
        ]
    # Who adds up makes no difference, not in a bit.
    assert all(map(torch.equal, found[0], found[1000]))
    for one, x, y in zip([one for one in packed for _ in range(2)], inputs[2:], found[0][2:], strict=True):
        check(one, x, None, y)
    for x, y in zip(inputs[:2], found[0][:2], strict=True):
        for part, rows in zip(parts, (slice(512), slice(512, 768), slice(768, 1068)), strict=True):
            check(part, x, None, y[:, rows])


@pytest.mark.parametrize("shape", [one for one in SHAPES if one.by_memory], ids=str)
def test_sums_of_layers_in_float16_are_handed_over_in_float32(
    random_layer: Any, check: Any, shape: LaunchShape
) -> None:
    packed = random_layer(600, 1352, 130, dtype=torch.float16)
    x = torch.randn(shape.tokens + 5, 1352, dtype=torch.float16, device="cuda")
    check(packed, x, None, run(packed, x, None, shape))


@pytest.mark.parametrize("shape", [one for one in SHAPES if one.by_memory], ids=str)
def test_tokens_of_any_size_leave_the_sums_of_others_as_they_are(
    exact_layer: Any, check_exactly: Any, shape: LaunchShape
) -> None:
    """Blocks hand over sums of many tokens with one exponent, of the largest that is finite."""
    packed = exact_layer(600, 1344)
    layer, x = prepare(packed), torch.randn(shape.tokens, 1344, dtype=torch.bfloat16, device="cuda")
    plan, expected = make_plan(layer, x.dtype, len(x), shape), run(packed, x, None, shape)
    check_exactly(packed, x, None, expected, **sharing(plan))
    others = [token for token in range(shape.tokens) if token % 8 != 3]
    infinite = torch.zeros_like(x[3::8])
    infinite[:, ::300] = torch.inf  # few of them in a block: many add up to none
    for loud in (x[3::8] * 2.0**12, infinite, infinite * torch.nan):
        given = x.clone()
        given[3::8] = loud
        found = launch(plan, given, layer, None)
        assert torch.equal(found[others], expected[others])
        assert loud is not infinite or bool(found[3::8].isinf().any())
    # Where float16's exponent alone would not do, and where the power of two comes to its end.
    for factor in (2.0**-100, 2.0**-112):
        check_exactly(packed, x * factor, None, run(packed, x * factor, None, shape), **sharing(plan))


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (4096, LaunchShape(64, 1, 4, 1, 4, 1, 128, by_memory=True)),
        (8192, LaunchShape(64, 1, 1, 1, 1, 1, 128, even=True, spared=30)),
    ],
    ids=["through memory", "handed on"],
)
def test_launches_of_two_streams_whose_blocks_share_tiles_do_not_wait_for_ever(
    random_layer: Any, rows: int, shape: LaunchShape
) -> None:
    layers = [prepare(random_layer(rows, 4096, 409 - one)) for one in range(2)]
    x = torch.randn(64, 4096, dtype=torch.bfloat16, device="cuda")
    plans = [make_plan(layer, x.dtype, 64, shape) for layer in layers]
    expected = [launch(plan, x, layer, None) for layer, plan in zip(layers, plans, strict=True)]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in layers], []
    for _ in range(100):
        for layer, plan, one in zip(layers, plans, streams, strict=True):
            with torch.cuda.stream(one):
                results.append(launch(plan, x, layer, None))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[index % 2]) for index, y in enumerate(results))


def test_blocks_with_nothing_to_multiply_wait_for_the_launches_before(
    random_layer: Any, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = LaunchShape(64, 1, 2, 1, 4, 1, 128, by_memory=True)
    # Four long blocks; then as many for two slots of W and two of L, the first of which has none of either.
    packed = [random_layer(128, 1 << 17), random_layer(128, 256, 256)]
    layers = [prepare(one) for one in packed]
    inputs = [torch.randn(64, one.format.columns, dtype=torch.bfloat16, device="cuda") for one in packed]
    plans = [make_plan(layer, torch.bfloat16, 64, shape) for layer in layers]
    assert [plan.main.grid for plan in plans] == [4, 4]
    memory = torch.empty(max(plan.main.grid * plan.main.part_bytes for plan in plans) // 4, device="cuda")
    # As the allocator does, which takes what a launch has freed for the next one.
    monkeypatch.setattr(torch, "empty", lambda count, **_options: memory[:count])
    for _ in range(20):
        torch.cuda._sleep(1 << 20)  # so that all launches below are there before the first begins
        results = [launch(plan, x, layer, None) for plan, x, layer in zip(plans, inputs, layers, strict=True)]
        for one, x, y in zip(packed, inputs, results, strict=True):
            check(one, x, None, y)


def test_blocks_of_the_launch_for_t_may_share_tiles_through_memory_too(random_layer: Any, check: Any) -> None:
    shape = LaunchShape(64, 1, 2, 1, 4, 1, 128, by_memory=True)
    packed = random_layer(128, 1 << 15, 64)
    layer, x = prepare(packed), torch.randn(64, 1 << 15, dtype=torch.bfloat16, device="cuda")
    plan = make_plan(layer, x.dtype, 64, shape, shape)
    assert plan.right is not None
    assert plan.right.sharing is not None
    for _ in range(20):
        torch.cuda._sleep(1 << 20)
        check(packed, x, None, launch(plan, x, layer, None))


def test_a_layer_chooses_it_and_takes_views_that_begin_anywhere(random_layer: Any, check: Any) -> None:
    packed = random_layer(256, 640, 57)
    layer = SlimLinear(packed, kernels=KERNELS)
    assert layer.choices()[0].kernel is STREAM
    x = torch.randn(641, dtype=torch.bfloat16, device="cuda")[1:]
    check(packed, x[None], None, layer(x[None]))


@pytest.mark.parametrize("tokens", [1, 16, 64, 256])
def test_layers_after_one_another_in_a_graph_do_not_meet(random_layer: Any, tokens: int) -> None:
    layers = [prepare(random_layer(4096, 4096, 409 - one)) for one in range(3)]
    x = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda") / 64
    plans = [make_plan(layer, x.dtype, tokens) for layer in layers]

    def chain() -> Tensor:
        y = x
        for _ in range(8):
            for layer, plan in zip(layers, plans, strict=True):
                y = torch.nn.functional.normalize(launch(plan, y, layer, None).float()).to(x.dtype)
        return y

    expected = chain()
    assert bool(expected.isfinite().all())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(20):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (4096, LaunchShape(128, 1, 4, 1, 4, 1, 256, by_memory=True)),
        (12288, LaunchShape(128, 1, 3, 1, 1, 1, 256, even=True, spared=76)),
        (4096, LaunchShape(128, 1, 4, 1, 7, 1, 256)),
        (12288, LaunchShape(128, 1, 3, 1, 1, 1, 256, inputs=2)),
    ],
)
def test_no_weights_come_before_those_of_their_slot_are_read(random_layer: Any, rows: int, shape: LaunchShape) -> None:
    """Products keep shared memory busy, loads from it wait, and a warp of its own fills a slot once it is released."""
    layers = [prepare(random_layer(rows, 4096, 409)) for _ in range(2)]
    x = torch.randn(128, 4096, dtype=torch.bfloat16, device="cuda")
    right = LaunchShape(64, 1, 1, 3, 3, 1, 128)

    def calls(shape: LaunchShape) -> list[Tensor]:
        plans = [make_plan(layer, x.dtype, 128, shape, right) for layer in layers]
        return [launch(plan, x, layer, None) for plan, layer in zip(plans, layers, strict=True)]

    # Who brings what is added up does not change in which order it is.
    expected, apart = calls(shape), replace(shape, apart=True)
    assert all(map(torch.equal, calls(apart), expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [*calls(apart), *calls(apart)]
    for _ in range(20):
        graph.replay()
        assert all(map(torch.equal, found, expected * 2))


def test_launches_back_to_back_give_the_same_results(random_layer: Any) -> None:
    layers = [prepare(random_layer(4096, 4096, 409 - one)) for one in range(4)]
    x = torch.randn(1, 4096, dtype=torch.bfloat16, device="cuda")
    plans = [make_plan(layer, x.dtype, 1) for layer in layers]
    expected = [launch(plan, x, layer, None) for layer, plan in zip(layers, plans, strict=True)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [launch(plan, x, layer, None) for layer, plan in zip(layers * 5, plans * 5, strict=True)]
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(captured, expected * 5, strict=True))


@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 256])
@pytest.mark.parametrize("ranks", [(57, 57), (130, 20), (20, 130), (0, 0)])
def test_stacked_layers_keep_their_own_adapters(
    random_layer: Any, check: Any, ranks: tuple[int, int], tokens: int
) -> None:
    parts = [random_layer(rows, 640, rank) for rows, rank in zip((512, 300), ranks, strict=True)]
    layer = stack([prepare(part) for part in parts])
    x, bias = (torch.randn(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((tokens, 640), (812,)))
    y = launch(make_plan(layer, x.dtype, tokens), x, layer, bias)
    check(parts[0], x, bias[:512], y[:, :512])
    check(parts[1], x, bias[512:], y[:, 512:])


@pytest.mark.parametrize("ranks", [(57, 57, 57), (130, 20, 64), (20, 130, 57)])
@pytest.mark.parametrize(
    ("tokens", "shape"),
    [*((tokens, None) for tokens in (1, 16, 64, 128, 256)), *((one.tokens, one) for one in SHAPES if one.step == 256)],
    ids=str,
)
def test_ranks_of_others_in_a_stack_are_not_read(
    check_neighbours: Any, tokens: int, shape: LaunchShape | None, ranks: tuple[int, ...]
) -> None:
    """A slot of 256 columns holds two units of ranks; of an odd number of them, the last is followed by the next's."""
    check_neighbours(ranks, tokens, lambda x, layer: launch(make_plan(layer, x.dtype, tokens, shape), x, layer, None))


@pytest.mark.parametrize("tokens", [129, 193, 256])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ((4096,) * 3, 4096),
        ((4096,), 4096),
        ((4096,), 11008),
        ((5120,) * 3, 5120),
        ((5120,), 5120),
        ((8192, 1024, 1024), 8192),
        ((8192,), 8192),
    ],
)
def test_each_tile_of_tokens_is_computed_as_by_itself(
    random_layer: Any, rows: tuple[int, ...], columns: int, tokens: int
) -> None:
    ranks = [min(count, columns) // 10 - place for place, count in enumerate(rows)]
    parts = [prepare(random_layer(count, columns, rank)) for count, rank in zip(rows, ranks, strict=True)]
    layer = stack(parts) if len(parts) > 1 else parts[0]
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    plan = make_plan(layer, x.dtype, tokens)
    assert plan.right is not None
    # An even launch divides the slots of all tiles: how many there are decides in which order they are added up.
    pair = [replace(one.shape, even=False) for one in (plan.main, plan.right)]
    halves = [launch(make_plan(layer, x.dtype, len(half), *pair), half, layer, None) for half in x.split(128)]
    whole, expected = make_plan(layer, x.dtype, tokens, *pair), torch.cat(halves)
    for _ in range(20):
        assert torch.equal(launch(whole, x, layer, None), expected)


def test_layers_and_stacks_choose_by_all_of_their_rows(random_layer: Any, check: Any) -> None:
    packed = [random_layer(4096, 4096, rank) for rank in (409, 400, 390)]
    model = torch.nn.ModuleDict(
        {name: SlimLinear(one, kernels=KERNELS) for name, one in zip("qkv", packed, strict=True)}
    )
    layers = sibling_layers([layer._handle for layer in model.values()])
    assert layers.prepare()
    x = torch.randn(256, 4096, dtype=torch.bfloat16, device="cuda")
    for tokens in (128, 256, 257):
        given = torch.cat([x, x])[:tokens]
        y = layers(given)
        for one, layer, part in zip(packed, model.values(), y.split(4096, 1), strict=True):
            check(one, given, None, part)
            check(one, given, None, layer(given))
    processors = torch.cuda.get_device_properties().multi_processor_count
    form = shapes.Form(True, 0, True, torch.bfloat16)
    for name, rows in (("q", [4096]), ("q + k + v", [4096] * 3)):
        pays = shapes.pays_for_two_tiles(rows, 4096, 448 * len(rows), form, processors)
        choice = next(one for one in explain(model)[name] if one.last_tokens is None or one.last_tokens >= 256)
        assert choice.kernel is (STREAM if pays else PREFILL)
