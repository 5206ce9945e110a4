"""CPU kernels that multiply by the codes of a weight without decoding them first.

PyTorch carries two for bfloat16 activations and few tokens, where reading the weight is what takes the time: for 4-bit
codes in groups (``aten::_weight_int4pack_mm_for_cpu``) and for 8-bit codes with a scale a row
(``aten::_weight_int8pack_mm``). They multiply by the unrounded product of code and scale and sum in float32, so that
only the result is rounded. A third multiplies 8-bit codes by 8-bit codes (``aten::_int_mm``), exactly, for layers with
int8 activations. Pruned positions become the code of zero: all read dense codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slimc.errors import FormatError
from slimc.runtime.activations import LARGEST, quantize_tokens, round_inputs
from slimc.runtime.decode import signed_codes
from slimc.runtime.formats import LinearFormat, WeightFormat
from slimc.runtime.ops import low_rank, weight_attributes
from slimc.runtime.packing import PackedLinear, PackedWeight
from slimc.runtime.select import Kernel

__all__ = ["INT4PACK", "INT8MM", "INT8PACK", "KERNELS"]

INT4PACK_TOKENS = 128
"""Most tokens for which the int4 kernel is chosen over decoding the weight and multiplying densely.

Measured on two threads of a CPU with AVX-512 and without AMX, 2:4 int4 with 4-bit adapters, ms a call (int4 kernel,
decoding, bfloat16 `Linear`): 576 x 576 with 128 tokens 1.0, 2.0, 0.7; 1536 x 576 with 128 tokens 2.2, 3.2, 1.6;
2048 x 2048 with 128 tokens 11.6, 16.8, 7.6 and with 256 tokens 23.9, 27.0, 15.3. Where AMX makes dense products
faster, decoding wins earlier, hence not more.
"""

INT8PACK_TOKENS = 128
"""The same for the int8 kernel: 2048 x 2048 with 128 tokens 12.2, 37.7, 7.9 ms."""

FEWEST_INT8MM_TOKENS = 16
"""Fewest tokens for which exact products of int8 codes are chosen over the int4 kernel, which reads half as much.

2:4 int4 with 4-bit adapters of rank 57 on one thread of a CPU with AMX, ms a call (these products, int4 kernel,
decoding, bfloat16 `Linear`): 576 x 1536 with 4 tokens 0.41, 0.21, -, 0.20, with 16 tokens 0.42, 0.79, -, 0.22, with 128
tokens 1.1, 4.3, -, 0.34, with 256 tokens 1.8, -, 2.7, 0.53, with 512 tokens 8.1, -, 3.9, 0.89.
"""

INT8MM_TOKENS = 256
"""Most tokens for which they are chosen over decoding the weight, which bfloat16 tiles of AMX make up for."""

MAX_EXACT_COLUMNS = (2**31 - 1) // (int(LARGEST["int8"]) * 128)
"""Columns whose products of int8 codes add up to less than 2^31."""

_KERNEL_GROUPS = (256, 128, 64, 32)
"""Columns that may share a scale in the int4 kernel, larger first."""

_ROW_MULTIPLE = 16
"""The int4 kernel wants whole blocks of output rows."""

_COLUMN_MULTIPLE = 32
"""The int8 kernel reads whole vectors of columns, past the end of the weight if they do not fill up (it crashes)."""

_ZERO = 8
"""The zero point of the int4 kernel: ``weight = (code - 8) * scale + zero``."""

# The bindings in torch's own namespace cost 2 us less a call than torch.ops. They are private, so a release may lack
# one; then its kernel refuses every case.
_int4pack_mm: Any = getattr(torch, "_weight_int4pack_mm_for_cpu", None)
_int4pack: Any = getattr(torch, "_convert_weight_to_int4pack_for_cpu", None)
_int8pack_mm: Any = getattr(torch, "_weight_int8pack_mm", None)
_int_mm: Any = getattr(torch, "_int_mm", None)


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """A matrix in the int4 kernel's layout: codes, (scale, zero) [columns / group, rows, 2], and the group."""

    codes: Tensor
    scales: Tensor
    group: int


