"""What the kernel that decodes is told of a weight; what it then does is shown on a GPU."""

from __future__ import annotations

import pytest
import torch

from slimc.backends.cuda.unpack import _kept_before, _load_bytes, refuses_weight, whole_pieces
from slimc.runtime.bits import pack_bits
from slimc.runtime.formats import NM, Unstructured, WeightFormat


@pytest.mark.parametrize("one_stream", [False, True])
def test_where_the_values_of_256_columns_begin(one_stream: bool) -> None:
    mask = torch.rand(5, 600, generator=torch.Generator().manual_seed(0)) < 0.4
    spec = WeightFormat(5, 600, sparsity=Unstructured(), nonzeros=int(mask.sum())) if one_stream else None
    spec = spec or WeightFormat(5, 600, sparsity=NM(2, 6))
    found = _kept_before(pack_bits(mask.view(torch.uint8), 1), spec)
    assert found.shape == (5, 3)
    for row in range(5):
        for segment in range(3):
            before = mask[row, : 256 * segment].sum() + (mask[:row].sum() if one_stream else 0)
            assert int(found[row, segment]) == int(before)


@pytest.mark.parametrize(
    ("piece_bits", "row_bytes", "address", "expected"),
    [(32, 512, 64, 4), (64, 512, 64, 4), (16, 512, 64, 2), (32, 510, 64, 2), (32, 512, 66, 2), (24, 768, 64, 1),
     (32, 511, 64, 1), (12, 512, 64, 1), (0, 512, 64, 1)],
)  # fmt: skip
def test_loads_are_as_wide_as_every_row_allows(piece_bits: int, row_bytes: int, address: int, expected: int) -> None:
    assert _load_bytes(piece_bits, row_bytes, address) == expected


def test_forms_that_are_refused() -> None:
    assert refuses_weight(WeightFormat(8, 64, 4, 16)) is None
    assert refuses_weight(WeightFormat(8, 10, 4, 12)) is None
    assert "groups of a multiple of 8 columns, not 12" in str(refuses_weight(WeightFormat(8, 64, 4, 12)))
    many = WeightFormat(2**16, 2**16, 4, sparsity=Unstructured(), nonzeros=2**31)
    assert "fewer than 2^31 values" in str(refuses_weight(many))


def test_whole_pieces() -> None:
    assert [whole_pieces(columns) for columns in (1, 8, 9)] == [8, 8, 16]
