"""Codes that the kernels do not take as they are, written as codes that they do, and back.

The kernels know symmetric 4-bit codes with one scale a row, or for every 32, 64 or 128 columns. Fewer bits, other
groups and widths say the same in that form: a code of 3 bits is a code of 4, a scale may be repeated, and a group may
be filled up with columns of zeros, where the input has zeros too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from slimc.backends.cuda.layer import FACTOR_GROUP, KERNEL_GROUPS
from slimc.runtime.formats import NM, WeightFormat
from slimc.runtime.packing import PackedWeight, pack_weight

__all__ = ["COLUMN_MULTIPLE", "Fit", "fit_of", "padding", "put_padding"]

BITS = 4
COLUMN_MULTIPLE = 8
MOST_ROOM = 2
"""How many times its bits a group may take; for more, decoding at every call is the better use of memory."""


@dataclass(frozen=True)
class Fit:
    """How a matrix is written for the kernels.

    Attributes:
        spec: the matrix as it is stored.
        group: columns that share a scale for the kernels; None for one scale a row, or a tensor if it has only one.
        own: columns that stay together.
        width: columns that they take for the kernels, the rest being zeros.
        multiple: to which all columns together are filled up.
        rows: for the kernels, filled up with zeros; None for those stored.
    """

    spec: WeightFormat
    group: int | None
    own: int
    width: int
    multiple: int = COLUMN_MULTIPLE
    rows: int | None = None

    @cached_property
    def format(self) -> WeightFormat:
        """The matrix as the kernels see it."""
        spec = self.spec
        return replace(
            spec,
            rows=self.rows or spec.rows,
            columns=self.columns,
            bits=BITS,
            group=self.group,
            per_tensor=spec.per_tensor and self.group is None,
        )

    @property
    def columns(self) -> int:
        """Columns for the kernels."""
        if self.own == self.width:
            return self.spec.columns + -self.spec.columns % self.multiple
        return -(-self.spec.columns // self.own) * self.width

    def spread(self, x: Tensor) -> Tensor:
        """Return inputs [tokens, columns] with zeros where the kernels have columns of none.

        Columns beyond those stored are zeros already.
        """
        if self.own == self.width:
            missing = self.columns - x.shape[1]
            return pad(x, (0, missing)) if missing else x
        groups = -(-self.spec.columns // self.own)
        stored = x[:, : self.spec.columns]
        parts = torch.unflatten(pad(stored, (0, groups * self.own - self.spec.columns)), 1, (groups, self.own))
        return pad(parts, (0, self.width - self.own)).flatten(1)

    def apply(self, weight: PackedWeight) -> PackedWeight:
        """Write a matrix for the kernels; what pads the streams of its codes is lost (`padding`)."""
        codes, mask = weight.unpack()
        place = self._places(codes.device)
        # Codes are unsigned: this is their distance from zero, and then from the zero of four bits.
        shifted = codes - (1 << ((self.spec.bits or BITS) - 1)) + (1 << (BITS - 1))
        spread = codes.new_full((codes.shape[0], self.columns), 1 << (BITS - 1))
        spread[:, place] = shifted
        kept = None
        if mask is not None:
            kept = mask.new_zeros(spread.shape)
            kept[:, place] = mask
        scale = weight.scale
        if scale is not None and self.group is not None:
            owners = torch.zeros(-(-self.columns // self.group), dtype=torch.int64, device=codes.device)
            owners[place // self.group] = torch.arange(len(place), device=codes.device) // self._stored_group
            scale = scale.expand(codes.shape[0], -1)[:, owners]
        more = (0, 0, 0, self.format.rows - self.spec.rows)
        if scale is not None and len(scale) == self.spec.rows and not self.format.per_tensor:
            scale = pad(scale, more)
        spread = pad(spread, more, value=1 << (BITS - 1))
        packed = pack_weight(spread, bits=BITS, scale=scale, group=self.group, mask=kept, sparsity=self.spec.sparsity)
        return PackedWeight(self.format, **packed.tensors())

    def undo(self, weight: PackedWeight) -> PackedWeight:
        """Return the matrix of which `apply` made this."""
        spec = self.spec
        codes, mask = weight.unpack()
        place = self._places(codes.device)
        stored = codes[: spec.rows, place] - (1 << (BITS - 1)) + (1 << ((spec.bits or BITS) - 1))
        rows, groups = spec.scale_shape
        scale = weight.scale
        if scale is not None and self.group is not None:
            first = place[:: self._stored_group][:groups] // self.group
            scale = scale[:rows, first]
        scale = None if scale is None else scale[:rows].contiguous()
        kept = None if mask is None else mask[:, place]
        packed = pack_weight(
            stored, bits=spec.bits, scale=scale, group=spec.group, mask=kept, sparsity=spec.sparsity
        )  # fmt: skip
        return PackedWeight(spec, **packed.tensors())

    @property
    def _stored_group(self) -> int:
        return self.spec.group or self.spec.columns

    def _places(self, device: torch.device) -> Tensor:
        """Where each column as stored lies for the kernels."""
        column = torch.arange(self.spec.columns, device=device)
        return column // self.own * self.width + column % self.own


def padding(weight: PackedWeight) -> Tensor | None:
    """Return the bits that fill the last byte of each row of codes, uint8 [rows], or None if all are zero as usual."""
    used = weight.format.stored_per_row * (weight.format.bits or 8) % 8
    bits = weight.values[:, -1] >> used if used else None
    return None if bits is None or not bool(bits.any()) else bits


def put_padding(weight: PackedWeight, bits: Tensor) -> None:
    """Put back what `padding` returned."""
    used = weight.format.stored_per_row * (weight.format.bits or 8) % 8
    weight.values[:, -1] |= bits << used


def fit_of(spec: WeightFormat, *, beside: Fit | None = None, grouped: bool = False) -> Fit | str:
    """Say how to write a matrix for the kernels, or why it cannot be.

    Args:
        spec: the matrix.
        beside: columns must lie as in this fit, of another matrix that reads the same input.
        grouped: there must be a scale every 64 columns, as in adapters inside a kernel.
    """
    refusal = _refuses_codes(spec)
    if refusal:
        return refusal
    if beside is not None:
        return _fit_beside(spec, beside)
    single = spec.group is None or spec.group >= spec.columns
    if grouped:
        if single or (spec.group or 0) % FACTOR_GROUP == 0:
            return Fit(spec, FACTOR_GROUP, spec.columns, spec.columns, multiple=1)
        return f"adapters inside a kernel have groups of multiples of {FACTOR_GROUP}, not of {spec.group}"
    if single:
        return Fit(spec, None, spec.columns, spec.columns)
    group = spec.group or 0
    width = group + -group % KERNEL_GROUPS[-1]
    if width * BITS > MOST_ROOM * group * (spec.bits or BITS):
        return f"groups of {group} columns would be filled up to {width} codes of 4 bits, more than twice their room"
    if isinstance(spec.sparsity, NM) and group % spec.sparsity.m:
        return f"groups of {group} columns cut through groups of {spec.sparsity.m}"
    return Fit(spec, next(size for size in KERNEL_GROUPS if width % size == 0), group, width)


def _refuses_codes(spec: WeightFormat) -> str | None:
    if spec.widths is not None:
        return f"holds codes of one width, not {spec.describe()}"
    if spec.bits is None or spec.bits > BITS:
        return f"holds codes of up to {BITS} bits, not {spec.describe()}"
    if spec.asymmetric:
        return "holds symmetric codes only"
    if spec.sparsity not in (None, NM(2, 4)):
        return f"knows 2:4 and dense weights, not {spec.sparsity}"
    return None


def _fit_beside(spec: WeightFormat, other: Fit) -> Fit | str:
    """Let a factor's columns lie as another matrix has them, if every 64 of them then still share a scale."""
    fit = Fit(spec, FACTOR_GROUP, other.own, other.width)
    group = spec.group or spec.columns
    place = fit._places(torch.device("cpu"))
    owners = torch.arange(spec.columns) // group
    blocks = place // FACTOR_GROUP
    mixed = (blocks[1:] == blocks[:-1]) & (owners[1:] != owners[:-1])
    if bool(mixed.any()):
        return f"groups of {group} columns do not fall on its groups of {FACTOR_GROUP}"
    return fit
