"""Layers with a binary part on a GPU: the kernel for products with signs, and every form of the part beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimc.backends import KERNELS
from slimc.backends.cuda.expand import expand_with_signs
from slimc.backends.cuda.layer import prepare, stack
from slimc.backends.cuda.signs import MOST_TOKENS, SignProduct, StackedSigns
from slimc.backends.dynamo import slim
from slimc.bench.unwritten import into_nans
from slimc.runtime.formats import NM, Unstructured
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedBinary, PackedLinear, pack_signs, pack_weight

CUDA = torch.device("cuda")


def random_signs(rows: int, columns: int, rank: int, dtype: torch.dtype) -> PackedBinary:
    generator = torch.Generator().manual_seed(rows + columns + rank)
    negative = torch.rand(rows, columns, generator=generator) < 0.5
    left = torch.rand(rows, rank, generator=generator) * 0.02
    right = torch.rand(rank, columns, generator=generator) + 0.5
    return PackedBinary(pack_signs(negative).to(CUDA), left.to(CUDA, dtype), right.to(CUDA, dtype))


def product(binary: PackedBinary, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum_k ((x * right[k]) @ B^T) * left[:, k]`` and the same of magnitudes, both float64."""
    left, right = binary.left.double(), binary.right.double()
    signs = (binary.decode() < 0).double().mul(-2).add(1)
    exact, size = torch.zeros(2, len(x), len(left), dtype=torch.float64, device=x.device)
    for column, row in zip(left.unbind(1), right.unbind(0), strict=True):
        exact = exact + (x.double() * row) @ signs.T * column
        size = size + (x.double() * row).abs().sum(1, keepdim=True) * column
    return exact, size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", sorted({*range(1, 18), MOST_TOKENS, MOST_TOKENS + 1, 40, 63, 64, 65, 300}))
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(576, 576, 1), (100, 96, 3), (9000, 64, 1), (4096, 4128, 1), (24, 40, 2)]
)
def test_products_with_signs(rows: int, columns: int, rank: int, tokens: int, dtype: torch.dtype) -> None:
    binary = random_signs(rows, columns, rank, dtype)
    x = torch.randn(tokens, columns, device=CUDA, dtype=dtype)
    before = torch.randn(tokens, rows, device=CUDA, dtype=dtype)
    exact, size = product(binary, x)
    signs = SignProduct(binary)
    y = into_nans(lambda: signs.add(before.clone(), x))
    # x * right is rounded, beyond MOST_TOKENS the product too, and the sum with y once a rank; sums are of float32.
    unit = torch.finfo(dtype).eps / 2
    bound = unit * (1 + rank) * (exact.abs() + before.double().abs()) + (3 * unit + columns * 2.0**-24) * size
    # What is below the smallest normal number, of x * right or of left * right, is rounded to steps of one size.
    step = torch.finfo(dtype).smallest_normal * unit
    bound += step * rank * (x.double().abs().sum(1, keepdim=True) + columns)
    assert bool(((y.double() - before.double() - exact).abs() <= bound).all())


def test_inputs_that_begin_anywhere() -> None:
    binary = random_signs(64, 96, 1, torch.bfloat16)
    flat = torch.randn(1 + 4 * 96, device=CUDA, dtype=torch.bfloat16)
    x = flat[1:].view(4, 96)
    zeros = torch.zeros(4, 64, device=CUDA, dtype=torch.bfloat16)
    assert torch.equal(SignProduct(binary).add(zeros.clone(), x), SignProduct(binary).add(zeros, x.clone()))


