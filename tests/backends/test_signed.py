"""Layers with signs beside what other kernels compute: choosing, the layout and its way back, and products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimc.backends import KERNELS, LAYOUTS, SIGNED, SIGNED_LAYOUTS
from slimc.backends.cpu_signs import INT4PACK_SIGNS
from slimc.backends.cuda import compiler, layout
from slimc.backends.cuda.layer import prepare, source, stack_shared
from slimc.backends.cuda.signs import SignProduct, StackedSigns, launch_defines
from slimc.backends.dynamo import slim
from slimc.backends.signed import signed, signed_layout
from slimc.errors import KernelError
from slimc.runtime.formats import NM, BinaryFormat, LinearFormat, WeightFormat
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedBinary, PackedLinear, PackedWeight, pack_signs, pack_weight
from slimc.runtime.select import Case, Kernel, choose
from tests.backends.cuda.conftest import compute

BF16 = torch.bfloat16
CPU = torch.device("cpu")
ROWS, COLUMNS = 48, 128


def make_binary(rank: int = 1, dtype: torch.dtype = BF16, columns: int = COLUMNS, rows: int = ROWS) -> PackedBinary:
    generator = torch.Generator().manual_seed(rank)
    negative = torch.rand(rows, columns, generator=generator) < 0.5
    left, right = (torch.rand(sides, generator=generator) for sides in ((rows, rank), (rank, columns)))
    return PackedBinary(pack_signs(negative), left.to(dtype), right.to(dtype))


@pytest.fixture
def packed() -> PackedLinear:
    """2:4 codes with a scale every 64 columns, and signs."""
    return make_layer(ROWS)


def make_layer(rows: int, rank: int = 1) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    spec = WeightFormat(rows, COLUMNS, bits=4, group=64, sparsity=NM(2, 4), dtype=BF16)
    values = torch.randint(0, 256, (rows, COLUMNS // 4), dtype=torch.uint8, generator=generator)
    pattern = torch.full((rows, COLUMNS // 8), 0x96, dtype=torch.uint8)
    scale = torch.rand(rows, 2, generator=generator).to(BF16)
    return PackedLinear(PackedWeight(spec, values, pattern, scale), binary=make_binary(rank, rows=rows))


def run_rest(x: Tensor, layer: Any, bias: Tensor | None) -> Tensor:
    rest = layout.restore((layer.format,), layout.tensors(layer), 0)
    return torch.nn.functional.linear(x, rest.weight.decode(), bias)


def accepts_few(_spec: LinearFormat, _dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    if device.type != "cpu":
        return "is for the CPU"
    return "is for few tokens" if tokens > 8 else None


FEW = Kernel("few", accepts_few, prepare, run_rest)
ANY = Kernel("any", lambda *_case: None, prepare, run_rest)
LAYOUT = signed_layout(replace(layout.FRAGMENTS, name="fragments for a test"), SignProduct)


def exact_product(
    packed: PackedLinear, x: Tensor, bias: Tensor | None, composed_product: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return the product, and how far one may be from it that is computed in bfloat16, the signs by themselves."""
    assert packed.binary is not None
    exact, bound = composed_product(replace(packed, binary=None), x, bias)
    matrix = packed.binary.decode().double()
    signs, size = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
    # Rounded are x * right, its product with the signs, that with left, sums over the rank, and that with y and bias.
    rank = packed.binary.left.shape[1]
    return exact + signs, bound + 2**-9 * ((3 + rank) * size + 2 * (exact.abs() + signs.abs()))


