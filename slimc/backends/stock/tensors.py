"""The tensors of a layer in a folder for stock transformers.

Codes lie as in compressed-tensors' ``pack-quantized``: the codes of a row end to end in integers of 32 bits, the first
in the lowest bits, which is the order of `slimc.runtime.bits`; zero points the same way along the rows of a column.
A code stands for itself less the zero point, ``2 ** (bits - 1)`` where none is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimc.backends.onnx.one_width import common_bits, common_codes, common_zero_point
from slimc.backends.stock.scheme import Scheme
from slimc.errors import FormatError
from slimc.runtime.bits import pack_bits
from slimc.runtime.formats import WeightFormat
from slimc.runtime.packing import PackedWeight

__all__ = ["code_tensors"]


def code_tensors(packed: PackedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """Return the tensors of a weight of codes, which decode to the same numbers (shapes: `Scheme.specs`).

    Raises:
        FormatError: a zero point is no code of the scheme.
    """
    form, half = packed.format, 1 << (scheme.bits - 1)
    codes, zero_point = common_codes(packed), common_zero_point(packed)
    if zero_point is None:
        codes = codes + (half - (1 << (common_bits(form) - 1)))
        zero_point = codes.new_full(form.scale_shape, half)
    elif int(zero_point.max()) >> scheme.bits:
        raise FormatError(f"the zero point {int(zero_point.max())} is no code of {scheme.bits} bits")
    if packed.scale is None:
        raise FormatError("a weight without codes has no scale")
    tensors = {
        "weight_packed": _in_words(codes, scheme.bits),
        "weight_scale": _regrouped(packed.scale, form, scheme),
        "weight_shape": torch.tensor([form.rows, form.columns], dtype=torch.int64),
    }
    if scheme.asymmetric:
        columns = _regrouped(zero_point, form, scheme).t().contiguous()
        tensors["weight_zero_point"] = _in_words(columns, scheme.bits).t().contiguous()
    return tensors


def _in_words(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [rows, count] into int32 [rows, words]."""
    stream = pack_bits(codes, bits)
    return pad(stream, (0, -stream.shape[1] % 4)).view(torch.int32)


def _regrouped(per_group: Tensor, form: WeightFormat, scheme: Scheme) -> Tensor:
    """Repeat [1, 1], [rows, 1] or [rows, groups] for the rows and groups of the scheme."""
    spread = per_group.expand(form.rows, per_group.shape[1])
    if scheme.group is None:
        return spread[:, :1].contiguous()
    groups = form.columns // scheme.group
    held = form.columns if form.group is None else form.group
    return spread.repeat_interleave(held // scheme.group if held < form.columns else groups, dim=1)[
        :, :groups
    ].contiguous()
