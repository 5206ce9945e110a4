"""A packed linear layer as nodes and constants of an ONNX graph.

The targets compute the same, ``slimc.runtime.ops.linear`` in the arithmetic of ``dtype``, and differ in how the
weight is held:

- ``portable``: one node ``slim::linear`` (`slimc.backends.onnx.functions`), its codes in the integer types of ONNX;
- ``ort``: ``com.microsoft::MatMulNBits``, which ONNX Runtime has for 2, 4 and 8 bits;
- ``cuda``: ``slim::linear`` as in ``portable``, for a library of kernels, in a graph that is otherwise as for ``ort``;
- ``dense``: decoded numbers and MatMul, for TensorRT, which finds the zeros of 2:4 itself.

ONNX has integers of 2, 4 and 8 bits, one width a matrix, and no pattern of kept positions: other widths are widened,
signs are codes of 2 bits, and pruned positions hold the code of zero. `LoweredLinear.notes` says where that costs bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from onnx import FunctionProto, NodeProto, TensorProto, helper
from torch import Tensor

from slimc.backends.onnx.functions import (
    DOMAIN,
    INPUTS,
    VERSION,
    LinearOverload,
    dequant_function,
    linear_function,
    round_nodes,
    sign_low_rank_function,
)
from slimc.backends.onnx.initializers import DATA_TYPES, Bytes, Initializer, bytes_of, of_codes, of_tensor
from slimc.backends.onnx.one_width import common_bits, common_codes, common_zero_point, sign_products
from slimc.errors import InputError, closest
from slimc.runtime.bits import pack_bits
from slimc.runtime.formats import NM, Unstructured, WeightFormat
from slimc.runtime.packing import PackedBinary, PackedLinear, PackedWeight

__all__ = [
    "CALLING",
    "COMPUTE_DTYPES",
    "CONTRIB",
    "MAX_OPSET",
    "MICROSOFT",
    "MIN_OPSET",
    "TARGETS",
    "LoweredLinear",
    "LoweredWeight",
    "check_options",
    "decode_exactly",
    "lower_linear",
    "lower_signs",
    "lower_weight",
    "narrowest",
    "opset_of",
]

TARGETS = ("portable", "dense", "ort", "cuda")
"""What a folder can be written for."""

CALLING = ("portable", "cuda")
"""Targets whose layers are calls of slimc's operators."""

CONTRIB = ("ort", "cuda")
"""Targets whose attention and norms are ONNX Runtime's own operators."""

MICROSOFT = "com.microsoft"

COMPUTE_DTYPES = (torch.float32, torch.float16)
"""What an ONNX graph computes in; processors have no product of bfloat16."""

ACCURACY_LEVELS = range(5)
"""Of MatMulNBits: 0 leaves it to ONNX Runtime (which is exact on CPUs), 1 to 4 are float32, float16, bfloat16, int8."""

MIN_OPSET, MAX_OPSET = 21, 26
"""DequantizeLinear has blocks and integers of 4 bits from 21 on; ONNX Runtime 1.30 reads up to 26."""

OPSET_OF_2_BITS = 25
"""The first opset with integers of 2 bits."""

_BLOCKS = (16, 32, 64, 128, 256)
"""The block sizes of MatMulNBits that every ONNX Runtime has a kernel for."""

_LEAST_USUAL, _MOST_FOR_ANY = 32, 128
"""The smallest block that is fast, and the largest that is taken where the scale would allow any."""

_WORTH_A_CAST = 256
"""Elements below which a constant is not worth a node that widens it."""

_SIGNED = {2: "INT2", 4: "INT4", 8: "INT8"}
_UNSIGNED = {2: "UINT2", 4: "UINT4", 8: "UINT8"}


