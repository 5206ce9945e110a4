"""Codes of one width for weights that have several, and for signs: ONNX has one width a matrix and none of 1 bit.

The result is exact. Symmetric codes keep their distance from the zero point, which is that of the widest ones;
asymmetric codes and their zero points stay as they are. A sign, which is a step of -1 or +1 and never 0, becomes the
code below or above a zero point, for which it takes 2 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimc.runtime.decode import expand_groups
from slimc.runtime.formats import WeightFormat
from slimc.runtime.packing import PackedBinary, PackedWeight

__all__ = ["SignProducts", "common_bits", "common_codes", "common_zero_point", "sign_products"]


def common_bits(form: WeightFormat) -> int:
    """Return the bits that every code of a weight fits into, 0 for numbers."""
    return 0 if form.bits is None else max(form.bits, 2)


def common_codes(packed: PackedWeight) -> Tensor:
    """Return codes of `common_bits` bits, uint8 [rows, columns]; a pruned position holds the code of zero.

    Symmetric ones have the zero point ``2 ** (common_bits - 1)``, others that of `common_zero_point`.
    """
    form = packed.format
    codes, mask = packed.unpack()
    if form.widths is None:
        return codes
    width = expand_groups(codes.new_tensor([form.widths]), form.columns, form.group or 0)
    half = 1 << (common_bits(form) - 1)
    zero_point = common_zero_point(packed)
    if zero_point is None:
        found = torch.where(width == 1, 2 * codes + (half - 1), codes + (half - (1 << (width - 1))))
        zero = codes.new_full((1, 1), half)
    else:
        found = torch.where(width == 1, 2 * codes, codes)
        zero = expand_groups(zero_point, form.columns, form.group or 0)
    return found if mask is None else torch.where(mask, found, zero)


def common_zero_point(packed: PackedWeight) -> Tensor | None:
    """Return the zero points of `common_codes`, uint8 of the scale's shape; None if the codes are symmetric."""
    zero_point, widths = packed.zero_point, packed.format.widths
    if zero_point is None or widths is None:
        return zero_point
    return torch.where(zero_point.new_tensor([widths]) == 1, 1, zero_point)


@dataclass(frozen=True)
class SignProducts:
    """A binary part as a product by a matrix of codes: ``sum_k ((x * right[k]) @ signs^T) * left[k]``.

    Attributes:
        right: [columns], or [rank, columns] of several ranks.
        signs: the matrix; with a single rank its scale is the magnitude of a row.
        left: [rank, rows] of several ranks, None of one.
    """

    right: Tensor
    signs: PackedWeight
    left: Tensor | None


def sign_products(binary: PackedBinary) -> SignProducts:
    """Return a binary part as products; the stored signs are not copied.

    They are codes of 1 bit whose scale is negative, because a bit that is set is -1.
    """
    form = binary.format
    single = form.rank == 1
    return SignProducts(
        right=binary.right[0] if single else binary.right,
        signs=PackedWeight(
            WeightFormat(form.rows, form.columns, bits=1, group=form.columns, dtype=form.dtype, widths=(1,)),
            binary.signs,
            scale=-binary.left if single else binary.left.new_full((form.rows, 1), -1),
        ),
        left=None if single else binary.left.t(),
    )
