"""Packed tensors to dense weights in plain PyTorch, on any device.

This is the meaning of every packed format: ``weight = (code - zero_point) * scale``, the difference exact, the
product rounded once to the dtype of the scale, and positions that are not stored exactly zero. The sizes arrive
as plain integers because they are attributes of graph nodes, where 0 stands for "absent": ``bits`` 0 means
floating point values, ``group`` 0 one group of all columns, ``m`` 0 no N:M pattern. Where groups of columns have
``widths`` of their own, a row is one bit stream a group, each beginning on a byte, and ``bits`` is the largest width.
Codes of 1 bit are signs: ``weight = (2 * code - 1) * scale``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slimc.runtime.bits import has_tables, pack_bits, stream_bytes, unpack_bits


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
    widths: Sequence[int] = (),
) -> Tensor:
    """Return the dense weight [rows, columns] of packed tensors, in the dtype of ``scale`` (or of the values).

    The tensors are those of `slimc.runtime.packing.PackedWeight`. The result never shares memory with them.
    """
    if scale is None:
        if pattern is None:
            return values.clone()
        return scatter(values, unpack_mask(pattern, columns), values.new_zeros(1, 1))
    if widths:
        steps = _mixed_steps(values, pattern, zero_point, columns=columns, group=group, n=n, m=m, widths=widths)
    elif zero_point is None:
        steps = signed_codes(values, pattern, bits=bits, columns=columns, n=n, m=m)
    else:
        zero = expand_groups(zero_point, columns, group)
        codes = stored_codes(values, bits=bits, columns=columns, n=n, m=m)
        if pattern is not None:
            codes = scatter(codes, unpack_mask(pattern, columns), zero)
        # The difference of two 8-bit numbers needs nine bits.
        steps = codes.to(torch.int16) - zero
    return steps.to(scale.dtype).mul_(expand_groups(scale, columns, group))


def group_counts(columns: int, group: int, n: int, m: int) -> list[int]:
    """Return how many codes of each group of columns a row stores."""
    sizes = [min(group, columns - start) for start in range(0, columns, group)]
    return [size // m * n for size in sizes] if m else sizes


def pack_groups(codes: Tensor, counts: Sequence[int], widths: Sequence[int]) -> Tensor:
    """Pack uint8 codes [rows, sum of counts], group by group at its own width, into one row of bytes a row."""
    parts = codes.split_with_sizes(list(counts), dim=1)
    return torch.cat([pack_bits(part, width) for part, width in zip(parts, widths, strict=True)], dim=1)


def unpack_groups(values: Tensor, counts: Sequence[int], widths: Sequence[int]) -> Tensor:
    """Read the codes of `pack_groups` back."""
    return _in_order([(groups, codes) for groups, _, codes in _alike(values, counts, widths)])


def _alike(values: Tensor, counts: Sequence[int], widths: Sequence[int]) -> Iterator[tuple[list[int], int, Tensor]]:
    """Yield numbers of groups of as many codes of one width, that width, and their codes [rows, groups, count].

    Nothing here makes a tensor of numbers, which no CUDA graph could capture.
    """
    sizes = [stream_bytes(count, width) for count, width in zip(counts, widths, strict=True)]
    parts = values.split_with_sizes(sizes, dim=1)
    kinds: dict[tuple[int, int], list[int]] = {}
    for index, kind in enumerate(zip(counts, widths, strict=True)):
        kinds.setdefault(kind, []).append(index)
    for (count, width), groups in kinds.items():
        yield groups, width, unpack_bits(torch.stack([parts[index] for index in groups], dim=1), width, count)


def _in_order(found: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """Put groups of columns [rows, groups, count] side by side by their numbers."""
    placed = {index: part for groups, codes in found for index, part in zip(groups, codes.unbind(1), strict=True)}
    return torch.cat([placed[index] for index in range(len(placed))], dim=1)


def _mixed_steps(
    values: Tensor,
    pattern: Tensor | None,
    zero_point: Tensor | None,
    *,
    columns: int,
    group: int,
    n: int,
    m: int,
    widths: Sequence[int],
) -> Tensor:
    """Return codes less their zero point, int16 [rows, columns]; signs are -1 and 1, and what is not kept is 0."""
    found: list[tuple[list[int], Tensor]] = []
    for groups, width, codes in _alike(values, group_counts(columns, group, n, m), widths):
        steps = codes.to(torch.int16)
        if width == 1:
            steps = steps.mul_(2).sub_(1)
        elif zero_point is None:
            steps = steps.sub_(1 << (width - 1))
        else:
            steps = steps.sub_(torch.stack([zero_point[:, index] for index in groups], dim=1).unsqueeze(2))
        found.append((groups, steps))
    steps = _in_order(found)
    return steps if pattern is None else scatter(steps, unpack_mask(pattern, columns), steps.new_zeros(1, 1))


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
