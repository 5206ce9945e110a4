"""What the kernel for few tokens asks of a GPU: no more shared memory than there is."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slimc.backends import KERNELS
from slimc.backends.cuda import decode, driver
from slimc.backends.cuda.dense import DENSE
from slimc.backends.cuda.layer import prepare
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.select import KernelTable, choose

GPU = torch.device("cuda")

H100, A100, L4 = 227 << 10, 163 << 10, 99 << 10
"""Shared memory of a block, as the CUDA C++ Programming Guide has it for compute capability 9.0, 8.0 and 8.9."""


def layer_of(rows: int, columns: int, rank: int) -> LinearFormat:
    weight = WeightFormat(rows, columns, bits=4, sparsity=NM(2, 4), dtype=torch.bfloat16)
    left = WeightFormat(rows, rank, bits=4, group=64, dtype=torch.bfloat16)
    return LinearFormat(weight, left, replace(left, rows=rank, columns=columns))


@pytest.mark.parametrize("shared_bytes", [H100, A100, L4], ids=["H100", "A100", "L4"])
@pytest.mark.parametrize("processors", [108, 1])
@pytest.mark.parametrize(("columns", "rank"), [(4096, 409), (11008, 409), (28672, 819)])
def test_a_launch_takes_no_more_shared_memory_than_there_is(
    make_packed: Any, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch,
    columns: int, rank: int, processors: int, shared_bytes: int,
) -> None:  # fmt: skip
    gpu.shared_memory_per_block_optin, gpu.multi_processor_count = shared_bytes, processors
    module = SimpleNamespace(function=lambda _name, **_room: SimpleNamespace(prepare=lambda _kinds: None))
    launched: list[dict[str, int]] = []

    def load(_source: str, _name: str, _device: int, defines: dict[str, int]) -> SimpleNamespace:
        launched.append(defines)
        return module

    monkeypatch.setattr(driver, "load", load)
    packed = make_packed(64, columns, rank)
    layer = prepare(packed)
    for tokens in range(1, decode.MAX_TOKENS + 1):
        assert decode.DECODE.refuses(packed.format, torch.bfloat16, GPU, tokens) is None
        plan = decode.make_plan(layer, torch.bfloat16, tokens)
        assert plan.shared_bytes + decode.OWN_SHARED_BYTES <= shared_bytes
        check_what_a_launch_reads(plan, columns, tokens, launched[-1])


def check_what_a_launch_reads(plan: decode.Plan, columns: int, tokens: int, defines: dict[str, int]) -> None:
    """Warps together must take all of x, of its pieces and of L; shared memory is laid out as ``decode.cu`` says."""
    arguments, warps = plan.arguments, defines["WARP_COLUMNS"]
    assert plan.threads == 32 * warps
    assert arguments.chunk * arguments.chunks >= columns
    read = 128 * arguments.steps * warps
    assert read == arguments.chunk if arguments.chunks > 1 else read >= arguments.chunk
    assert arguments.steps % defines["STAGES"] == 0
    assert arguments.left_steps * warps >= arguments.left_units
    assert 64 * arguments.split_units * arguments.splits >= columns
    # A share of the product with R reads one piece of x.
    assert arguments.chunks == 1 or 64 * arguments.split_units <= arguments.chunk
    staged = tokens if tokens <= 8 else 16
    x, t = staged * (2 * arguments.chunk + 16), staged * (2 * arguments.ranks + 16)
    sums = 512 * warps * defines["ROW_TILES"]
    assert plan.shared_bytes == 16 + sums + (x + t if arguments.chunks == 1 else max(2 * x, t))


@pytest.mark.parametrize(("capability", "shared_bytes"), [((8, 0), A100), ((8, 9), L4)])
def test_ranks_that_find_no_room_are_left_to_another_kernel(
    gpu: SimpleNamespace, capability: tuple[int, int], shared_bytes: int
) -> None:
    gpu.capability, gpu.shared_memory_per_block_optin = capability, shared_bytes
    table = KernelTable(KERNELS)
    # t [tokens, ranks] in 16 bits must find room beside the sums of the warps.
    most_ranks = shared_bytes // 2 // decode.MAX_TOKENS
    for rank, expected in ((most_ranks // 2, decode.DECODE), (most_ranks, DENSE)):
        kernel, refusals = choose(table, layer_of(4096, 4096, rank), torch.bfloat16, GPU, decode.MAX_TOKENS)
        assert kernel is expected
    assert f"4096 columns and {most_ranks // 64 * 64 + 64} ranks than this GPU has" in refusals["cuda-decode"]


def test_layers_of_which_each_finds_room_and_all_do_not(gpu: SimpleNamespace) -> None:
    gpu.capability, gpu.shared_memory_per_block_optin = (8, 9), L4
    spec = layer_of(4096, 4096, 1600)
    for layers, expected in (((), decode.DECODE), ((spec, spec), DENSE)):
        table = KernelTable(KERNELS)
        kernel, _ = choose(table, spec, torch.bfloat16, GPU, decode.MAX_TOKENS, layers)
        assert kernel is expected
