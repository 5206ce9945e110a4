"""The CUDA kernel for few tokens, against the product with the decoded weight in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends import KERNELS
from slimc.backends.cuda import decode
from slimc.backends.cuda.decode import DECODE, launch, make_plan
from slimc.backends.cuda.layer import prepare, stack
from slimc.backends.cuda.stream import STREAM
from slimc.bench.unwritten import into_nans
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear


def run(packed: PackedLinear, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run the kernel in memory that holds NaN before, too, and return the result, which must not change."""
    layer = prepare(packed)
    return into_nans(launch, make_plan(layer, x.dtype, len(x)), x, layer, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", range(1, 18))
def test_every_number_of_tokens(random_layer: Any, check: Any, tokens: int, dtype: torch.dtype) -> None:
    packed = random_layer(256, 640, 57, dtype=dtype)
    x, bias = torch.randn(tokens, 640, dtype=dtype, device="cuda"), torch.randn(256, dtype=dtype, device="cuda")
    check(packed, x, bias, run(packed, x, bias))


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(16, 128, 0), (1, 8, 0), (17, 136, 1), (1000, 4088, 57), (4096, 4096, 409), (4096, 11008, 409), (8192, 28672, 64)],
)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_tails_of_rows_columns_and_ranks(
    random_layer: Any, check: Any, rows: int, columns: int, rank: int, tokens: int
) -> None:
    packed = random_layer(rows, columns, rank)
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    check(packed, x, None, run(packed, x))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(4096, 4096, 409), (4096, 11008, 409)])
@pytest.mark.parametrize("tokens", [1, 16])
def test_layers_of_a_models_size(
    exact_layer: Any, check_exactly: Any, rows: int, columns: int, rank: int, tokens: int
) -> None:
    packed, x = exact_layer(rows, columns, rank), torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    check_exactly(packed, x, None, run(packed, x))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("group", "per_tensor"), [(None, True), (None, False), (32, False), (64, False), (128, False)])
def test_scales_and_forms(random_layer: Any, check: Any, group: int | None, per_tensor: bool, sparse: bool) -> None:
    packed = random_layer(160, 1344, 130, group=group, per_tensor=per_tensor, sparse=sparse)
    x = torch.randn(5, 1344, dtype=torch.bfloat16, device="cuda")
    check(packed, x, None, run(packed, x))


@pytest.mark.parametrize("available", [162 << 10, 98 << 10], ids=["as on an A100", "as on an L4"])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(300, 4096, 409), (300, 11008, 409), (6400, 8192, 64)])
@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 16])
def test_cards_with_less_shared_memory(
    random_layer: Any, check: Any, monkeypatch: pytest.MonkeyPatch,
    rows: int, columns: int, rank: int, tokens: int, available: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(decode, "available_shared", lambda _device: available)
    packed = random_layer(rows, columns, rank)
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    # Pieces of x that are 16 warps wide find no room, if they hold more than 8 tokens of an L4's.
    threads = make_plan(prepare(packed), x.dtype, tokens).threads
    assert threads == (256 if available < 100 << 10 and tokens > 8 else 512)
    check(packed, x, None, run(packed, x))


def test_a_layer_chooses_it_and_takes_views_that_begin_anywhere(random_layer: Any, check: Any) -> None:
    packed = random_layer(256, 640, 57)
    layer = SlimLinear(packed, kernels=KERNELS)
    # On Hopper another kernel comes first, which must take such views as well.
    assert layer.choices()[0].kernel is (STREAM if torch.cuda.get_device_capability()[0] == 9 else DECODE)
    x = torch.randn(641, dtype=torch.bfloat16, device="cuda")[1:]
    check(packed, x[None], None, layer(x[None]))
    check(packed, x[None], None, DECODE.run(x[None], prepare(packed), None))


def test_a_captured_graph_and_another_stream_do_not_meet(random_layer: Any) -> None:
    packed = random_layer(2048, 2048, 204)
    layer = SlimLinear(packed, kernels=KERNELS)
    x = torch.randn(1, 2048, dtype=torch.bfloat16, device="cuda")
    expected = layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            captured = layer(x)
    others = [torch.cuda.Stream() for _ in range(2)]
    results: list[Tensor] = []
    for _ in range(10):
        graph.replay()
        for stream in others:
            with torch.cuda.stream(stream):
                results.extend(layer(x) for _ in range(20))
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("tokens", [1, 5, 16])
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


@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("ranks", [(57, 57, 57), (130, 20, 64), (20, 130, 57)])
def test_ranks_of_others_in_a_stack_are_not_read(check_neighbours: Any, ranks: tuple[int, ...], tokens: int) -> None:
    check_neighbours(ranks, tokens, lambda x, layer: launch(make_plan(layer, x.dtype, tokens), x, layer, None))
