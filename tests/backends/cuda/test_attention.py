"""Attention of a few queries, in the parts that need no GPU: what it is for, and what a processor computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from slimc.backends.cuda import attention
from slimc.backends.cuda.attention import attend, refuses

BF16 = torch.bfloat16


def tensors(rows: int = 1, keys: int = 40, numbers: int = 64, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 4, size, numbers).to(dtype) for size in (rows, keys, keys))


def test_what_it_is_for(gpu: SimpleNamespace) -> None:
    q, k, v = tensors()
    mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    assert refuses(q, k, v, mask) == "needs a CUDA GPU, not cpu"
    assert attention._refuses_sizes(q, k, v, mask) is None
    assert attention._refuses_sizes(q, k, v, None) is None
    for reason, case in {
        "four axes": (q[0], k, v, None),
        "16-bit dtype": (*tensors(dtype=torch.float32), None),
        "one 16-bit": (q, k.half(), v, None),
        "heads of 64 or 128": (*tensors(numbers=96), None),
        "1 to 8 queries": (*tensors(rows=9), None),
        "as many heads": (q, k[:, :2], v[:, :2], None),
        "mask of bools": (q, k, v, mask.to(BF16)),
    }.items():
        assert reason in str(attention._refuses_sizes(*case))


@pytest.mark.parametrize("rows", [1, 3])
def test_elsewhere_it_is_pytorchs_own(rows: int) -> None:
    q, k, v = tensors(rows)
    mask = torch.arange(40).view(1, 1, 1, 40) < 30
    y = attend(q, k, v, mask, 0.2)
    assert torch.equal(y, scaled_dot_product_attention(q, k, v, mask, scale=0.2))
    # The heads of a token lie side by side.
    assert y.transpose(1, 2).is_contiguous()
    torch.library.opcheck(attend, (q, k, v, mask, 0.2))


def test_what_can_be_read() -> None:
    memory = torch.zeros(2, 40, 4, 64, dtype=BF16)
    assert attention._can_be_read(memory.transpose(1, 2))
    assert not attention._can_be_read(memory.transpose(1, 3))
    assert not attention._can_be_read(memory.view(-1)[1:-63].view(-1, 64)[None, None])
    # The step along an axis of one is never taken.
    assert attention._can_be_read(memory.as_strided((1, 4, 8, 64), (3, 2560, 64, 1)))
    assert not attention._can_be_read(memory.as_strided((2, 4, 8, 64), (3, 2560, 64, 1)))
