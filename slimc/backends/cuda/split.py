"""Codes of more than four bits, and those with zero points, as sums of symmetric 4-bit codes.

With ``c = code - 2^(bits - 1)`` a weight is ``(c + offset) * scale``, where ``offset = 2^(bits - 1) - zero_point`` is
the same for a whole group, and zero for symmetric codes. Of more than four bits, ``c = 16 * high + low + 8`` with high
and low from -8 to 7. So a product with W is one or two products with 4-bit codes, and one of the sums of x over the
groups with the offsets times the scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimc.runtime.formats import WeightFormat
from slimc.runtime.packing import PackedWeight, pack_weight

__all__ = ["Split", "split_of"]

BITS = 4
ZERO = 1 << (BITS - 1)
STEP = 1 << BITS


@dataclass(frozen=True)
class Split:
    """A matrix as sums of others.

    Attributes:
        spec: the matrix as it is stored.
    """

    spec: WeightFormat

    @property
    def part(self) -> WeightFormat:
        """The form of the 4-bit matrices."""
        return replace(self.spec, bits=BITS, asymmetric=False)

    @property
    def wide(self) -> bool:
        """Whether there are two of them."""
        return (self.spec.bits or 0) > BITS

    def apply(self, weight: PackedWeight) -> tuple[PackedWeight, PackedWeight | None]:
        """Return low, with the matrix's scale, and high, with sixteen times that, if there is one."""
        codes, _ = weight.unpack()
        if not self.wide:
            return self._pack(codes + (ZERO - self._middle), weight.scale), None
        codes = codes + (ZERO * STEP - self._middle)
        # Sixteen times a 16-bit scale is exact.
        high = None if weight.scale is None else weight.scale * STEP
        return self._pack(codes & (STEP - 1), weight.scale), self._pack(codes >> BITS, high)

    def undo(self, low: PackedWeight, high: PackedWeight | None, zero_point: Tensor | None) -> PackedWeight:
        """Return the matrix of which `apply` made these."""
        codes, _ = low.unpack()
        if high is None:
            codes = codes - (ZERO - self._middle)
        else:
            codes = (codes | (high.unpack()[0] << BITS)) - (ZERO * STEP - self._middle)
        spec = self.spec
        packed = pack_weight(codes, bits=spec.bits, scale=low.scale, zero_point=zero_point, group=spec.group)
        return PackedWeight(spec, **packed.tensors())

    def offsets(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return [rows, groups]: what each input of a group is multiplied by beside the 4-bit codes."""
        offset = torch.full_like(scale, ZERO if self.wide else 0)
        if zero_point is not None:
            offset = offset + (self._middle - zero_point.to(scale.dtype))
        return (offset * scale).expand(self.spec.rows, -1).contiguous()

    def sums(self, x: Tensor) -> Tensor:
        """Return the sums [tokens, groups] of inputs [tokens, columns] over the groups."""
        group = self.spec.group or self.spec.columns
        return torch.unflatten(pad(x, (0, -x.shape[1] % group)), 1, (-1, group)).sum(dim=-1)

    @property
    def _middle(self) -> int:
        """The code that counts as zero where there are no zero points."""
        return 1 << ((self.spec.bits or BITS) - 1)

    def _pack(self, codes: Tensor, scale: Tensor | None) -> PackedWeight:
        packed = pack_weight(codes, bits=BITS, scale=scale, group=self.spec.group)
        return PackedWeight(self.part, **packed.tensors())


def split_of(spec: WeightFormat) -> Split | str | None:
    """Say how to write a matrix as a sum of others, why it cannot be, or ``None`` if it need not."""
    if spec.bits is None or (spec.bits <= BITS and not spec.asymmetric):
        return None
    if spec.sparsity is not None:
        return f"{spec.describe()}: sums over groups count what was pruned"
    if spec.bits > BITS and spec.dtype == torch.float16:
        return f"{spec.describe()}: sixteen times a scale may be beyond float16"
    return Split(spec)
