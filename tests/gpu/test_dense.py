"""Decoding on the GPU, bit for bit, and the kernels that multiply by what it gives, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends import cusparselt
from slimc.backends.cuda import dense
from slimc.backends.cuda.unpack import unpacker, whole_pieces
from slimc.runtime.formats import NM, LinearFormat, Unstructured, WeightFormat
from slimc.runtime.packing import PackedLinear, PackedWeight, pack_weight

CUDA = torch.device("cuda")
SPARSITIES = {"dense": None, "2:4": NM(2, 4), "1:4": NM(1, 4), "4:8": NM(4, 8), "unstructured": Unstructured()}


def make_weight(
    rows: int,
    columns: int,
    bits: int | None = 4,
    sparsity: str = "dense",
    scales: str | int = "tensor",
    asymmetric: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> PackedWeight:
    """Make a matrix of random codes, on the GPU; ``scales`` is "tensor", "row" or the columns of a group."""
    generator = torch.Generator().manual_seed(rows + columns)
    kind, mask = SPARSITIES[sparsity], None
    if isinstance(kind, NM):
        order = torch.rand(rows, columns // kind.m, kind.m, generator=generator).argsort(-1)
        mask = (order < kind.n).flatten(1)
    elif kind is not None:
        mask = torch.rand(rows, columns, generator=generator) < 0.5
    if bits is None:
        values = torch.randn(rows, columns, generator=generator).to(dtype)
        return to_cuda(pack_weight(values, bits=None, mask=mask, sparsity=kind))
    group = scales if isinstance(scales, int) else None
    shape = (1, 1) if scales == "tensor" else (rows, -(-columns // group) if group else 1)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = ((torch.rand(shape, generator=generator) + 0.5) * 0.01).to(dtype)
    zero = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8) if asymmetric else None
    return to_cuda(pack_weight(codes, bits=bits, scale=scale, zero_point=zero, group=group, mask=mask, sparsity=kind))


def to_cuda(packed: PackedWeight) -> PackedWeight:
    return PackedWeight(packed.format, **{name: tensor.cuda() for name, tensor in packed.tensors().items()})


def decode(packed: PackedWeight) -> Tensor:
    """Decode into memory that holds NaN before, and beyond the columns."""
    spec = packed.format
    whole = torch.full((spec.rows, whole_pieces(spec.columns) + 16), float("nan"), dtype=spec.dtype, device=CUDA)
    unpacker(packed)(whole[:, :-8])
    assert bool(whole[:, -8:].isnan().all())
    assert not bool(whole[:, spec.columns : -8].any())
    return whole[:, : spec.columns]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8, None])
def test_every_width_and_pattern(bits: int | None, sparsity: str, dtype: torch.dtype) -> None:
    if bits is None and sparsity == "dense":
        return
    for rows, columns in ((1, 8), (7, 1352), (130, 4096)):
        packed = make_weight(rows, columns, bits, sparsity, dtype=dtype)
        assert torch.equal(decode(packed), packed.decode())


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("scales", ["row", 8, 64, 128])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_scales_and_zero_points(scales: str | int, sparsity: str, asymmetric: bool) -> None:
    for bits in (3, 4, 8):
        packed = make_weight(33, 1352, bits, sparsity, scales, asymmetric)
        assert torch.equal(decode(packed), packed.decode())


def test_columns_that_are_not_its_own_become_zeros() -> None:
    for sparsity in SPARSITIES:
        packed = make_weight(33, 1352, 4, sparsity)
        wide = torch.full((33, 1352 + 2 * 1024), float("nan"), dtype=torch.bfloat16, device=CUDA)
        unpacker(packed)(wide)
        assert torch.equal(wide, torch.nn.functional.pad(packed.decode(), (0, 2 * 1024)))


@pytest.mark.parametrize("columns", [1, 57, 409, 1001])
def test_columns_that_are_no_whole_pieces(columns: int) -> None:
    for bits in (3, 4, 5):
        packed = make_weight(65, columns, bits, "dense", "row")
        assert torch.equal(decode(packed), packed.decode())
    packed = make_weight(65, 4 * columns, 4, "2:4")
    assert torch.equal(decode(packed), packed.decode())


def make_layer(weight: PackedWeight, rank: int, bits: int | None = 4, scaled: bool = False) -> PackedLinear:
    spec = weight.format
    left = make_weight(spec.rows, rank, bits, "dense", 64 if bits else "tensor") if rank else None
    right = make_weight(rank, spec.columns, bits, "dense", 64 if bits else "tensor") if rank else None
    scale = (torch.rand(spec.columns, device=CUDA) + 0.5).to(spec.dtype) if scaled else None
    return PackedLinear(weight, left, right, scale)


def exact(packed: PackedLinear, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the product in float64 and how far roundings may lead from it: of W, of x, of t, of y, of W + L @ R."""
    unit = torch.finfo(x.dtype).eps / 2
    weight, x, scale = packed.weight.decode().double(), x.double(), packed.input_scale
    scaled = x if scale is None else x * scale.double()
    y, size = scaled @ weight.T, scaled.abs() @ weight.abs().T
    if packed.left is not None and packed.right is not None:
        left, right = packed.left.decode().double(), packed.right.decode().double()
        y += x @ right.T @ left.T
        size += 2 * (x.abs() @ right.abs().T @ left.abs().T)
    return y + bias.double(), unit * ((y + bias.double()).abs() + 1.1 * size) + 2**-20 * size


