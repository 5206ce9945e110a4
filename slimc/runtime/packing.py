"""The canonical packed layout: what is stored of a compressed weight, and how to get there and back.

Codes form little-endian bit streams (`slimc.runtime.bits`), one a row; an N:M weight stores only the kept codes,
in column order, and an unstructured weight is a single row-major stream. Kept positions are marked in a bit mask.
The layout does not depend on the device; kernels derive their own from it when they are first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimc.errors import FormatError
from slimc.runtime.bits import pack_bits, unpack_bits
from slimc.runtime.decode import (
    dequantize,
    expand_groups,
    pack_groups,
    scatter,
    stored_codes,
    unpack_groups,
    unpack_mask,
    unpack_signs,
)
from slimc.runtime.formats import NM, BinaryFormat, LinearFormat, Sparsity, TensorSpecs, Unstructured, WeightFormat

__all__ = [
    "NM",
    "BinaryFormat",
    "LinearFormat",
    "PackedBinary",
    "PackedLinear",
    "PackedWeight",
    "Sparsity",
    "TensorSpecs",
    "Unstructured",
    "WeightFormat",
    "pack_signs",
    "pack_weight",
]


@dataclass
class PackedWeight:
    """A matrix in its storage form.

    Attributes:
        format: Shape, bits, grouping and sparsity.
        values: Codes as bit streams, uint8 [rows, bytes] ([bytes] if unstructured); without bits the kept
            values themselves, [rows, stored per row] ([nonzeros] if unstructured).
        pattern: Bit mask of kept positions, uint8 [rows, ceil(columns / 8)]; None if all are kept.
        scale: [1, 1], [rows, 1] or [rows, groups]; None without bits.
        zero_point: uint8, shaped like ``scale``; None if the zero point is ``2 ** (bits - 1)``.
    """

    format: WeightFormat
    values: Tensor
    pattern: Tensor | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are present, by name, in storage order."""
        named = {
            "values": self.values,
            "pattern": self.pattern,
            "scale": self.scale,
            "zero_point": self.zero_point,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, spec: WeightFormat, tensors: Mapping[str, Tensor]) -> PackedWeight:
        """Put untrusted tensors together; raise `FormatError` unless they are exactly what ``spec`` needs.

        Names, shapes and dtypes are checked, that a pattern keeps as many positions as values are stored, and that
        the zero points of groups with widths of their own are codes (not on the meta device, where there is nothing to
        read).
        """
        check_specs(spec.tensor_specs(), tensors)
        packed = cls(spec, **tensors)
        check_pattern(packed)
        check_zero_points(packed)
        return packed

    def unpack(self) -> tuple[Tensor, Tensor | None]:
        """Return codes (or values) [rows, columns] and the boolean mask of kept positions, None if all are.

        A position that is not kept holds the code of zero (or the value zero).
        """
        spec = self.format
        mask = None if self.pattern is None else unpack_mask(self.pattern, spec.columns)
        if spec.bits is None:
            return (self.values.clone(), None) if mask is None else (self.decode(), mask)
        n, m = _pattern_sizes(spec.sparsity)
        if spec.widths is None:
            codes = stored_codes(self.values, bits=spec.bits, columns=spec.columns, n=n, m=m)
        else:
            codes = unpack_groups(self.values, [count for count, _ in spec.group_streams()], spec.widths)
        return (codes, None) if mask is None else (scatter(codes, mask, self._zero_codes()), mask)

    def decode(self) -> Tensor:
        """Return the dense weight [rows, columns] in the format's dtype; positions not kept are exactly zero."""
        spec = self.format
        n, m = _pattern_sizes(spec.sparsity)
        return dequantize(
            self.values,
            self.pattern,
            self.scale,
            self.zero_point,
            bits=spec.bits or 0,
            columns=spec.columns,
            group=spec.group or 0,
            n=n,
            m=m,
            widths=spec.widths or (),
        )

    def _zero_codes(self) -> Tensor:
        """The code of zero at every position, broadcastable to [rows, columns]."""
        return _zero_of(self.format, self.values, self.zero_point)