def layer(columns: int = 640, dtype: torch.dtype = torch.bfloat16, **form: Any) -> PackedLinear:
    """A layer of 512 rows with random values."""
    generator = torch.Generator().manual_seed(columns)
    noise = torch.rand(512, columns, generator=generator)
    sparsity, bits = form.get("sparsity"), form.get("bits")
    mask = None
    if isinstance(sparsity, NM):
        order = noise.unflatten(1, (-1, sparsity.m)).argsort(-1).argsort(-1)
        mask = (order < sparsity.n).flatten(1)
    elif sparsity is not None:
        mask = noise < 0.44
    if bits is None:
        weight = pack_weight((noise - 0.5).to(dtype), bits=None, mask=mask, sparsity=sparsity)
    else:
        codes = (noise * 2**bits).to(torch.uint8)
        scale = (torch.rand(512, -(-columns // 64), generator=generator) * 0.01 + 0.01).to(dtype)
        weight = pack_weight(codes, bits=bits, scale=scale, group=64, mask=mask, sparsity=sparsity)
    moved = {name: tensor.cuda() for name, tensor in weight.tensors().items()}
    return PackedLinear(replace(weight, **moved), binary=random_signs(512, columns, 1, dtype))


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "2:4 int4": ("cuda-signs", {"bits": 4, "sparsity": NM(2, 4)}),
    "int4": ("cuda-signs", {"bits": 4}),
    "2:4 16 bit": ("cuda-signs", {"sparsity": NM(2, 4)}),
    "2:4 16 bit by the library": ("cusparselt-signs", {"sparsity": NM(2, 4)}),
    "16 bit of another width": ("cuda-composed-signs", {"columns": 580}),
    "2:4 16 bit of another width": ("cuda-stored-signs", {"sparsity": NM(2, 4), "columns": 580}),
    "3 bits": ("cuda-composed-signs", {"bits": 3}),
    "unstructured": ("cuda-stored-signs", {"sparsity": Unstructured()}),
    "4:8 4 bits": ("cuda-stored-signs", {"bits": 4, "sparsity": NM(4, 8)}),
    "float32": ("cuda-decoded", {"sparsity": NM(2, 4), "dtype": torch.float32}),
}


@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_the_rest(name: str, tokens: int) -> None:
    kernel, form = FORMS[name]
    packed = layer(**form)
    dtype = packed.format.weight.dtype
    bias = torch.randn(512, device=CUDA, dtype=dtype)
    kernels = [one for one in KERNELS if one.name == kernel] if "library" in name else KERNELS
    module = SlimLinear(packed, bias, kernels=kernels)
    chosen = next(one for one in module.choices() if one.last_tokens is None or tokens <= one.last_tokens)
    assert chosen.kernel is not None
    assert chosen.kernel.name == kernel, chosen
    x = torch.randn(tokens, packed.format.columns, device=CUDA, dtype=dtype)
    weight = packed.weight.decode().double()
    signs, sign_size = product(packed.binary, x)
    exact = x.double() @ weight.T + bias.double() + signs
    size = x.double().abs() @ weight.abs().T + bias.double().abs() + sign_size
    unit = torch.finfo(dtype).eps / 2
    # Roundings of the weight, of x * right, of either product, of the bias added and of the sum.
    bound = unit * 6 * size + packed.format.columns * 2.0**-23 * size
    with torch.no_grad():
        y = into_nans(module, x)
    assert bool(((y.double() - exact).abs() <= bound).all())
    for key, tensor in packed.tensors().items():
        assert torch.equal(module.state_dict()[key], tensor)


@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_signs_of_siblings_in_one_launch(tokens: int) -> None:
    """Rows that end within a block, ranks that differ."""
    parts = [random_signs(rows, 640, rank, torch.bfloat16) for rows, rank in ((200, 1), (9000, 2), (24, 1))]
    x = torch.randn(tokens, 640, device=CUDA, dtype=torch.bfloat16)
    zeros = torch.zeros(tokens, 9224, device=CUDA, dtype=torch.bfloat16)
    y = StackedSigns([SignProduct(part) for part in parts]).add(zeros, x)
    for part, found in zip(parts, y.split([200, 9000, 24], dim=1), strict=True):
        exact, size = product(part, x)
        bound = 2**-9 * (1 + part.format.rank) * exact.abs() + (3 * 2**-9 + 640 * 2.0**-24) * size
        assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("bits", [4, None])
def test_a_stack_is_decoded_with_the_signs_of_each(bits: int | None) -> None:
    parts = [layer(bits=bits, sparsity=NM(2, 4)), replace(layer(bits=bits, sparsity=NM(2, 4)), binary=None)]
    parts[1] = replace(parts[1], binary=random_signs(512, 640, 3, torch.bfloat16))
    shared = stack([prepare(replace(part, binary=None)) for part in parts])
    matrix = expand_with_signs(shared, StackedSigns([SignProduct(part.binary) for part in parts]))
    for part, found in zip(parts, matrix.split(512), strict=True):
        exact = part.weight.decode().double() + part.binary.decode().double()
        size = part.weight.decode().double().abs() + part.binary.left.double() @ part.binary.right.double()
        # A sum is rounded for each rank.
        assert bool(((found.double() - exact).abs() <= 2**-8 * part.binary.format.rank * size).all())


class Siblings(nn.Module):
    """Two layers that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (SlimLinear(layer(bits=4, sparsity=NM(2, 4)), kernels=KERNELS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


# What Inductor and Triton say about themselves is not slimc's.
@pytest.mark.filterwarnings("default")
def test_a_compiled_layer_and_its_siblings() -> None:
    siblings = Siblings()
    x = torch.randn(3, 640, device=CUDA, dtype=torch.bfloat16)
    compiled = torch.compile(siblings, backend=slim, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), siblings(x))
