"""The CUDA kernels for groups of 1 to 8 bits, against the product with the decoded weight in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends import KERNELS
from slimc.backends.cuda import mixed
from slimc.bench.unwritten import into_nans
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear, pack_weight

SHAPES = [mixed.LaunchShape(*shape) for shape in ((1, 4), (1, 16), (2, 8), (4, 4), (4, 8), (2, 16))]


def make_layer(
    rows: int,
    columns: int,
    widths: tuple[int, ...],
    *,
    group: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    asymmetric: bool = True,
    rank: int = 0,
    scaled: bool = False,
) -> PackedLinear:
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.cat([torch.randint(0, 1 << width, (rows, group), generator=generator) for width in widths], dim=1)
    scale = ((torch.rand(rows, len(widths), generator=generator) + 0.5) * 0.01).to(dtype)
    zeros = [torch.randint(0, 1 << width if width > 1 else 1, (rows, 1), generator=generator) for width in widths]
    weight = pack_weight(
        codes[:, :columns].to(torch.uint8),
        bits=None,
        scale=scale,
        zero_point=torch.cat(zeros, dim=1).to(torch.uint8) if asymmetric else None,
        group=group,
        widths=widths,
    )
    factors = [
        pack_weight(0.01 * torch.randn(*shape, generator=generator).to(dtype), bits=None)
        for shape in ((rows, rank), (rank, columns))
        if rank
    ]
    inputs = torch.rand(columns, generator=generator).to(dtype) if scaled else None
    packed = PackedLinear(weight, *factors, input_scale=inputs)
    return PackedLinear.assemble(packed.format, {name: one.cuda() for name, one in packed.tensors().items()})


def run(packed: PackedLinear, x: Tensor, bias: Tensor | None, shape: mixed.LaunchShape | None = None) -> Tensor:
    """Run the kernel in memory that holds NaN before, too, and return the result, which must not change."""
    layer = mixed.prepare(packed)
    if shape is None:
        return into_nans(mixed.run, x, layer, bias)

    def launch() -> Tensor:
        y = x.new_empty(len(x), packed.format.rows)
        mixed.launch(layer, shape, x, bias, y)
        return y

    return into_nans(launch)


@pytest.mark.parametrize(
    "widths", [(1, 2, 3, 4, 4, 3, 2, 1, 1, 3), (5, 2, 3, 6, 4, 7, 2, 8, 1, 5)], ids=["few", "many"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("tokens", [*range(1, 18), 32, 33, 50, 63, 64, 65])
def test_every_number_of_tokens(
    check: Any, tokens: int, asymmetric: bool, dtype: torch.dtype, widths: tuple[int, ...]
) -> None:
    packed = make_layer(200, 640, widths, dtype=dtype, asymmetric=asymmetric)
    x, bias = torch.randn(tokens, 640, dtype=dtype, device="cuda"), torch.randn(200, dtype=dtype, device="cuda")
    check(packed, x, bias, run(packed, x, bias))


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("width", range(1, 9))
def test_each_width_by_itself(check: Any, width: int, asymmetric: bool) -> None:
    packed = make_layer(48, 576, (*[width] * 8, 1), asymmetric=asymmetric)
    x = torch.randn(5, 576, dtype=torch.bfloat16, device="cuda")
    check(packed, x, None, run(packed, x, None))


@pytest.mark.parametrize("mixture", [(1, 3, 2, 4, 2), (1, 6, 2, 5, 3)], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(16, 64, 64), (1, 128, 128), (1000, 4160, 128), (4096, 11008, 64)]
)
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [(shape, tokens) for shape in SHAPES for tokens in (1, 16, 32) if mixed.fits(shape, tokens)],
    ids=str,
)
def test_shapes_of_layers_and_launches(
    check: Any, rows: int, columns: int, group: int, tokens: int, shape: mixed.LaunchShape, mixture: tuple[int, ...]
) -> None:
    widths = tuple(mixture[index % 5] for index in range(-(-columns // group)))
    packed = make_layer(rows, columns, widths, group=group)
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    check(packed, x, None, run(packed, x, None, shape))


@pytest.mark.parametrize("widths", [(1, 2, 3, 4, 4, 3, 2, 1, 1, 3, 2), (8, 2, 5, 4, 6, 3, 7, 1, 8, 5, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_dense_weight_is_what_decode_gives(dtype: torch.dtype, asymmetric: bool, widths: tuple[int, ...]) -> None:
    packed = make_layer(1000, 704, widths, dtype=dtype, asymmetric=asymmetric)
    assert torch.equal(mixed.expand(mixed.prepare(packed)), packed.weight.decode())


@pytest.mark.parametrize("tokens", [1, 16, 200])
@pytest.mark.parametrize(("rank", "scaled"), [(0, True), (9, False), (9, True)])
def test_adapters_and_scaled_inputs(tokens: int, rank: int, scaled: bool) -> None:
    packed = make_layer(96, 320, (2, 4, 1, 3, 2), rank=rank, scaled=scaled)
    x = torch.randn(tokens, 320, dtype=torch.bfloat16, device="cuda")
    layer = mixed.prepare(packed)
    exact, size = x.double() @ packed.decode().double().T, x.double().abs() @ packed.decode().double().abs().T
    for y in (mixed.run(x, layer, None), mixed.run_dense(x, layer, None)):
        # Inputs, t and the two sums are rounded to 8 bits of significand.
        assert bool(((y.double() - exact).abs() <= 2**-8 * (exact.abs() + 4 * size)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [None, 64, 128])
@pytest.mark.parametrize(("bits", "asymmetric"), [(5, False), (6, True), (8, False), (8, True)])
@pytest.mark.parametrize("tokens", [1, 16, 40, 200])
def test_many_bits_of_one_width(
    check: Any, tokens: int, bits: int, asymmetric: bool, group: int | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(bits)
    shape = (200, 1 if group is None else 640 // group)
    zeros = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    weight = pack_weight(
        torch.randint(0, 1 << bits, (200, 640), generator=generator, dtype=torch.uint8),
        bits=bits,
        scale=((torch.rand(*shape, generator=generator) + 0.5) * 0.01).to(dtype),
        zero_point=zeros if asymmetric else None,
        group=group,
    )
    packed = PackedLinear(weight)
    packed = PackedLinear.assemble(packed.format, {name: one.cuda() for name, one in packed.tensors().items()})
    x, bias = torch.randn(tokens, 640, dtype=dtype, device="cuda"), torch.randn(200, dtype=dtype, device="cuda")
    layer = SlimLinear(packed, bias, kernels=KERNELS)
    names = dict.fromkeys(choice.kernel.name for choice in layer.choices() if choice.kernel)
    assert list(names) == ["cuda-mixed", "cuda-mixed-dense"]
    with torch.no_grad():
        check(packed, x, bias, layer(x))
    state = layer.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in packed.tensors().items())


@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_siblings_in_one_launch(check: Any, tokens: int) -> None:
    """Rows that end within a tile and within a block, widths that differ, and more rows than one wave of blocks has."""
    members = [
        make_layer(200, 320, (2, 4, 1, 3, 2)),
        make_layer(9000, 320, (3, 6, 2, 3, 4)),
        make_layer(24, 320, (1, 2, 1, 4, 1)),
    ]
    stacked, parts = mixed.stack([mixed.prepare(packed) for packed in members])
    x = torch.randn(tokens, 320, dtype=torch.bfloat16, device="cuda")
    results = mixed.run(x, stacked, None).split([packed.format.rows for packed in members], dim=1)
    for packed, y, part in zip(members, results, parts, strict=True):
        check(packed, x, None, y)
        check(packed, x, None, mixed.run(x, part, None))


def test_a_layer_holds_its_codes_once_and_gives_the_same_bytes_back(check: Any) -> None:
    packed = make_layer(200, 640, (1, 2, 3, 4, 4, 3, 2, 1, 1, 3))
    bias = torch.randn(200, dtype=torch.bfloat16, device="cuda")
    layer = SlimLinear(packed, bias, kernels=KERNELS)
    with torch.no_grad():
        x = torch.randn(3, 640, dtype=torch.bfloat16, device="cuda")
        check(packed, x, bias, layer(x))
    # A kernel may be named for several ranges of tokens, with other reasons against the others in each.
    names = dict.fromkeys(choice.kernel.name for choice in layer.choices() if choice.kernel)
    assert list(names) == ["cuda-mixed", "cuda-mixed-dense"]
    state = layer.state_dict()
    for name, tensor in packed.tensors().items():
        assert torch.equal(state[name], tensor)