@dataclass
class LoweredLinear:
    """A layer as a piece of a graph: ``name + ".x"`` [..., columns] goes in, ``name + ".y"`` [..., rows] comes out.

    Attributes:
        name: what all its names begin with.
        nodes: in order of computation.
        stored: its constants by name, made when they are written.
        functions: what its nodes need of the domain ``slim``.
        notes: what takes more bits than the packed form, and why; for people.
    """

    name: str
    nodes: list[NodeProto] = field(default_factory=list)
    stored: dict[str, Initializer] = field(default_factory=dict)
    functions: list[FunctionProto] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def input(self) -> str:
        """Name of the value that the layer reads."""
        return f"{self.name}.x"

    @property
    def output(self) -> str:
        """Name of the value that it computes."""
        return f"{self.name}.y"

    @property
    def domains(self) -> dict[str, int]:
        """The domains besides ONNX's own that the nodes come from, with their versions."""
        versions = {DOMAIN: VERSION, MICROSOFT: 1}
        return {node.domain: versions[node.domain] for node in self.nodes if node.domain}

    @property
    def nbytes(self) -> int:
        """Bytes of all constants."""
        return sum(constant.nbytes for constant in self.stored.values())

    @cached_property
    def initializers(self) -> dict[str, TensorProto]:
        """The constants with their content."""
        return {name: constant.proto(name) for name, constant in self.stored.items()}


@dataclass
class LoweredWeight(LoweredLinear):
    """A weight alone as a piece of a graph: nothing goes in, and ``name + ".y"`` is [columns, rows]."""


def check_options(target: str, dtype: torch.dtype, opset: int | None, accuracy_level: int = 0) -> None:
    """Raise `InputError` unless all options are known; ``opset`` may be None, the lowest that will do."""
    if target not in TARGETS:
        raise InputError(f"there is no target {target!r}{closest(target, TARGETS)}: use one of {', '.join(TARGETS)}")
    if dtype not in COMPUTE_DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in COMPUTE_DTYPES)
        raise InputError(f"an ONNX graph cannot compute in {dtype}: use one of {names}")
    if opset is not None and not MIN_OPSET <= opset <= MAX_OPSET:
        raise InputError(f"opset {opset} is not supported: use {MIN_OPSET} to {MAX_OPSET}, or none for the lowest")
    if accuracy_level not in ACCURACY_LEVELS:
        raise InputError(f"there is no accuracy level {accuracy_level}: use 0, which is exact, to 4, which is fastest")
    if accuracy_level and target not in CONTRIB:
        raise InputError(
            f"a graph for {target!r} has no accuracy level of its own, it is chosen when ONNX Runtime opens it "
            "(session.qdq_matmulnbits_accuracy_level); leave accuracy_level out, or export with target='ort'"
        )


def opset_of(layers: Sequence[PackedLinear], target: str) -> int:
    """Return the lowest opset in which no code of these layers has to be widened more than ONNX's integers ask for."""
    signs = [sign_products(layer.binary).signs for layer in layers if layer.binary is not None]
    parts = [part for layer in layers for part in (layer.weight, layer.left, layer.right) if part is not None]
    narrow = any(_code_bits(part) == 2 and _whole_bytes(part.format) for part in (*parts, *signs))
    wants_2_bits = target in CALLING and narrow
    return OPSET_OF_2_BITS if wants_2_bits and _has_2_bits(OPSET_OF_2_BITS) else MIN_OPSET


def lower_linear(
    packed: PackedLinear,
    bias: Tensor | None,
    target: str,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    opset: int = MIN_OPSET,
    accuracy_level: int = 0,
) -> LoweredLinear:
    """Return a layer as nodes and constants.

    Args:
        packed: the layer.
        bias: [rows] or None.
        target: one of `TARGETS`.
        name: what names of values and constants begin with.
        dtype: what the graph computes in, float32 or float16; x and y have it.
        opset: of the graph; below 25 codes of 2 bits take 4 in a portable graph.
        accuracy_level: of MatMulNBits: 0 computes in ``dtype``, 4 rounds inputs to 8 bits block by block, which is
            faster on processors.

    Raises:
        InputError: ``target``, ``dtype`` or ``opset`` is not known.
    """
    check_options(target, dtype, opset, accuracy_level)
    piece = _Piece(LoweredLinear(name), dtype, opset, accuracy_level, compact=target != "dense")
    lower = {"portable": _lower_portable, "cuda": _lower_portable, "ort": _lower_ort, "dense": _lower_dense}[target]
    lower(piece, packed, bias)
    return piece.result


