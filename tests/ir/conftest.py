"""What the tests of the graph share: packed forms of a weight, made without any solver."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slimc.runtime.packing import (
    NM,
    PackedBinary,
    PackedLinear,
    PackedWeight,
    Unstructured,
    pack_signs,
    pack_weight,
)

Packer = Callable[..., PackedLinear]


def _store(weight: Tensor, bits: int | None, sparsity: NM | Unstructured | None, asymmetric: bool) -> PackedWeight:
    """Store ``weight`` on a plain absmax grid by row, keeping the first of each group or every other value."""
    mask = None
    if isinstance(sparsity, NM):
        mask = (torch.arange(weight.shape[1]) % sparsity.m < sparsity.n).expand(weight.shape).clone()
    elif sparsity is not None:
        mask = (torch.arange(weight.numel()) % 3 != 0).reshape(weight.shape)
    if bits is None:
        return pack_weight(weight, bits=None, mask=mask, sparsity=sparsity)
    zero = 2 ** (bits - 1)
    scale = (weight.float().abs().amax(1, keepdim=True) / (zero - 1)).to(weight.dtype)
    codes = (weight.float() / scale.float()).round().clamp(-zero, zero - 1) + zero
    zero_point = torch.full(scale.shape, zero, dtype=torch.uint8) if asymmetric else None
    return pack_weight(
        codes.to(torch.uint8), bits=bits, scale=scale, zero_point=zero_point, mask=mask, sparsity=sparsity
    )


@pytest.fixture(scope="session")
def pack() -> Packer:
    """Return ``pack(weight, form)``.

    A form is words out of int4, int4z, 16bit, 2:4, mask, scaled, rank16, rank4, int8in, fp8in, signs.
    """

    def packed(weight: Tensor, form: str = "int4") -> PackedLinear:
        words = form.split()
        sparsity = NM(2, 4) if "2:4" in words else Unstructured() if "mask" in words else None
        base = _store(weight.contiguous(), None if "16bit" in words else 4, sparsity, "int4z" in words)
        generator = torch.Generator().manual_seed(weight.shape[0])
        left = right = None
        if "rank16" in words or "rank4" in words:
            bits = 4 if "rank4" in words else None
            left = _store(torch.randn(weight.shape[0], 2, generator=generator).to(weight.dtype), bits, None, False)
            right = _store(torch.randn(2, weight.shape[1], generator=generator).to(weight.dtype), bits, None, False)
        scale = None
        if "scaled" in words:
            scale = (1 + torch.rand(weight.shape[1], generator=generator)).to(weight.dtype)
        activation = "int8" if "int8in" in words else "float8_e4m3fn" if "fp8in" in words else None
        binary = None
        if "signs" in words:
            factors = (
                torch.randn(sides, generator=generator) for sides in ((weight.shape[0], 2), (2, weight.shape[1]))
            )
            binary = PackedBinary(pack_signs(weight < 0), *(factor.to(weight.dtype) for factor in factors))
        return PackedLinear(base, left, right, scale, activation, binary)

    return packed