def pack_weight(
    codes_or_values: Tensor,
    *,
    bits: int | None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    group: int | None = None,
    mask: Tensor | None = None,
    sparsity: Sparsity = None,
    widths: tuple[int, ...] | None = None,
) -> PackedWeight:
    """Pack a matrix into the canonical layout.

    Args:
        codes_or_values: uint8 codes below ``2 ** bits``, or floating point values if ``bits`` is None;
            [rows, columns], what it holds at pruned positions does not matter.
        bits: Bits a code, 2 to 8, or None; not read where there are ``widths``.
        scale: [1, 1] (per tensor), [rows, 1] or [rows, ceil(columns / group)]; required with ``bits``.
        zero_point: uint8 of the scale's shape, or None for symmetric codes.
        group: Columns that share a scale; None if all do.
        mask: Boolean [rows, columns], True where a value is kept; required with ``sparsity``.
        sparsity: An N:M mask that keeps fewer than N in some group is filled up at the lowest free positions with
            the code of zero; one that keeps more is an error.
        widths: Bits a code of each group of columns, 1 to 8, where they differ. Widths that are all alike, and
            more than 1, make a weight of one width.

    Raises:
        FormatError: The arguments do not fit each other.
    """
    if codes_or_values.dim() != 2:
        raise FormatError(f"a weight has two dimensions, not the shape {tuple(codes_or_values.shape)}")
    if (mask is None) != (sparsity is None):
        raise FormatError("a mask and a sparsity belong together: one was given without the other")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != codes_or_values.shape):
        raise FormatError(f"the mask must be bool {tuple(codes_or_values.shape)}, not {mask.dtype} {tuple(mask.shape)}")
    if bits is not None and scale is None:
        raise FormatError(f"codes of {bits} bits need a scale")
    rows, columns = codes_or_values.shape
    if widths is not None:
        bits = max(widths)
        widths = None if min(widths) == bits > 1 else widths
    spec = WeightFormat(
        rows,
        columns,
        bits=bits,
        group=group,
        per_tensor=scale is not None and scale.numel() == 1 and group is None,
        asymmetric=zero_point is not None,
        sparsity=sparsity,
        nonzeros=int(mask.sum()) if mask is not None and isinstance(sparsity, Unstructured) else None,
        dtype=codes_or_values.dtype if scale is None else scale.dtype,
        widths=widths,
    )
    if spec.widths is not None and spec.group is not None:
        for index, width in enumerate(spec.widths):
            _check_codes(codes_or_values[:, index * spec.group : (index + 1) * spec.group], width)
    elif bits is not None:
        _check_codes(codes_or_values, bits)
    stored, pattern = codes_or_values, None
    if mask is not None:
        zero = _zero_of(spec, codes_or_values, zero_point)
        stored = torch.where(mask, codes_or_values, zero)
        kept = _fill_groups(mask, sparsity) if isinstance(sparsity, NM) else mask
        if kept is not mask and 1 in (spec.widths or ()):
            raise FormatError(f"signs have no code of zero, so their mask must keep exactly {sparsity} everywhere")
        pattern = pack_bits(kept.to(torch.uint8), 1)
        stored = stored[kept]
        if isinstance(sparsity, NM):
            stored = stored.view(rows, spec.stored_per_row)
    if spec.widths is not None:
        values = pack_groups(stored, [count for count, _ in spec.group_streams()], spec.widths)
    else:
        values = stored.contiguous() if bits is None else pack_bits(stored, bits)
    if values.data_ptr() == codes_or_values.data_ptr():
        values = values.clone()
    tensors = {"values": values, "pattern": pattern, "scale": scale, "zero_point": zero_point}
    return PackedWeight.from_tensors(spec, {name: t for name, t in tensors.items() if t is not None})