@dataclass(frozen=True, slots=True)
class DenseAdapters:
    """Adapters that no integer kernel holds, transposed: ``right`` [columns, rank] and ``left`` [rank, rows].

    They are kept in float32: for so few numbers oneDNN's bfloat16 products take three times as long, nearly all
    of it spent before the first multiplication (576 x 576, rank 57, 1 token: 95 us against 28 us).
    """

    right: Tensor
    left: Tensor

    def correct(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y + (x @ right) @ left`` in float32."""
        return torch.addmm(y.float(), torch.mm(x.float(), self.right), self.left)


@dataclass(frozen=True, slots=True)
class Int4Layer:
    """State of the int4 kernel.

    With 4-bit adapters the left factor stands beside the weight as further columns, so that
    ``y = [x * input_scale, x @ right^T] @ [weight | left]^T`` takes two calls. ``padding`` columns of zeros follow
    those of x; the rows of ``weight`` beyond ``rows`` are padding too. ``activation`` is what inputs are rounded to, if
    they are: those of ``weight``, and of the adapters too if there is no input scale.
    """

    weight: Int4Matrix
    right: Int4Matrix | None
    dense: DenseAdapters | None
    input_scale: Tensor | None
    columns: int
    padding: int
    rows: int
    activation: str | None


@dataclass(frozen=True, slots=True)
class Int8Layer:
    """State of the int8 kernel: signed codes [rows, columns + padding], a scale a row, and decoded adapters."""

    codes: Tensor
    scales: Tensor
    dense: DenseAdapters | None
    input_scale: Tensor | None
    columns: int
    padding: int
    activation: str | None


@dataclass(frozen=True, slots=True)
class ExactLayer:
    """State of products of int8 codes: signed codes [columns, rows], a float32 scale a row, and decoded factors."""

    codes: Tensor
    scales: Tensor
    factors: tuple[Tensor, Tensor] | None
    input_scale: Tensor | None
    columns: int


def _accepts_int4(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    return (
        _refuses_release(_int4pack_mm, _int4pack)
        or _refuses_device(spec.weight, dtype, device)
        or _refuses_int4(spec.weight)
        or _refuses_exact_tokens(spec, dtype, device, tokens)
        or _refuses_tokens(tokens, INT4PACK_TOKENS)
    )


def _accepts_int8(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    return (
        _refuses_release(_int8pack_mm)
        or _refuses_device(spec.weight, dtype, device)
        or _refuses_int8(spec.weight)
        or _refuses_tokens(tokens, INT8PACK_TOKENS)
    )


def _accepts_exact(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    if spec.activation != "int8":
        return "is for layers with int8 inputs (Activations)"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"computes in float32, not in {str(dtype).removeprefix('torch.')}"
    if spec.columns == 1:
        # torch._int_mm of a [m, 1] by a [1, n] matrix reads memory that neither holds (seen in PyTorch 2.13).
        return "PyTorch's product of int8 codes needs two columns or more"
    if spec.columns > MAX_EXACT_COLUMNS:
        return f"sums of more than {MAX_EXACT_COLUMNS} products may not fit in 32 bits"
    return (
        _refuses_release(_int_mm)
        or _refuses_processor(device)
        or _refuses_int8(spec.weight)
        or _refuses_tokens(tokens, INT8MM_TOKENS)
    )


def _refuses_exact_tokens(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
    if tokens < FEWEST_INT8MM_TOKENS or _accepts_exact(spec, dtype, device, tokens) is not None:
        return None
    return f"for more than {FEWEST_INT8MM_TOKENS // 2} tokens products of int8 codes are faster"


def _refuses_release(*functions: Any) -> str | None:
    return f"PyTorch {torch.__version__} does not have this kernel" if None in functions else None


def _refuses_processor(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return "PyTorch has no vectorised version for this CPU"
    return None


def _refuses_device(spec: WeightFormat, dtype: torch.dtype, device: torch.device) -> str | None:
    if reason := _refuses_processor(device):
        return reason
    if dtype != torch.bfloat16:
        return f"fast for bfloat16 inputs only, not {str(dtype).removeprefix('torch.')}"
    if spec.dtype != torch.bfloat16:
        return f"reads bfloat16 scales, not {str(spec.dtype).removeprefix('torch.')}"
    return None


def _refuses_tokens(tokens: int, limit: int) -> str | None:
    return f"for more than {limit} tokens decoding the weight is faster" if tokens > limit else None


def _refuses_int4(spec: WeightFormat) -> str | None:
    """Why the int4 kernel cannot hold this matrix."""
    if spec.widths is not None:
        return f"holds codes of one width, not {spec.describe()}"
    if spec.bits is None or spec.bits > 4:
        return f"holds codes of up to 4 bits, not {spec.describe()}"
    if spec.asymmetric:
        return "holds symmetric codes only: it would round the offset of each group to bfloat16"
    if _has_groups(spec) and (spec.group or 0) % _KERNEL_GROUPS[-1]:
        return f"groups of {spec.group} columns are not a multiple of {_KERNEL_GROUPS[-1]}"
    return None


def _refuses_int8(spec: WeightFormat) -> str | None:
    """Why the int8 kernel cannot hold this matrix."""
    if spec.widths is not None:
        return f"holds codes of one width, not {spec.describe()}"
    if spec.bits is None:
        return f"holds codes, not {spec.describe()}"
    if spec.asymmetric:
        return "holds symmetric codes only"
    if _has_groups(spec):
        return f"holds one scale a row, not one for {spec.group} columns"
    return None


def _has_groups(spec: WeightFormat) -> bool:
    return spec.group is not None and spec.group < spec.columns


def _prepare_int4(packed: PackedLinear) -> Int4Layer:
    spec = packed.format
    padding = -spec.columns % _KERNEL_GROUPS[-1]
    width = spec.columns + padding
    left, right, dense = packed.left, packed.right, _dense_adapters(packed)
    if left is None or right is None or dense is not None:
        weight = _int4_matrix([(packed.weight, width)], _kernel_group(width, packed.weight.format), spec.rows)
        return Int4Layer(weight, None, dense, packed.input_scale, spec.columns, padding, spec.rows, spec.activation)
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
        activation=spec.activation,
    )


def _prepare_int8(packed: PackedLinear) -> Int8Layer:
    spec = packed.format
    codes, scale = _signed(packed.weight)
    padding = -spec.columns % _COLUMN_MULTIPLE
    return Int8Layer(
        codes=functional.pad(codes, (0, padding)),
        scales=scale[:, 0].to(torch.bfloat16).expand(spec.rows).contiguous(),
        dense=_dense_adapters(packed, always=True),
        input_scale=packed.input_scale,
        columns=spec.columns,
        padding=padding,
        activation=spec.activation,
    )


def _prepare_exact(packed: PackedLinear) -> ExactLayer:
    spec = packed.format
    codes, scale = _signed(packed.weight)
    return ExactLayer(
        codes=codes.t(),
        scales=scale[:, 0].float().expand(spec.rows).contiguous(),
        factors=None if packed.left is None or packed.right is None else (packed.left.decode(), packed.right.decode()),
        input_scale=packed.input_scale,
        columns=spec.columns,
    )


def _dense_adapters(packed: PackedLinear, *, always: bool = False) -> DenseAdapters | None:
    """The decoded adapters, if there are any and (unless ``always``) the int4 kernel cannot hold them."""
    if packed.left is None or packed.right is None:
        return None
    if not always and all(_refuses_int4(factor.format) is None for factor in (packed.left, packed.right)):
        return None
    left, right = (factor.decode().float() for factor in (packed.left, packed.right))
    return DenseAdapters(right.t(), left.t())


def _kernel_group(width: int, spec: WeightFormat, beside: WeightFormat | None = None) -> int:
    """Choose the kernel's group: it divides ``width`` and the groups of the parts, and pads ``beside`` least."""

    def fits(group: int) -> bool:
        parts = [part for part in (spec, beside) if part is not None and _has_groups(part)]
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
        repeated = scale.to(torch.bfloat16).expand(spec.rows, -1)[:, source.clamp(max=scale.shape[1] - 1)]
        scales.append(functional.pad(repeated, (0, 0, 0, rows - spec.rows)))
    unsigned = torch.cat(codes, dim=1).to(torch.int32) + _ZERO
    scale = torch.cat(scales, dim=1).t()
    return Int4Matrix(_int4pack(unsigned, 1), torch.stack((scale, torch.zeros_like(scale)), dim=-1), group)


def _signed(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Signed codes, int8 [rows, columns], and the scale."""
    spec = packed.format
    if spec.bits is None or packed.scale is None:
        raise FormatError(f"{spec.describe()} has no codes")
    attributes = weight_attributes(spec)
    del attributes["group"]
    return signed_codes(packed.values, packed.pattern, **attributes), packed.scale


def _run_int4(x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
    layer: Int4Layer = state
    inputs = x.reshape(-1, layer.columns).contiguous()
    scaled = inputs if layer.input_scale is None else inputs * layer.input_scale
    scaled = round_inputs(scaled, layer.activation)
    if layer.input_scale is None:
        inputs = scaled
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
        y = layer.dense.correct(y, inputs[:, : layer.columns]).to(torch.bfloat16)
    if bias is not None:
        y = y.add_(bias)
    return y.view(*x.shape[:-1], layer.rows)


def _run_int8(x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
    layer: Int8Layer = state
    inputs = x.reshape(-1, layer.columns).contiguous()
    scaled = inputs if layer.input_scale is None else inputs * layer.input_scale
    scaled = round_inputs(scaled, layer.activation)
    if layer.input_scale is None:
        inputs = scaled
    if layer.padding:
        scaled = functional.pad(scaled, (0, layer.padding))
    y: Tensor = _int8pack_mm(scaled, layer.codes, layer.scales)
    if layer.dense is not None:
        y = layer.dense.correct(y, inputs).to(torch.bfloat16)
    if bias is not None:
        y = y.add_(bias)
    return y.view(*x.shape[:-1], y.shape[1])


def _run_exact(x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
    layer: ExactLayer = state
    inputs = x.reshape(-1, layer.columns).contiguous()
    scaled = inputs if layer.input_scale is None else inputs * layer.input_scale.to(x.dtype)
    codes, scale = quantize_tokens(scaled, "int8")
    y: Tensor = _int_mm(codes, layer.codes).float().mul_(scale).mul_(layer.scales)
    if layer.factors is not None:
        # For few tokens oneDNN's 16-bit products take longer than those of float32 (see `DenseAdapters`).
        few = len(inputs) < FEWEST_INT8MM_TOKENS
        read = inputs if layer.input_scale is not None else (codes.float() * scale).to(x.dtype)
        y = y.add_(low_rank(read.float() if few else read, *layer.factors))
    if bias is not None:
        y = y.add_(bias)
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


INT4PACK = Kernel("int4pack", _accepts_int4, _prepare_int4, _run_int4)
"""4-bit codes in groups of 32 to 256 columns, adapters included if they have at most 4 bits."""

INT8PACK = Kernel("int8pack", _accepts_int8, _prepare_int8, _run_int8)
"""8-bit codes with one scale a row or a tensor."""

INT8MM = Kernel("int8mm", _accepts_exact, _prepare_exact, _run_exact)
"""Codes of up to 8 bits with one scale a row or a tensor, times activations rounded to int8; the sums are exact."""

KERNELS = (INT4PACK, INT8MM, INT8PACK)
