"""The kernels for Hopper, against the product with the decoded weight in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends import KERNELS
from slimc.backends.cuda.hopper import HOPPER, LaunchShape, launch, make_plan
from slimc.backends.cuda.layer import prepare, stack
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear


def run(packed: PackedLinear, x: Tensor, bias: Tensor | None = None, shape: LaunchShape | None = None) -> Tensor:
    """Run three times, into memory that holds NaN before, and return the result, which must not change."""
    layer = prepare(packed)
    plan = make_plan(layer, x.dtype, len(x), shape)
    results = []
    for _ in range(3):
        poison = torch.full((len(x), packed.format.rows), float("nan"), dtype=x.dtype, device=x.device)
        del poison
        results.append(launch(plan, x, layer, bias))
    assert all(torch.equal(results[0], other) for other in results[1:])
    return results[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 300])
def test_numbers_of_tokens(random_layer: Any, check: Any, tokens: int, dtype: torch.dtype) -> None:
    packed = random_layer(256, 640, 57, dtype=dtype)
    x, bias = torch.randn(tokens, 640, dtype=dtype, device="cuda"), torch.randn(256, dtype=dtype, device="cuda")
    check(packed, x, bias, run(packed, x, bias))


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(16, 128, 0), (1, 8, 0), (17, 136, 1), (1000, 4088, 57), (4096, 4096, 409), (4096, 11008, 409), (24000, 1024, 64)],
)
@pytest.mark.parametrize("tokens", [16, 64, 200])
def test_tails_of_rows_columns_and_ranks(
    random_layer: Any, check: Any, rows: int, columns: int, rank: int, tokens: int
) -> None:
    packed = random_layer(rows, columns, rank)
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    check(packed, x, None, run(packed, x))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("group", "per_tensor"), [(None, True), (None, False), (64, False), (128, False)])
@pytest.mark.parametrize("tokens", [48, 256])
def test_scales_and_forms(
    random_layer: Any, check: Any, tokens: int, group: int | None, per_tensor: bool, sparse: bool
) -> None:
    packed = random_layer(160, 1344, 130, group=group, per_tensor=per_tensor, sparse=sparse)
    x = torch.randn(tokens, 1344, dtype=torch.bfloat16, device="cuda")
    check(packed, x, None, run(packed, x))


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize(("tile", "row_tiles", "blocks"), [(16, 1, 2), (32, 2, 2), (64, 1, 2), (64, 2, 1), (128, 2, 1)])
def test_shapes_of_a_launch(
    random_layer: Any, check: Any, tile: int, row_tiles: int, blocks: int, cluster: int
) -> None:
    packed = random_layer(600, 1344, 130)
    x = torch.randn(tile - 3, 1344, dtype=torch.bfloat16, device="cuda")
    check(packed, x, None, run(packed, x, None, LaunchShape(tile, row_tiles, 2, cluster, blocks)))


def test_a_layer_chooses_it_and_takes_views_that_begin_anywhere(random_layer: Any, check: Any) -> None:
    packed = random_layer(256, 640, 57)
    layer = SlimLinear(packed, kernels=KERNELS)
    assert HOPPER in [choice.kernel for choice in layer.choices()]
    x = torch.randn(20 * 640 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(20, 640)
    check(packed, x, None, layer(x))


def test_a_captured_graph_replays_the_same_result(random_layer: Any) -> None:
    packed = random_layer(2048, 2048, 204)
    layer = SlimLinear(packed, kernels=KERNELS)
    x = torch.randn(40, 2048, dtype=torch.bfloat16, device="cuda")
    expected = layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            captured = layer(x)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("tokens", [16, 64, 200])
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
