"""CPU kernels for few tokens, where reading the weight is what takes the time.

PyTorch carries two kernels that multiply bfloat16 activations by integer weights without decoding them first:
4-bit codes in groups (``aten::_weight_int4pack_mm_for_cpu``) and 8-bit codes with a scale a row
(``aten::_weight_int8pack_mm``). Pruned positions become the code of zero, so both read dense codes. They multiply
by the unrounded product of code and scale and sum in float32, so that only the result is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slimc.errors import FormatError
from slimc.runtime.decode import signed_codes
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear, PackedWeight
from slimc.runtime.select import Kernel

__all__ = ["INT4PACK", "INT8PACK", "KERNELS"]

INT4PACK_TOKENS = 8
INT8PACK_TOKENS = 8

_KERNEL_GROUPS = (256, 128, 64, 32)
"""Columns that may share a scale in the int4 kernel, larger first."""

_ROW_MULTIPLE = 16
"""The int4 kernel wants whole blocks of output rows."""

_ZERO = 8
"""The zero point of the int4 kernel: ``weight = (code - 8) * scale + zero``."""

_int4pack_mm = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_int4pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default
_int8pack_mm = torch.ops.aten._weight_int8pack_mm.default


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """A matrix in the int4 kernel's layout: codes, (scale, zero) [columns / group, rows, 2], and the group."""

    codes: Tensor
    scales: Tensor
    group: int


@dataclass(frozen=True, slots=True)
class DenseAdapters:
    """Adapters in 16 bit: ``right`` [rank, columns] and the transpose of ``left`` [rank, rows]."""

    right: Tensor
    left: Tensor


@dataclass(frozen=True, slots=True)
class Int4Layer:
    """State of the int4 kernel.

    With 4-bit adapters the left factor stands beside the weight as further columns, so that
    ``y = [x * input_scale, x @ right^T] @ [weight | left]^T`` takes two calls. ``padding`` columns of zeros follow
    those of x; the rows of ``weight`` beyond ``rows`` are padding too.
    """

    weight: Int4Matrix
    right: Int4Matrix | None
    dense: DenseAdapters | None
    input_scale: Tensor | None
    columns: int
    padding: int
    rows: int


@dataclass(frozen=True, slots=True)
class Int8Layer:
    """State of the int8 kernel: signed codes [rows, columns], a scale a row, and adapters in 16 bit."""

    codes: Tensor
    scales: Tensor
    dense: DenseAdapters | None
    input_scale: Tensor | None
    columns: int


