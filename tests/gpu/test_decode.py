"""The CUDA kernel for few tokens, against the product with the decoded weight in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimc.backends import KERNELS
from slimc.backends.cuda.decode import DECODE, launch, make_plan
from slimc.backends.cuda.layer import prepare
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear

PATTERNS = torch.tensor([3, 5, 9, 6, 10, 12], dtype=torch.uint8)
"""All masks that keep two of four."""


def random_layer(
    rows: int,
    columns: int,
    rank: int = 0,
    *,
    dtype: torch.dtype = torch.bfloat16,
    sparse: bool = True,
    group: int | None = None,
    per_tensor: bool = True,
) -> PackedLinear:
    weight = WeightFormat(
        rows,
        columns,
        bits=4,
        group=group,
        per_tensor=per_tensor and group is None,
        sparsity=NM(2, 4) if sparse else None,
        dtype=dtype,
    )
    factors = [WeightFormat(*shape, bits=4, group=64, dtype=dtype) for shape in ((rows, rank), (rank, columns)) if rank]
    spec = LinearFormat(weight, *factors)
    generator = torch.Generator().manual_seed(rows + columns + rank)
    tensors: dict[str, Tensor] = {}
    for name, (shape, kind) in spec.tensor_specs().items():
        if kind == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = ((torch.rand(shape, generator=generator) + 0.5) * 0.01).to(kind)
    if sparse:
        nibbles = PATTERNS[torch.randint(6, (rows, -(-columns // 8), 2), generator=generator)]
        tensors["pattern"] = nibbles[..., 0] | (nibbles[..., 1] << 4)
        if columns % 8:
            tensors["pattern"][:, -1] &= 15
    return PackedLinear.assemble(spec, {name: tensor.cuda() for name, tensor in tensors.items()})


def check(packed: PackedLinear, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Each result must be as near as its roundings allow.

    The kernel sums exact products in float32, rounds t and y to the 16-bit dtype, and multiplies by the unrounded
    product of code and scale where the decoded weight was rounded once.
    """
    unit = torch.finfo(x.dtype).eps / 2
    weight = packed.weight.decode().double()
    exact, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if packed.left is not None and packed.right is not None:
        left, right = packed.left.decode().double(), packed.right.decode().double()
        exact += x.double() @ right.T @ left.T
        size += 2 * (x.double().abs() @ right.abs().T @ left.abs().T)
    if bias is not None:
        exact += bias.double()
    bound = unit * (exact.abs() + 1.1 * size) + 2**-20 * size
    assert bool(((y.double() - exact).abs() <= bound).all())


def run(packed: PackedLinear, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run the kernel three times, into memory that holds NaN before, and return the result, which must not change."""
    layer = prepare(packed)
    plan = make_plan(layer, x.dtype, len(x))
    results = []
    for _ in range(3):
        poison = torch.full((len(x), packed.format.rows), float("nan"), dtype=x.dtype, device=x.device)
        del poison
        results.append(launch(plan, x, layer, bias))
    assert all(torch.equal(results[0], other) for other in results[1:])
    return results[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", range(1, 18))
def test_every_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    packed = random_layer(256, 640, 57, dtype=dtype)
    x, bias = torch.randn(tokens, 640, dtype=dtype, device="cuda"), torch.randn(256, dtype=dtype, device="cuda")
    check(packed, x, bias, run(packed, x, bias))


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(16, 128, 0), (1, 8, 0), (17, 136, 1), (1000, 4088, 57), (4096, 4096, 409), (4096, 11008, 409), (8192, 28672, 64)],
)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_tails_of_rows_columns_and_ranks(rows: int, columns: int, rank: int, tokens: int) -> None:
    packed = random_layer(rows, columns, rank)
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    check(packed, x, None, run(packed, x))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("group", "per_tensor"), [(None, True), (None, False), (64, False), (128, False)])
def test_scales_and_forms(group: int | None, per_tensor: bool, sparse: bool) -> None:
    packed = random_layer(160, 1344, 130, group=group, per_tensor=per_tensor, sparse=sparse)
    x = torch.randn(5, 1344, dtype=torch.bfloat16, device="cuda")
    check(packed, x, None, run(packed, x))


def test_a_layer_chooses_it_and_takes_views_that_begin_anywhere() -> None:
    packed = random_layer(256, 640, 57)
    layer = SlimLinear(packed, kernels=KERNELS)
    assert layer.choices()[0].kernel is DECODE
    x = torch.randn(641, dtype=torch.bfloat16, device="cuda")[1:]
    check(packed, x[None], None, layer(x[None]))


def test_a_captured_graph_and_another_stream_do_not_meet() -> None:
    packed = random_layer(2048, 2048, 204)
    layer = SlimLinear(packed, kernels=KERNELS)
    x = torch.randn(1, 2048, dtype=torch.bfloat16, device="cuda")
    expected = layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            captured = layer(x)
    others = [torch.cuda.Stream() for _ in range(2)]
    results: list[Tensor] = []
    for _ in range(10):
        graph.replay()
        for stream in others:
            with torch.cuda.stream(stream):
                results.extend(layer(x) for _ in range(20))
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
    assert all(torch.equal(result, expected) for result in results)