@dataclass
class PackedBinary:
    """A matrix of signs with a magnitude of low rank: ``(left @ right) (.) B`` with B in {-1, +1}.

    Attributes:
        signs: Bit mask of the entries that are -1, uint8 [rows, ceil(columns / 8)].
        left: [rows, rank].
        right: [rank, columns], in the dtype of ``left``.
    """

    signs: Tensor
    left: Tensor
    right: Tensor

    @property
    def format(self) -> BinaryFormat:
        """The storage form; raises `FormatError` if it is none."""
        return BinaryFormat(self.left.shape[0], self.right.shape[1], self.left.shape[1], self.left.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors under their flat names, in storage order."""
        return {"signs": self.signs, "sign_left": self.left, "sign_right": self.right}

    def decode(self) -> Tensor:
        """Return the dense matrix [rows, columns] in float32."""
        magnitude = self.left.float() @ self.right.float()
        return magnitude.mul_(unpack_signs(self.signs, magnitude.shape[1], torch.float32))


def pack_signs(negative: Tensor) -> Tensor:
    """Pack a boolean matrix [rows, columns], True where an entry is -1, into uint8 [rows, ceil(columns / 8)]."""
    return pack_bits(negative.to(torch.uint8), 1)


@dataclass
class PackedLinear:
    """A linear layer's weight in its storage form, without the bias.

    The layer computes ``y = (x * input_scale) @ decode(weight)^T + (x @ right^T) @ left^T``; the adapters read
    the unscaled input. With an ``activation`` the product with the weight reads ``x * input_scale`` rounded token by
    token, and so do the adapters if there is no ``input_scale``; if there is one they still read x. A binary part reads
    x itself: for each of its ranks it adds ``((x * right) @ B^T) * left``.

    Attributes:
        weight: The matrix [rows, columns].
        left: Left factor of the low-rank correction, [rows, rank], or None.
        right: Right factor, [rank, columns], or None.
        input_scale: [columns] in the dtype of the weight, or None.
        activation: What inputs are rounded to, one of `slimc.runtime.formats.ACTIVATIONS`, or None.
        binary: Signs with a magnitude of low rank, added to the weight, or None.
    """

    weight: PackedWeight
    left: PackedWeight | None = None
    right: PackedWeight | None = None
    input_scale: Tensor | None = None
    activation: str | None = None
    binary: PackedBinary | None = None

    @property
    def format(self) -> LinearFormat:
        """The storage form; raises `FormatError` if the parts do not fit each other."""
        return LinearFormat(
            self.weight.format,
            None if self.left is None else self.left.format,
            None if self.right is None else self.right.format,
            self.input_scale is not None,
            self.activation,
            None if self.binary is None else self.binary.format,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are present under their flat names: ``values``, ..., ``left_values``, ..."""
        named = self.weight.tensors()
        if self.input_scale is not None:
            named["input_scale"] = self.input_scale
        for prefix, factor in (("left", self.left), ("right", self.right)):
            if factor is not None:
                named |= {f"{prefix}_{name}": tensor for name, tensor in factor.tensors().items()}
        return named if self.binary is None else named | self.binary.tensors()

    @classmethod
    def from_tensors(cls, spec: LinearFormat, tensors: Mapping[str, Tensor]) -> PackedLinear:
        """Put untrusted tensors together; raise `FormatError` unless they are exactly what ``spec`` needs."""
        check_specs(spec.tensor_specs(), tensors)
        packed = cls.assemble(spec, tensors)
        check_pattern(packed.weight)
        check_zero_points(packed.weight)
        if packed.binary is not None:
            check_signs(packed.binary)
        return packed

    @classmethod
    def assemble(cls, spec: LinearFormat, tensors: Mapping[str, Tensor]) -> PackedLinear:
        """Put tensors together that are known to fit; nothing is checked."""

        def part(prefix: str, spec: WeightFormat) -> PackedWeight:
            return PackedWeight(spec, **{name: tensors[prefix + name] for name in spec.tensor_specs()})

        return cls(
            part("", spec.weight),
            None if spec.left is None else part("left_", spec.left),
            None if spec.right is None else part("right_", spec.right),
            tensors.get("input_scale"),
            spec.activation,
            None if spec.binary is None else PackedBinary(*(tensors[name] for name in spec.binary.tensor_specs())),
        )

    def decode_base(self) -> Tensor:
        """Return the effective weight without adapters and binary part: ``decode(weight) * input_scale``, float32."""
        base = self.weight.decode().float()
        return base if self.input_scale is None else base * self.input_scale.float()

    def decode(self) -> Tensor:
        """Return the effective weight [rows, columns] in float32: input scale, adapters and binary part included."""
        whole = self.decode_base()
        if self.left is not None and self.right is not None:
            whole = whole + self.left.decode().float() @ self.right.decode().float()
        return whole if self.binary is None else whole + self.binary.decode()


def check_specs(specs: TensorSpecs, tensors: Mapping[str, Tensor]) -> None:
    """Raise `FormatError` unless ``tensors`` has exactly the names, shapes and dtypes of ``specs``."""
    if missing := [name for name in specs if name not in tensors]:
        raise FormatError(f"packed weight lacks the tensor {', '.join(missing)}")
    if unknown := [name for name in tensors if name not in specs]:
        raise FormatError(f"packed weight has a tensor that its format does not know: {', '.join(unknown)}")
    for name, (shape, dtype) in specs.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise FormatError(f"packed tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")


def _pattern_sizes(sparsity: Sparsity) -> tuple[int, int]:
    """N and M as op attributes: zeros unless the sparsity is N:M."""
    return (sparsity.n, sparsity.m) if isinstance(sparsity, NM) else (0, 0)


def _zero_of(spec: WeightFormat, like: Tensor, zero_point: Tensor | None) -> Tensor:
    """The code (or value) of zero, broadcastable to [rows, columns]."""
    if spec.bits is None:
        return like.new_zeros(1, 1)
    if zero_point is None and spec.widths is not None:
        zeros = [1 << (width - 1) for width in spec.widths]
        return expand_groups(like.new_tensor([zeros]), spec.columns, spec.group or 0)
    if zero_point is None:
        return like.new_full((1, 1), 1 << (spec.bits - 1))
    check_specs({"zero_point": (spec.scale_shape, torch.uint8)}, {"zero_point": zero_point})
    return expand_groups(zero_point, spec.columns, spec.group or 0)


def _check_codes(codes: Tensor, bits: int) -> None:
    if codes.dtype != torch.uint8:
        raise FormatError(f"codes must be uint8, not {codes.dtype}")
    if int(codes.max()) >> bits:
        raise FormatError(f"code {int(codes.max())} does not fit in {bits} bits")


def _fill_groups(mask: Tensor, sparsity: NM) -> Tensor:
    """Return the mask with exactly N set in each group of M: free positions are taken from the lowest up."""
    groups = torch.unflatten(mask, 1, (-1, sparsity.m))
    missing = sparsity.n - groups.sum(dim=-1, keepdim=True, dtype=torch.int32)
    if not bool(missing.any()):
        return mask
    if int(missing.min()) < 0:
        row, group, _ = (int(index) for index in (missing < 0).nonzero()[0])
        raise FormatError(
            f"the mask keeps {sparsity.n - int(missing.min())} values in a group of {sparsity.m}, {sparsity} allows "
            f"{sparsity.n}; the first such group is number {group} of row {row}"
        )
    free = ~groups
    return (groups | (free & (free.cumsum(dim=-1) <= missing))).flatten(1)


def check_signs(packed: PackedBinary) -> None:
    """Raise `FormatError` if a sign is set beyond the columns."""
    columns = packed.right.shape[1]
    if packed.signs.is_meta or columns % 8 == 0:
        return
    if bool((packed.signs[:, -1] >> columns % 8).any()):
        raise FormatError(f"the signs mark positions beyond the {columns} columns")


def check_pattern(packed: PackedWeight) -> None:
    """Raise `FormatError` unless the mask keeps exactly the positions that have a value, and no padding bit is set."""
    pattern, spec = packed.pattern, packed.format
    if pattern is None or pattern.is_meta:
        return
    mask = unpack_bits(pattern, 1, 8 * pattern.shape[1])
    if bool(mask[:, spec.columns :].any()):
        raise FormatError(f"the pattern marks positions beyond the {spec.columns} columns")
    if isinstance(spec.sparsity, NM):
        kept = torch.unflatten(mask[:, : spec.columns], 1, (-1, spec.sparsity.m)).sum(dim=-1, dtype=torch.int32)
        if bool((kept != spec.sparsity.n).any()):
            raise FormatError(f"the pattern is not {spec.sparsity}: some group keeps another number of values")
    elif int(mask.sum()) != spec.nonzeros:
        raise FormatError(f"the pattern keeps {int(mask.sum())} positions, but {spec.nonzeros} values are stored")


def check_zero_points(packed: PackedWeight) -> None:
    """Raise `FormatError` unless the zero points of groups with widths of their own are codes of theirs, of signs 0."""
    zero_point, widths = packed.zero_point, packed.format.widths
    if zero_point is None or widths is None or zero_point.is_meta:
        return
    highest = zero_point.new_tensor([(1 << width) - 1 if width > 1 else 0 for width in widths])
    if bool((zero_point > highest).any()):
        group = int((zero_point > highest).any(dim=0).nonzero()[0])
        raise FormatError(f"a zero point of group {group} is no code of {widths[group]} bits (signs have none: 0)")
