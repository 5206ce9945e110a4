"""These tests need a CUDA GPU, some of them a Hopper one; where there is none they are not collected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends.cuda.layer import FragmentLayer, prepare, stack
from slimc.bench.exact import exact_product, exact_weights
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
collect_ignore = (
    ["test_prefill.py", "test_stream.py"]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)
    else []
)
try:
    import onnxruntime
except ImportError:
    _on_cuda = False
else:
    _on_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
if not _on_cuda:
    collect_ignore += ["test_onnx_decoder.py", "test_onnx_kernels.py"]

PATTERNS = torch.tensor([3, 5, 9, 6, 10, 12], dtype=torch.uint8)
"""All masks that keep two of four."""


def make_layer(
    rows: int,
    columns: int,
    rank: int = 0,
    *,
    dtype: torch.dtype = torch.bfloat16,
    sparse: bool = True,
    group: int | None = None,
    per_tensor: bool = True,
    bits: int | None = 4,
) -> PackedLinear:
    weight = WeightFormat(
        rows,
        columns,
        bits=bits,
        group=group,
        per_tensor=per_tensor and group is None and bits is not None,
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
    if bits is None:
        tensors["values"] = (torch.randn(tensors["values"].shape, generator=generator) * 0.02).to(dtype)
    if sparse:
        nibbles = PATTERNS[torch.randint(6, (rows, -(-columns // 8), 2), generator=generator)]
        tensors["pattern"] = nibbles[..., 0] | (nibbles[..., 1] << 4)
        if columns % 8:
            tensors["pattern"][:, -1] &= 15
    return PackedLinear.assemble(spec, {name: tensor.cuda() for name, tensor in tensors.items()})


def check_result(packed: PackedLinear, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
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


def make_exact_layer(rows: int, columns: int, rank: int = 0, **options: Any) -> PackedLinear:
    return exact_weights(make_layer(rows, columns, rank, **options))


def check_beside_infinite_ranks(
    ranks: Sequence[int], tokens: int, run: Callable[[Tensor, FragmentLayer], Tensor]
) -> None:
    """Neither neighbour of a member of a stack whose t is infinite or NaN may read it."""
    sizes = 512, 256, 300
    parts = [make_layer(rows, 640, rank) for rows, rank in zip(sizes, ranks, strict=True)]
    tensors = parts[1].tensors()
    infinite = {"right_scale": torch.full_like(tensors["right_scale"], torch.inf)}
    members = [parts[0], PackedLinear.assemble(parts[1].format, tensors | infinite), parts[2]]
    x = torch.randn(tokens, 640, dtype=torch.bfloat16, device="cuda")
    first, middle, last = run(x, stack([prepare(member) for member in members])).split(sizes, 1)
    check_result(parts[0], x, None, first)
    assert not middle.isfinite().any()
    check_result(parts[2], x, None, last)


def check_exact_result(packed: PackedLinear, x: Tensor, bias: Tensor | None, y: Tensor, **sharing: int) -> None:
    """The same for a layer of `make_exact_layer`, where nothing but t and y is rounded.

    With the ranks of a model the other bound is larger than the result: it has room for a rounding of each weight.
    ``sharing`` says which blocks hand over sums, see `exact_product`.
    """
    exact, bound = exact_product(packed, x, bias, **sharing)
    assert bool((bound.mean() < 0.1 * exact.std()).item())
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.fixture(scope="session")
def random_layer() -> Callable[..., PackedLinear]:
    """Makes a layer of random codes, or values, on the GPU, all six 2:4 patterns among them."""
    return make_layer


@pytest.fixture(scope="session")
def check() -> Callable[..., None]:
    """Compares a result with the product in float64."""
    return check_result


@pytest.fixture(scope="session")
def exact_layer() -> Callable[..., PackedLinear]:
    """Makes a layer of random codes, with scales that are powers of two, on the GPU."""
    return make_exact_layer


@pytest.fixture(scope="session")
def check_neighbours() -> Callable[..., None]:
    """Runs a stack of three layers of these ranks, the one between with infinite ones, and checks the other two."""
    return check_beside_infinite_ranks


@pytest.fixture(scope="session")
def check_exactly() -> Callable[..., None]:
    """Compares a result of such a layer with the product in float64."""
    return check_exact_result
