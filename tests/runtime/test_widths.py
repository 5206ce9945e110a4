"""Groups of columns with widths of their own: the layout against its definition, sizes, JSON, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimc.errors import FormatError
from slimc.runtime.bits import stream_bytes
from slimc.runtime.ops import weight_attributes
from slimc.runtime.packing import NM, LinearFormat, PackedLinear, PackedWeight, Unstructured, WeightFormat, pack_weight

slim = torch.ops.slim


@given(
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=5).filter(lambda widths: len({*widths, 0}) > 2),
    group=st.sampled_from([1, 5, 12, 64]),
    short=st.booleans(),
    asymmetric=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_decoding_follows_the_definition(
    make_weight: Callable[..., PackedWeight],
    widths: list[int],
    group: int,
    short: bool,
    asymmetric: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    columns = len(widths) * group - (group // 2 if short else 0)
    form: dict[str, Any] = {"group": group, "asymmetric": asymmetric, "dtype": dtype, "seed": seed}
    packed = make_weight(3, columns, max(widths), widths=tuple(widths), **form)
    codes, mask = packed.unpack()
    assert mask is None
    decoded = packed.decode()
    position = 0
    for index, width in enumerate(widths):
        inside = slice(index * group, min((index + 1) * group, columns))
        here = codes[:, inside]
        assert int(here.max()) < 1 << width
        scale = packed.scale[:, index, None]
        if width == 1:
            steps = 2 * here.to(dtype) - 1
        else:
            zero = packed.zero_point[:, index, None] if asymmetric else 1 << (width - 1)
            steps = (here.int() - zero).to(dtype)
        assert torch.equal(decoded[:, inside], steps * scale)
        # Each group of a row is the little-endian integer of its codes, on bytes of its own.
        size = stream_bytes(here.shape[1], width)
        for row, stream in zip(here.tolist(), packed.values[:, position : position + size].tolist(), strict=True):
            number = sum(code << (width * place) for place, code in enumerate(row))
            assert bytes(stream) == number.to_bytes(size, "little")
        position += size
    assert packed.values.shape[1] == position
    again = pack_weight(
        codes, bits=None, scale=packed.scale, zero_point=packed.zero_point, group=group, widths=tuple(widths)
    )
    assert torch.equal(again.values, packed.values)
    assert WeightFormat.from_json(packed.format.to_json()) == packed.format
    op = slim.dequant(
        packed.values,
        packed.scale,
        packed.zero_point,
        **{name: value for name, value in weight_attributes(packed.format).items() if name not in ("n", "m")},
    )
    assert torch.equal(op, decoded)


def test_signs_take_one_bit() -> None:
    spec = WeightFormat(8, 192, 3, 64, dtype=torch.bfloat16, widths=(1, 3, 2))
    assert spec.tensor_specs()["values"] == ((8, 8 + 24 + 16), torch.uint8)
    assert spec.bits_per_weight() == 2 + 16 / 64
    assert spec.describe() == "int1-3/64"
    assert WeightFormat(8, 128, 1, 64, widths=(1, 1)).bits_per_weight() == 1 + 32 / 64
    assert spec.to_json()["widths"] == "132"
    assert "widths" not in WeightFormat(8, 128, 3, 64).to_json()


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 2), NM(3, 8)])
def test_patterns_store_what_they_keep_of_each_group(make_weight: Callable[..., PackedWeight], pattern: NM) -> None:
    packed = make_weight(5, 64, 5, group=16, widths=(2, 1, 5, 3), sparsity=pattern, asymmetric=True)
    kept = 16 // pattern.m * pattern.n
    assert packed.values.shape == (5, sum(stream_bytes(kept, width) for width in (2, 1, 5, 3)))
    codes, mask = packed.unpack()
    decoded = packed.decode()
    assert bool((decoded[~mask] == 0).all())
    dense = pack_weight(
        codes, bits=None, scale=packed.scale, zero_point=packed.zero_point, group=16, widths=(2, 1, 5, 3)
    ).decode()
    assert torch.equal(decoded[mask], dense[mask])


def test_widths_that_are_all_alike_are_a_weight_of_one_width() -> None:
    codes, scale = torch.randint(0, 8, (4, 32), dtype=torch.uint8), torch.ones(4, 2)
    packed = pack_weight(codes, bits=None, scale=scale, group=16, widths=(3, 3))
    assert packed.format == WeightFormat(4, 32, 3, 16)


def weight(**changes: Any) -> WeightFormat:
    return WeightFormat(**{"rows": 4, "columns": 40, "bits": 3, "group": 16, "widths": (2, 3, 1)} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": None}, "widths belong to groups of columns"),
        ({"widths": (2, 3)}, "2 widths do not describe 3 groups"),
        ({"widths": (2, 9, 3), "bits": 8}, "codes of 2 to 9 bits: 1 to 8 are possible"),
        ({"widths": (2, 3, 0)}, "codes of 0 to 3 bits"),
        ({"widths": (2, 2, 1)}, "the widest codes have 2 bits, but the weight says 3"),
        ({"sparsity": Unstructured(), "nonzeros": 3}, "do not go with unstructured sparsity: each must keep"),
        ({"sparsity": NM(2, 5)}, "do not go with 2:5 sparsity"),
        ({"bits": None, "group": None}, "widths belong to groups"),
    ],
)
def test_a_form_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        weight(**changes)


@pytest.mark.parametrize("text", ["", "2x1", "٢٣١", 231, [2, 3, 1], "231" * 9, "-31", "2 1"])
def test_widths_from_a_file_are_digits(text: Any) -> None:
    with pytest.raises(FormatError, match="widths"):
        WeightFormat.from_json(weight().to_json() | {"widths": text})


def test_tensors_that_do_not_fit_are_refused(make_weight: Callable[..., PackedWeight]) -> None:
    packed = make_weight(4, 40, 3, group=16, widths=(2, 3, 1), asymmetric=True)
    tensors = packed.tensors()
    with pytest.raises(FormatError, match="values is"):
        PackedWeight.from_tensors(packed.format, tensors | {"values": packed.values[:, :-1]})
    for group, zero in ((0, 4), (1, 8), (2, 1)):
        changed = packed.zero_point.clone()
        changed[1, group] = zero
        with pytest.raises(FormatError, match=f"a zero point of group {group} is no code of"):
            PackedLinear.from_tensors(LinearFormat(packed.format), tensors | {"zero_point": changed})
    with pytest.raises(FormatError, match="code 3 does not fit in 1 bits"):
        pack_weight(
            torch.full((4, 40), 3, dtype=torch.uint8), bits=None, scale=packed.scale, group=16, widths=(2, 3, 1)
        )
    with pytest.raises(FormatError, match="signs have no code of zero"):
        pack_weight(
            torch.zeros(4, 32, dtype=torch.uint8),
            bits=None,
            scale=torch.ones(4, 2),
            group=16,
            mask=torch.zeros(4, 32, dtype=torch.bool),
            sparsity=NM(1, 4),
            widths=(2, 1),
        )
    with pytest.raises(FormatError, match="factors are dense, symmetric and of one width"):
        LinearFormat(WeightFormat(4, 8), WeightFormat(4, 2, 2, 1, widths=(1, 2)), WeightFormat(2, 8))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [2, 3]}, "2 widths do not describe 3 groups of columns"),
        ({"widths": [2, 2, 1]}, r"widths must be 1 to 8, the largest 3, not \[2, 2, 1\]"),
        ({"widths": [2, 3, 0]}, "widths must be 1 to 8"),
        ({"widths": [3, 3, 1]}, r"values must have shape \(4, 13\), not \(4, 11\)"),
        ({"widths": []}, "values must have shape"),
        ({"group": 0}, "3 widths do not describe 0 groups"),
    ],
)
def test_one_message_in_eager_mode_and_under_a_fake(
    make_weight: Callable[..., PackedWeight], changes: dict[str, Any], message: str, device: str
) -> None:
    packed = make_weight(4, 40, 3, group=16, widths=(2, 3, 1))
    attributes = {"bits": 3, "columns": 40, "group": 16, "widths": [2, 3, 1]} | changes
    with pytest.raises(RuntimeError, match=message):
        slim.dequant(packed.values.to(device), packed.scale.to(device), None, **attributes)