def lower_weight(
    packed: PackedWeight, target: str, name: str, *, dtype: torch.dtype = torch.float32, opset: int = MIN_OPSET
) -> LoweredWeight:
    """Return a weight that is not fused with its product: numbers [columns, rows] (see `lower_linear`).

    Raises:
        InputError: ``target``, ``dtype`` or ``opset`` is not known.
    """
    check_options(target, dtype, opset)
    result = LoweredWeight(name)
    piece = _Piece(result, dtype, opset, 0, compact=target != "dense")
    if target == "dense" or packed.format.bits is None:
        piece.node("Identity", [_decoded(piece, "weight", packed)], result.output)
        return result
    held = _held_codes(piece, "weight", packed)
    if target in CALLING:
        operator = _DEQUANT[type(packed.format.sparsity)]
        function = dequant_function(operator, codes=True, zero_point=bool(held.zero_point), opset=opset)
        inputs = [held.codes, held.scale, held.zero_point]
        piece.node(operator, inputs, result.output, function=function, axis=held.axis, block_size=held.block)
    else:
        piece.node("DequantizeLinear", held.inputs, result.output, axis=held.axis, block_size=held.block)
    return result


def lower_signs(
    binary: PackedBinary,
    target: str,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    opset: int = MIN_OPSET,
    accuracy_level: int = 0,
) -> LoweredLinear:
    """Return a binary part that is not fused with its layer, ``slim::sign_low_rank`` (see `lower_linear`).

    Raises:
        InputError: ``target``, ``dtype`` or ``opset`` is not known.
    """
    check_options(target, dtype, opset, accuracy_level)
    piece = _Piece(LoweredLinear(name), dtype, opset, accuracy_level, compact=target != "dense")
    result = piece.result
    if target == "dense":
        form = binary.format
        weight = Initializer(
            DATA_TYPES[dtype],
            (form.columns, form.rows),
            lambda: of_tensor(binary.decode(), dtype, transposed=True).make(),
        )
        piece.node("MatMul", [result.input, piece.constant("signs", weight)], result.output)
    elif target == "ort":

        def product(x: str, name: str, part: PackedWeight, output: str) -> str:
            return _n_bits_product(piece, x, name, part, output)

        _binary_product(piece, result.input, binary, product, result.output)
    else:
        products = sign_products(binary)
        held = _held_codes(piece, "signs", products.signs)
        inputs = [result.input, piece.numbers("sign_right", products.right), held.codes, held.scale]
        if products.left is not None:
            inputs.append(piece.numbers("sign_left", products.left))
        function = sign_low_rank_function(opset, several=products.left is not None)
        piece.node(
            "sign_low_rank",
            inputs,
            result.output,
            function=function,
            signs_axis=held.axis,
            signs_block_size=held.block,
        )
    return result


_DEQUANT: dict[type, str] = {type(None): "dequant", NM: "dequant_nm", Unstructured: "dequant_mask"}
"""The operator for a weight of each sparsity."""