@pytest.mark.parametrize("tokens", [1, 3, 64, 700])
@pytest.mark.parametrize(("rank", "bits"), [(0, None), (57, 4), (64, None)])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_dense_kernel(tokens: int, rank: int, bits: int | None, scaled: bool) -> None:
    for weight in (
        make_weight(192, 640, 4, "2:4"),
        make_weight(200, 644, 3, "dense", 64, asymmetric=True),
        make_weight(192, 640, 4, "unstructured", "row"),
        make_weight(192, 640, None, "dense"),
    ):
        packed = make_layer(weight, rank, bits, scaled)
        shape = (tokens, weight.format.columns)
        x, bias = (torch.randn(*size, dtype=torch.bfloat16, device=CUDA) for size in (shape, (weight.format.rows,)))
        spec = packed.format
        assert dense.DENSE.accepts(spec, x.dtype, CUDA, tokens) is None
        y = dense.run(x, dense.prepare(packed), bias)
        expected, bound = exact(packed, x, bias)
        assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("tokens", [1, 8, 13, 300])
@pytest.mark.parametrize(("rank", "bits"), [(0, None), (57, 4), (64, None)])
@pytest.mark.parametrize("scaled", [False, True])
def test_cusparselt(tokens: int, rank: int, bits: int | None, scaled: bool) -> None:
    for width, scales in ((None, "tensor"), (4, "tensor"), (4, 64), (3, "row")):
        packed = make_layer(make_weight(192, 640, width, "2:4", scales), rank, bits, scaled)
        x, bias = (torch.randn(*size, dtype=torch.bfloat16, device=CUDA) for size in ((tokens, 640), (192,)))
        assert cusparselt.CUSPARSELT.accepts(packed.format, x.dtype, CUDA, tokens) is None
        layer = cusparselt.prepare(packed)
        y = cusparselt.run(x[None], layer, bias)[0]
        expected, bound = exact(packed, x, bias)
        assert bool(((y.double() - expected).abs() <= bound).all())
        again = cusparselt.run(x[None], layer, bias)[0]
        assert torch.equal(y, again)


def test_metadata_is_the_librarys() -> None:
    weight = make_weight(320, 1344, None, "2:4")
    assert cusparselt._refuses_form(CUDA) is None
    ours = cusparselt.prepare(PackedLinear(weight)).compressed
    assert ours is not None
    assert torch.equal(ours, torch._cslt_compress(weight.decode()))


def test_what_is_accepted() -> None:
    def reason(kernel: Any, spec: WeightFormat) -> str | None:
        found: str | None = kernel.accepts(LinearFormat(spec), spec.dtype, CUDA, 64)
        return found

    assert "2:4 weights, not int4 per tensor" in str(
        reason(cusparselt.CUSPARSELT, WeightFormat(64, 64, 4, per_tensor=True, dtype=torch.bfloat16))
    )
    sparse = {"bits": 4, "per_tensor": True, "sparsity": NM(2, 4)}
    assert "illegal" in str(reason(cusparselt.CUSPARSELT, WeightFormat(64, 64, **sparse, dtype=torch.float16)))
    assert "multiples" in str(reason(cusparselt.CUSPARSELT, WeightFormat(65, 64, **sparse, dtype=torch.bfloat16)))
    assert "multiple of 8" in str(reason(dense.DENSE, WeightFormat(64, 64, 4, 12, dtype=torch.bfloat16)))


def test_both_are_captured_into_a_graph() -> None:
    packed = make_layer(make_weight(192, 640, 4, "2:4"), 57)
    x = torch.randn(64, 640, dtype=torch.bfloat16, device=CUDA)
    for kernel in (dense.DENSE, cusparselt.CUSPARSELT):
        state = kernel.prepare(packed)
        expected = kernel.run(x, state, None)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kernel.run(x, state, None)
        graph.replay()
        assert torch.equal(captured, expected)
