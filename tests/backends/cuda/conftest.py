"""What these tests share: layers of random codes, and a kernel for the GPU's form of a layer that runs anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends.cuda import compiler, layer, mixed
from slimc.backends.cuda.layer import FACTOR_GROUP, FragmentLayer, _refuses_format, prepare, stack_shared
from slimc.backends.cuda.layout import restore, tensors
from slimc.runtime.activations import quantize_tokens
from slimc.runtime.bits import pack_bits
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear
from slimc.runtime.select import Kernel


def random_tensors(spec: LinearFormat, seed: int = 0) -> PackedLinear:
    """Fill a format with random bits: codes, and the padding of their streams, take every value."""
    generator = torch.Generator().manual_seed(seed)
    named: dict[str, Tensor] = {}
    for name, (shape, dtype) in spec.tensor_specs().items():
        if dtype == torch.uint8:
            named[name] = torch.randint(0, 256, shape, dtype=dtype, generator=generator)
        else:
            named[name] = (torch.rand(shape, generator=generator) * 0.1 + 0.01).to(dtype)
    if spec.weight.sparsity is not None:
        named["pattern"] = pack_bits(random_mask(spec.weight, generator).to(torch.uint8), 1)
    return PackedLinear.from_tensors(spec, named)


def random_mask(spec: WeightFormat, generator: torch.Generator) -> Tensor:
    """Return which positions a sparse weight keeps."""
    if isinstance(spec.sparsity, NM):
        noise = torch.rand(spec.rows, spec.columns // spec.sparsity.m, spec.sparsity.m, generator=generator)
        return (noise.argsort(dim=-1).argsort(dim=-1) < spec.sparsity.n).flatten(1)
    order = torch.randperm(spec.rows * spec.columns, generator=generator)
    return (order < (spec.nonzeros or 0)).view(spec.rows, spec.columns)


def build(
    rows: int,
    columns: int = 256,
    rank: int = 0,
    *,
    sparse: bool = True,
    group: int | None = None,
    per_tensor: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    bits: int | None = 4,
    seed: int = 0,
) -> PackedLinear:
    """Return a layer of random codes, or of random values if they have no bits."""
    sparsity = NM(2, 4) if sparse else None
    one_scale = per_tensor and group is None and bits is not None
    weight = WeightFormat(rows, columns, bits, group, one_scale, sparsity=sparsity, dtype=dtype)
    factors = [WeightFormat(*shape, bits=4, group=64, dtype=dtype) for shape in ((rows, rank), (rank, columns)) if rank]
    return random_tensors(LinearFormat(weight, *factors), seed)


def part_of(layer: FragmentLayer, first_tile: int, rows: int) -> PackedLinear:
    """Turn a run of rows of a whole stack, which has no canonical form of its own, into a layer for the reference."""
    tiles = slice(first_tile, first_tile - (-rows // 16))
    weight = layer.format.weight
    rank = 0
    named = {"codes": layer.codes[tiles]}
    if layer.metadata is not None:
        named["metadata"] = layer.metadata[tiles]
    named["scale"] = layer.scale[tiles] if weight.group else layer.scale[16 * first_tile : 16 * first_tile + rows]
    if layer.rank_range is not None:
        held = tensors(layer)
        first, units = layer.rank_range[first_tile].tolist()
        rank, ranks = FACTOR_GROUP * units, slice(first // 16, first // 16 + 4 * units)
        named |= {name: held[name][ranks] for name in ("right", "right_scale")}
        named |= {name: held[name][tiles, :units] for name in ("left", "left_scale")}
    own = WeightFormat(rows, weight.columns, weight.bits, weight.group, sparsity=weight.sparsity, dtype=weight.dtype)
    shapes = ((rows, rank), (rank, weight.columns))
    factors = [WeightFormat(*shape, bits=4, group=64, dtype=weight.dtype) for shape in shapes if rank]
    return restore((LinearFormat(own, *factors, activation=layer.format.activation),), named, 0)


def compute(x: Tensor, layer: FragmentLayer, bias: Tensor | None) -> Tensor:
    """Compute y in float64 of what a `FragmentLayer` holds, tile by tile as its ranges of ranks say."""
    if layer.format.left is not None or layer.rank_range is None:
        parts = [restore((layer.format,), tensors(layer), 0)]
    else:
        tiles = range(layer.row_tiles)
        parts = [part_of(layer, tile, min(16, layer.format.rows - 16 * tile)) for tile in tiles]
    y = torch.cat([product(x, part) for part in parts], -1)
    return (y if bias is None else y + bias.double()).to(x.dtype)


def product(x: Tensor, packed: PackedLinear) -> Tensor:
    """Compute y in float64; the weight reads codes as they are, without a rounding of ``s * q`` to the dtype of x."""
    inputs = x.double()
    if packed.activation is not None:
        codes, scale = quantize_tokens(x, packed.activation)
        inputs = codes.double() * scale.double()
    y = inputs @ packed.weight.decode().double().T
    if packed.left is not None and packed.right is not None:
        y += inputs @ packed.right.decode().double().T @ packed.left.decode().double().T
    return y


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Pretends that there is a GPU, of a capability, multiprocessors and shared memory that a test may change."""
    card = SimpleNamespace(capability=(9, 0), multi_processor_count=132, shared_memory_per_block_optin=227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: card.capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device=None: card)
    layer._refuses_toolchain.cache_clear()
    monkeypatch.setattr(compiler, "version", lambda: "13.0")
    yield card
    layer._refuses_toolchain.cache_clear()


