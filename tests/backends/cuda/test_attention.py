"""The attention of a new token and what is between linears, in the parts that need no GPU: what they are for."""

from __future__ import annotations

import torch
from torch import Tensor

from slimc.backends.cuda import attention, between

BF16 = torch.bfloat16


def tensors(
    batch: int = 2, heads: int = 4, key_heads: int = 4, tokens: int = 1, numbers: int = 64, dtype: torch.dtype = BF16
) -> tuple[Tensor, ...]:
    q = torch.zeros(batch, heads, tokens, numbers, dtype=dtype)
    k, v = torch.zeros(2, batch, key_heads, tokens, numbers, dtype=dtype)
    cos, sin = torch.zeros(2, 1, 1, tokens, numbers, dtype=dtype)
    keys, values = torch.zeros(2, batch, key_heads, 40, numbers, dtype=dtype)
    return q, k, v, cos, sin, keys, values


def test_what_attention_it_is_for() -> None:
    mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    assert attention.refuses(tensors(), mask) == "needs a CUDA GPU, not cpu"
    assert attention._refuses_sizes(tensors(), mask) is None
    assert attention._refuses_sizes(tensors(heads=8, key_heads=1), None) is None
    assert attention._refuses_sizes(tensors(), mask.expand(2, 4, 1, 40)) is None
    first, *rest = tensors()
    *most, values = tensors()
    for reason, case in {
        "four axes": (first[0], *rest, mask),
        "16-bit dtype": (*tensors(dtype=torch.float32), mask),
        "of one 16-bit": (first.half(), *rest, mask),
        "heads of 64 or 128": (*tensors(numbers=96), mask),
        "one new token": (*tensors(tokens=2), mask),
        "1 to 8 heads": (*tensors(heads=9, key_heads=1), mask),
        "as many sequences and heads": (*most, values[:1], mask),
        "mask of bools": (*tensors(), mask.to(BF16)),
        "of each key": (*tensors(), mask[..., 1:]),
    }.items():
        assert reason in str(attention._refuses_sizes(case[:-1], case[-1]))
    q, k, v, cos, sin, keys, values = tensors()
    assert "one rotation" in str(attention._refuses_sizes((q, k, v, cos.expand(1, 4, 1, 64), sin, keys, values), mask))


def test_what_attention_can_be_read() -> None:
    memory = torch.zeros(2, 40, 4, 64, dtype=BF16)
    assert attention._can_be_read(memory.transpose(1, 2))
    assert not attention._can_be_read(memory.transpose(1, 3))
    assert not attention._can_be_read(memory.view(-1)[1:-63].view(-1, 64)[None, None])
    # The step along an axis of one is never taken.
    assert attention._can_be_read(memory.as_strided((1, 4, 8, 64), (3, 2560, 64, 1)))
    assert not attention._can_be_read(memory.as_strided((2, 4, 8, 64), (3, 2560, 64, 1)))


def test_what_is_ahead_of_a_linear() -> None:
    x = torch.zeros(2, 1, 64, dtype=BF16)
    assert between.refuses(x, 64) == "needs a CUDA GPU, not cpu"
    assert between._refuses_sizes(x, 64) is None
    assert "16-bit dtype" in str(between._refuses_sizes(x.float(), 64))
    assert "multiple of 8 columns" in str(between._refuses_sizes(x, 68))
    assert "at most" in str(between._refuses_sizes(x, 1 << 16))


def test_how_far_tokens_are_apart() -> None:
    both = torch.zeros(3, 1, 128, dtype=BF16)
    assert between._token_stride(both[..., :64]) == 128
    assert between._token_stride(both[:1, :, :64]) == 0
    assert between._token_stride(both[..., 4:68]) is None
    assert between._token_stride(both.transpose(0, 2)) is None
    assert between._token_stride(torch.zeros(2, 3, 136, dtype=BF16)[:, :2, :64]) is None
