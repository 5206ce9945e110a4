"""Every form of a layer, for every target, in onnx.reference and in ONNX Runtime, against the exact product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimc.errors import InputError
from slimc.runtime.decode import unpack_signs
from slimc.runtime.packing import (
    NM,
    PackedBinary,
    PackedLinear,
    PackedWeight,
    Sparsity,
    Unstructured,
    pack_signs,
    pack_weight,
)

onnx = pytest.importorskip("onnx")

from onnx import helper  # noqa: E402 - after the check that it is there
from onnx.reference import ReferenceEvaluator  # noqa: E402

from slimc.backends.onnx.initializers import DATA_TYPES  # noqa: E402
from slimc.backends.onnx.weights import (  # noqa: E402
    TARGETS,
    LoweredLinear,
    lower_linear,
    lower_signs,
    lower_weight,
    opset_of,
)

Runtime = Callable[[bytes | Path, Mapping[str, Any]], list[np.ndarray]]


def pack_random(
    rows: int,
    columns: int,
    *,
    bits: int | None = 4,
    group: int | str | None = None,
    sparsity: Sparsity = None,
    asymmetric: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PackedWeight:
    """Return random codes with random scales; ``group`` is None (a tensor), ``"channel"`` or a number of columns."""
    generator = torch.Generator().manual_seed(seed)
    mask = None
    if isinstance(sparsity, NM):
        order = torch.rand(rows, columns // sparsity.m, sparsity.m, generator=generator).argsort(-1)
        mask = (order < sparsity.n).reshape(rows, columns)
    elif sparsity is not None:
        mask = torch.rand(rows, columns, generator=generator) < 0.5
    if bits is None:
        values = torch.randn(rows, columns, generator=generator).to(dtype)
        return pack_weight(values, bits=None, mask=mask, sparsity=sparsity)
    width = group if isinstance(group, int) else None
    shape = (1, 1) if group is None else (rows, 1 if width is None else -(-columns // width))
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (0.5 + torch.rand(shape, generator=generator)).to(dtype)
    zero_point = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8) if asymmetric else None
    return pack_weight(codes, bits=bits, scale=scale, zero_point=zero_point, group=width, mask=mask, sparsity=sparsity)


def pack_widths(
    *widths: int, group: int = 16, sparsity: NM | None = None, asymmetric: bool = False, last: int = 0
) -> PackedWeight:
    """Return 24 rows of groups of random codes, each of its own width; the last group is ``last`` columns short."""
    generator = torch.Generator().manual_seed(0)

    def random(below: int, columns: int) -> Tensor:
        return torch.randint(0, below, (24, columns), generator=generator, dtype=torch.uint8)

    codes = torch.cat([random(1 << width, group) for width in widths], 1)
    codes = codes[:, : codes.shape[1] - last]
    zeros = torch.cat([random(1 << width if width > 1 else 1, 1) for width in widths], 1) if asymmetric else None
    mask = None
    if sparsity is not None:
        order = torch.rand(24, codes.shape[1] // sparsity.m, sparsity.m, generator=generator).argsort(-1)
        mask = (order < sparsity.n).reshape(codes.shape)
    scale = 0.5 + torch.rand(24, len(widths), generator=generator)
    return pack_weight(
        codes, bits=None, scale=scale, zero_point=zeros, group=group, widths=widths, mask=mask, sparsity=sparsity
    )


def with_signs(packed: PackedLinear, ranks: int = 1) -> PackedLinear:
    """Return the layer with random signs, whose magnitude may be negative, as the storage form allows."""
    form, generator = packed.format, torch.Generator().manual_seed(7)
    negative = torch.rand(form.rows, form.columns, generator=generator) < 0.5
    left = torch.randn(form.rows, ranks, generator=generator).to(form.weight.dtype)
    right = torch.randn(ranks, form.columns, generator=generator).to(form.weight.dtype)
    return replace(packed, binary=PackedBinary(pack_signs(negative), left, right))


def model_of(lowered: LoweredLinear, packed: PackedLinear, dtype: torch.dtype, opset: int = 21) -> onnx.ModelProto:
    """Return a graph of one layer, with all that it needs inside."""
    form, kind = packed.format, DATA_TYPES[dtype]
    graph = helper.make_graph(
        lowered.nodes,
        "layer",
        [helper.make_tensor_value_info(lowered.input, kind, ["batch", "length", form.columns])],
        [helper.make_tensor_value_info(lowered.output, kind, ["batch", "length", form.rows])],
        list(lowered.initializers.values()),
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(*pair) for pair in lowered.domains.items())]
    model = helper.make_model(graph, opset_imports=imports, functions=lowered.functions)
    model.ir_version = 10 if opset < 25 else 13
    return model


def unrounded_product(packed: PackedLinear, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the exact result in float64, and the sum of the magnitudes of its terms."""

    def exact(weight: PackedWeight) -> Tensor:
        if weight.scale is None:
            return weight.decode().double()
        return PackedWeight(
            weight.format, weight.values, weight.pattern, weight.scale.double(), weight.zero_point
        ).decode()

    scaled = x.double() if packed.input_scale is None else x.double() * packed.input_scale.double()
    weight = exact(packed.weight)
    ideal, size = scaled @ weight.T, scaled.abs() @ weight.abs().T
    if packed.left is not None and packed.right is not None:
        left, right = exact(packed.left), exact(packed.right)
        ideal = ideal + x.double() @ right.T @ left.T
        size = size + x.double().abs() @ right.abs().T @ left.abs().T
    if packed.binary is not None:
        signs = unpack_signs(packed.binary.signs, packed.format.columns, torch.float64)
        left, right = packed.binary.left.double(), packed.binary.right.double()
        ideal = ideal + x.double() @ (signs * (left @ right)).T
        size = size + x.double().abs() @ (left.abs() @ right.abs()).T
    if bias is not None:
        ideal, size = ideal + bias.double(), size + bias.double().abs()
    return ideal, size