@pytest.fixture(scope="session")
def make_packed() -> Callable[..., PackedLinear]:
    """Makes a layer of random codes."""
    return build


@pytest.fixture(scope="session")
def fill() -> Callable[..., PackedLinear]:
    """Fills any format with random bits."""
    return random_tensors


@pytest.fixture(scope="session")
def check(composed_product: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., None]:
    """Compares a result with the product in float64."""

    def check_result(y: Tensor, x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> None:
        exact, bound = composed_product(packed, x, bias)
        assert bool(((y.double() - exact).abs() <= bound).all())

    return check_result


def matrix_of_fragments(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the dense matrix of fragments with groups of 64 columns, by the definition of their order."""
    tiles, units = codes.shape[:2]
    words = codes.view(tiles, units, 8, 4, 4)  # g, t, instruction
    dense = torch.zeros(tiles, 16, units, 64)
    rows = torch.arange(8)
    for place in range(4):
        for instruction in range(4):
            word = words[:, :, :, place, instruction].long() & 0xFFFFFFFF
            for register in range(4):
                column = 16 * instruction + 8 * (register // 2) + 2 * place
                for half in range(2):
                    code = ((word >> (4 * register + 16 * half)) & 15) - 8
                    dense[:, rows + 8 * (register % 2), :, column + half] = code.transpose(1, 2).float()
    bits = torch.stack((scale & 0xFFFF, (scale >> 16) & 0xFFFF), dim=1).to(torch.int32)  # tile, half, group, g
    numbers = bits.to(torch.int16).view(torch.bfloat16).float()
    numbers = numbers.permute(0, 1, 3, 2).reshape(tiles, 16, units)
    return (dense * numbers[..., None]).flatten(2).flatten(0, 1)


@pytest.fixture(scope="session")
def decode_fragments() -> Callable[..., Tensor]:
    """Decodes 4-bit fragments with bfloat16 scales, independently of what wrote them."""
    return matrix_of_fragments


@pytest.fixture
def calls_made() -> list[int]:
    """Rows of the layers that the kernel of `cpu_kernels` has computed."""
    return []


@pytest.fixture
def cpu_kernels(calls_made: list[int]) -> tuple[Kernel, ...]:
    """A table with one kernel for each of the GPU's forms of a layer, on a CPU."""

    def accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, _tokens: int) -> str | None:
        if device.type != "cpu" or dtype != spec.weight.dtype:
            return "is for the CPU"
        return _refuses_format(spec)

    def run(x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        calls_made.append(state.format.rows)
        return compute(x, state, bias)

    def accepts_mixed(spec: LinearFormat, dtype: torch.dtype, device: torch.device, _tokens: int) -> str | None:
        if device.type != "cpu" or dtype != spec.weight.dtype:
            return "is for the CPU"
        return mixed.refuses_form(spec)

    def run_mixed(x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        y = product(x, mixed.restore((state.format,), mixed.tensors(state), 0))
        return (y if bias is None else y + bias.double()).to(x.dtype)

    return (
        Kernel("fragments on the CPU", accepts, prepare, run, stack_shared),
        Kernel("lines on the CPU", accepts_mixed, mixed.prepare, run_mixed),
    )
