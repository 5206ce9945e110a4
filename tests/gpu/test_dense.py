"""Decoding on the GPU, bit for bit, and the kernels that multiply by what it gives, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends import KERNELS, cusparselt
from slimc.backends.cuda import dense, stored
from slimc.backends.cuda.expand import expand_kept, expand_left, expand_right, expand_weight
from slimc.backends.cuda.layer import prepare, stack
from slimc.backends.cuda.stored import StoredMatrix
from slimc.backends.cuda.unpack import MOST_PRODUCT_TOKENS, Unpacker, whole_pieces
from slimc.backends.tuning import tune
from slimc.bench.unwritten import into_nans
from slimc.errors import KernelError
from slimc.runtime.formats import NM, LinearFormat, Unstructured, WeightFormat
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear, PackedWeight, pack_weight
from slimc.runtime.select import choose

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
        # No zeros: cuSPARSELt would keep other columns in their place.
        values = (torch.randn(rows, columns, generator=generator).abs() + 0.01).to(dtype)
        values *= torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
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
    Unpacker(packed).write(whole[:, :-8])
    assert bool(whole[:, -8:].isnan().all())
    assert not bool(whole[:, spec.columns : -8].any())
    return whole[:, : spec.columns]


def check_products(packed: PackedWeight) -> None:
    """Products of a few tokens: sums of exact products in float32, rounded once, the same at every call."""
    spec, matrix = packed.format, StoredMatrix(packed)
    unit, exact_weight = torch.finfo(spec.dtype).eps / 2, packed.decode().double()
    bias = random(spec.rows, dtype=spec.dtype)
    for tokens in (1, 2, 3, MOST_PRODUCT_TOKENS):
        x, before = random(tokens, spec.columns, dtype=spec.dtype), random(tokens, spec.rows + 3, dtype=spec.dtype)
        exact, size = x.double() @ exact_weight.T, x.double().abs() @ exact_weight.abs().T
        y = matrix.product(x, bias)
        assert torch.equal(y, matrix.product(x.t().contiguous().t(), bias))
        bound = unit * (exact + bias).abs() + spec.columns * 2.0**-23 * (size + bias.abs())
        assert bool(((y.double() - exact - bias.double()).abs() <= bound).all())
        assert torch.equal(y, matrix.product(x, bias))
        into = before[:, : spec.rows]
        exact = exact + into.double()
        bound = unit * exact.abs() + spec.columns * 2.0**-23 * (size + into.abs())
        kept = before.clone()
        assert matrix.add_product(into, x).data_ptr() == before.data_ptr()
        assert bool(((into.double() - exact).abs() <= bound).all())
        assert torch.equal(before[:, spec.rows :], kept[:, spec.rows :])
        filled = matrix.product(x, filled=True)
        assert filled.shape == (tokens, whole_pieces(spec.rows))
        assert not bool(filled[:, spec.rows :].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8, None])
def test_every_width_and_pattern(bits: int | None, sparsity: str, dtype: torch.dtype) -> None:
    if bits is None and sparsity == "dense":
        return
    for rows, columns in ((1, 8), (7, 1352), (130, 4096)):
        packed = make_weight(rows, columns, bits, sparsity, dtype=dtype)
        assert torch.equal(decode(packed), packed.decode())
        check_products(packed)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("scales", ["row", 8, 64, 128])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_scales_and_zero_points(scales: str | int, sparsity: str, asymmetric: bool) -> None:
    for bits in (3, 4, 8):
        packed = make_weight(33, 1352, bits, sparsity, scales, asymmetric)
        assert torch.equal(decode(packed), packed.decode())
        check_products(packed)


def test_columns_that_are_not_its_own_become_zeros() -> None:
    for sparsity in SPARSITIES:
        packed = make_weight(33, 1352, 4, sparsity)
        wide = torch.full((33, 1352 + 2 * 1024), float("nan"), dtype=torch.bfloat16, device=CUDA)
        Unpacker(packed).write(wide)
        assert torch.equal(wide, torch.nn.functional.pad(packed.decode(), (0, 2 * 1024)))


@pytest.mark.parametrize("columns", [1, 57, 409, 1001])
def test_columns_that_are_no_whole_pieces(columns: int) -> None:
    for bits in (3, 4, 5):
        packed = make_weight(65, columns, bits, "dense", "row")
        assert torch.equal(decode(packed), packed.decode())
        check_products(packed)
    packed = make_weight(65, 4 * columns, 4, "2:4")
    assert torch.equal(decode(packed), packed.decode())
    check_products(packed)


def make_layer(weight: PackedWeight, rank: int, bits: int | None = 4, scaled: bool = False) -> PackedLinear:
    spec = weight.format
    scales = 64 if bits else "tensor"
    left = make_weight(spec.rows, rank, bits, "dense", scales, dtype=spec.dtype) if rank else None
    right = make_weight(rank, spec.columns, bits, "dense", scales, dtype=spec.dtype) if rank else None
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


def check(packed: PackedLinear, x: Tensor, bias: Tensor, y: Tensor) -> None:
    expected, bound = exact(packed, x, bias)
    assert bool(((y.double() - expected).abs() <= bound).all())


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=CUDA)


@pytest.mark.parametrize("tokens", [*range(1, 18), 63, 64, 65, 700])
@pytest.mark.parametrize(("rank", "bits"), [(0, None), (57, 4), (64, None)])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_stored_in_any_form(tokens: int, rank: int, bits: int | None, scaled: bool) -> None:
    for weight in (
        make_weight(192, 640, 4, "2:4"),
        make_weight(200, 644, 3, "dense", 64, asymmetric=True),
        make_weight(192, 640, 4, "unstructured", "row"),
        make_weight(192, 640, None, "dense"),
    ):
        packed = make_layer(weight, rank, bits, scaled)
        x, bias = random(tokens, weight.format.columns), random(weight.format.rows)
        assert stored.STORED.accepts(packed.format, x.dtype, CUDA, tokens) is None
        check(packed, x, bias, into_nans(stored.run, x, stored.prepare(packed), bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", ["tensor", "row", 32, 64, 128])
@pytest.mark.parametrize("sparsity", ["dense", "2:4"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (200, 1352), (4096, 4096)])
def test_fragments_become_the_same_numbers(
    rows: int, columns: int, sparsity: str, scales: str | int, dtype: torch.dtype
) -> None:
    weight = make_weight(rows, columns, 4, sparsity, scales, dtype=dtype)
    layer = prepare(PackedLinear(weight))
    assert torch.equal(expand_weight(layer), weight.decode())
    if sparsity == "2:4" and columns % 16 == 0:
        kept = torch.full((rows, columns // 2), float("nan"), dtype=dtype, device=CUDA)
        expand_kept(layer, kept)
        assert torch.equal(kept.flatten(), weight.decode().flatten()[weight.unpack()[1].flatten()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (200, 1352), (512, 1024)])
def test_values_become_the_same_matrix(rows: int, columns: int, dtype: torch.dtype, random_layer: Any) -> None:
    packed = random_layer(rows, columns, bits=None, dtype=dtype)
    layer = prepare(packed)
    assert torch.equal(expand_weight(layer), packed.weight.decode())
    if columns % 16 == 0:
        kept = torch.full((rows, columns // 2), float("nan"), dtype=dtype, device=CUDA)
        expand_kept(layer, kept)
        assert torch.equal(kept, packed.weight.values)


@pytest.mark.parametrize("rank", [1, 57, 64, 130])
def test_fragments_of_factors(rank: int) -> None:
    packed = make_layer(make_weight(200, 648), rank)
    layer = prepare(packed)
    left, right = expand_left(layer), expand_right(layer)
    assert left.shape[1] == right.shape[0] == -(-rank // 64) * 64
    assert torch.equal(left[:, :rank], packed.left.decode())
    assert torch.equal(right[:rank], packed.right.decode())
    # Ranks beyond the last one are zeros in R; what L has there, the padding of its bytes among it, is finite.
    assert not bool(right[rank:].any())
    assert bool(left.isfinite().all())


@pytest.mark.parametrize("tokens", [*range(1, 18), 63, 64, 65, 700])
@pytest.mark.parametrize("ranks", [(57, 57), (130, 20), (0, 0)])
def test_the_dense_kernel_and_stacks(tokens: int, ranks: tuple[int, int]) -> None:
    forms = ((4, "2:4", "tensor"), (4, "dense", 64), (4, "2:4", "row"), (None, "2:4", "tensor"))
    for bits, sparsity, scales in forms:
        weights = [make_weight(rows, 640, bits, sparsity, scales) for rows in (512, 384)]
        parts = [make_layer(weight, rank) for weight, rank in zip(weights, ranks, strict=True)]
        x, bias = random(tokens, 640), random(896)
        for run in (dense.run, cusparselt.run_decoded) if sparsity == "2:4" else (dense.run,):
            y = into_nans(run, x[None], stack([prepare(part) for part in parts]), bias)[0]
            check(parts[0], x, bias[:512], y[:, :512])
            check(parts[1], x, bias[512:], y[:, 512:])
            check(parts[0], x, bias[:512], into_nans(run, x, prepare(parts[0]), bias[:512]))


@pytest.mark.parametrize("tokens", [*range(1, 18), 63, 64, 65, 700])
def test_the_dense_kernel_in_float16(tokens: int) -> None:
    packed = make_layer(make_weight(512, 640, 4, "2:4", dtype=torch.float16), 57)
    x, bias = random(tokens, 640, dtype=torch.float16), random(512, dtype=torch.float16)
    check(packed, x, bias, into_nans(dense.run, x, prepare(packed), bias))


@pytest.mark.parametrize("tokens", [*range(1, 18), 63, 64, 65, 300])
@pytest.mark.parametrize(("rank", "bits"), [(0, None), (57, 4), (64, None)])
@pytest.mark.parametrize("scaled", [False, True])
def test_cusparselt(tokens: int, rank: int, bits: int | None, scaled: bool) -> None:
    packed = make_layer(make_weight(256, 640, None, "2:4"), rank, bits, scaled)
    x, bias = random(tokens, 640), random(256)
    assert cusparselt.CUSPARSELT.accepts(packed.format, x.dtype, CUDA, tokens) is None
    layer = cusparselt.prepare(packed)
    check(packed, x, bias, into_nans(cusparselt.run, x[None], layer, bias)[0])


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (256, 640), (384, 1408), (4096, 11008)])
def test_metadata_is_the_librarys(rows: int, columns: int) -> None:
    weight = make_weight(rows, columns, None, "2:4")
    ours, theirs = cusparselt.prepare(PackedLinear(weight)).compressed, torch._cslt_compress(weight.decode())
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))
    codes = make_weight(rows, columns, 4, "2:4")
    layer = prepare(PackedLinear(codes))
    _, values, metadata = cusparselt._empty(codes.format, layer.codes)
    expand_kept(layer, values)
    cusparselt.order_metadata(layer, metadata)
    theirs = torch._cslt_compress(torch.where(codes.unpack()[1], codes.decode().abs() + 1, 0))
    assert torch.equal(metadata.view(torch.int16), theirs.view(torch.int16).flatten()[values.numel() :])


def test_what_is_accepted() -> None:
    def reason(kernel: Any, spec: WeightFormat) -> str | None:
        found: str | None = kernel.accepts(LinearFormat(spec), spec.dtype, CUDA, 64)
        return found

    assert reason(cusparselt.CUSPARSELT, WeightFormat(128, 128, sparsity=NM(2, 4), dtype=torch.bfloat16)) is None
    sparse = WeightFormat(128, 128, 4, per_tensor=True, sparsity=NM(2, 4), dtype=torch.bfloat16)
    assert reason(cusparselt.DECODED, sparse) is None
    assert reason(dense.DENSE, sparse) is None
    float16 = replace(sparse, dtype=torch.float16)
    assert "is for bfloat16" in str(reason(cusparselt.DECODED, float16))
    assert reason(dense.DENSE, float16) is None
    assert reason(stored.STORED, sparse) is None
    assert "multiple of 8" in str(reason(stored.STORED, WeightFormat(64, 64, 4, 12, dtype=torch.bfloat16)))


def test_all_are_captured_into_a_graph() -> None:
    codes, values = make_weight(256, 640, 4, "2:4"), make_weight(256, 640, None, "2:4")
    x = random(64, 640)
    for kernel in (dense.DENSE, stored.STORED, cusparselt.DECODED, cusparselt.CUSPARSELT):
        state = kernel.prepare(make_layer(values if kernel is cusparselt.CUSPARSELT else codes, 57))
        expected = kernel.run(x, state, None)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kernel.run(x, state, None)
        graph.replay()
        assert torch.equal(captured, expected)


def test_tuning_finds_the_fastest(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("SLIMC_CACHE_DIR", str(tmp_path))
    layer = SlimLinear(make_layer(make_weight(512, 640, 4, "2:4"), 57), kernels=KERNELS)
    tune(layer, tokens=(1, 256))
    times = KERNELS.timings.of(layer.format, torch.bfloat16, layer.values.device)
    assert {"cuda-dense", "cuda-decode"} <= times[1].keys()
    assert "cuda-decode" not in times[256]
    for tokens in (1, 256):
        chosen = choose(KERNELS, layer.format, torch.bfloat16, layer.values.device, tokens)[0]
        assert times[tokens][chosen.name] == min(times[tokens].values())
    x = random(256, 640)
    check(layer.packed, x, random(512) * 0, layer(x))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)
        with pytest.raises(KernelError, match="captured"):
            tune(layer, tokens=(2,))
