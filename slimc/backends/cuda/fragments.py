"""The order in which the tensor cores take a weight, made from the canonical packed tensors.

The cores multiply 16 rows at a time. A register of a lane (group ``g = lane // 4``, place ``t = lane % 4``) holds two
numbers of row ``g`` or ``g + 8``; four registers are one instruction, 16 columns of a dense weight or 32 of a 2:4 one,
and the codes of one register are one byte of the canonical stream: two columns, or the two kept codes of a group of
four. So both forms have one order of bytes, in units of 32 bytes a row: ``[row tile][unit][lane][instruction]`` words
of 32 bits, in which nibble ``i`` is the first code of register ``i`` and nibble ``i + 4`` the second. 16 bytes a lane
are 128 columns of a 2:4 weight or 64 of a dense one. 16-bit values take four times the room, a register a word:
``[row tile][unit][instruction][lane][register]``. See the PTX manual, "Matrix fragments for mma.m16n8k16" and
"mma.sp.m16n8k32".

Every function has an exact inverse, so that a device need not keep the canonical tensors beside this form.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE_ROWS = 16
UNIT_BYTES = 32
"""Bytes of a row's codes in one unit, four instructions of eight bytes; of values as many words."""

GROUP_COLUMNS = 4
"""Columns of a 2:4 group, one nibble of the bit mask."""


def code_words(codes: Tensor, fill: int = 0x88) -> Tensor:
    """Return 4-bit codes in the cores' order.

    Args:
        codes: canonical stream, uint8 [rows, bytes].
        fill: the byte that fills the last tile and the last unit; 0x88 is two codes of zero.

    Returns:
        int32 [row tiles, units, 32 lanes, 4 instructions].
    """
    tiles = _tiles(_padded(codes, fill))
    words = torch.zeros(tiles.shape[0], tiles.shape[3], 4, 8, 4, dtype=torch.int32, device=codes.device)
    for half in range(2):
        for place in range(2):
            register = half + 2 * place
            byte = tiles[:, half, :, :, :, place].permute(0, 2, 3, 1, 4).to(torch.int32)
            words |= ((byte & 15) << (4 * register)) | ((byte >> 4) << (16 + 4 * register))
    return words.permute(0, 1, 3, 4, 2).flatten(2, 3).contiguous()


def code_bytes(words: Tensor, rows: int, size: int) -> Tensor:
    """Return the canonical stream, uint8 [rows, size], of which `code_words` made ``words``."""
    tiles, units = words.shape[:2]
    # [row tile, unit, instruction, g, t]
    lanes = words.view(tiles, units, 8, 4, 4).permute(0, 1, 4, 2, 3)
    stream = torch.empty(tiles, 2, 8, units, 4, 2, 4, dtype=torch.uint8, device=words.device)
    for half in range(2):
        for place in range(2):
            register = half + 2 * place
            byte = ((lanes >> (4 * register)) & 15) | (((lanes >> (16 + 4 * register)) & 15) << 4)
            stream[:, half, :, :, :, place] = byte.permute(0, 3, 1, 2, 4)
    return _untiled(stream, rows, size)


def value_words(values: Tensor) -> Tensor:
    """Return 16-bit values in the cores' order.

    Args:
        values: as they are stored, [rows, an even number].

    Returns:
        int32 [row tiles, units, 4 instructions, 32 lanes, 4 registers] of two values each; a unit is 64 values a row.
    """
    tiles = _tiles(_padded(values.contiguous().view(torch.int32), 0))
    return tiles.permute(0, 3, 4, 2, 6, 5, 1).flatten(5, 6).flatten(3, 4).contiguous()


