"""The CPU kernels: a derived error bound against float64, odd shapes, and each reason to refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from slimc.backends import KERNELS, cpu
from slimc.backends.cpu import INT4PACK, INT4PACK_TOKENS, INT8PACK
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
    [("_int4pack_mm", INT4PACK, 4), ("_int4pack", INT4PACK, 4), ("_int8pack_mm", INT8PACK, 8)],
)
def test_a_release_without_the_function_only_loses_the_kernel(
    monkeypatch: pytest.MonkeyPatch, name: str, kernel: Kernel, bits: int
) -> None:
    form = linear(16, 64, bits).format
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