def _accepts_int4(format: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    return (
        _refuses_device(format.weight, dtype, device)
        or _refuses_int4(format.weight)
        or _refuses_tokens(tokens, INT4PACK_TOKENS)
    )


def _accepts_int8(format: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    return (
        _refuses_device(format.weight, dtype, device)
        or _refuses_int8(format.weight)
        or _refuses_tokens(tokens, INT8PACK_TOKENS)
    )


def _refuses_device(format: WeightFormat, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return "PyTorch has no vectorised version for this CPU"
    if dtype != torch.bfloat16:
        return f"fast for bfloat16 inputs only, not {str(dtype).removeprefix('torch.')}"
    if format.dtype != torch.bfloat16:
        return f"reads bfloat16 scales, not {str(format.dtype).removeprefix('torch.')}"
    return None


def _refuses_tokens(tokens: int, limit: int) -> str | None:
    return f"for more than {limit} tokens decoding the weight is faster" if tokens > limit else None


def _refuses_int4(format: WeightFormat) -> str | None:
    """Why the int4 kernel cannot hold this matrix."""
    if format.bits is None or format.bits > 4:
        return f"holds codes of up to 4 bits, not {format.describe()}"
    if format.asymmetric:
        return "holds symmetric codes only: it would round the offset of each group to bfloat16"
    if _has_groups(format) and (format.group or 0) % _KERNEL_GROUPS[-1]:
        return f"groups of {format.group} columns are not a multiple of {_KERNEL_GROUPS[-1]}"
    return None


def _refuses_int8(format: WeightFormat) -> str | None:
    """Why the int8 kernel cannot hold this matrix."""
    if format.bits is None:
        return f"holds codes, not {format.describe()}"
    if format.asymmetric:
        return "holds symmetric codes only"
    if _has_groups(format):
        return f"holds one scale a row, not one for {format.group} columns"
    return None


def _has_groups(format: WeightFormat) -> bool:
    return format.group is not None and format.group < format.columns


def _prepare_int4(packed: PackedLinear) -> Int4Layer:
    spec = packed.format
    padding = -spec.columns % _KERNEL_GROUPS[-1]
    width = spec.columns + padding
    left, right, dense = packed.left, packed.right, _dense_adapters(packed)
    if left is None or right is None or dense is not None:
        weight = _int4_matrix([(packed.weight, width)], _kernel_group(width, packed.weight.format), spec.rows)
        return Int4Layer(weight, None, dense, packed.input_scale, spec.columns, padding, spec.rows)
    group = _kernel_group(width, packed.weight.format, left.format)
    rank = spec.rank + -spec.rank % group
    return Int4Layer(
        weight=_int4_matrix([(packed.weight, width), (left, rank)], group, spec.rows),
        right=_int4_matrix([(right, width)], _kernel_group(width, right.format), rank),
        dense=None,
        input_scale=packed.input_scale,
        columns=spec.columns,
        padding=padding,
        rows=spec.rows,
    )


def _prepare_int8(packed: PackedLinear) -> Int8Layer:
    spec = packed.format
    codes, scale = _signed(packed.weight)
    return Int8Layer(
        codes=codes,
        scales=scale[:, 0].expand(spec.rows).contiguous(),
        dense=_dense_adapters(packed, always=True),
        input_scale=packed.input_scale,
        columns=spec.columns,
    )


def _dense_adapters(packed: PackedLinear, *, always: bool = False) -> DenseAdapters | None:
    """The adapters in bfloat16, if there are any and (unless ``always``) the int4 kernel cannot hold them."""
    if packed.left is None or packed.right is None:
        return None
    if not always and all(_refuses_int4(factor.format) is None for factor in (packed.left, packed.right)):
        return None
    left, right = (factor.decode().to(torch.bfloat16) for factor in (packed.left, packed.right))
    return DenseAdapters(right, left.t())


def _kernel_group(width: int, format: WeightFormat, beside: WeightFormat | None = None) -> int:
    """Choose the kernel's group: it divides ``width`` and the groups of the parts, and pads ``beside`` least."""

    def fits(group: int) -> bool:
        parts = [part for part in (format, beside) if part is not None and _has_groups(part)]
        return width % group == 0 and all((part.group or 0) % group == 0 for part in parts)

    # min() keeps the first of equals, the largest group.
    return min((g for g in _KERNEL_GROUPS if fits(g)), key=lambda g: -beside.columns % g if beside else 0)


def _int4_matrix(parts: Sequence[tuple[PackedWeight, int]], group: int, rows: int) -> Int4Matrix:
    """Lay parts side by side, each padded with zeros to its width, and all to ``rows`` rows and a row block."""
    rows += -rows % _ROW_MULTIPLE
    codes, scales = [], []
    for part, width in parts:
        signed, scale = _signed(part)
        spec = part.format
        missing = (0, width - spec.columns, 0, rows - spec.rows)
        codes.append(functional.pad(signed, missing))
        first_columns = torch.arange(0, width, group, device=signed.device)
        source = first_columns // spec.group if spec.group else torch.zeros_like(first_columns)
        repeated = scale.expand(spec.rows, -1)[:, source.clamp(max=scale.shape[1] - 1)]
        scales.append(functional.pad(repeated, (0, 0, 0, rows - spec.rows)))
    unsigned = torch.cat(codes, dim=1).to(torch.int32) + _ZERO
    scale = torch.cat(scales, dim=1).t()
    return Int4Matrix(_int4pack(unsigned, 1), torch.stack((scale, torch.zeros_like(scale)), dim=-1), group)


def _signed(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Signed codes, int8 [rows, columns], and the scale in bfloat16."""
    spec = packed.format
    if spec.bits is None or packed.scale is None:
        raise FormatError(f"{spec.describe()} has no codes")
    pattern = spec.sparsity if isinstance(spec.sparsity, NM) else None
    n, m = (pattern.n, pattern.m) if pattern else (0, 0)
    codes = signed_codes(packed.values, packed.pattern, bits=spec.bits, columns=spec.columns, n=n, m=m)
    return codes, packed.scale.to(torch.bfloat16)


def _run_int4(x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
    layer: Int4Layer = state
    inputs = x.reshape(-1, layer.columns).contiguous()
    scaled = inputs if layer.input_scale is None else inputs * layer.input_scale
    if layer.padding:
        inputs, scaled = (functional.pad(each, (0, layer.padding)) for each in (inputs, scaled))
    right, weight = layer.right, layer.weight
    if right is not None:
        inner = _int4pack_mm(inputs, right.codes, right.group, right.scales)
        scaled = torch.cat((scaled, inner), 1)
    y: Tensor = _int4pack_mm(scaled, weight.codes, weight.group, weight.scales)
    if y.shape[1] != layer.rows:
        y = y[:, : layer.rows].contiguous()
    if layer.dense is not None:
        y = torch.addmm(y, functional.linear(inputs[:, : layer.columns], layer.dense.right), layer.dense.left)
    if bias is not None:
        y = y.add_(bias)
    return y.view(*x.shape[:-1], layer.rows)


def _run_int8(x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
    layer: Int8Layer = state
    inputs = x.reshape(-1, layer.columns).contiguous()
    scaled = inputs if layer.input_scale is None else inputs * layer.input_scale
    y: Tensor = _int8pack_mm(scaled, layer.codes, layer.scales)
    if layer.dense is not None:
        y = torch.addmm(y, functional.linear(inputs, layer.dense.right), layer.dense.left)
    if bias is not None:
        y = y.add_(bias)
    return y.view(*x.shape[:-1], y.shape[1])


INT4PACK = Kernel("int4pack", _accepts_int4, _prepare_int4, _run_int4)
"""4-bit codes in groups of 32 to 256 columns, adapters included if they have at most 4 bits."""

INT8PACK = Kernel("int8pack", _accepts_int8, _prepare_int8, _run_int8)
"""8-bit codes with one scale a row or a tensor."""

KERNELS = (INT4PACK, INT8PACK)