def test_what_is_computed_is_the_rest_and_the_signs(
    packed: PackedLinear, composed_product: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    kernel = signed("both", (FEW, ANY), SignProduct, LAYOUT.prepare)
    bias = torch.rand(ROWS).to(BF16)
    module = SlimLinear(packed, bias, kernels=[kernel])
    assert not module.holds_canonical
    for shape in ((2, 3, COLUMNS), (COLUMNS,), (40, COLUMNS)):
        x = torch.randn(shape).to(BF16)
        with torch.no_grad():
            y = module(x)
        exact, bound = exact_product(packed, x, bias, composed_product)
        assert y.shape == (*shape[:-1], ROWS)
        assert bool(((y.double() - exact).abs() <= bound).all())
    for name, tensor in packed.tensors().items():
        assert torch.equal(module.state_dict()[name], tensor)
    assert torch.equal(module.signs, packed.binary.signs)


def run_together(x: Tensor, layer: Any, product: SignProduct, bias: Tensor | None) -> Tensor | None:
    matrix = layout.restore((layer.format,), layout.tensors(layer), 0).weight.decode()
    return torch.nn.functional.linear(x, matrix + product.matrix(), bias) if len(x) > 1 else None


@pytest.mark.parametrize("rank", [1, 3])
def test_both_parts_become_one_matrix_where_both_would_be_decoded(rank: int) -> None:
    kernel = signed("both", (ANY,), SignProduct, LAYOUT.prepare, together=run_together)
    packed = make_layer(ROWS, rank)
    assert packed.binary is not None
    bias, x = torch.rand(ROWS).to(BF16), torch.randn(2, 20, COLUMNS).to(BF16)
    state = kernel.prepare(packed)
    y = kernel.run(x, state, bias)
    matrix = packed.weight.decode() + packed.binary.decode().to(BF16)
    assert torch.equal(y, torch.nn.functional.linear(x, matrix, bias))
    # Adapters, rounded inputs and what else a weight is not stay with the kernels of the rest.
    scaled = replace(packed, input_scale=torch.rand(COLUMNS).to(BF16))
    assert not replace(state, formats=(scaled.format,)).is_plain


def test_siblings_are_computed_as_one_and_each_gets_its_bytes_back(
    composed_product: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    seen: list[Case] = []
    stacking = Kernel("stacking", lambda *_case: None, prepare, compute, stack_shared, expects=seen.append)
    kernel = signed("both", (ANY, stacking), SignProduct, LAYOUT.prepare, StackedSigns)
    # Rows of all but the last end with a tile of every kernel.
    siblings = [make_layer(256), make_layer(512, 2), make_layer(ROWS, 3)]
    assert kernel.stack is not None
    shared, parts = kernel.stack([kernel.prepare(one) for one in siblings])
    for tokens in (1, 40):
        x = torch.randn(tokens, COLUMNS).to(BF16)
        together = kernel.run(x, shared, None).split([one.format.rows for one in siblings], dim=1)
        assert seen[-1].members == tuple(replace(one.format, binary=None) for one in siblings)
        # Sums of a larger product may be taken in another order.
        for one, part, y in zip(siblings, parts, together, strict=True):
            exact, bound = exact_product(one, x, None, composed_product)
            for found in (y, kernel.run(x, part, None)):
                assert bool(((found.double() - exact).abs() <= bound).all())
    formats, named = tuple(one.format for one in siblings), LAYOUT.tensors(shared)
    for part, one in enumerate(siblings):
        back = LAYOUT.restore(formats, named, part)
        assert back.format == one.format
        for name, tensor in one.tensors().items():
            assert torch.equal(back.tensors()[name], tensor)
        again = LAYOUT.assemble(formats, named, part)
        assert again.product.packed.signs.data_ptr() == named[f"signs_{part}"].data_ptr()
        assert torch.equal(kernel.run(x, again, None), kernel.run(x, parts[part], None))


def test_siblings_that_do_not_fit_each_other_stay_apart(packed: PackedLinear) -> None:
    assert signed("both", (ANY,), SignProduct).stack is None
    alone = signed("both", (ANY,), SignProduct, join=StackedSigns)
    assert alone.stack is not None
    with pytest.raises(KernelError, match="compute one at a time"):
        alone.stack([alone.prepare(packed)] * 2)
    with pytest.raises(KernelError, match="up to 8 binary parts of one width"):
        StackedSigns([SignProduct(make_binary())] * 9)
    with pytest.raises(KernelError, match="up to 8 binary parts of one width"):
        StackedSigns([SignProduct(make_binary()), SignProduct(make_binary(columns=64))])


def test_reasons(packed: PackedLinear) -> None:
    spec, meta = packed.format, torch.device("meta")
    one = signed("both", (FEW,), SignProduct)
    assert one.refuses(spec, BF16, CPU, 8) is None
    assert one.refuses(spec, BF16, CPU, 16) == "is for few tokens"
    assert one.refuses(spec, BF16, meta, 8) == "is for the CPU"
    assert one.refuses(replace(spec, binary=None), BF16, CPU, 8) == "is for layers with a binary part"
    other = replace(spec, binary=BinaryFormat(ROWS, COLUMNS, 1, torch.float32))
    assert one.refuses(other, BF16, CPU, 8) == "needs a magnitude of signs in the dtype of x, not float32"
    assert FEW.refuses(spec, BF16, CPU, 8) == "does not compute the binary part (signs x rank 1 bf16)"
    with pytest.raises(KernelError, match="has no signs to add"):
        one.prepare(replace(packed, binary=None))
    state = one.prepare(packed)
    with pytest.raises(KernelError, match="no kernel computes 16 tokens of 2:4 int4/64 .* rank 1 bf16: .*few tokens"):
        one.run(torch.zeros(16, COLUMNS, dtype=BF16), state, None)


@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize("sparsity", [NM(2, 4), None])
def test_no_kernel_of_the_table_forgets_signs(bits: int | None, sparsity: NM | None) -> None:
    weight = WeightFormat(128, 256, bits, sparsity=sparsity, dtype=BF16)
    spec = LinearFormat(weight, binary=BinaryFormat(128, 256, 1, BF16))
    able = {kernel.name for kernel in KERNELS if kernel.binary}
    assert able == {*(kernel.name for kernel in SIGNED), "cuda-decoded", "decode"}
    for kernel in KERNELS:
        if not kernel.binary:
            assert "does not compute the binary part" in str(kernel.refuses(spec, BF16, CPU, 1))
    chosen, _ = choose(KERNELS, spec, BF16, CPU, 1)
    assert chosen is not None
    assert chosen.binary


def test_layouts_with_signs_are_known() -> None:
    assert set(SIGNED_LAYOUTS) < set(LAYOUTS)
    assert [one.name for one in SIGNED_LAYOUTS] == [
        *("fragments and signs", "cusparselt and signs", "composed and signs"),
    ]
    prepared = [kernel.prepare for kernel in SIGNED]
    assert [one.prepare for one in SIGNED_LAYOUTS] == prepared[1:4]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("columns", [COLUMNS, 44])
def test_signs_written_out_give_the_product(rank: int, columns: int) -> None:
    binary = make_binary(rank, torch.float32, columns)
    x, y = torch.randn(5, columns), torch.randn(5, ROWS)
    expected = y + torch.ops.slim.sign_low_rank(x, *binary.tensors().values())
    assert torch.allclose(SignProduct(binary).add(y.clone(), x), expected, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 7, 32])
@pytest.mark.parametrize(("columns", "rank"), [(COLUMNS, 1), (40, 2)])
def test_the_int4_kernel_computes_signs(tokens: int, columns: int, rank: int) -> None:
    codes = torch.randint(0, 16, (ROWS, columns), dtype=torch.uint8)
    weight = pack_weight(codes, bits=4, scale=torch.rand(ROWS, -(-columns // 32)).to(BF16), group=32)
    packed = PackedLinear(weight, binary=make_binary(rank, columns=columns))
    module = SlimLinear(packed, kernels=KERNELS)
    few, many = module.choices()
    assert few.kernel is INT4PACK_SIGNS
    assert many.kernel is not None
    assert many.kernel.name == "decode"
    assert "for more than 32 tokens decoding the weight and its signs is faster" in str(many)
    x = torch.randn(tokens, columns).to(BF16)
    dense, matrix = packed.weight.decode().double(), packed.binary.decode().double()
    exact = x.double() @ (dense + matrix).T
    size = x.double().abs() @ (dense.abs() + matrix.abs()).T
    with torch.no_grad():
        y = module(x)
    # The weight's rounding, that of x * right, of the products and of their sums.
    assert bool(((y.double() - exact).abs() <= 2**-9 * (3 + rank) * size).all())


# What Dynamo and Inductor say about themselves is not slimc's.
@pytest.mark.filterwarnings("ignore")
def test_siblings_with_signs_are_computed_one_by_one_in_a_compiled_graph() -> None:
    codes = torch.randint(0, 16, (ROWS, COLUMNS), dtype=torch.uint8)
    weight = pack_weight(codes, bits=4, scale=torch.rand(ROWS, 1).to(BF16))
    layers = [SlimLinear(PackedLinear(weight, binary=make_binary(rank)), kernels=KERNELS) for rank in (1, 2)]
    siblings = nn.ModuleDict({"first": layers[0], "second": layers[1]})

    def both(x: Tensor) -> Tensor:
        return siblings["first"](x) + siblings["second"](x)

    x = torch.randn(3, COLUMNS).to(BF16)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(both, backend=slim, fullgraph=True)(x), both(x))


@pytest.mark.parametrize("tiles", [(1, 1), (2, 1), (1, 2), (2, 2), (2, 4)])
@pytest.mark.parametrize(("arch", "major"), [("sm_80", 8), ("sm_90a", 9)])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_the_kernel_compiles(tiles: tuple[int, int], arch: str, major: int, dtype: torch.dtype) -> None:
    defines = launch_defines(dtype, major, *tiles)
    cubin = compiler.compile_source(source("signs.cu"), name="add_signs", arch=arch, defines=defines)
    assert b"add_signs" in cubin
    assert b"write_signs" in cubin


def test_the_order_of_columns_in_the_kernel_is_that_of_its_signs() -> None:
    """A model of ``signs.cu``: which signs and inputs meet in a product of the tensor cores."""
    generator = torch.Generator().manual_seed(0)
    word = int(torch.randint(0, 2**32, (1,), generator=generator))
    x = torch.randn(32, generator=generator, dtype=torch.float64)
    total = 0.0
    for step in range(8):
        for half in range(2):
            first = 2 * step + half
            ones = (word << (15 - first)) & 0x80008000
            near, far = x[first], x[first + 16]  # halves of words `step` and `step + 8`
            total += float(-near if ones & 0x8000 else near) + float(-far if ones & 0x80000000 else far)
    signs = torch.tensor([-1.0 if word >> bit & 1 else 1.0 for bit in range(32)], dtype=torch.float64)
    assert total == pytest.approx(float(signs @ x), abs=1e-12)
