"""Forms that no single kernel takes, composed of products: exact in what they store, near in what they compute."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slimc.backends.cuda.compose import COMPOSED, composed, decoded, plan_of
from slimc.backends.cuda.fit import Fit, fit_of
from slimc.backends.cuda.split import Split, split_of
from slimc.backends.reference import DECODE
from slimc.runtime.formats import ACTIVATIONS, NM, LinearFormat, Unstructured, WeightFormat
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear, PackedWeight
from slimc.runtime.select import Kernel

BF16 = torch.bfloat16


def weight(rows: int = 48, columns: int = 320, bits: int | None = 4, **form: Any) -> WeightFormat:
    return WeightFormat(rows, columns, bits, dtype=BF16, **form)


def linear(
    main: WeightFormat, rank: int = 0, *, scaled: bool = False, activation: str | None = None, **form: Any
) -> LinearFormat:
    form = {"bits": 4, "group": 64} | form
    shapes = ((main.rows, rank), (rank, main.columns))
    factors = [WeightFormat(*shape, dtype=BF16, **form) for shape in shapes if rank]
    return LinearFormat(main, *factors, input_scaled=scaled, activation=activation)


PLAIN = {"bits": None, "group": None}

COMPOSED_FORMS = {
    "16-bit adapters": linear(weight(group=64), 20, **PLAIN),
    "16-bit adapters of a 2:4 weight": linear(weight(sparsity=NM(2, 4), per_tensor=True), 20, **PLAIN),
    "scaled inputs": linear(weight(sparsity=NM(2, 4), per_tensor=True), 20, scaled=True),
    "scaled inputs, no adapters": linear(weight(group=128), scaled=True),
    "scaled inputs, 16-bit adapters": linear(weight(group=64), 33, scaled=True, **PLAIN),
    "adapters in groups of 128": linear(weight(group=64), 130, group=128),
    "adapters with a scale a row": linear(weight(group=128), 70, group=None),
    "adapters with one scale": linear(weight(per_tensor=True), 70, group=None, per_tensor=True),
    "adapters in groups of 32": linear(weight(group=64), 70, group=32),
    "8-bit adapters": linear(weight(group=64), 70, bits=8),
    "3-bit adapters": linear(weight(group=64), 70, bits=3),
    "16-bit weight": linear(weight(bits=None), 20, bits=8),
    "16-bit weight, scaled inputs": linear(weight(bits=None), scaled=True),
    "3 bits": linear(weight(bits=3, group=64), 20),
    "2 bits, 2:4": linear(weight(bits=2, sparsity=NM(2, 4)), 20),
    "groups of 24": linear(weight(group=24), 20),
    "groups of 48, 2:4": linear(weight(group=48, sparsity=NM(2, 4)), 20, **PLAIN),
    "groups of 256": linear(weight(group=256), 20),
    "groups of 192": linear(weight(columns=500, group=192), 20),
    "one group": linear(weight(group=1024), 20),
    "a width that is not round": linear(weight(columns=325, group=64), 20),
    "a width of half a byte, 2:4": linear(weight(columns=324, sparsity=NM(2, 4), per_tensor=True), 21),
    "a width below 8": linear(weight(columns=3), 1),
    "8 bits": linear(weight(bits=8, group=64), 20),
    "8 bits a row, no adapters": linear(weight(bits=8)),
    "8 bits, 16-bit adapters": linear(weight(bits=8, per_tensor=True), 20, **PLAIN),
    "6 bits in groups of 32, scaled inputs": linear(weight(columns=300, bits=6, group=32), 20, scaled=True),
    "5 bits": linear(weight(columns=323, bits=5, group=128), 20),
    "asymmetric": linear(weight(group=64, asymmetric=True), 20),
    "asymmetric 3 bits": linear(weight(columns=300, bits=3, group=128, asymmetric=True)),
    "asymmetric 8 bits": linear(weight(bits=8, group=64, asymmetric=True), 20),
    "asymmetric 7 bits, one scale": linear(weight(bits=7, per_tensor=True, asymmetric=True), 20),
    "one row": linear(weight(rows=1, columns=3, bits=3), 1, **PLAIN),
}

DENSE_FORMS = {
    "8 bits, 2:4": (linear(weight(bits=8, sparsity=NM(2, 4)), 20), "sums over groups count what was pruned"),
    "asymmetric, 2:4": (linear(weight(asymmetric=True, sparsity=NM(2, 4))), "sums over groups count what was pruned"),
    "2:4 of 16-bit values": (linear(weight(bits=None, sparsity=NM(2, 4)), 20, **PLAIN), "not 2:4 bf16"),
    "unstructured": (linear(weight(sparsity=Unstructured(), nonzeros=7000), 20), "knows 2:4 and dense weights"),
    "1:4": (linear(weight(sparsity=NM(1, 4)), 20), "knows 2:4 and dense weights, not 1:4"),
    "groups of 12": (linear(weight(group=12)), "filled up to 32 codes of 4 bits, more than twice"),
    "groups of 50, 2:4": (linear(weight(group=50, sparsity=NM(2, 4))), "cut through groups of 4"),
}


@pytest.fixture
def table(cpu_kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    one = composed(cpu_kernels, "cpu")
    return (cpu_kernels[0], one, decoded("cpu"), DECODE)


def canonical(packed: PackedLinear) -> PackedLinear:
    """Clear the bits that pad the streams of codes, as whoever packs them does."""
    named = packed.tensors()
    parts = {"": packed.format.weight, "left_": packed.format.left, "right_": packed.format.right}
    for prefix, spec in parts.items():
        if spec is not None and spec.bits is not None and (used := spec.stored_per_row * spec.bits % 8):
            named[f"{prefix}values"][:, -1] &= (1 << used) - 1
    return PackedLinear.assemble(packed.format, named)


@pytest.mark.parametrize("name", COMPOSED_FORMS)
def test_composed_forms(name: str, fill: Any, check: Any, table: tuple[Kernel, ...]) -> None:
    spec = COMPOSED_FORMS[name]
    packed = fill(spec)
    expected = {key: tensor.clone() for key, tensor in packed.tensors().items()}
    bias = torch.randn(spec.rows).to(BF16)
    layer = SlimLinear(packed, bias, kernels=table)
    (choice,) = layer.choices()
    assert choice.kernel is table[1]
    assert list(choice.refusals) == [table[0].name]
    for tokens in (1, 5):
        x = torch.randn(tokens, spec.columns).to(BF16)
        check(layer(x), x, packed, bias)
        check(layer(x.view(tokens, 1, -1))[:, 0], x, packed, bias)
    held = dict(layer.named_buffers())
    assert held
    assert all(key.startswith("resident_") for key in held)
    restored = layer.packed.tensors()
    assert restored.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in restored.items())


ROUNDED_FORMS = ("scaled inputs", "16-bit adapters", "16-bit weight", "asymmetric 8 bits", "3 bits", "one row")


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("name", ROUNDED_FORMS)
def test_composed_forms_with_rounded_inputs(
    name: str, kind: str, fill: Any, rounded_product: Any, table: tuple[Kernel, ...]
) -> None:
    spec = replace(COMPOSED_FORMS[name], activation=kind)
    packed = canonical(fill(spec))
    bias = torch.randn(spec.rows).to(BF16)
    layer = SlimLinear(packed, bias, kernels=table)
    assert [choice.kernel for choice in layer.choices()] == [table[1]]
    assert layer.packed.format == spec
    for tokens in (1, 5):
        x = torch.randn(tokens, spec.columns).to(BF16)
        ideal, bound = rounded_product(packed, x, bias)
        assert bool(((layer(x).double() - ideal).abs() <= bound).all())


@pytest.mark.parametrize("name", DENSE_FORMS)
def test_forms_that_are_decoded_once_say_why(name: str, fill: Any, check: Any, table: tuple[Kernel, ...]) -> None:
    spec, reason = DENSE_FORMS[name]
    packed = fill(spec)
    layer = SlimLinear(packed, kernels=table)
    (choice,) = layer.choices()
    assert choice.kernel is table[2]
    assert reason in choice.refusals["cuda-composed"]
    assert reason in str(choice)
    x = torch.randn(5, spec.columns).to(BF16)
    check(layer(x), x, packed)
    assert layer(x[0]).shape == (spec.rows,)
    assert list(layer.state_dict()) == list(packed.tensors())


def test_a_fused_adapter_is_in_the_kernel_and_others_beside_it() -> None:
    fused = {"adapters in groups of 128", "adapters with a scale a row", "3-bit adapters", "3 bits"}
    for name, spec in COMPOSED_FORMS.items():
        plan = plan_of(spec)
        assert not isinstance(plan, str)
        if name in fused:
            assert plan.fused, name
        if "scaled" in name or "16-bit" in name or "32" in name.partition("adapters")[2]:
            assert not plan.fused, name
        if plan.fused:
            assert len(plan.kernel_formats()) == 1 + (plan.high is not None)


@given(
    bits=st.integers(2, 4),
    columns=st.integers(1, 40).map(lambda n: 4 * n),
    group=st.sampled_from([None, 32, 36, 64, 100, 128, 200, 256]),
    sparse=st.booleans(),
    grouped=st.booleans(),
)
def test_what_is_written_for_a_kernel_is_the_same_matrix(
    fill: Any, bits: int, columns: int, group: int | None, sparse: bool, grouped: bool
) -> None:
    spec = weight(17, columns, bits, group=group, sparsity=NM(2, 4) if sparse else None)
    packed = canonical(fill(LinearFormat(spec))).weight
    fit = fit_of(spec, grouped=grouped)
    if isinstance(fit, str):
        filled = 0 if group is None else group + -group % 32
        assert (grouped and (group or 0) % 64) or 4 * filled > 2 * bits * (group or 0)
        return
    written = fit.apply(packed)
    assert written.format == fit.format
    x = torch.randn(3, columns).to(BF16)
    # Columns of zeros and repeated scales change no product.
    dense, spread = packed.decode().double(), written.decode().double()
    torch.testing.assert_close(fit.spread(x).double() @ spread.T, x.double() @ dense.T, rtol=1e-12, atol=1e-12)
    undone = fit.undo(written)
    assert all(torch.equal(tensor, packed.tensors()[name]) for name, tensor in undone.tensors().items())


def test_a_factor_lies_beside_another_matrix_if_its_groups_do() -> None:
    main = fit_of(weight(group=48))
    assert isinstance(main, Fit)
    assert isinstance(fit_of(weight(20, group=96), beside=main), Fit)
    assert isinstance(fit_of(weight(20, group=48), beside=main), Fit)
    refusal = fit_of(weight(20, group=16), beside=main)
    assert refusal == "groups of 16 columns do not fall on its groups of 64"


def test_other_inputs_and_devices_are_refused(cpu_kernels: tuple[Kernel, ...]) -> None:
    spec = COMPOSED_FORMS["16-bit adapters"]
    cpu, meta = torch.device("cpu"), torch.device("meta")
    one = composed(cpu_kernels, "cpu")
    dense = decoded("cpu")
    assert composed(cpu_kernels).accepts(spec, BF16, cpu, 1) == "needs a CUDA GPU, not cpu"
    assert one.accepts(spec, BF16, meta, 1) == "needs a cpu device, not meta"
    assert one.accepts(spec, torch.float32, cpu, 1) == "needs activations and scales of one 16-bit dtype"
    assert dense.accepts(spec, torch.float32, cpu, 1) == "would decode for inputs of the weight's dtype only"
    assert decoded().accepts(spec, BF16, cpu, 1) == "needs a CUDA GPU, not cpu"
    assert dense.accepts(spec, BF16, meta, 1) == "needs a cpu device, not meta"
    assert "that other kernels hold packed" in str(dense.accepts(spec, BF16, cpu, 4096))
    # Kernels know 16-bit scales only.
    wide = LinearFormat(WeightFormat(48, 320, 4))
    assert dense.accepts(wide, torch.float32, cpu, 1) is None
    assert composed((), "cpu").accepts(spec, BF16, cpu, 1) == ""


def test_a_layer_that_does_more_to_its_input_is_refused(cpu_kernels: tuple[Kernel, ...]) -> None:
    @dataclass(frozen=True)
    class Rounded(LinearFormat):
        """A format of a later day."""

        rounded: bool = True

    spec = Rounded(weight(bits=8), input_scaled=True)
    cpu = torch.device("cpu")
    refusal = composed(cpu_kernels, "cpu").accepts(spec, BF16, cpu, 1)
    assert refusal == "does nothing to inputs but scale and round them"
    for one in (spec, linear(weight(sparsity=NM(1, 4)), activation="int8")):
        assert decoded("cpu").accepts(one, BF16, cpu, 1) == "does nothing to inputs but scale them"


@given(
    bits=st.integers(2, 8),
    columns=st.integers(1, 200),
    group=st.sampled_from([None, 16, 50, 64, 128]),
    asymmetric=st.booleans(),
)
def test_a_matrix_is_the_sum_of_its_parts(
    fill: Any, bits: int, columns: int, group: int | None, asymmetric: bool
) -> None:
    spec = weight(5, columns, bits, group=group, asymmetric=asymmetric)
    split = split_of(spec)
    if not isinstance(split, Split):
        assert split is None
        assert bits <= 4
        assert not asymmetric
        return
    packed = canonical(fill(LinearFormat(spec))).weight
    low, high = split.apply(packed)
    x = torch.randint(-8, 9, (3, columns)).double()
    assert packed.scale is not None
    # In float64 every product and sum here is exact, but for the rounding of decoded weights, which is left out.
    exact = [
        PackedWeight(replace(one.format, dtype=torch.float64), one.values, scale=one.scale.double())
        for one in (low, high)
        if one
    ]
    y = sum(x @ one.decode().T for one in exact)
    y = y + split.sums(x) @ split.offsets(packed.scale.double(), packed.zero_point).T
    stored = PackedWeight(
        replace(spec, dtype=torch.float64), packed.values, scale=packed.scale.double(), zero_point=packed.zero_point
    )
    torch.testing.assert_close(y, x @ stored.decode().T, rtol=1e-12, atol=1e-9)
    undone = split.undo(low, high, packed.zero_point)
    assert all(torch.equal(tensor, packed.tensors()[name]) for name, tensor in undone.tensors().items())


def test_a_copy_and_a_compiled_layer(fill: Any, table: tuple[Kernel, ...]) -> None:
    layer = SlimLinear(canonical(fill(COMPOSED_FORMS["scaled inputs"])), kernels=table)
    x = torch.randn(5, 320).to(BF16)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_the_layout_gives_back_fresh_tensors(fill: Any) -> None:
    packed = canonical(fill(COMPOSED_FORMS["scaled inputs, 16-bit adapters"]))
    state = COMPOSED.prepare(packed)
    restored = COMPOSED.restore((packed.format,), COMPOSED.tensors(state), 0)
    held: list[Tensor] = list(COMPOSED.tensors(state).values())
    assert not {t.data_ptr() for t in held} & {t.data_ptr() for t in restored.tensors().values()}