def _linear(
    weight: PackedWeight,
    *,
    rank: int = 0,
    factor: tuple[Any, Any] = (None, None),
    scaled: bool = False,
    activation: str | None = None,
) -> PackedLinear:
    rows, columns, dtype = weight.format.rows, weight.format.columns, weight.format.dtype
    left = right = None
    if rank:
        bits, group = factor
        left = pack_random(rows, rank, bits=bits, group=group, dtype=dtype, seed=1)
        right = pack_random(rank, columns, bits=bits, group=group, dtype=dtype, seed=2)
    scale = 0.5 + torch.rand(columns, generator=torch.Generator().manual_seed(3)) if scaled else None
    return PackedLinear(weight, left, right, None if scale is None else scale.to(dtype), activation)


FORMS: dict[str, Callable[[], PackedLinear]] = {
    "int4": lambda: _linear(pack_random(24, 64)),
    "int4 channel": lambda: _linear(pack_random(24, 64, group="channel")),
    "int4/32": lambda: _linear(pack_random(24, 64, group=32)),
    "int4/32 short last group": lambda: _linear(pack_random(24, 76, group=32)),
    "int4/48": lambda: _linear(pack_random(24, 100, group=48)),
    "int4/8": lambda: _linear(pack_random(23, 60, group=8)),
    "int4/512": lambda: _linear(pack_random(8, 1100, group=512)),
    "int4/64 wider than the weight": lambda: _linear(pack_random(24, 40, group=64)),
    "odd sizes": lambda: _linear(pack_random(7, 33)),
    **{
        f"int{bits}{' asymmetric' if asymmetric else ''}": lambda bits=bits, asymmetric=asymmetric: _linear(
            pack_random(24, 64, bits=bits, group=32, asymmetric=asymmetric)
        )
        for bits in (2, 3, 5, 8)
        for asymmetric in (False, True)
    },
    "int4 asymmetric": lambda: _linear(pack_random(24, 96, group=48, asymmetric=True)),
    "int4 asymmetric tensor": lambda: _linear(pack_random(24, 64, asymmetric=True)),
    "2:4 int4": lambda: _linear(pack_random(24, 64, sparsity=NM(2, 4))),
    "2:4 int4/32 asymmetric": lambda: _linear(pack_random(24, 64, group=32, sparsity=NM(2, 4), asymmetric=True)),
    "1:4 int3 channel": lambda: _linear(pack_random(24, 64, bits=3, group="channel", sparsity=NM(1, 4))),
    "unstructured int4": lambda: _linear(pack_random(24, 64, sparsity=Unstructured())),
    "numbers": lambda: _linear(pack_random(24, 64, bits=None)),
    "2:4 numbers": lambda: _linear(pack_random(24, 64, bits=None, sparsity=NM(2, 4))),
    "unstructured numbers bf16": lambda: _linear(
        pack_random(24, 64, bits=None, sparsity=Unstructured(), dtype=torch.bfloat16)
    ),
    "low-rank": lambda: _linear(pack_random(24, 64), rank=5),
    "low-rank int4": lambda: _linear(pack_random(24, 64, sparsity=NM(2, 4)), rank=57, factor=(4, 64)),
    "low-rank int4 channel": lambda: _linear(pack_random(24, 64), rank=9, factor=(4, "channel")),
    "scaled": lambda: _linear(pack_random(24, 64), scaled=True),
    "scaled low-rank bf16": lambda: _linear(
        pack_random(24, 64, group=32, dtype=torch.bfloat16), rank=20, factor=(4, 16), scaled=True
    ),
    "odd sizes int2": lambda: _linear(pack_random(7, 36, bits=2, group=16)),
    **{
        f"int{'-'.join(map(str, widths))}/16{' asymmetric' * asymmetric}": (
            lambda widths=widths, asymmetric=asymmetric: _linear(pack_widths(*widths, asymmetric=asymmetric))
        )
        for widths in ((3, 1, 2, 4), (2, 1, 2), (8, 1, 5), (1, 1))
        for asymmetric in (False, True)
    },
    "int1-4/16 2:4": lambda: _linear(pack_widths(3, 1, 2, 4, sparsity=NM(2, 4))),
    "int1-4/16 2:4 asymmetric": lambda: _linear(pack_widths(3, 1, 2, 4, sparsity=NM(2, 4), asymmetric=True)),
    "int1-3/12 short last group": lambda: _linear(pack_widths(3, 1, 2, group=12, last=5)),
    "int1-3/16 low-rank scaled": lambda: _linear(pack_widths(3, 1), rank=5, factor=(4, "channel"), scaled=True),
    "signs": lambda: with_signs(_linear(pack_random(24, 64))),
    "signs odd sizes": lambda: with_signs(_linear(pack_random(7, 33, bits=None))),
    "signs 3 ranks": lambda: with_signs(_linear(pack_random(24, 64, group=32)), 3),
    "signs 2:4 numbers bf16": lambda: with_signs(
        _linear(pack_random(24, 64, bits=None, sparsity=NM(2, 4), dtype=torch.bfloat16))
    ),
    "signs unstructured": lambda: with_signs(_linear(pack_random(24, 64, bits=None, sparsity=Unstructured())), 2),
    "signs scaled low-rank": lambda: with_signs(_linear(pack_widths(3, 1, 2), rank=5, factor=(4, 16), scaled=True), 2),
    "float16 scales": lambda: _linear(pack_random(24, 640, group=32, dtype=torch.float16)),
}
"""Layers in every form that slimc can make."""

