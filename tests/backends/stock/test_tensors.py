"""Schemes, and codes as compressed-tensors lays them out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimc.backends.stock.scheme import Scheme, check_inputs, choose_scheme, no_codes_for, notes
from slimc.backends.stock.tensors import code_tensors
from slimc.errors import FormatError, InputError
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.packing import PackedWeight, pack_weight

ROWS = 24


def packed_weight(bits: int, columns: int, group: int | None = None, *, asymmetric: bool = False) -> PackedWeight:
    generator = torch.Generator().manual_seed(bits)
    groups = 1 if group is None else -(-columns // group)
    zero_point = torch.randint(0, 1 << bits, (ROWS, groups), dtype=torch.uint8, generator=generator)
    return pack_weight(
        torch.randint(0, 1 << bits, (ROWS, columns), dtype=torch.uint8, generator=generator),
        bits=bits,
        scale=torch.rand(ROWS, groups, generator=generator) + 0.5,
        zero_point=zero_point if asymmetric else None,
        group=group,
    )


def read_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Read codes as the format has them: code i of a row begins at bit i * bits of its integers of 32 bits."""
    wide = words.to(torch.int64) & 0xFFFFFFFF
    return torch.stack([wide[:, i * bits // 32] >> (i * bits % 32) & ((1 << bits) - 1) for i in range(count)], dim=1)


def decoded(tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    rows, columns = tensors["weight_shape"].tolist()
    scale = tensors["weight_scale"]
    codes = read_words(tensors["weight_packed"], scheme.bits, columns)
    zero = torch.full_like(scale, 1 << (scheme.bits - 1))
    if scheme.asymmetric:
        zero = read_words(tensors["weight_zero_point"].t(), scheme.bits, rows).t()
    spread = columns // scale.shape[1]
    return (codes - zero.repeat_interleave(spread, 1)) * scale.repeat_interleave(spread, 1)


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 16, True), Scheme(8, 16, True), Scheme(4, 16, False), Scheme(8, None, True)]
)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_codes_mean_the_same(scheme: Scheme, bits: int, asymmetric: bool) -> None:
    packed = packed_weight(bits, 48, None if scheme.group is None else 32, asymmetric=asymmetric and scheme.asymmetric)
    tensors = code_tensors(packed, scheme)
    assert {name: (tuple(one.shape), one.dtype) for name, one in tensors.items()} == scheme.specs(packed.format)
    assert torch.equal(decoded(tensors, scheme), packed.decode())


def test_sparse_codes_of_several_widths_and_signs() -> None:
    mask = torch.tensor([True, False, False, True]).repeat(ROWS, 16)
    codes = torch.randint(0, 2, (ROWS, 64), dtype=torch.uint8)
    packed = pack_weight(
        codes, bits=None, scale=torch.rand(ROWS, 2) + 0.5, group=32, widths=(1, 5), mask=mask, sparsity=NM(2, 4)
    )
    scheme = choose_scheme({"a": packed.format})
    assert scheme == Scheme(8, 32, False)
    assert torch.equal(decoded(code_tensors(packed, scheme), scheme), packed.decode())


def test_a_zero_point_that_is_no_code() -> None:
    packed = packed_weight(4, 32, asymmetric=True)
    packed.zero_point = torch.full((ROWS, 1), 200, dtype=torch.uint8)
    with pytest.raises(FormatError, match="zero point 200 is no code of 4 bits"):
        code_tensors(packed, Scheme(4, None, True))


def form(columns: int = 128, **settings: object) -> WeightFormat:
    return WeightFormat(**{"rows": 64, "columns": columns, "bits": 4, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("forms", "expected"),
    [
        ([form(per_tensor=True), form()], Scheme(4, None, False)),
        ([form(group=128)], Scheme(4, None, False)),
        ([form(group=64), form(group=32, bits=3)], Scheme(4, 32, False)),
        ([form(group=64), form(columns=96)], Scheme(4, 32, False)),
        ([form(group=64, asymmetric=True), form(bits=5)], Scheme(8, 64, True)),
    ],
)
def test_one_scheme_for_all(forms: list[WeightFormat], expected: Scheme) -> None:
    assert choose_scheme({str(index): one for index, one in enumerate(forms)}) == expected


def test_groups_without_a_common_size() -> None:
    with pytest.raises(InputError, match="24 and 64 columns, and the folder has one size for all, of at least 16"):
        choose_scheme({"a": form(columns=96, group=24), "b": form(group=64)})


def test_refusals() -> None:
    assert no_codes_for(LinearFormat(form()), "Linear") is None
    assert no_codes_for(LinearFormat(form(group=48)), "Linear") is None
    assert no_codes_for(LinearFormat(form(columns=100, group=64)), "Linear") == (
        "has groups of 64 columns, which 100 columns are no multiple of"
    )
    assert no_codes_for(LinearFormat(form(), input_scaled=True), "Linear") == "has a scale for each input"
    assert "is a Conv1D in transformers" in str(no_codes_for(LinearFormat(form()), "Conv1D"))
    with pytest.raises(InputError, match="'a' rounds its inputs to int8.*without the pass 'activations'"):
        check_inputs({"a": LinearFormat(form(), activation="int8")})


def test_notes_say_what_takes_more() -> None:
    factors = {"left": form(rows=64, columns=8, dtype=torch.bfloat16), "right": form(rows=8, dtype=torch.bfloat16)}
    sparse = LinearFormat(form(bits=3, group=64, sparsity=NM(2, 4)), **factors)
    assert notes(sparse, Scheme(4, 32, True)) == [
        "codes of 3 bits take 4",
        "zeros of 2:4 are stored, so the codes are as large as without it",
        "scales are repeated for groups of 32 columns",
        "zero points are stored because other layers have them",
        "adapters of 4 bits take 16",
    ]
    assert notes(LinearFormat(form(per_tensor=True)), Scheme(4, None, False)) == [
        "the one scale of a tensor is repeated"
    ]
    assert notes(LinearFormat(form(bits=None, sparsity=NM(2, 4))), None) == ["zeros of 16-bit values are stored"]
