"""Formats: strict JSON, sizes, and the words for people."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimc.errors import FormatError
from slimc.runtime.formats import ACTIVATIONS, NM, BinaryFormat, LinearFormat, Unstructured, WeightFormat

INT4 = WeightFormat(64, 128, bits=4, group=64, dtype=torch.bfloat16)


@given(
    bits=st.sampled_from([None, 2, 3, 4, 8]),
    group=st.sampled_from([None, 48, 128]),
    per_tensor=st.booleans(),
    asymmetric=st.booleans(),
    sparsity=st.sampled_from([None, NM(2, 4), Unstructured()]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_json_round_trip(bits, group, per_tensor, asymmetric, sparsity, dtype) -> None:
    scales = (
        {}
        if bits is None
        else {"group": None if per_tensor else group, "per_tensor": per_tensor, "asymmetric": asymmetric}
    )
    nonzeros = 7 if sparsity == Unstructured() else None
    form = WeightFormat(9, 576, bits, sparsity=sparsity, nonzeros=nonzeros, dtype=dtype, **scales)
    assert WeightFormat.from_json(form.to_json()) == form
    whole = LinearFormat(form, WeightFormat(9, 2), WeightFormat(2, 576, bits=4, group=64), input_scaled=True)
    assert LinearFormat.from_json(whole.to_json()) == whole
    for activation in ACTIVATIONS:
        rounded = replace(whole, activation=activation)
        assert LinearFormat.from_json(rounded.to_json()) == rounded
        assert rounded.nbytes() == whole.nbytes()
    signed = replace(whole, binary=BinaryFormat(9, 576, 2, dtype))
    assert LinearFormat.from_json(signed.to_json()) == signed
    assert signed.nbytes() == whole.nbytes() + 9 * 72 + 2 * (9 + 576) * dtype.itemsize


@pytest.mark.parametrize(
    ("binary", "message"),
    [
        ([], "a binary format must be a JSON object, not list"),
        ({"rank": 1}, "a binary format lacks dtype"),
        ({"rank": 1, "dtype": "bfloat16", "rows": 64}, "unknown key 'rows' in a binary format"),
        ({"rank": 1.0, "dtype": "bfloat16"}, "rank of a weight format must be an integer, not 1.0"),
        ({"rank": 0, "dtype": "bfloat16"}, "64 x 128 cannot have the rank 0"),
        ({"rank": 65, "dtype": "bfloat16"}, "64 x 128 cannot have the rank 65"),
        ({"rank": 1, "dtype": "bfloat15"}, "dtype of a binary format is 'bfloat15'.*did you mean 'bfloat16'"),
        ({"rank": 1, "dtype": 16}, "dtype of a binary format is 16: use one of"),
    ],
)
def test_hostile_binary_parts_are_refused(binary: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        LinearFormat.from_json(LinearFormat(INT4).to_json() | {"binary": binary})


def test_a_binary_part_must_fit() -> None:
    with pytest.raises(FormatError, match="binary part of 64 x 64 does not fit a weight of 64 x 128"):
        LinearFormat(INT4, binary=BinaryFormat(64, 64, 1, torch.bfloat16))
    with pytest.raises(FormatError, match="magnitude of a binary part cannot be torch.int8"):
        BinaryFormat(64, 64, 1, torch.int8)
    words = LinearFormat(INT4, binary=BinaryFormat(64, 128, 1, torch.bfloat16)).describe()
    assert words == "int4/64 + signs x rank 1 bf16"


def test_formats_without_rounded_inputs_are_written_and_read_as_ever() -> None:
    record = LinearFormat(INT4).to_json()
    assert list(record) == ["weight", "left", "right", "input_scaled"]
    assert LinearFormat.from_json(record).activation is None
    assert LinearFormat.from_json(record | {"activation": None}).activation is None
    assert LinearFormat.from_json(record | {"binary": None}).binary is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int9", r"inputs cannot be rounded to 'int9': use one of int8, float8_e4m3fn .did you mean 'int8'"),
        (8, "activation of a format must be text, not 8"),
        ([], r"activation of a format must be text, not \[\]"),
    ],
)
def test_hostile_activations_are_refused(value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        LinearFormat.from_json(LinearFormat(INT4).to_json() | {"activation": value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "cannot have 0 rows"),
        ({"columns": -1}, "cannot have -1 columns"),
        ({"rows": 2**31 + 1}, "cannot have 2147483649 rows"),
        ({"rows": 2**31, "columns": 2**31}, "is larger than"),
        ({"rows": 64.0}, "rows of a weight format must be an integer, not 64.0"),
        ({"rows": True}, "rows of a weight format must be an integer, not True"),
        ({"rows": None}, "must be an integer, not None"),
        ({"bits": 1}, "cannot have 1 bits"),
        ({"bits": 9}, "cannot have 9 bits"),
        ({"bits": "4"}, "bits of a weight format must be an integer, not '4'"),
        ({"bits": None}, "without bits there are none"),
        ({"group": 0}, "a group cannot have 0 columns"),
        ({"per_tensor": True}, "one scale per tensor excludes groups of 64 columns"),
        ({"asymmetric": 1}, "must be true or false, not 1"),
        ({"sparsity": "4:2"}, "4:2 is not an N:M sparsity"),
        ({"sparsity": "0:4"}, "0:4 is not an N:M sparsity"),
        ({"sparsity": "2:5"}, "2:5 sparsity does not divide 128 columns"),
        ({"sparsity": "2:" + "9" * 9999}, "use 'unstructured' or N:M"),
        ({"sparsity": [2, 4]}, "use 'unstructured' or N:M"),
        ({"sparsity": "unstructured"}, "nonzeros is the number of values of an unstructured weight"),
        ({"nonzeros": 3}, "nonzeros is the number of values of an unstructured weight"),
        ({"sparsity": "unstructured", "nonzeros": 64 * 128 + 1}, "8193 values cannot be stored"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'?"),
        ({"dtype": 16}, "dtype of a weight format is 16"),
        ({"gruop": 64}, "unknown key 'gruop' in a weight format (did you mean 'group'?)"),
    ],
)
def test_hostile_weight_formats_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        WeightFormat.from_json(INT4.to_json() | changes)
    assert message in str(caught.value)


def test_formats_must_be_complete_objects() -> None:
    with pytest.raises(FormatError, match="must be a JSON object, not list"):
        WeightFormat.from_json([])
    record = INT4.to_json()
    del record["bits"], record["dtype"]
    with pytest.raises(FormatError, match="lacks bits, dtype"):
        WeightFormat.from_json(record)


def test_adapters_must_fit() -> None:
    left, right = WeightFormat(64, 3), WeightFormat(3, 128)
    with pytest.raises(FormatError, match="needs both factors"):
        LinearFormat(INT4, left)
    with pytest.raises(FormatError, match="factors of 64 x 3 and 4 x 128 do not correct a weight of 64 x 128"):
        LinearFormat(INT4, left, WeightFormat(4, 128))
    with pytest.raises(
        FormatError, match="the right factor is 2:4 fp32: factors are dense, symmetric and of one width"
    ):
        LinearFormat(INT4, left, WeightFormat(3, 128, sparsity=NM(2, 4)))
    with pytest.raises(FormatError, match="cannot be torch.int8: use one of bfloat16"):
        WeightFormat(64, 3, dtype=torch.int8)
    assert LinearFormat(INT4, left, right).rank == 3


def test_words_for_people() -> None:
    def words(**fields: Any) -> str:
        return WeightFormat(**{"rows": 10, "columns": 576, "dtype": torch.bfloat16} | fields).describe()

    assert words(bits=4, per_tensor=True, sparsity=NM(2, 4)) == "2:4 int4 per tensor"
    assert words(bits=3, group=64, asymmetric=True) == "int3/64 asymmetric"
    assert words(bits=8) == "int8 per channel"
    assert words(sparsity=Unstructured(), nonzeros=2880) == "50% unstructured bf16"
    factors = (WeightFormat(10, 57, bits=4, group=64), WeightFormat(57, 576, bits=4, group=64))
    base = WeightFormat(10, 576, bits=4, per_tensor=True, sparsity=NM(2, 4))
    assert LinearFormat(base, *factors).describe() == "2:4 int4 per tensor + low-rank 57 int4/64"
    mixed = LinearFormat(base, WeightFormat(10, 57, dtype=torch.bfloat16), factors[1], input_scaled=True)
    assert mixed.describe() == "2:4 int4 per tensor scaled inputs + low-rank 57 bf16 x int4/64"
    rounded = LinearFormat(base, *factors, activation="int8")
    assert rounded.describe() == "2:4 int4 per tensor, int8 inputs + low-rank 57 int4/64"
    both = LinearFormat(base, input_scaled=True, activation="float8_e4m3fn")
    assert both.describe() == "2:4 int4 per tensor, scaled fp8 inputs"


def test_every_stored_byte_counts() -> None:
    form = LinearFormat(
        WeightFormat(16, 128, bits=4, group=64, asymmetric=True, dtype=torch.bfloat16),
        WeightFormat(16, 3, dtype=torch.bfloat16),
        WeightFormat(3, 128, bits=4, group=64, dtype=torch.bfloat16),
        input_scaled=True,
    )
    weight = 16 * 64 + 16 * 2 * (2 + 1)
    adapters = 16 * 3 * 2 + 3 * 64 + 3 * 2 * 2
    assert form.nbytes() == weight + 128 * 2 + adapters
    assert form.bits_per_weight() == 8 * form.nbytes() / (16 * 128)
