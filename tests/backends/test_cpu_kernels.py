"""The CPU kernels: a derived error bound against float64, odd shapes, and each reason to refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from slimc.backends import KERNELS, cpu
from slimc.backends.cpu import (
    INT4PACK,
    INT4PACK_TOKENS,
    INT8MM,
    INT8MM_TOKENS,
    INT8PACK,
    MAX_EXACT_COLUMNS,
)
from slimc.backends.reference import DECODE
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import NM, PackedLinear, PackedWeight, Sparsity, Unstructured, pack_weight
from slimc.runtime.select import Kernel, choices, choose

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weight(
    rows: int,
    columns: int,
    bits: int | None,
    *,
    group: int | None = None,
    per_tensor: bool = False,
    asymmetric: bool = False,
    sparsity: Sparsity = None,
    dtype: torch.dtype = BF16,
) -> PackedWeight:
    mask = None
    if isinstance(sparsity, NM):
        mask = torch.rand(rows, columns // sparsity.m, sparsity.m).argsort(-1).flatten(1) < sparsity.n
    elif sparsity is not None:
        mask = torch.rand(rows, columns) < 0.5
    if bits is None:
        return pack_weight(torch.randn(rows, columns).to(dtype), bits=None, mask=mask, sparsity=sparsity)
    shape = (1, 1) if per_tensor else (rows, -(-columns // (group or columns)))
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    zero_point = torch.full(shape, 3, dtype=torch.uint8) if asymmetric else None
    scale = (torch.rand(shape) + 0.1).to(dtype)
    return pack_weight(codes, bits=bits, scale=scale, zero_point=zero_point, group=group, mask=mask, sparsity=sparsity)


def linear(
    rows: int,
    columns: int,
    bits: int | None,
    rank: int = 0,
    adapter_bits: int | None = 4,
    adapter_group: int | None = 64,
    scaled: bool = False,
    **form: Any,
) -> PackedLinear:
    group = adapter_group if adapter_bits else None
    return PackedLinear(
        weight(rows, columns, bits, **form),
        weight(rows, rank, adapter_bits, group=group) if rank else None,
        weight(rank, columns, adapter_bits, group=group) if rank else None,
        (torch.rand(columns) + 0.5).to(BF16) if scaled else None,
    )


INT4_CASES = {
    "the recipe": {"rows": 48, "columns": 64, "bits": 4, "rank": 6, "per_tensor": True, "sparsity": NM(2, 4)},
    "odd sizes": {"rows": 21, "columns": 52, "bits": 4, "rank": 7, "scaled": True},
    "groups that do not divide": {"rows": 32, "columns": 576, "bits": 4, "group": 128, "rank": 57},
    "groups of 96": {"rows": 16, "columns": 192, "bits": 3, "group": 96, "rank": 70},
    "wide groups": {"rows": 16, "columns": 512, "bits": 2, "group": 256},
    "unstructured": {"rows": 16, "columns": 64, "bits": 3, "sparsity": Unstructured(), "scaled": True},
    "16-bit adapters": {"rows": 16, "columns": 40, "bits": 4, "rank": 5, "adapter_bits": None},
    "adapters in short groups": {"rows": 16, "columns": 64, "bits": 4, "rank": 20, "adapter_group": 8},
    "adapters in groups of 32": {"rows": 16, "columns": 256, "bits": 4, "rank": 40, "adapter_group": 32},
}
INT8_CASES = {
    "per tensor": {"rows": 48, "columns": 64, "bits": 8, "rank": 6, "per_tensor": True, "sparsity": NM(2, 4)},
    "odd sizes": {"rows": 21, "columns": 51, "bits": 6, "rank": 7, "scaled": True},
    "plain": {"rows": 16, "columns": 40, "bits": 5},
}
CASES = [
    *(pytest.param(INT4PACK, case, id=f"int4pack: {name}") for name, case in INT4_CASES.items()),
    *(pytest.param(INT8PACK, case, id=f"int8pack: {name}") for name, case in INT8_CASES.items()),
]


@pytest.mark.parametrize(("kernel", "case"), CASES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_kernel_is_within_its_rounding_errors(kernel: Kernel, case: dict[str, Any], tokens: int) -> None:
    torch.manual_seed(0)
    packed = linear(**case)
    layer = SlimLinear(packed, torch.randn(case["rows"]).to(BF16), kernels=[kernel])
    assert kernel.accepts(packed.format, BF16, CPU, tokens) is None
    x = torch.randn(tokens, 1, case["columns"]).to(BF16)
    y = layer(x).double()

    scale = torch.ones(()) if packed.input_scale is None else packed.input_scale
    base = packed.weight.decode().double()
    exact = (x.double() * scale.double()) @ base.t() + layer.bias.double()
    size = (x.double() * scale.double()).abs() @ base.abs().t() + layer.bias.double().abs()
    if packed.left is not None and packed.right is not None:
        left, right = packed.left.decode().double(), packed.right.decode().double()
        exact = exact + (x.double() @ right.t()) @ left.t()
        size = size + (x.double().abs() @ right.abs().t()) @ left.abs().t()
    # The oracle rounds each weight to bfloat16, the kernels do not. Through the adapters that is two roundings,
    # beside the inner product, the result and the sum with the bias; one more covers products of roundings.
    unit = torch.finfo(BF16).eps / 2
    bound = (6 * unit + (case["columns"] + 80) * 2.0**-24) * size
    assert bool(((y - exact).abs() <= bound).all())
    assert y.shape == (tokens, 1, case["rows"])


@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_a_kernel_is_a_function_of_the_packed_bytes(kernel: Kernel, case: dict[str, Any]) -> None:
    packed = linear(**case)
    again = PackedLinear.from_tensors(packed.format, {name: t.clone() for name, t in packed.tensors().items()})
    x = torch.randn(3, case["columns"]).to(BF16)
    assert torch.equal(*(SlimLinear(one, kernels=[kernel])(x) for one in (packed, again)))


INT8MM_CASES = {
    "the recipe": INT4_CASES["the recipe"],
    "odd sizes": {"rows": 21, "columns": 51, "bits": 6, "rank": 7, "scaled": True},
    "unstructured": {"rows": 7, "columns": 64, "bits": 3, "sparsity": Unstructured()},
    "8 bits": {"rows": 16, "columns": 40, "bits": 8, "rank": 3, "adapter_bits": None},
}
ROUNDED_CASES = [
    *(pytest.param(INT8MM, "int8", case, id=f"int8mm: {name}") for name, case in INT8MM_CASES.items()),
    *(pytest.param(INT4PACK, "int8", case, id=f"int4pack, int8: {name}") for name, case in INT4_CASES.items()),
    *(pytest.param(INT4PACK, "float8_e4m3fn", case, id=f"int4pack, fp8: {name}") for name, case in INT4_CASES.items()),
    *(pytest.param(INT8PACK, "float8_e4m3fn", case, id=f"int8pack, fp8: {name}") for name, case in INT8_CASES.items()),
    *(pytest.param(DECODE, "int8", case, id=f"decode, int8: {name}") for name, case in INT8MM_CASES.items()),
]


@pytest.mark.parametrize(("kernel", "activation", "case"), ROUNDED_CASES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_kernel_with_rounded_inputs_keeps_to_the_bound(
    kernel: Kernel,
    activation: str,
    case: dict[str, Any],
    dtype: torch.dtype,
    tokens: int,
    rounded_product: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> None:
    torch.manual_seed(0)
    packed = replace(linear(**case), activation=activation)
    if kernel.accepts(packed.format, dtype, CPU, 1) is not None:
        assert dtype != BF16
        return
    layer = SlimLinear(packed, torch.randn(case["rows"]).to(BF16), kernels=[kernel])
    x = torch.randn(tokens, 1, case["columns"]).to(dtype)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (tokens, 1, case["rows"]))
    ideal, bound = rounded_product(packed, x, layer.bias)
    assert bool(((y.double() - ideal).abs() <= bound).all())


def test_products_of_int8_codes_are_exact() -> None:
    """Both operands at their largest, and in the second row one of the products: float32 sums would lose it."""
    columns = 4096
    codes = torch.zeros(2, columns, dtype=torch.uint8)
    codes[1, -1] = 255
    one = pack_weight(codes, bits=8, scale=torch.ones(1, 1))
    layer = SlimLinear(PackedLinear(one, activation="int8"), kernels=[INT8MM])
    y = layer(torch.full((1, columns), 127.0))
    exact = [-127 * 128 * columns, -127 * 128 * (columns - 1) + 127 * 127]
    assert torch.equal(y, torch.tensor([exact], dtype=torch.int64).float())


def test_the_table_takes_exact_products_where_they_are_faster() -> None:
    form = replace(linear(16, 64, 4, rank=5), activation="int8").format
    few, many, *_, most = choices(KERNELS, form, BF16, CPU)
    assert (few.kernel, few.last_tokens, many.kernel, many.last_tokens) == (INT4PACK, 8, INT8MM, INT8MM_TOKENS)
    assert many.refusals == {"int4pack": "for more than 8 tokens products of int8 codes are faster"}
    assert most.kernel is DECODE
    assert most.refusals["int8mm"] == "for more than 256 tokens decoding the weight is faster"
    assert choices(KERNELS, form, torch.float32, CPU)[0].kernel is INT8MM
    grouped = replace(linear(16, 64, 4, group=32), activation="int8").format
    assert choose(KERNELS, grouped, BF16, CPU, 64)[0] is INT4PACK
    assert choose(KERNELS, grouped, BF16, CPU, 256)[0] is DECODE


@pytest.mark.parametrize(
    ("activation", "case", "dtype", "reason"),
    [
        (None, {"bits": 4}, BF16, "is for layers with int8 inputs (Activations)"),
        ("float8_e4m3fn", {"bits": 4}, BF16, "is for layers with int8 inputs (Activations)"),
        ("int8", {"bits": 4}, torch.float64, "computes in float32, not in float64"),
        ("int8", {"bits": 4, "group": 32}, BF16, "holds one scale a row, not one for 32 columns"),
        ("int8", {"bits": 4, "asymmetric": True}, BF16, "holds symmetric codes only"),
        ("int8", {"bits": None}, BF16, "holds codes, not bf16"),
    ],
)
def test_exact_products_refuse(activation: str | None, case: dict[str, Any], dtype: torch.dtype, reason: str) -> None:
    form = replace(linear(16, 64, **case), activation=activation).format
    assert INT8MM.accepts(form, dtype, CPU, 1) == reason


def test_a_single_column_is_not_left_to_products_of_codes_that_read_beyond_it() -> None:
    packed = replace(linear(21, 1, 4), activation="int8")
    assert INT8MM.accepts(packed.format, BF16, CPU, 20) == "PyTorch's product of int8 codes needs two columns or more"
    x = torch.randn(20, 1)
    y = SlimLinear(packed, kernels=KERNELS)(x)
    assert torch.equal(y, SlimLinear(packed, kernels=[DECODE])(x))


def test_exact_products_refuse_sums_that_may_overflow_and_other_devices() -> None:
    form = replace(linear(1, MAX_EXACT_COLUMNS, 8), activation="int8").format
    assert INT8MM.accepts(form, BF16, CPU, 1) is None
    assert INT8MM.accepts(form, BF16, torch.device("meta"), 1) == "runs on the CPU, not on meta"
    wider = replace(form, weight=replace(form.weight, columns=MAX_EXACT_COLUMNS + 1))
    assert INT8MM.accepts(wider, BF16, CPU, 1) == "sums of more than 132104 products may not fit in 32 bits"
    assert MAX_EXACT_COLUMNS * 127 * 128 < 2**31


@pytest.mark.parametrize(
    ("kernel", "case", "dtype", "tokens", "reason"),
    [
        (INT4PACK, {"bits": 8}, BF16, 1, "holds codes of up to 4 bits, not int8 per channel"),
        (INT4PACK, {"bits": None}, BF16, 1, "holds codes of up to 4 bits, not bf16"),
        (INT4PACK, {"bits": 4, "asymmetric": True}, BF16, 1, "holds symmetric codes only"),
        (INT4PACK, {"bits": 4, "group": 48}, BF16, 1, "groups of 48 columns are not a multiple of 32"),
        (INT4PACK, {"bits": 4}, torch.float32, 1, "fast for bfloat16 inputs only, not float32"),
        (INT4PACK, {"bits": 4, "dtype": torch.float32}, BF16, 1, "reads bfloat16 scales, not float32"),
        (INT4PACK, {"bits": 4}, BF16, 256, "for more than 128 tokens decoding the weight is faster"),
        (INT8PACK, {"bits": None}, BF16, 1, "holds codes, not bf16"),
        (INT8PACK, {"bits": 8, "asymmetric": True}, BF16, 1, "holds symmetric codes only"),
        (INT8PACK, {"bits": 8, "group": 32}, BF16, 1, "holds one scale a row, not one for 32 columns"),
        (INT8PACK, {"bits": 8}, BF16, 256, "for more than 128 tokens decoding the weight is faster"),
    ],
)
def test_a_kernel_refuses(kernel: Kernel, case: dict[str, Any], dtype: torch.dtype, tokens: int, reason: str) -> None:
    refused = kernel.accepts(linear(16, 64, **case).format, dtype, CPU, tokens)
    assert refused is not None
    assert refused.startswith(reason)


def test_a_kernel_refuses_other_devices() -> None:
    form = linear(16, 64, 4).format
    assert INT4PACK.accepts(form, BF16, torch.device("meta"), 1) == "runs on the CPU, not on meta"


def test_a_kernel_refuses_a_cpu_without_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert INT8PACK.accepts(linear(16, 64, 8).format, BF16, CPU, 1) == "PyTorch has no vectorised version for this CPU"


@pytest.mark.parametrize(
    ("name", "kernel", "bits"),
    [
        ("_int4pack_mm", INT4PACK, 4),
        ("_int4pack", INT4PACK, 4),
        ("_int8pack_mm", INT8PACK, 8),
        ("_int_mm", INT8MM, 4),
    ],
)
def test_a_release_without_the_function_only_loses_the_kernel(
    monkeypatch: pytest.MonkeyPatch, name: str, kernel: Kernel, bits: int
) -> None:
    form = replace(linear(16, 64, bits).format, activation="int8" if kernel is INT8MM else None)
    assert kernel.accepts(form, BF16, CPU, 1) is None
    monkeypatch.setattr(cpu, name, None)
    assert kernel.accepts(form, BF16, CPU, 1) == f"PyTorch {torch.__version__} does not have this kernel"
    assert choose(KERNELS, form, BF16, CPU, 1)[0] not in (None, kernel)


def test_the_table_ends_with_a_kernel_for_everything() -> None:
    form = linear(16, 64, 4, asymmetric=True, group=8).format
    assert choose(KERNELS, form, torch.float64, torch.device("meta"), 4096)[0] is DECODE
    first, last = choices(KERNELS, linear(16, 64, 4).format, BF16, CPU)
    assert (first.kernel, first.last_tokens, last.kernel) == (INT4PACK, INT4PACK_TOKENS, DECODE)


def test_decode_is_the_reference_op() -> None:
    packed = linear(16, 64, 4, rank=5, scaled=True, sparsity=NM(2, 4))
    x = torch.randn(2, 3, 64).to(BF16)
    assert torch.equal(SlimLinear(packed, kernels=[DECODE])(x), SlimLinear(packed)(x))