class _Piece:
    """A layer while it is being lowered: it names values, and keeps what it is made of."""

    def __init__(
        self, result: LoweredLinear, dtype: torch.dtype, opset: int, accuracy_level: int, *, compact: bool
    ) -> None:
        self.result = result
        self.dtype = dtype
        self.opset = opset
        self.accuracy_level = accuracy_level
        self.compact = compact

    def named(self, name: str) -> str:
        return f"{self.result.name}.{name}"

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        output: str,
        *,
        domain: str = "",
        function: FunctionProto | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node and return what it computes; one that calls a function takes its domain and overload from it."""
        if function is not None:
            self.result.functions.append(function)
            domain = function.domain
        node = helper.make_node(operator, list(inputs), [output], domain=domain, **attributes)
        if function is not None:
            node.overload = function.overload
        self.result.nodes.append(node)
        return output

    def constant(self, name: str, initializer: Initializer) -> str:
        self.result.stored[self.named(name)] = initializer
        return self.named(name)

    def numbers(self, name: str, tensor: Tensor, *, transposed: bool = False) -> str:
        """Store numbers, in 16 bits where those hold them exactly, and return them in the dtype of the graph."""
        kept = narrowest(tensor) if self.compact and tensor.numel() >= _WORTH_A_CAST else self.dtype
        if kept.itemsize >= self.dtype.itemsize:
            return self.constant(name, of_tensor(tensor, self.dtype, transposed=transposed))
        narrow = self.constant(f"{name}.narrow", of_tensor(tensor, kept, transposed=transposed))
        return self.node("Cast", [narrow], self.named(name), to=DATA_TYPES[self.dtype])

    def note(self, text: str) -> None:
        self.result.notes.append(text)


def narrowest(tensor: Tensor) -> torch.dtype:
    """Return bfloat16 or float16 if every number of ``tensor`` is one, else its own dtype; NaNs count as themselves."""
    for dtype in (torch.bfloat16, torch.float16):
        if tensor.dtype == dtype or bool(((tensor.to(dtype).to(tensor.dtype) == tensor) | tensor.isnan()).all()):
            return dtype
    return tensor.dtype


# ------------------------------------------------------------------------------------------------------ portable


def _lower_portable(piece: _Piece, packed: PackedLinear, bias: Tensor | None) -> None:
    attributes: dict[str, Any] = {}
    inputs = dict.fromkeys(INPUTS, "") | {"x": piece.result.input}

    def hold(name: str, prefix: str, part: PackedWeight) -> bool:
        """Hold a matrix as codes, or as numbers; tell which."""
        if part.format.bits is None:
            inputs[name] = _decoded(piece, name, part)
            return False
        held = _held_codes(piece, name, part)
        inputs[name], inputs[f"{prefix}scale"] = held.codes, held.scale
        if held.zero_point:
            inputs["zero_point"] = held.zero_point
        attributes.update({f"{prefix}axis": held.axis, f"{prefix}block_size": held.block})
        attributes[f"{prefix}bits"] = part.format.bits
        return True

    codes = hold("weight", "", packed.weight)
    left_codes = right_codes = False
    if packed.left is not None and packed.right is not None:
        left_codes, right_codes = hold("left", "left_", packed.left), hold("right", "right_", packed.right)
    ranks = 0
    if packed.binary is not None:
        products, ranks = sign_products(packed.binary), packed.binary.format.rank
        hold("signs", "signs_", products.signs)
        inputs["sign_right"] = piece.numbers("sign_right", products.right)
        if products.left is not None:
            inputs["sign_left"] = piece.numbers("sign_left", products.left)
    if packed.input_scale is not None:
        inputs["input_scale"] = piece.numbers("input_scale", packed.input_scale)
    if bias is not None:
        inputs["bias"] = piece.numbers("bias", bias)
    overload = LinearOverload(
        codes=codes,
        zero_point=bool(inputs["zero_point"]),
        input_scale=packed.input_scale is not None,
        low_rank=packed.left is not None,
        left_codes=left_codes,
        right_codes=right_codes,
        bias=bias is not None,
        sign_ranks=ranks,
        activation=packed.activation,
    )
    pattern = packed.weight.format.sparsity
    if isinstance(pattern, NM):
        attributes |= {"n": pattern.n, "m": pattern.m}
    function = linear_function(overload, piece.opset)
    piece.node("linear", list(inputs.values()), piece.result.output, function=function, **attributes)


@dataclass(frozen=True)
class _HeldCodes:
    """A matrix as operands of DequantizeLinear, by name; ``zero_point`` is empty without one."""

    codes: str
    scale: str
    zero_point: str
    axis: int
    block: int

    @property
    def inputs(self) -> list[str]:
        return [self.codes, self.scale, *([self.zero_point] if self.zero_point else [])]


def _held_codes(piece: _Piece, name: str, packed: PackedWeight) -> _HeldCodes:
    """Store codes as [columns, rows] beside their scales: one, [rows], or [groups, rows]."""
    form, scale = packed.format, _scale(packed)
    narrow = _has_2_bits(piece.opset) and _whole_bytes(form)
    bits = _container(piece, name, packed, (2, 4, 8) if narrow else (4, 8))
    data_type = TensorProto.DataType.Value((_UNSIGNED if form.asymmetric else _SIGNED)[bits])
    codes = piece.constant(
        name, of_codes(data_type, (form.columns, form.rows), lambda: _signed_or_unsigned(packed).t())
    )
    grouped = scale.shape[1] > 1

    def oriented(per_group: Tensor) -> Tensor:
        return per_group.t().contiguous() if grouped else per_group.reshape(() if form.per_tensor else (-1,))

    prefix = "" if name == "weight" else f"{name}_"
    zero_point, zeros = "", common_zero_point(packed)
    if zeros is not None:
        zeros = oriented(zeros)
        zero_point = piece.constant(f"{prefix}zero_point", of_codes(data_type, tuple(zeros.shape), lambda: zeros))
    return _HeldCodes(
        codes=codes,
        scale=piece.numbers(f"{prefix}scale", oriented(scale)),
        zero_point=zero_point,
        axis=0 if grouped else 1,
        block=form.group or 0 if grouped else 0,
    )


def _scale(packed: PackedWeight) -> Tensor:
    if packed.scale is None:
        raise ValueError("a weight of numbers has no scale")
    return packed.scale


def _whole_bytes(form: WeightFormat) -> bool:
    """Tell whether 2-bit codes of a column fill their bytes: ONNX Runtime 1.32 makes a wrong MatMulNBits of others."""
    return form.rows % 4 == 0


def _has_2_bits(opset: int) -> bool:
    return opset >= OPSET_OF_2_BITS and hasattr(TensorProto, "INT2")


def _signed_or_unsigned(packed: PackedWeight) -> Tensor:
    """Return codes [rows, columns] as uint8: asymmetric ones as they are, symmetric ones less their zero point."""
    codes = common_codes(packed)
    return codes if packed.format.asymmetric else codes - (1 << (common_bits(packed.format) - 1))


def _code_bits(packed: PackedWeight) -> int:
    """Return the bits that codes and zero points need, 0 for numbers."""
    largest = 0 if packed.zero_point is None else int(packed.zero_point.max())
    return max(common_bits(packed.format), largest.bit_length())


def _container(piece: _Piece, name: str, packed: PackedWeight, widths: Sequence[int]) -> int:
    """Return the least width that holds the codes, and note what that costs."""
    form = packed.format
    width = next(width for width in widths if width >= _code_bits(packed))
    stored = {width} if form.bits is None else set(form.widths or (form.bits,))
    if stored != {width}:
        widths_of_codes = " to ".join(map(str, sorted({min(stored), max(stored)})))
        piece.note(f"{name}: codes of {widths_of_codes} bit{'s' * (max(stored) > 1)} are stored in {width}")
    if form.sparsity is not None:
        piece.note(f"{name}: {form.describe()} is stored without its pattern, pruned positions as {width}-bit codes")
    return width


# ----------------------------------------------------------------------------------------------------------- ort


Product = Callable[[str, str, PackedWeight, str], str]
"""``product(x, name, part, output)`` adds the product of x by a packed matrix, and returns its name."""


def _lower_ort(piece: _Piece, packed: PackedLinear, bias: Tensor | None) -> None:
    def product(x: str, name: str, part: PackedWeight, output: str) -> str:
        return _n_bits_product(piece, x, name, part, output)

    _lower_products(piece, packed, bias, product)


def _lower_products(
    piece: _Piece,
    packed: PackedLinear,
    bias: Tensor | None,
    product: Product,
) -> None:
    """Write a layer as products and sums."""
    x, y, named = piece.result.input, piece.result.output, piece.named
    operand = x
    if packed.input_scale is not None:
        operand = piece.node("Mul", [x, piece.numbers("input_scale", packed.input_scale)], named("scaled"))
    if packed.activation is not None:
        piece.result.nodes += round_nodes(operand, named("rounded_input"), packed.activation, named("round_"))
        operand = named("rounded_input")
    low_rank = packed.left is not None and packed.right is not None
    signed = packed.binary is not None
    last = y if bias is None and not low_rank and not signed else named("product")
    total = product(operand, "weight", packed.weight, last)
    if bias is not None:
        last = named("biased") if low_rank or signed else y
        total = piece.node("Add", [total, piece.numbers("bias", bias)], last)
    if packed.left is not None and packed.right is not None:
        inner = product(operand if packed.input_scale is None else x, "right", packed.right, named("inner"))
        correction = product(inner, "left", packed.left, named("correction"))
        total = piece.node("Add", [total, correction], named("corrected") if signed else y)
    if packed.binary is not None:
        piece.node("Add", [total, _binary_product(piece, x, packed.binary, product, named("binary"))], y)


def _binary_product(piece: _Piece, x: str, binary: PackedBinary, product: Product, output: str) -> str:
    """Add ``sum_k ((x * right[k]) @ signs^T) * left[k]``; signs are read once for all ranks."""
    products = sign_products(binary)
    right = piece.numbers("sign_right", products.right)
    if products.left is None:
        return product(piece.node("Mul", [x, right], piece.named("sign_input")), "signs", products.signs, output)
    axis = piece.constant("sign_axis", of_tensor(torch.tensor([-2])))
    each = piece.node("Unsqueeze", [x, axis], piece.named("sign_x"))
    scaled = piece.node("Mul", [each, right], piece.named("sign_input"))
    ranks = product(scaled, "signs", products.signs, piece.named("sign_product"))
    terms = piece.node("Mul", [ranks, piece.numbers("sign_left", products.left)], piece.named("sign_terms"))
    return piece.node("ReduceSum", [terms, axis], output, keepdims=0)


def _n_bits_product(piece: _Piece, x: str, name: str, packed: PackedWeight, output: str) -> str:
    form = packed.format
    if form.bits is None:
        return piece.node("MatMul", [x, _decoded(piece, name, packed)], output)
    block = _block_size(form)
    if block is None:
        piece.note(
            f"{name}: groups of {form.group} columns have no kernel in ONNX Runtime; it is decoded at every call"
        )
        held = _held_codes(piece, name, packed)
        weight = piece.node(
            "DequantizeLinear", held.inputs, piece.named(f"{name}.decoded"), axis=held.axis, block_size=held.block
        )
        return piece.node("MatMul", [x, weight], output)
    bits = _container(piece, name, packed, (2, 4, 8))
    if bits == 2:
        piece.note(f"{name}: 2-bit products need ONNX Runtime 1.23 or later, on CUDA one of after September 2026")
    blocks = -(-form.columns // block)
    shape = (form.rows, blocks, block * bits // 8)
    codes = Initializer(TensorProto.UINT8, shape, lambda: bytes_of(_blocked_codes(packed, bits, blocks * block)))
    inputs = [x, piece.constant(name, codes), _blocked_scale(piece, name, packed, block)]
    zero_point = common_zero_point(packed)
    if zero_point is not None:
        zeros = pack_bits(_per_block(zero_point, form, block), bits)
        inputs.append(piece.constant(_beside(name, "zero_point"), of_tensor(zeros)))
    return piece.node(
        "MatMulNBits",
        inputs,
        output,
        domain=MICROSOFT,
        K=form.columns,
        N=form.rows,
        bits=bits,
        block_size=block,
        accuracy_level=piece.accuracy_level,
    )


def _beside(name: str, what: str) -> str:
    """Name a constant that belongs to the matrix ``name``: ``scale``, ``left_scale``."""
    return what if name == "weight" else f"{name}_{what}"


def _block_size(form: WeightFormat) -> int | None:
    """Return the block size of MatMulNBits for groups of this form, None if none of its blocks fits into a group.

    Of those that fit it is the largest that fills up the last block least: what is filled up is stored.
    """
    if form.scale_shape[1] == 1:
        fitting = [block for block in _BLOCKS if block <= _MOST_FOR_ANY]
    else:
        fitting = [block for block in _BLOCKS if (form.group or 0) % block == 0]
    # A scale for every 16 columns takes a lot of memory, so those are for where nothing else will do.
    usual = [block for block in fitting if block >= _LEAST_USUAL] or fitting
    return min(usual, key=lambda block: (-form.columns % block, -block), default=None)


def _blocked_codes(packed: PackedWeight, bits: int, columns: int) -> Tensor:
    """Return unsigned codes of ``bits`` bits, filled up to ``columns`` and packed: [rows, bytes]."""
    codes = common_codes(packed)
    if not packed.format.asymmetric:
        # The zero point that MatMulNBits takes for granted, in place of that of the narrower codes.
        codes = codes + ((1 << (bits - 1)) - (1 << (common_bits(packed.format) - 1)))
    padded = torch.nn.functional.pad(codes, (0, columns - codes.shape[1]))
    return pack_bits(padded, bits)


def _group_of_block(form: WeightFormat, block: int) -> Tensor:
    """Return for each block the number of the scale that it has."""
    blocks = torch.arange(-(-form.columns // block))
    return torch.zeros_like(blocks) if form.scale_shape[1] == 1 else blocks * block // (form.group or 1)


def _per_block(per_group: Tensor, form: WeightFormat, block: int) -> Tensor:
    return per_group.expand(form.rows, -1)[:, _group_of_block(form, block)]


def _blocked_scale(piece: _Piece, name: str, packed: PackedWeight, block: int) -> str:
    """Return the scale of every block, [rows, blocks]; what repeats is stored once, and repeated when it is loaded."""
    form, scale = packed.format, _scale(packed)
    index = _group_of_block(form, block)
    stored = piece.numbers(_beside(name, "scale"), scale)
    if form.per_tensor:
        shape = piece.constant(_beside(name, "scale.shape"), of_tensor(torch.tensor([form.rows, len(index)])))
        return piece.node("Expand", [stored, shape], piece.named(_beside(name, "scale.blocks")))
    if len(index) == scale.shape[1]:
        return stored
    chosen = piece.constant(_beside(name, "scale.index"), of_tensor(index))
    return piece.node("Gather", [stored, chosen], piece.named(_beside(name, "scale.blocks")), axis=1)


# --------------------------------------------------------------------------------------------------------- dense


def _lower_dense(piece: _Piece, packed: PackedLinear, bias: Tensor | None) -> None:
    def product(x: str, name: str, part: PackedWeight, output: str) -> str:
        if name == "weight" and whole is not None:
            weight = piece.constant(name, _sum_of(packed.weight, whole, piece.dtype))
            return piece.node("MatMul", [x, weight], output)
        return piece.node("MatMul", [x, _decoded(piece, name, part)], output)

    # Signs leave no zeros that a second product could profit from; where both read the same input, one will do.
    whole = packed.binary if packed.input_scale is None and packed.activation is None else None
    if whole is not None:
        piece.note(f"weight: {whole.format.describe()} are added to its numbers, which leaves no zeros")
        packed = replace(packed, binary=None)
    if packed.weight.format.bits is not None or whole is not None:
        bits = 8 * piece.dtype.itemsize
        piece.note(f"weight: {packed.weight.format.describe()} is stored as numbers of {bits} bits")
    _lower_products(piece, packed, bias, product)


def _decoded(piece: _Piece, name: str, packed: PackedWeight) -> str:
    """Store a matrix as numbers [columns, rows]."""
    if packed.format.bits is None and packed.format.sparsity is None:
        return piece.numbers(name, packed.values, transposed=True)
    form = packed.format
    if form.bits is None:
        piece.note(f"{name}: {form.describe()} is stored without its pattern, pruned positions as zeros")
        return piece.numbers(name, packed.decode(), transposed=True)
    kept = Initializer(
        DATA_TYPES[piece.dtype],
        (form.columns, form.rows),
        lambda: of_tensor(decode_exactly(packed), piece.dtype, transposed=True).make(),
    )
    return piece.constant(name, kept)


def _sum_of(packed: PackedWeight, binary: PackedBinary, dtype: torch.dtype) -> Initializer:
    """Return the numbers of a weight and of its binary part together, [columns, rows]."""
    form = packed.format

    def make() -> Bytes:
        weight = packed.decode().float() if form.bits is None else decode_exactly(packed)
        return of_tensor(weight + binary.decode(), dtype, transposed=True).make()

    return Initializer(DATA_TYPES[dtype], (form.columns, form.rows), make)


def decode_exactly(packed: PackedWeight) -> Tensor:
    """Decode in float32, as DequantizeLinear does, and not in the 16 bits of the scale."""
    return replace(packed, scale=_scale(packed).float()).decode()