ROUNDED: dict[str, Callable[[], PackedLinear]] = {
    kind: lambda kind=kind: _linear(pack_random(24, 64, group=32), rank=5, scaled=True, activation=kind)
    for kind in ("int8", "float8_e4m3fn")
}
"""Layers whose inputs are rounded."""


def bias_of(packed: PackedLinear) -> Tensor:
    return torch.randn(packed.format.rows, generator=torch.Generator().manual_seed(4))


def inputs_of(packed: PackedLinear, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, packed.format.columns, generator=torch.Generator().manual_seed(5)).to(dtype)


def bound_of(packed: PackedLinear, size: Tensor) -> Tensor:
    """A rounding for each term of a sum, and four: two decoded weights meet in the adapters, and sums are added.

    Signs multiply the input by a factor and their product by another, and add up over their ranks.
    """
    ranks = packed.format.rank if packed.binary is None else packed.format.rank + packed.binary.format.rank + 1
    return (packed.format.columns + ranks + 4) * 2.0**-24 * size


def check(model: onnx.ModelProto, x: Tensor, ideal: Tensor, bound: Tensor, in_runtime: Runtime) -> None:
    onnx.checker.check_model(model, full_check=True)
    for name, (found,) in (
        ("onnx.reference", ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})),
        ("ONNX Runtime", in_runtime(model.SerializeToString(), {model.graph.input[0].name: x.numpy()})),
    ):
        excess = (torch.from_numpy(found).double() - ideal).abs() - bound
        assert excess.max() <= 0, f"{name} is off by {excess.max():.2e} more than {bound.max():.2e}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_the_exact_product(form: str, target: str, in_runtime: Runtime) -> None:
    packed = FORMS[form]()
    x, bias = inputs_of(packed), bias_of(packed)
    opset = opset_of([packed], target)
    lowered = lower_linear(packed, bias, target, "layer.0", opset=opset)
    ideal, size = unrounded_product(packed, x, bias)
    model = model_of(lowered, packed, torch.float32, opset)
    if target == "ort":  # onnx.reference does not know com.microsoft
        (found,) = in_runtime(model.SerializeToString(), {lowered.input: x.numpy()})
        assert ((torch.from_numpy(found).double() - ideal).abs() <= bound_of(packed, size)).all()
    else:
        check(model, x, ideal, bound_of(packed, size), in_runtime)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ROUNDED)
