"""The order of the tensor cores, against what the PTX manual says a lane's registers hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slimc.backends.cuda.fragments import code_words, metadata_words, scale_words
from slimc.runtime.packing import NM, pack_weight

PATTERNS = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])


def mask_2_of_4(rows: int, columns: int) -> Tensor:
    """A random mask, in which all six patterns occur where there is room."""
    chosen = (torch.randperm(rows * columns // 4) % len(PATTERNS)).view(rows, -1)
    mask = torch.zeros(rows, columns // 4, 4, dtype=torch.bool)
    return mask.scatter_(2, PATTERNS[chosen], True).flatten(1)


def registers(words: Tensor) -> Tensor:
    """Codes that the registers of an instruction hold: [tile, unit, instruction, lane, register, 2]."""
    words = words.permute(0, 1, 3, 2).to(torch.int64) & 0xFFFFFFFF
    first = [(words >> (4 * register)) & 15 for register in range(4)]
    second = [(words >> (16 + 4 * register)) & 15 for register in range(4)]
    return torch.stack((torch.stack(first, -1), torch.stack(second, -1)), -1)


def rows_and_places() -> tuple[Tensor, Tensor]:
    """Row and pair of columns of each [lane, register]: m16n8k16's a0 to a7, two to a register."""
    lane, register = torch.arange(32)[:, None], torch.arange(4)[None, :]
    return lane // 4 + 8 * (register % 2), lane % 4 + 4 * (register // 2)


@given(rows=st.integers(1, 40), columns=st.integers(1, 70).map(lambda n: 2 * n))
def test_dense_codes_are_where_the_registers_want_them(rows: int, columns: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    packed = pack_weight(codes, bits=4, scale=torch.ones(1, 1))
    held = registers(code_words(packed.values))
    tiles, units = held.shape[:2]
    assert (tiles, units) == (-(-rows // 16), -(-columns // 64))
    row, pair = rows_and_places()
    dense = torch.full((tiles, 16, units, 4, 8, 2), 255)
    dense[:, row, :, :, pair] = held.permute(3, 4, 0, 1, 2, 5)
    dense = dense.reshape(16 * tiles, 64 * units)
    assert torch.equal(dense[:rows, :columns], codes.long())
    assert bool((dense[rows:] == 8).all())
    assert bool((dense[:, columns:] == 8).all())


@given(rows=st.integers(1, 40), columns=st.integers(1, 70).map(lambda n: 4 * n))
def test_sparse_codes_and_metadata_make_the_dense_weight(rows: int, columns: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    packed = pack_weight(codes, bits=4, scale=torch.ones(1, 1), mask=mask_2_of_4(rows, columns), sparsity=NM(2, 4))
    assert packed.pattern is not None
    held, metadata = registers(code_words(packed.values)), metadata_words(packed.pattern).to(torch.int64) & 0xFFFFFFFF
    tiles, units = held.shape[:2]
    dense = torch.zeros(16 * tiles, 128 * units)
    row, group = rows_and_places()
    for instruction in range(4):
        # mma.sp.m16n8k32: lanes 2 f and 2 f + 1 of each four hold the indices of 16 columns each; f is the selector.
        selector = instruction % 2
        source = 4 * (torch.arange(32)[:, None] // 4) + 2 * selector + group // 4
        shift = 16 * (row // 8) + 4 * (group % 4)
        indices = (metadata[:, :, source, instruction // 2] >> shift) & 15
        column = 32 * instruction + 4 * group
        for tile in range(tiles):
            for unit in range(units):
                for which, index in ((0, indices[tile, unit] & 3), (1, indices[tile, unit] >> 2)):
                    values = held[tile, unit, instruction, :, :, which].float() - 8
                    dense[16 * tile + row, 128 * unit + column + index] += values
    assert torch.equal(dense[:rows, :columns], packed.decode())
    assert not dense[rows:].any()
    assert not dense[:, columns:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_stand_in_pairs_of_rows(dtype: torch.dtype) -> None:
    scale = torch.rand(21, 3).to(dtype)
    words = scale_words(scale, units=5)
    assert words.shape == (2, 5, 8)
    halves = words.view(torch.int16).view(2, 5, 8, 2).view(dtype)
    expected = torch.zeros(32, 5, dtype=dtype)
    expected[:21, :3] = scale
    assert torch.equal(halves[..., 0].permute(0, 2, 1).reshape(-1, 5), expected.view(2, 2, 8, 5)[:, 0].reshape(-1, 5))
    assert torch.equal(halves[..., 1].permute(0, 2, 1).reshape(-1, 5), expected.view(2, 2, 8, 5)[:, 1].reshape(-1, 5))
