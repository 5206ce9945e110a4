"""What the runtime's tests share: packed weights of any format, filled with seeded noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from slimc.runtime.packing import NM, PackedBinary, PackedLinear, PackedWeight, Sparsity, pack_signs, pack_weight


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread: these tensors are so small that several would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_mask(rows: int, columns: int, sparsity: Sparsity, generator: torch.Generator) -> torch.Tensor | None:
    if sparsity is None:
        return None
    noise = torch.rand(rows, columns, generator=generator)
    if isinstance(sparsity, NM):
        order = noise.unflatten(1, (-1, sparsity.m)).argsort(dim=-1).argsort(dim=-1)
        return (order < sparsity.n).flatten(1)
    return noise < 0.5


def random_weight(
    rows: int,
    columns: int,
    bits: int | None,
    *,
    group: int | None = None,
    per_tensor: bool = False,
    asymmetric: bool = False,
    sparsity: Sparsity = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    widths: tuple[int, ...] | None = None,
) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(rows, columns, sparsity, generator)
    if bits is None:
        values = torch.randn(rows, columns, generator=generator).to(dtype)
        return pack_weight(values, bits=None, mask=mask, sparsity=sparsity)
    shape = (1, 1) if per_tensor else (rows, -(-columns // (group or columns)))
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    if widths is not None:
        limits = torch.tensor([1 << width for width in widths])
        codes = (codes % limits.repeat_interleave(group or columns)[:columns]).to(torch.uint8)
        zeros = (zeros % torch.where(limits == 2, 1, limits)).to(torch.uint8)
    return pack_weight(
        codes,
        bits=bits,
        scale=(torch.rand(shape, generator=generator) + 0.1).to(dtype),
        zero_point=zeros if asymmetric else None,
        group=group,
        mask=mask,
        sparsity=sparsity,
        widths=widths,
    )


def random_binary(rows: int, columns: int, rank: int, dtype: torch.dtype) -> PackedBinary:
    generator = torch.Generator().manual_seed(4)
    negative = torch.rand(rows, columns, generator=generator) < 0.5
    left, right = torch.rand(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return PackedBinary(pack_signs(negative), left.to(dtype), right.to(dtype))


@pytest.fixture(scope="session")
def make_weight() -> Callable[..., PackedWeight]:
    return random_weight


@pytest.fixture(scope="session")
def make_linear() -> Callable[..., PackedLinear]:
    def build(
        rows: int,
        columns: int,
        bits: int | None,
        *,
        rank: int = 0,
        adapter_bits: int | None = 4,
        scaled: bool = False,
        signs: int = 0,
        **form,
    ) -> PackedLinear:
        dtype = form.get("dtype", torch.bfloat16)
        group = None if adapter_bits is None else 64
        return PackedLinear(
            random_weight(rows, columns, bits, **form),
            random_weight(rows, rank, adapter_bits, group=group, dtype=dtype, seed=1) if rank else None,
            random_weight(rank, columns, adapter_bits, group=group, dtype=dtype, seed=2) if rank else None,
            (torch.rand(columns, generator=torch.Generator().manual_seed(3)) + 0.5).to(dtype) if scaled else None,
            binary=random_binary(rows, columns, signs, dtype) if signs else None,
        )

    return build