def test_rounded_inputs(
    kind: str, target: str, in_runtime: Runtime, rounded_product: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    packed = ROUNDED[kind]()
    x, bias = inputs_of(packed), bias_of(packed)
    x[0, 0] = 0  # a token without a scale of its own
    lowered = lower_linear(packed, bias, target, "layer.0")
    ideal, bound = rounded_product(packed, x, bias)
    model = model_of(lowered, packed, torch.float32)
    (found,) = in_runtime(model.SerializeToString(), {lowered.input: x.numpy()})
    assert ((torch.from_numpy(found).double() - ideal).abs() <= bound).all()
    if target != "ort":
        check(model, x, ideal, bound, in_runtime)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("form", "roundings"),
    # Scales, decoded weights, the scaled input, products, and sums; of signs two factors, their products, three ranks.
    [("scaled low-rank bf16", 8), ("int3-1-2-4/16 asymmetric", 8), ("signs", 8), ("signs 3 ranks", 12)],
)
def test_float16(form: str, roundings: int, target: str, in_runtime: Runtime) -> None:
    packed = FORMS[form]()
    x, bias = inputs_of(packed, torch.float16), bias_of(packed).half()
    lowered = lower_linear(packed, bias, target, "layer.0", dtype=torch.float16)
    model = model_of(lowered, packed, torch.float16)
    onnx.checker.check_model(model, full_check=True)
    (found,) = in_runtime(model.SerializeToString(), {lowered.input: x.numpy()})
    ideal, size = unrounded_product(packed, x, bias)
    # Products add up in float32, all else is rounded to float16.
    bound = roundings * 2.0**-11 * size + bound_of(packed, size)
    assert found.dtype == np.float16
    assert ((torch.from_numpy(found).double() - ideal).abs() <= bound).all()