def value_matrix(words: Tensor, rows: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return the values [rows, size] of which `value_words` made ``words``."""
    tiles = words.view(*words.shape[:3], 8, 4, 2, 2).permute(0, 6, 3, 1, 2, 5, 4)
    return _untiled(tiles, rows, size // 2).view(dtype)


def metadata_words(pattern: Tensor) -> Tensor:
    """Return a 2:4 bit mask as the metadata of ``mma.sp``: for each group the two kept columns, 2 bits each.

    Args:
        pattern: canonical bit mask, uint8 [rows, columns / 8]; each nibble has two bits set.

    Returns:
        int32 [row tiles, units, 32 lanes, 2]. A word serves two instructions: the first reads it from the places 0
        and 1 of each group of lanes, the second from 2 and 3. Its low half is row ``g``, its high half ``g + 8``.
    """
    nibbles = torch.stack((pattern & 15, pattern >> 4), dim=-1).flatten(1)
    indices = _INDICES.to(pattern.device)[nibbles.int()]
    tiles = _tiles(_padded(indices, _INDICES_OF_FIRST_TWO))
    # tiles: [row tile, half, g, unit, instruction, half of its columns, group]
    shape = (tiles.shape[0], 2, 8, tiles.shape[3], 2, 2, 2, 4)  # instruction = 2 * word + selector
    groups = tiles.reshape(shape).to(torch.int32)
    words = torch.zeros(*groups.shape[:1], *groups.shape[2:7], dtype=torch.int32, device=pattern.device)
    for half in range(2):
        for group in range(4):
            words |= groups[:, half, ..., group] << (16 * half + 4 * group)
    # [row tile, g, unit, word, selector, half of columns] -> lane = 4 g + 2 selector + half of columns
    return words.permute(0, 2, 1, 4, 5, 3).flatten(2, 4).contiguous()


def metadata_pattern(words: Tensor, rows: int, columns: int) -> Tensor:
    """Return the 2:4 bit mask, uint8 [rows, ceil(columns / 8)], of which `metadata_words` made ``words``."""
    tiles, units = words.shape[:2]
    # [row tile, unit, g, selector, half of columns, word] -> [row tile, g, unit, word, selector, half of columns]
    groups = words.view(tiles, units, 8, 2, 2, 2).permute(0, 2, 1, 5, 3, 4)
    indices = torch.empty(tiles, 2, 8, units, 2, 2, 2, 4, dtype=torch.uint8, device=words.device)
    for half in range(2):
        for group in range(4):
            indices[:, half, ..., group] = (groups >> (16 * half + 4 * group)) & 15
    kept = _untiled(indices, rows, columns // GROUP_COLUMNS)
    nibbles = torch.unflatten(pad(_MASKS.to(words.device)[kept.int()], (0, kept.shape[1] % 2)), 1, (-1, 2))
    return nibbles[..., 0] | (nibbles[..., 1] << 4)


def scale_words(scale: Tensor, units: int | None = None) -> Tensor:
    """Return scales a group in the cores' order: int32 [row tiles, groups, 8], row ``g`` low and row ``g + 8`` high.

    Args:
        scale: 16-bit [rows, groups].
        units: number of groups to fill up to, with zeros.
    """
    rows, groups = scale.shape
    bits = scale.view(torch.int16).int() & 0xFFFF
    bits = pad(bits, (0, (units or groups) - groups, 0, -rows % TILE_ROWS))
    tiles = torch.unflatten(bits, 0, (-1, 2, 8))
    return (tiles[:, 0] | (tiles[:, 1] << 16)).permute(0, 2, 1).contiguous()


def scale_groups(words: Tensor, rows: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Return the scales [rows, groups] of a 16-bit ``dtype``, of which `scale_words` made ``words``."""
    halves = torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF), dim=1).to(torch.int16)
    return _untiled(halves.permute(0, 1, 3, 2), rows, groups).view(dtype)


def _padded(stream: Tensor, fill: int) -> Tensor:
    rows, size = stream.shape
    return pad(stream, (0, -size % UNIT_BYTES, 0, -rows % TILE_ROWS), value=fill)


def _tiles(stream: Tensor) -> Tensor:
    """View [rows, bytes] as [row tile, half, g, unit, instruction, half of its columns, t]."""
    return torch.unflatten(torch.unflatten(stream, 1, (-1, 4, 2, 4)), 0, (-1, 2, 8))


def _untiled(tiles: Tensor, rows: int, size: int) -> Tensor:
    """Return [rows, size] of [row tile, half, g, ...], without what fills the last tile and unit; never a view."""
    return tiles.reshape(tiles.shape[0] * TILE_ROWS, -1)[:rows, :size].clone(memory_format=torch.contiguous_format)


def _tabulate_indices() -> Tensor:
    """``first | second << 2`` of the columns that each 4-bit mask keeps; masks that keep not two give 0b0100."""
    table = torch.full((16,), _INDICES_OF_FIRST_TWO, dtype=torch.uint8)
    for mask in range(16):
        kept = [column for column in range(GROUP_COLUMNS) if mask >> column & 1]
        if len(kept) == 2:
            table[mask] = kept[0] | kept[1] << 2
    return table


_INDICES_OF_FIRST_TWO = 0b0100
_INDICES = _tabulate_indices()


def _tabulate_masks() -> Tensor:
    """The 4-bit mask of every ``first | second << 2``."""
    index = torch.arange(16)
    return ((1 << (index & 3)) | (1 << (index >> 2))).to(torch.uint8)


_MASKS = _tabulate_masks()
