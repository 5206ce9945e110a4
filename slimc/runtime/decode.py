"""Packed tensors to dense weights in plain PyTorch, on any device.

This is the meaning of every packed format: ``weight = (code - zero_point) * scale``, the difference exact, the
product rounded once to the dtype of the scale, and positions that are not stored exactly zero. The sizes arrive
as plain integers because they are attributes of graph nodes, where 0 stands for "absent": ``bits`` 0 means
floating point values, ``group`` 0 one group of all columns, ``m`` 0 no N:M pattern.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimc.runtime.bits import has_tables, unpack_bits


def unpack_mask(pattern: Tensor, columns: int) -> Tensor:
    """Return the boolean mask [rows, columns] of kept positions."""
    return unpack_bits(pattern, 1, columns).view(torch.bool)


def unpack_signs(signs: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix of +1 and, where a bit is set, -1, [rows, columns]."""
    return 1 - 2 * unpack_bits(signs, 1, columns).to(dtype)


def scatter(stored: Tensor, mask: Tensor, fill: Tensor) -> Tensor:
    """Put ``stored`` values, in row-major order, where ``mask`` [rows, columns] is set, and ``fill`` elsewhere.

    ``stored`` may be longer than the mask has positions (the padding of a bit stream); the rest is ignored.
    """
    return fill.expand(mask.shape).masked_scatter(mask, stored)


def expand_groups(per_group: Tensor, columns: int, group: int) -> Tensor:
    """Repeat [rows, groups] along the columns so that it broadcasts against [rows, columns]."""
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(group, dim=1)[:, :columns]


def stored_codes(values: Tensor, *, bits: int, columns: int, n: int, m: int) -> Tensor:
    """Unpack the codes of a bit stream: [rows, stored per row], or [at least as many as stored] for one stream."""
    if values.dim() == 1:
        return unpack_bits(values, bits, values.shape[0] * 8 // bits)
    return unpack_bits(values, bits, columns // m * n if m else columns)


def signed_codes(values: Tensor, pattern: Tensor | None, *, bits: int, columns: int, n: int, m: int) -> Tensor:
    """Return symmetric codes less their zero point, int8 [rows, columns]; positions not kept are 0."""
    if pattern is not None and (bits, n, m) == (4, 2, 4) and has_tables(values):
        return _signed_2_of_4(values, pattern, columns)
    codes = stored_codes(values, bits=bits, columns=columns, n=n, m=m)
    signed = (codes - (1 << (bits - 1))).view(torch.int8)
    return signed if pattern is None else scatter(signed, unpack_mask(pattern, columns), signed.new_zeros(1, 1))


def dequantize(
    values: Tensor,
    pattern: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    *,
    bits: int,
    columns: int,
    group: int,
    n: int = 0,
    m: int = 0,
) -> Tensor:
    """Return the dense weight [rows, columns] of packed tensors, in the dtype of ``scale`` (or of the values).

    The tensors are those of `slimc.runtime.packing.PackedWeight`. The result never shares memory with them.
    """
    if scale is None:
        if pattern is None:
            return values.clone()
        return scatter(values, unpack_mask(pattern, columns), values.new_zeros(1, 1))
    if zero_point is None:
        steps = signed_codes(values, pattern, bits=bits, columns=columns, n=n, m=m)
    else:
        zero = expand_groups(zero_point, columns, group)
        codes = stored_codes(values, bits=bits, columns=columns, n=n, m=m)
        if pattern is not None:
            codes = scatter(codes, unpack_mask(pattern, columns), zero)
        # The difference of two 8-bit numbers needs nine bits.
        steps = codes.to(torch.int16) - zero
    return steps.to(scale.dtype).mul_(expand_groups(scale, columns, group))


def _signed_2_of_4(values: Tensor, pattern: Tensor, columns: int) -> Tensor:
    """`signed_codes` of 2:4 nibbles: both codes of a group are one byte, so a group is one look-up."""
    rows = values.shape[0]
    nibbles = torch.stack((pattern & 15, pattern >> 4), dim=-1).flatten(1)[:, : columns // 4]
    index = nibbles.to(torch.int32).bitwise_left_shift_(8).bitwise_or_(values)
    return _GROUPS_2_OF_4.index_select(0, index.flatten()).view(torch.int8).view(rows, columns)


def _tabulate_2_of_4() -> Tensor:
    """Four signed codes, viewed as one int32, for each (4-bit pattern, byte of two nibbles).

    Patterns that do not keep two positions cannot pass `PackedWeight.from_tensors`; they decode to something finite.
    """
    byte = torch.arange(256).repeat(16)
    pattern = torch.arange(16).repeat_interleave(256)
    kept = (pattern[:, None] >> torch.arange(4)) & 1
    rank = kept.cumsum(1) - kept
    nibble = (byte[:, None] >> (4 * rank)) & 15
    signed = torch.where((kept == 1) & (rank < 2), nibble - 8, 0)
    return signed.to(torch.int8).view(torch.int32).flatten()


_GROUPS_2_OF_4 = _tabulate_2_of_4()