@pytest.mark.parametrize(
    "form", ["int4/32", "int4", "int4 channel", "int3", "int8", "int2", "int4 asymmetric tensor", "int3-1-2-4/16"]
)
def test_onnx_runtime_keeps_the_codes(form: str, in_runtime: Runtime, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    packed = FORMS[form]()
    opset = opset_of([packed], "portable")
    model = model_of(lower_linear(packed, None, "portable", "layer", opset=opset), packed, torch.float32, opset)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx").graph
    assert [node.op_type for node in optimised.node] == ["MatMulNBits"]
    assert all(
        constant.data_type != onnx.TensorProto.FLOAT
        or len(constant.dims) < 2
        or (constant.dims[0] == 24 and constant.dims[1] <= 64 // 16)
        for constant in optimised.initializer
    ), "nothing is folded to numbers"


@pytest.mark.parametrize("opset", [21, 25])
@pytest.mark.parametrize("ranks", [1, 3])
def test_onnx_runtime_keeps_signs_as_codes(ranks: int, opset: int, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    packed = with_signs(_linear(pack_random(24, 64)), ranks)
    model = model_of(lower_linear(packed, None, "portable", "layer", opset=opset), packed, torch.float32, opset)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx").graph
    operators = [node.op_type for node in optimised.node]
    assert operators.count("MatMulNBits") == 2
    assert not {"MatMul", "DequantizeLinear"} & set(operators)


@pytest.mark.parametrize(
    ("form", "target", "opset", "bits", "note"),
    [
        ("int4", "portable", 21, 4, None),
        ("int4", "ort", 21, 4, None),
        ("int3", "portable", 21, 4, "weight: codes of 3 bits are stored in 4"),
        ("int3", "ort", 21, 4, "weight: codes of 3 bits are stored in 4"),
        ("int5 asymmetric", "portable", 21, 8, "weight: codes of 5 bits are stored in 8"),
        ("int2", "portable", 21, 4, "weight: codes of 2 bits are stored in 4"),
        ("int2", "portable", 25, 2, None),
        ("odd sizes int2", "portable", 25, 4, "weight: codes of 2 bits are stored in 4"),
        ("int2", "ort", 21, 2, "2-bit products need ONNX Runtime 1.23 or later"),
        ("2:4 int4", "portable", 21, 4, "is stored without its pattern"),
        ("int4", "dense", 21, 32, "is stored as numbers of 32 bits"),
        ("int3-1-2-4/16", "portable", 21, 4, "weight: codes of 1 to 4 bits are stored in 4"),
        ("int3-1-2-4/16", "ort", 21, 4, "weight: codes of 1 to 4 bits are stored in 4"),
        ("int8-1-5/16 asymmetric", "ort", 21, 8, "weight: codes of 1 to 8 bits are stored in 8"),
        ("int2-1-2/16 asymmetric", "portable", 25, 2, "weight: codes of 1 to 2 bits are stored in 2"),
        ("int1-1/16", "ort", 21, 2, "weight: codes of 1 bit are stored in 2"),
        ("int3-1-2-4/16", "dense", 21, 32, "weight: int1-4/16 is stored as numbers of 32 bits"),
    ],
)
def test_bits_and_notes(form: str, target: str, opset: int, bits: int, note: str | None) -> None:
    packed = FORMS[form]()
    lowered = lower_linear(packed, None, target, "layer", opset=opset)
    assert lowered.stored["layer.weight"].nbytes * 8 == bits * packed.format.rows * packed.format.columns
    assert all(proto.ByteSize() >= lowered.stored[name].nbytes for name, proto in lowered.initializers.items())
    assert (note is None and not lowered.notes) or any(note in line for line in lowered.notes)


@pytest.mark.parametrize(("target", "opset", "bits"), [("portable", 25, 2), ("portable", 21, 4), ("ort", 21, 2)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_signs_are_stored_once_in_the_fewest_bits(target: str, opset: int, bits: int, ranks: int) -> None:
    packed = with_signs(_linear(pack_random(24, 64)), ranks)
    assert opset_of([packed], "portable") == 25
    lowered = lower_linear(packed, None, target, "layer", opset=opset)
    signs = {name: constant for name, constant in lowered.stored.items() if name.startswith("layer.sign")}
    assert signs["layer.signs"].nbytes * 8 == bits * 24 * 64
    # A scale for each row, which is the left factor of rank 1; an axis in the graphs of several ranks.
    numbers = 4 * (24 + 64 if ranks == 1 else 24 + ranks * (24 + 64)) + 8 * (target == "ort" and ranks > 1)
    assert sum(constant.nbytes for constant in signs.values()) == signs["layer.signs"].nbytes + numbers
    assert f"signs: codes of 1 bit are stored in {bits}" in lowered.notes


def test_dense_weights_have_their_signs_in_them() -> None:
    packed = with_signs(_linear(pack_random(24, 64, sparsity=NM(2, 4))))
    lowered = lower_linear(packed, None, "dense", "layer")
    assert [node.op_type for node in lowered.nodes] == ["MatMul"]
    assert any("signs x rank 1" in note for note in lowered.notes)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_signs_alone(target: str, ranks: int, in_runtime: Runtime) -> None:
    packed = with_signs(_linear(pack_random(24, 64)), ranks)
    assert packed.binary is not None
    x = inputs_of(packed)
    lowered = lower_signs(packed.binary, target, "layer")
    model = model_of(lowered, packed, torch.float32)
    onnx.checker.check_model(model, full_check=True)
    (found,) = in_runtime(model.SerializeToString(), {lowered.input: x.numpy()})
    zero = pack_weight(torch.zeros(24, 64), bits=None)
    ideal, size = unrounded_product(replace(packed, weight=zero), x, None)
    assert ((torch.from_numpy(found).double() - ideal).abs() <= bound_of(packed, size)).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ROUNDED)
def test_signs_read_inputs_that_are_not_rounded(
    kind: str, target: str, in_runtime: Runtime, rounded_product: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    packed = ROUNDED[kind]()
    x, bias = inputs_of(packed), bias_of(packed)
    signed = with_signs(packed)
    lowered = lower_linear(signed, bias, target, "layer.0")
    model = model_of(lowered, packed, torch.float32)
    (found,) = in_runtime(model.SerializeToString(), {lowered.input: x.numpy()})
    ideal, bound = rounded_product(packed, x, bias)
    zero = replace(signed, weight=pack_weight(torch.zeros(24, 64), bits=None), left=None, right=None, input_scale=None)
    signs, size = unrounded_product(zero, x, None)
    excess = (torch.from_numpy(found).double() - ideal - signs).abs() - bound - bound_of(signed, size)
    # The sum of the two is rounded once more.
    assert (excess <= 2.0**-24 * (ideal.abs() + signs.abs())).all()


@pytest.mark.parametrize("target", ["portable", "ort"])
def test_what_16_bits_hold_takes_16_bits(target: str) -> None:
    packed = FORMS["float16 scales"]()
    stored = lower_linear(packed, None, target, "layer").stored
    assert sum(constant.nbytes for constant in stored.values()) == packed.format.nbytes()


def test_one_scale_takes_one_scale_whatever_the_blocks_of_the_runtime() -> None:
    packed = PackedLinear(pack_random(64, 1024))
    lowered = lower_linear(packed, None, "ort", "layer")
    assert lowered.nbytes <= packed.format.nbytes() + 16


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "form",
    [
        *("int4/32", "int4 asymmetric", "2:4 int4", "unstructured int4", "2:4 numbers", "numbers"),
        *("int3-1-2-4/16", "int3-1-2-4/16 asymmetric", "int1-4/16 2:4", "int1-4/16 2:4 asymmetric", "int1-1/16"),
    ],
)
def test_a_weight_alone(form: str, target: str, in_runtime: Runtime) -> None:
    weight = FORMS[form]().weight
    lowered = lower_weight(weight, target, "w")
    graph = helper.make_graph(
        lowered.nodes,
        "weight",
        [],
        [helper.make_tensor_value_info("w.y", onnx.TensorProto.FLOAT, [weight.format.columns, weight.format.rows])],
        list(lowered.initializers.values()),
    )
    imports = [helper.make_opsetid("", 21), *(helper.make_opsetid(*pair) for pair in lowered.domains.items())]
    model = helper.make_model(graph, opset_imports=imports, functions=lowered.functions, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    for (found,) in (ReferenceEvaluator(model).run(None, {}), in_runtime(model.SerializeToString(), {})):
        assert torch.equal(torch.from_numpy(found), weight.decode().t())


@pytest.mark.parametrize(
    ("columns", "group", "block"),
    [
        (576, None, 64),
        (1536, "channel", 128),
        (57, None, 64),
        (19, None, 32),
        (576, 128, 64),
        (4096, 128, 128),
        (1024, 512, 256),
        (96, 48, 16),
        (96, 24, None),
        (640, 32, 32),
    ],
)
def test_blocks_are_large_and_waste_little(columns: int, group: int | str | None, block: int | None) -> None:
    lowered = lower_linear(PackedLinear(pack_random(8, columns, group=group)), None, "ort", "layer")
    products = [node for node in lowered.nodes if node.op_type == "MatMulNBits"]
    found = [one.i for node in products for one in node.attribute if one.name == "block_size"]
    assert found == ([] if block is None else [block])


def test_names_are_those_of_the_layer() -> None:
    packed = FORMS["low-rank int4"]()
    for target in TARGETS:
        lowered = lower_linear(packed, bias_of(packed), target, "model.layers.0.q_proj")
        names = {name for node in lowered.nodes for name in (*node.input, *node.output) if name} | set(lowered.stored)
        assert all(name.startswith("model.layers.0.q_proj.") for name in names)
        assert lowered.nodes[-1].output == [lowered.output]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "portabel"}, "did you mean 'portable'"),
        ({"target": "ort", "opset": 7}, "opset 7 is not supported"),
        ({"target": "ort", "opset": 99}, "opset 99 is not supported"),
        ({"target": "ort", "dtype": torch.bfloat16}, "cannot compute in torch.bfloat16"),
    ],
)
def test_unknown_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lower_linear(FORMS["int4"](), None, **{"target": "ort", "name": "layer", **options})


def test_dense_weights_keep_the_zeros_of_2_of_4() -> None:
    packed = FORMS["low-rank int4"]()
    weight = lower_linear(packed, None, "dense", "layer").stored["layer.weight"]
    numbers = torch.from_numpy(weight.content()).view(torch.float32).reshape(weight.dims)
    kept = (numbers.t().reshape(packed.format.rows, -1, 4) != 0).sum(-1)
    assert weight.dims == (packed.format.columns, packed.format.rows)
    assert int(kept.max()) == 2, "of every four inputs two at most, adapters apart"
