"""The canonical layout: bit streams against Python integers, decoding against the definition, and the refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimc.errors import FormatError
from slimc.runtime.bits import pack_bits, stream_bytes, unpack_bits
from slimc.runtime.packing import NM, LinearFormat, PackedLinear, PackedWeight, Unstructured, pack_weight

BITS = st.integers(1, 8)
SPARSITIES = [None, NM(1, 2), NM(2, 4), NM(3, 7), NM(2, 8), Unstructured()]


@given(bits=BITS, count=st.integers(0, 41), rows=st.integers(1, 3), seed=st.integers(0, 999))
def test_a_stream_is_the_little_endian_integer_of_its_values(bits: int, count: int, rows: int, seed: int) -> None:
    values = torch.randint(
        0, 1 << bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    stream = pack_bits(values, bits)
    for row, packed in zip(values.tolist(), stream.tolist(), strict=True):
        number = sum(value << (bits * i) for i, value in enumerate(row))
        assert bytes(packed) == number.to_bytes(stream_bytes(count, bits), "little")
    assert torch.equal(unpack_bits(stream, bits, count), values)


@given(bits=BITS, count=st.integers(1, 41))
def test_tables_and_shifts_unpack_alike(bits: int, count: int) -> None:
    class Shifted(torch.Tensor):
        """A subclass, which the tables do not serve."""

    stream = torch.randint(0, 256, (2, stream_bytes(count, bits)), dtype=torch.uint8)
    by_shifts = unpack_bits(stream.as_subclass(Shifted), bits, count).as_subclass(torch.Tensor)
    assert torch.equal(unpack_bits(stream, bits, count), by_shifts)


@given(
    rows=st.integers(1, 4),
    groups_of_56=st.booleans(),
    odd=st.integers(1, 37),
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 1, 5, 16, 64]),
    asymmetric=st.booleans(),
    sparsity=st.sampled_from(SPARSITIES),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_decoding_follows_the_definition(
    make_weight: Callable[..., PackedWeight],
    rows: int,
    groups_of_56: bool,
    odd: int,
    bits: int,
    group: int | None,
    asymmetric: bool,
    sparsity: object,
    dtype: torch.dtype,
    seed: int,
) -> None:
    columns = 56 if groups_of_56 or isinstance(sparsity, NM) else odd
    packed = make_weight(
        rows, columns, bits, group=group, asymmetric=asymmetric, sparsity=sparsity, dtype=dtype, seed=seed
    )
    codes, mask = packed.unpack()
    scale, zero = (
        per_group.repeat_interleave(group or columns, dim=1)[:, :columns]
        for per_group in (
            packed.scale,
            torch.full(packed.scale.shape, 1 << (bits - 1)) if packed.zero_point is None else packed.zero_point,
        )
    )
    # A difference of 9 bits times a scale of at most 24 is exact in float64, so the only rounding is to dtype.
    expected = ((codes.double() - zero.double()) * scale.double()).to(dtype)
    assert torch.equal(packed.decode(), expected)
    if mask is not None:
        assert not packed.decode()[~mask].any()
        assert torch.equal(codes[~mask], zero.to(torch.uint8)[~mask])
    again = pack_weight(
        codes,
        bits=bits,
        scale=packed.scale,
        zero_point=packed.zero_point,
        group=group,
        mask=mask,
        sparsity=packed.format.sparsity,
    )
    assert again.format == packed.format
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in packed.tensors().items())


@given(
    rows=st.integers(1, 4),
    columns=st.sampled_from([56, 112]),
    sparsity=st.sampled_from(SPARSITIES),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_plain_values_survive(rows: int, columns: int, sparsity: object, dtype: torch.dtype, make_weight) -> None:
    packed = make_weight(rows, columns, None, sparsity=sparsity, dtype=dtype)
    values, mask = packed.unpack()
    assert torch.equal(values, packed.decode())
    assert values.dtype == dtype
    assert mask is None or not values[~mask].any()
    again = pack_weight(values, bits=None, mask=mask, sparsity=sparsity)
    assert torch.equal(again.values, packed.values)


def test_2_of_4_with_4_bits_takes_three_bits_a_weight(make_weight) -> None:
    form = make_weight(64, 576, 4, per_tensor=True, sparsity=NM(2, 4)).format
    assert form.bits_per_weight() == 3 + 16 / (64 * 576)
    assert form.nbytes() == 64 * 576 * 3 // 8 + 2


def test_a_group_that_keeps_too_few_is_filled_up_from_the_lowest_position() -> None:
    mask = torch.tensor([[False, False, False, True, False, False, False, False]])
    codes = torch.full((1, 8), 15, dtype=torch.uint8)
    packed = pack_weight(codes, bits=4, scale=torch.ones(1, 1), mask=mask, sparsity=NM(2, 4))
    unpacked, kept = packed.unpack()
    assert kept.tolist() == [[True, False, False, True, True, True, False, False]]
    assert unpacked.tolist() == [[8, 8, 8, 15, 8, 8, 8, 8]]
    assert packed.decode().tolist() == [[0, 0, 0, 7, 0, 0, 0, 0]]


def test_packing_does_not_depend_on_what_stands_at_pruned_positions() -> None:
    mask = torch.tensor([[True, False, True, False]])
    one, other = (
        pack_weight(
            torch.tensor([codes], dtype=torch.uint8), bits=3, scale=torch.ones(1, 1), mask=mask, sparsity=NM(2, 4)
        )
        for codes in ([1, 2, 3, 4], [1, 7, 3, 0])
    )
    assert torch.equal(one.values, other.values)


def test_signs_have_a_magnitude_and_padding_is_checked(make_linear) -> None:
    packed = make_linear(4, 20, 4, rank=2, signs=2, dtype=torch.float32)
    binary = packed.binary
    bits = [[int(byte) >> bit & 1 for byte in row for bit in range(8)][:20] for row in binary.signs]
    expected = (binary.left @ binary.right) * (1 - 2 * torch.tensor(bits))
    assert torch.equal(binary.decode(), expected)
    adapters = packed.left.decode() @ packed.right.decode()
    assert torch.equal(packed.decode(), packed.decode_base() + adapters + expected)
    assert PackedLinear.from_tensors(packed.format, packed.tensors()).format == packed.format
    beyond = packed.tensors() | {"signs": binary.signs | 0x80}
    with pytest.raises(FormatError, match="the signs mark positions beyond the 20 columns"):
        PackedLinear.from_tensors(packed.format, beyond)
    with pytest.raises(FormatError, match="lacks the tensor signs"):
        PackedLinear.from_tensors(packed.format, {k: t for k, t in packed.tensors().items() if k != "signs"})
    with pytest.raises(FormatError, match=r"sign_right is torch.float32 \(2, 16\), not torch.float32 \(2, 20\)"):
        PackedLinear.from_tensors(packed.format, packed.tensors() | {"sign_right": binary.right[:, :16]})


def test_packing_copies_what_it_stores() -> None:
    values = torch.ones(2, 4)
    packed = pack_weight(values, bits=None)
    values.zero_()
    assert packed.decode().all()


def test_the_effective_weight_has_input_scale_and_adapters(make_linear) -> None:
    packed = make_linear(6, 20, 4, rank=3, scaled=True, sparsity=NM(2, 4))
    base = packed.weight.decode().float() * packed.input_scale.float()
    assert torch.equal(packed.decode_base(), base)
    assert torch.equal(packed.decode(), base + packed.left.decode().float() @ packed.right.decode().float())
    again = PackedLinear.from_tensors(LinearFormat.from_json(packed.format.to_json()), packed.tensors())
    assert torch.equal(again.decode(), packed.decode())
    assert sum(tensor.nbytes for tensor in packed.tensors().values()) == packed.format.nbytes()


CODES = torch.zeros(2, 8, dtype=torch.uint8)
ONE = torch.ones(1, 1)
KEPT = torch.ones(2, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codes_or_values": CODES[0]}, "two dimensions, not the shape (8,)"),
        ({"mask": KEPT}, "one was given without the other"),
        ({"sparsity": NM(2, 4)}, "one was given without the other"),
        ({"mask": KEPT[:1], "sparsity": NM(2, 4)}, "the mask must be bool (2, 8), not torch.bool (1, 8)"),
        ({"scale": None}, "codes of 4 bits need a scale"),
        ({"codes_or_values": CODES + 16}, "code 16 does not fit in 4 bits"),
        ({"codes_or_values": CODES.int()}, "codes must be uint8, not torch.int32"),
        ({"scale": torch.ones(2, 2)}, "scale is torch.float32 (2, 2), not torch.float32 (2, 1)"),
        ({"scale": ONE.int()}, "cannot be torch.int32"),
        ({"mask": KEPT, "sparsity": NM(2, 4)}, "keeps 4 values in a group of 4, 2:4 allows 2"),
        ({"mask": KEPT, "sparsity": NM(2, 3)}, "2:3 sparsity does not divide 8 columns"),
        (
            {"mask": KEPT, "sparsity": Unstructured(), "zero_point": ONE},
            "zero_point is torch.float32 (1, 1), not torch.uint8 (1, 1)",
        ),
    ],
)
def test_packing_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        pack_weight(**{"codes_or_values": CODES, "bits": 4, "scale": ONE} | arguments)
    assert message in str(caught.value)


def test_tensors_that_do_not_fit_the_format_are_refused(make_linear) -> None:
    packed = make_linear(4, 8, 4, rank=2, sparsity=NM(2, 4))
    form, good = packed.format, packed.tensors()

    def message(**changes: object) -> str:
        with pytest.raises(FormatError) as caught:
            PackedLinear.from_tensors(form, {k: v for k, v in (good | changes).items() if v is not None})
        return str(caught.value)

    assert "lacks the tensor left_scale" in message(left_scale=None)
    assert "does not know: extra" in message(extra=ONE)
    assert "values is torch.uint8 (4, 1), not torch.uint8 (4, 2)" in message(values=good["values"][:, :1])
    assert "scale is torch.float32 (4, 1), not torch.bfloat16 (4, 1)" in message(scale=good["scale"].float())
    assert "the pattern is not 2:4" in message(pattern=torch.full_like(good["pattern"], 255))


def test_a_mask_must_keep_as_many_positions_as_values_are_stored(make_weight) -> None:
    packed = make_weight(3, 12, 4, sparsity=Unstructured())
    tensors = packed.tensors()
    wrong = tensors | {"pattern": torch.zeros_like(tensors["pattern"])}
    with pytest.raises(FormatError, match="the pattern keeps 0 positions, but"):
        PackedWeight.from_tensors(packed.format, wrong)
    beyond = tensors | {"pattern": torch.full_like(tensors["pattern"], 240)}
    with pytest.raises(FormatError, match="marks positions beyond the 12 columns"):
        PackedWeight.from_tensors(packed.format, beyond)
