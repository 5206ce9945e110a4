"""The order of codes that ``mixed.cu`` reads, by a reader of its own; the way back; and that the kernels compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimc.backends import COMPOSED, KERNELS
from slimc.backends.cuda import compiler, mixed
from slimc.backends.cuda.layer import source
from slimc.errors import KernelError
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear, pack_weight
from slimc.runtime.select import choose

MIXTURES = [
    (1,),
    (2, 1),
    (3, 1),
    (4, 1),
    (1, 2, 3, 4, 3),
    (4, 4, 2, 1),
    (5, 1),
    (6, 2),
    (7, 3),
    (8, 4),
    (8, 7, 6, 5, 3),
]


def build(rows: int, widths: tuple[int, ...], group: int, columns: int, asymmetric: bool, rank: int) -> PackedLinear:
    generator = torch.Generator().manual_seed(rows)
    codes = [torch.randint(0, 1 << width, (rows, group), generator=generator) for width in widths]
    zeros = [torch.randint(0, 1 << width if width > 1 else 1, (rows, 1), generator=generator) for width in widths]
    weight = pack_weight(
        torch.cat(codes, dim=1)[:, :columns].to(torch.uint8),
        bits=None,
        scale=(torch.rand(rows, len(widths), generator=generator) + 0.1).bfloat16(),
        zero_point=torch.cat(zeros, dim=1).to(torch.uint8) if asymmetric else None,
        group=group,
        widths=widths,
    )
    if not rank:
        return PackedLinear(weight)
    left, right = (pack_weight(torch.randn(*shape).bfloat16(), bits=None) for shape in ((rows, rank), (rank, columns)))
    return PackedLinear(weight, left, right, torch.rand(columns).bfloat16())


def lane_codes(words: list[int], width: int, pair: int) -> tuple[int, int]:
    """Read a pair as the kernel does: shifted to the low bits of both halves of a word."""
    whole = 16 // width
    if pair >= whole * width:
        place = 16 - 16 % width + pair - whole * width
        word = sum(((words[bit] >> (place - bit)) & (0x00010001 << bit)) for bit in range(width))
    else:
        word = words[pair // whole] >> (width * (pair % whole))
    return word & ((1 << width) - 1), word >> 16 & ((1 << width) - 1)


@pytest.mark.parametrize("widths", MIXTURES, ids=str)
def test_a_lane_finds_the_codes_of_two_rows_and_sixteen_columns(widths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    units = [torch.randint(0, 1 << width, (20, 64), generator=generator) for width in widths]
    codes = torch.cat(units, dim=1).to(torch.uint8)
    lines = mixed.code_lines(codes, list(widths))
    assert lines.shape == (2, sum(widths), 32)
    for tile, unit, lane in ((0, 0, 0), (0, len(widths) - 1, 31), (1, 0, 13), (1, len(widths) // 2, 6)):
        first, width = sum(widths[:unit]), widths[unit]
        words = [word & 0xFFFFFFFF for word in lines[tile, first : first + width, lane].tolist()]
        for pair in range(16):
            row = 16 * tile + lane // 4 + 8 * (pair % 2)
            column = 64 * unit + 16 * (lane % 4) + 4 * (pair // 4) + 2 * (pair % 4 // 2)
            expected = tuple(codes[row, column : column + 2].tolist()) if row < 20 else (0, 0)
            assert lane_codes(words, width, pair) == expected


@pytest.mark.parametrize("widths", MIXTURES, ids=str)
@pytest.mark.parametrize(("rows", "group", "short"), [(16, 64, 0), (37, 64, 0), (5, 128, 64)])
@pytest.mark.parametrize(("asymmetric", "rank"), [(False, 0), (True, 3)])
def test_the_canonical_bytes_come_back(
    rows: int, widths: tuple[int, ...], group: int, short: int, asymmetric: bool, rank: int
) -> None:
    packed = build(rows, widths, group, group * len(widths) - short, asymmetric, rank)
    layer = mixed.prepare(packed)
    kept = mixed.tensors(layer)
    back = mixed.restore((packed.format,), kept, 0)
    assert back.format == packed.format
    for name, tensor in packed.tensors().items():
        assert torch.equal(back.tensors()[name], tensor)
    again = mixed.assemble((packed.format,), kept, 0)
    assert torch.equal(again.units, layer.units)
    assert (again.adapters is None) == (rank == 0)


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
@pytest.mark.parametrize(("columns", "group"), [(192, 64), (320, 128), (128, None)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_codes_of_one_width_are_groups_that_are_alike(
    bits: int, columns: int, group: int | None, asymmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = WeightFormat(20, columns, bits, group, asymmetric=asymmetric, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(bits)
    named = {
        name: torch.randint(0, 256, shape, dtype=kind, generator=generator) if kind == torch.uint8
        else torch.rand(shape, generator=generator).to(kind)
        for name, (shape, kind) in LinearFormat(spec).tensor_specs().items()
    }  # fmt: skip
    packed = PackedLinear.from_tensors(LinearFormat(spec), named)
    layer = mixed.prepare(packed)
    codes, _ = packed.weight.unpack()
    assert torch.equal(mixed.line_codes(layer.codes, mixed.unit_widths(spec), 20), codes.to(torch.uint8))
    back = mixed.restore((packed.format,), mixed.tensors(layer), 0)
    assert back.format == packed.format
    assert all(torch.equal(back.tensors()[name], tensor) for name, tensor in packed.tensors().items())
    assert refusal(spec, monkeypatch) is None


def test_codes_of_one_width_with_adapters_or_rounded_inputs_are_for_other_kernels() -> None:
    weight = WeightFormat(16, 128, 8, dtype=torch.bfloat16)
    factors = [WeightFormat(*shape, dtype=torch.bfloat16) for shape in ((16, 8), (8, 128))]
    for spec in (LinearFormat(weight, *factors), LinearFormat(weight, activation="int8")):
        reason = mixed._refuses(spec, torch.bfloat16, torch.device("cuda"))
        assert "without adapters and without rounded inputs" in (reason or "")


def test_a_layer_of_one_width_is_held_in_one_order_at_all_numbers_of_tokens(gpu: object) -> None:
    del gpu
    spec = LinearFormat(WeightFormat(4096, 4096, 8, 128, dtype=torch.bfloat16))
    device = torch.device("cuda", 0)
    found = [choose(KERNELS, spec, torch.bfloat16, device, tokens) for tokens in (1, 64, 65, 4096)]
    assert [kernel for kernel, _ in found] == [mixed.MIXED, mixed.MIXED, mixed.MIXED_DENSE, mixed.MIXED_DENSE]
    assert "in another order" in (COMPOSED.accepts(spec, torch.bfloat16, device, 100) or "")


def test_units_know_their_place() -> None:
    spec = WeightFormat(16, 320, 4, 128, dtype=torch.bfloat16, widths=(3, 4, 1))
    assert mixed.unit_widths(spec) == [3, 3, 4, 4, 1]
    places = mixed._units(spec, torch.device("cpu"))
    assert [(place // 16, place % 16) for place in places.tolist()] == [(0, 3), (3, 3), (6, 4), (10, 4), (14, 1)]


@pytest.mark.parametrize(
    ("asymmetric", "widest", "group", "tiles", "tokens", "warps"),
    [(0, 4, 1, 1, 1, 16), (1, 4, 2, 2, 4, 8), (1, 6, 1, 4, 2, 8), (1, 8, 2, 1, 4, 16)],
)
@pytest.mark.parametrize(("arch", "number", "bfloat16"), [("sm_80", 80, 1), ("sm_90a", 90, 0), ("sm_90a", 90, 1)])
def test_the_kernels_compile(
    arch: str, number: int, bfloat16: int, asymmetric: int, widest: int, group: int, tiles: int, tokens: int, warps: int
) -> None:
    defines = {
        "BFLOAT16": bfloat16, "ARCH": number, "ASYMMETRIC": asymmetric, "WIDEST": widest, "GROUP_UNITS": group,
        "TILES": tiles, "TOKEN_TILES": tokens, "WARPS": warps, "DEPTH": mixed._depth(tiles, warps, widest),
    }  # fmt: skip
    cubin = compiler.compile_source(source("mixed.cu"), name="mixed", arch=arch, defines=defines)
    assert cubin.startswith(b"\x7fELF")


def test_siblings_are_one_launch_and_each_gets_its_bytes_back() -> None:
    """Layers of other widths, rows that end within a tile, one of them with adapters."""
    siblings = [build(40, (2, 4, 1), 64, 192, True, 0), build(20, (3, 1, 4), 64, 192, True, 3)]
    siblings[1] = replace(siblings[1], input_scale=None)
    layers = [mixed.prepare(packed) for packed in siblings]
    stacked, parts = mixed.stack(layers)
    assert parts == layers
    assert sum(tensor.nbytes for tensor in mixed.tensors(stacked).values()) == sum(
        tensor.nbytes for one in layers for tensor in mixed.tensors(one).values()
    )
    formats = tuple(packed.format for packed in siblings)
    for part, packed in enumerate(siblings):
        back = mixed.restore(formats, mixed.tensors(stacked), part)
        assert back.format == packed.format
        for name, tensor in packed.tensors().items():
            assert torch.equal(back.tensors()[name], tensor)
        again = mixed.assemble(formats, mixed.tensors(stacked), part)
        assert again.codes.data_ptr() == layers[part].codes.data_ptr()
    arguments = mixed._arguments(stacked.members, 2, None, None, torch.zeros(1))
    places = [(one.first_row, one.first_block, one.rows) for one in arguments.members[:2]]
    assert places == [(0, 0, 40), (40, 2, 20)]
    assert (arguments.member_count, arguments.rows) == (2, 60)


def test_layers_that_cannot_be_one_launch_stay_apart() -> None:
    first = mixed.prepare(build(16, (2, 1), 64, 128, True, 0))
    others = [
        build(16, (2, 1), 64, 128, False, 0),
        build(16, (2, 1), 128, 256, True, 0),
        build(16, (2, 1), 64, 128, True, 3),
    ]
    for packed in others:
        with pytest.raises(KernelError, match="cannot be stacked"):
            mixed.stack([first, mixed.prepare(packed)])
    with pytest.raises(KernelError, match="at most 8 layers can be stacked, not 9"):
        mixed.stack([first] * 9)


def refusal(spec: WeightFormat, monkeypatch: pytest.MonkeyPatch, tokens: int = 1) -> str | None:
    monkeypatch.setattr(mixed, "refuses_machine", lambda spec, dtype, device: None)
    return mixed.MIXED.accepts(LinearFormat(spec), torch.bfloat16, torch.device("cuda"), tokens)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"columns": 128, "bits": 4, "group": 64}, "codes of different widths, or of more than 4 bits"),
        ({"columns": 128, "bits": 8, "per_tensor": True}, "takes codes of one width with scales for rows or groups"),
        ({"columns": 96, "bits": 8}, "needs columns and groups of multiples of 64"),
        ({"columns": 64, "bits": 2, "group": 32, "widths": (2, 1)}, "needs columns and groups of multiples of 64"),
        ({"columns": 96, "bits": 2, "group": 64, "widths": (2, 1)}, "needs columns and groups of multiples of 64"),
        (
            {"columns": 128, "bits": 2, "group": 64, "widths": (2, 1), "sparsity": NM(2, 4)},
            "knows dense weights, not 2:4 int1-2/64",
        ),
    ],
)
def test_reasons_to_refuse(form: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = WeightFormat(16, dtype=torch.bfloat16, **form)  # type: ignore[arg-type]
    assert reason in (refusal(spec, monkeypatch) or "")


def test_many_tokens_are_for_the_dense_product(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = WeightFormat(16, 128, 2, 64, dtype=torch.bfloat16, widths=(2, 1))
    assert refusal(spec, monkeypatch) is None
    assert "more than 64 tokens" in (refusal(spec, monkeypatch, 128) or "")


@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_tokens_are_taken_thirty_two_at_a_time(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = build(20, (2, 4, 1), 64, 192, True, 3)
    counts = []

    def launch(layer: mixed.MixedLayer, _shape: object, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        counts.append(len(x))
        y.copy_(torch.nn.functional.linear(x, packed.weight.decode(), bias))

    class Adapters:
        def add(self, y: Tensor, x: Tensor) -> Tensor:
            return y.addmm_(torch.mm(x, packed.right.decode().t()), packed.left.decode().t())

    monkeypatch.setattr(mixed, "launch", launch)
    monkeypatch.setattr(mixed, "expand", lambda layer: packed.weight.decode())
    monkeypatch.setattr(mixed, "_processors", lambda index: 132)
    layer = mixed.prepare(packed)
    layer.adapters = Adapters()  # type: ignore[assignment]
    x, bias = torch.randn(tokens, 1, 192).bfloat16(), torch.randn(20).bfloat16()
    y = mixed.run(x, layer, bias)
    assert y.shape == (tokens, 1, 20)
    assert sum(counts) == tokens
    assert max(counts) <= 32
    torch.testing.assert_close(y, mixed.run_dense(x, layer, bias))


@pytest.mark.parametrize(
    ("rows", "tokens", "shape"),
    [(4096, 1, (1, 16)), (8432, 32, (1, 16)), (8448, 8, (4, 8)), (22016, 16, (4, 8)), (22016, 17, (2, 8))],
)
def test_layers_of_many_rows_take_several_tiles(rows: int, tokens: int, shape: tuple[int, int]) -> None:
    assert mixed.launch_shape(rows, tokens, 132) == mixed.LaunchShape(*shape)
    assert mixed.fits(mixed.LaunchShape(*shape), tokens)
