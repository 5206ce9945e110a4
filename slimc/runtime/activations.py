"""Activations rounded to eight bits, token by token: what the 8-bit products of a layer read.

Every token (a vector along the last axis) has a scale of its own, so that it can be computed when the token arrives,
and so that one token's outliers cost no other token precision. ``int8`` has 255 evenly spaced values,
``float8_e4m3fn`` 4 bits of significand: an error in proportion to each value, down to 2^-15 of the largest.

The codes and scales of `quantize_tokens` are the definition. `round_tokens` gives them back in the dtype of x, one more
rounding; kernels that multiply the codes themselves by the codes of a weight do without it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimc.errors import FormatError
from slimc.runtime.formats import ACTIVATIONS

__all__ = ["ACTIVATION_NAMES", "LARGEST", "quantize_tokens", "refuses_codes", "round_inputs", "round_tokens"]

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""The code of the largest magnitude of a token. ``int8`` does not use -128, so that it is symmetric."""

_EXACT_INTEGERS = {"int8": 128, "float8_e4m3fn": 16}
"""The magnitudes up to which codes of a weight are exact in the same 8 bits (``int8`` has no +128, nor have they)."""

ACTIVATION_NAMES = {number: name for name, number in ACTIVATIONS.items()}
"""What the attribute ``activation`` of an op stands for; 0 is none."""


def quantize_tokens(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the codes q of x [..., columns] and the scales s, float32 [..., 1]: x is nearly s * q.

    All arithmetic is in float32. ``s = max |x| / 127`` and q = x / s rounded half to even (``"int8"``), or
    ``s = max |x| / 448`` and q = x / s rounded to a float8 (``"float8_e4m3fn"``); s = 1 where max |x| is zero (or so
    small that s would be). A token with NaN or an infinity has the scale NaN or infinity, which makes all of ``s * q``
    NaN; its codes mean nothing.

    Raises:
        FormatError: ``kind`` is not one of `slimc.runtime.formats.ACTIVATIONS`.
    """
    if kind not in ACTIVATIONS:
        raise FormatError(f"inputs cannot be rounded to {kind!r}: use one of {', '.join(ACTIVATIONS)}")
    values = x.float()
    largest = LARGEST[kind]
    peak = values.abs().amax(-1, keepdim=True)
    # By a tensor: on a GPU a division by a number is a multiplication by its reciprocal, which gives other scales.
    scale = peak / torch.full_like(peak, largest)
    scale = torch.where(scale == 0, 1.0, scale)
    # Clamped: the quotient of the largest value may be rounded up, and a float8 overflows to NaN.
    quotient = (values / scale).clamp(-largest, largest)
    if kind == "int8":
        return quotient.round().to(torch.int8), scale
    return quotient.to(torch.float8_e4m3fn), scale


def round_tokens(x: Tensor, kind: str) -> Tensor:
    """Return ``s * q`` of `quantize_tokens`, multiplied in float32 and rounded to the dtype of x."""
    codes, scale = quantize_tokens(x, kind)
    return (codes.float() * scale).to(x.dtype)


def round_inputs(x: Tensor, activation: str | None) -> Tensor:
    """Return what a layer multiplies by its weight: `round_tokens` of x, or x itself without an ``activation``."""
    return x if activation is None else round_tokens(x, activation)


def refuses_codes(bits: int | None, asymmetric: bool, kind: str) -> str | None:
    """Say why a weight of such codes cannot be the other operand of an 8-bit product, or return ``None``."""
    if bits is None:
        return "its weight has no codes, so no product of 8 bits is to be had"
    largest = (1 << bits) - 1 if asymmetric else 1 << (bits - 1)
    if largest > _EXACT_INTEGERS[kind]:
        return f"codes of its weight go up to {largest}, but {kind} is exact up to {_EXACT_INTEGERS[kind]} only"
    return None
