"""Little-endian bit streams: unsigned integers of 1 to 8 bits laid end to end.

Value ``i`` of a stream occupies the bits ``[i * bits, (i + 1) * bits)``, and bit ``j`` of a stream is bit
``j % 8`` of byte ``j // 8``. Every axis but the last is a separate stream that starts on a byte of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def stream_bytes(count: int, bits: int) -> int:
    """Return how many bytes ``count`` values of ``bits`` bits occupy."""
    return (count * bits + 7) // 8


def _unit(bits: int) -> tuple[int, int, torch.dtype]:
    """The smallest run of values that ends on a byte: (values, bytes, a dtype that holds it whole)."""
    span = math.lcm(bits, 8)
    width = span // 8
    return span // bits, width, torch.uint8 if width == 1 else torch.int32 if width < 4 else torch.int64


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``values`` [..., count], each below ``2 ** bits``, into uint8 [..., ceil(count * bits / 8)]."""
    count = values.shape[-1]
    per_unit, width, dtype = _unit(bits)
    units = torch.unflatten(pad(values, (0, -count % per_unit)), -1, (-1, per_unit))
    word = units[..., 0].to(dtype)
    for i in range(1, per_unit):
        word = word | (units[..., i].to(dtype) << (bits * i))
    if width == 1:
        return word.contiguous()
    stream = torch.stack([(word >> (8 * j)).to(torch.uint8) for j in range(width)], dim=-1)
    return stream.flatten(-2)[..., : stream_bytes(count, bits)].contiguous()


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """Read the first ``count`` values of uint8 ``stream`` [..., bytes] back as uint8 [..., count]."""
    stream = stream[..., : stream_bytes(count, bits)]
    if bits in _TABLES and has_tables(stream):
        found = _TABLES[bits].index_select(0, stream.flatten().to(torch.int32)).view(torch.uint8)
        return found.view(*stream.shape[:-1], -1)[..., :count].contiguous()
    per_unit, width, dtype = _unit(bits)
    units = torch.unflatten(pad(stream, (0, -stream.shape[-1] % width)), -1, (-1, width))
    word = units[..., 0].to(dtype)
    for j in range(1, width):
        word = word | (units[..., j].to(dtype) << (8 * j))
    top = (1 << bits) - 1
    values = torch.stack([((word >> (bits * i)) & top).to(torch.uint8) for i in range(per_unit)], dim=-1)
    return values.flatten(-2)[..., :count].contiguous()


def has_tables(tensor: Tensor) -> bool:
    """Whether ``tensor`` can index a table: a real tensor in main memory, where a look-up beats a row of shifts.

    Subclasses are excluded because fake and functional tensors do not mix with the constant tables.
    """
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def _tabulate(bits: int, word: torch.dtype) -> Tensor:
    """All values of each possible byte, viewed as one word."""
    values = (torch.arange(256)[:, None] >> torch.arange(0, 8, bits)) & ((1 << bits) - 1)
    return values.to(torch.uint8).view(word).flatten()


_TABLES = {1: _tabulate(1, torch.int64), 2: _tabulate(2, torch.int32)}
