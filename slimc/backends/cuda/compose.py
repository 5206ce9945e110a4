"""Layers that no single kernel takes, composed of products that one does.

A layer is ``y = round(x * input_scale) @ W^T + (x @ R^T) @ L^T + bias``, where inputs are rounded if the layer says so.
W, R and L are products of their own here, each by the best that there is for it: codes by a kernel
(`slimc.backends.cuda.mixed` takes some as they are, `slimc.backends.cuda.fit` writes others so that one takes them, and
`slimc.backends.cuda.split` as sums of 4-bit codes), 16-bit values by cuBLAS. Adapters stay inside W's kernel where they
fit there; where they do not, L is decoded for many tokens, so that cuBLAS adds its product to y. As everywhere on a GPU
the canonical tensors are not kept; only adapters of codes that no kernel takes are, beside their values.

What even that cannot hold is decoded for each call (`slimc.backends.cuda.stored`), and what that cannot decode, once
and for all (`decoded`), beside the canonical tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends.cuda import layout, mixed
from slimc.backends.cuda.expand import expand_weight
from slimc.backends.cuda.fit import COLUMN_MULTIPLE, Fit, fit_of, padding, put_padding
from slimc.backends.cuda.layer import FragmentLayer
from slimc.backends.cuda.mixed import MIXED_DENSE, MixedLayer
from slimc.backends.cuda.rounding import round_inputs
from slimc.backends.cuda.split import Split, split_of
from slimc.errors import KernelError
from slimc.runtime.formats import LinearFormat, WeightFormat
from slimc.runtime.layouts import Formats, Layout, register_layout
from slimc.runtime.packing import PackedLinear, PackedWeight
from slimc.runtime.select import Kernel, choose, token_bucket

__all__ = ["COMPOSED", "DECODED", "ComposedLayer", "Plan", "composed", "decoded", "plan_of", "prepare"]

T = TypeVar("T")

MOST_ADDED_TOKENS = 32
"""Up to here L's product comes from a kernel and is added to y; cuBLAS adds while it multiplies, by a decoded L."""


@dataclass(frozen=True)
class AsStored:
    """A matrix that kernels take as it is (`slimc.backends.cuda.mixed`)."""

    spec: WeightFormat

    @property
    def format(self) -> WeightFormat:
        """The matrix as the kernels see it."""
        return self.spec

    def spread(self, x: Tensor) -> Tensor:
        """Return inputs [tokens, columns] as the kernels read them."""
        return x

    def apply(self, weight: PackedWeight) -> PackedWeight:
        """Write a matrix for the kernels."""
        return weight

    def undo(self, weight: PackedWeight) -> PackedWeight:
        """Return the matrix of which `apply` made this."""
        return weight


@dataclass(frozen=True)
class Plan:
    """Which product computes each part of a layer.

    Attributes:
        main: how W's codes are written for a kernel; None if cuBLAS multiplies by W's values.
        left, right: the same of the adapters.
        fused: the adapters are inside W's kernel.
        split: how W is a sum, of which ``main`` is the low part.
        activation: what the inputs of W are rounded to.
    """

    main: Fit | AsStored | None
    left: Fit | None = None
    right: Fit | None = None
    fused: bool = False
    split: Split | None = None
    activation: str | None = None

    @property
    def high(self) -> Fit | AsStored | None:
        """How the codes of W's high part are written, if there is one."""
        return self.main if self.split is not None and self.split.wide else None

    @property
    def main_format(self) -> LinearFormat | None:
        """What W's kernel computes."""
        if self.main is None:
            return None
        if self.fused and self.left is not None and self.right is not None:
            return LinearFormat(self.main.format, self.left.format, self.right.format, activation=self.activation)
        return LinearFormat(self.main.format, activation=self.activation)

    @property
    def high_format(self) -> LinearFormat | None:
        """What the kernel of W's high part computes."""
        return None if self.high is None else LinearFormat(self.high.format, activation=self.activation)

    def kernel_formats(self) -> list[LinearFormat]:
        """Return what the kernels of all parts compute."""
        factors = () if self.fused else (self.left, self.right)
        alone = [LinearFormat(fit.format) for fit in factors if fit is not None]
        return [form for form in (self.main_format, self.high_format) if form is not None] + alone


@cache
def plan_of(spec: LinearFormat) -> Plan | str:
    """Decide which product computes each part of a layer, or say why none can compute W."""
    if spec != _known(spec):
        return "does nothing to inputs but scale and round them"
    if spec.weight.widths is not None:
        return f"holds codes of one width, not {spec.weight.describe()}"
    planned = _plan_weight(spec)
    if isinstance(planned, str):
        return planned
    main, split = planned
    if spec.left is None or spec.right is None:
        return Plan(main, split=split, activation=spec.activation)
    # Inside the kernel adapters would read the scaled input.
    if isinstance(main, Fit) and not spec.input_scaled:
        left, right = fit_of(spec.left, grouped=True), fit_of(spec.right, beside=main)
        if isinstance(left, Fit) and isinstance(right, Fit):
            return Plan(main, left, right, fused=True, split=split, activation=spec.activation)
    left, right = fit_of(spec.left), fit_of(spec.right)
    return Plan(
        main,
        left if isinstance(left, Fit) else None,
        replace(right, rows=_filled(spec.rank)) if isinstance(right, Fit) else None,
        split=split,
        activation=spec.activation,
    )


def _plan_weight(spec: LinearFormat) -> tuple[Fit | AsStored | None, Split | None] | str:
    """Decide how W is written for a kernel, and of what it is a sum; or say why it cannot be."""
    if spec.activation is None and mixed.refuses_form(LinearFormat(spec.weight)) is None:
        return AsStored(spec.weight), None
    split = split_of(spec.weight)
    if isinstance(split, str):
        return split
    weight = spec.weight if split is None else split.part
    if weight.bits is None and weight.sparsity is None:
        return None, split
    fit = fit_of(weight)
    return fit if isinstance(fit, str) else (fit, split)


def _order(form: LinearFormat) -> Layout:
    """Return the layout in which kernels hold a matrix of codes."""
    return mixed.LAYOUT if (form.weight.bits or 0) > mixed.NARROW else layout.FRAGMENTS


def _known(spec: LinearFormat) -> LinearFormat:
    """Return what of a format is computed here."""
    return LinearFormat(spec.weight, spec.left, spec.right, spec.input_scaled, spec.activation)


def _filled(rank: int) -> int:
    """Return the ranks of adapters beside W's product: t must begin at a multiple of 16 bytes for every token."""
    return rank + -rank % COLUMN_MULTIPLE


class _Coded:
    """A product by a kernel."""

    def __init__(self, fit: Fit | AsStored, layer: FragmentLayer | MixedLayer) -> None:
        self.fit, self.layer = fit, layer
        self._chosen: dict[tuple[torch.dtype, int], Kernel] = {}

    def run(self, x: Tensor, bias: Tensor | None, kernels: Sequence[Kernel]) -> Tensor:
        case = (x.dtype, token_bucket(len(x)))
        kernel = self._chosen.get(case)
        if kernel is None:
            spec = self.layer.format
            kernel, refusals = choose(kernels, spec, x.dtype, x.device, len(x))
            if kernel is None:
                raise KernelError(f"no kernel computes {len(x)} tokens of {spec.describe()}: {refusals}")
            self._chosen[case] = kernel
        return kernel.run(self.fit.spread(x), self.layer, bias)

    def add_to(self, y: Tensor, x: Tensor, kernels: Sequence[Kernel]) -> Tensor:
        """Add the product to y [tokens, rows], in place; return y."""
        if len(x) > MOST_ADDED_TOKENS and x.is_cuda and isinstance(self.layer, FragmentLayer):
            return y.addmm_(self.fit.spread(x), expand_weight(self.layer).t())
        return y.add_(self.run(x, None, kernels))


class _Dense:
    """A product by cuBLAS."""

    def __init__(self, matrix: Tensor, activation: str | None = None) -> None:
        self.matrix, self.activation = matrix, activation

    def run(self, x: Tensor, bias: Tensor | None, _kernels: Sequence[Kernel]) -> Tensor:
        return functional.linear(round_inputs(x, self.activation), self.matrix, bias)

    def add_to(self, y: Tensor, x: Tensor, _kernels: Sequence[Kernel]) -> Tensor:
        """Add the product to y [tokens, rows], in place; return y."""
        return y.addmm_(x, self.matrix.t())


@dataclass
class ComposedLayer:
    """A layer as its products want it.

    Attributes:
        format: what the layer stores.
        plan: which product computes what.
        tensors: all that is kept, by the name of the product (``main_``, ``high_``, ``left_``, ``right_``) and their
            own.
        main, high, left, right: the products; no factors if there are none, or if ``main`` computes with them.
        offsets: [groups, rows], what the sums of x over the groups of W are multiplied by, or None.
        input_scale: [columns] or None.
    """

    format: LinearFormat
    plan: Plan
    tensors: dict[str, Tensor]
    main: _Coded | _Dense
    high: _Coded | _Dense | None = None
    offsets: Tensor | None = None
    left: _Coded | _Dense | None = None
    right: _Coded | _Dense | None = None
    input_scale: Tensor | None = None


def prepare(packed: PackedLinear) -> ComposedLayer:
    """Write a layer for its products."""
    spec = packed.format
    plan = _plan(spec)
    named: dict[str, Tensor] = {}
    parts = (
        ("main_", plan.main, packed.weight),
        ("left_", plan.left, packed.left),
        ("right_", plan.right, packed.right),
    )
    for prefix, fit, part in parts:
        bits = None if fit is None or part is None else padding(part)
        if bits is not None:
            named[f"{prefix}padding"] = bits
    weight, high = (packed.weight, None) if plan.split is None else plan.split.apply(packed.weight)
    if plan.main is None:
        named["main_values"] = weight.values
    elif plan.fused:
        named |= _write("main_", plan, weight, packed.left, packed.right)
    else:
        named |= _write("main_", Plan(plan.main), weight)
    if high is not None:
        named |= _write("high_", Plan(plan.high), high)
    if plan.split is not None and packed.weight.zero_point is not None:
        named["zero_point"] = packed.weight.zero_point
    if packed.left is not None and packed.right is not None and not plan.fused:
        for prefix, fit, factor in parts[1:]:
            if fit is not None:
                named |= _write(prefix, Plan(fit), _present(factor))
            elif _present(factor).format.bits is None:
                named[f"{prefix}values"] = _fill_ranks(prefix, spec.rank, _present(factor).values)
            else:
                named |= _prefixed(prefix, _present(factor).tensors())
    if packed.input_scale is not None:
        named["input_scale"] = packed.input_scale
    return assemble((spec,), named, 0)


def assemble(formats: Formats, named: Mapping[str, Tensor], _part: int) -> ComposedLayer:
    """Make the products of a layer from what is kept of it."""
    spec = formats[0]
    plan = _plan(spec)
    layer = ComposedLayer(spec, plan, dict(named), _product("main_", plan.main, plan.main_format, spec, named))
    if plan.high is not None:
        layer.high = _product("high_", plan.high, plan.high_format, spec, named)
    if plan.split is not None and plan.main is not None and plan.main_format is not None:
        low = _order(plan.main_format).restore((plan.main_format,), _without("main_", named), 0).weight
        scale = _present(plan.main.undo(low).scale)
        layer.offsets = plan.split.offsets(scale, named.get("zero_point")).t()
    if spec.left is not None and not plan.fused:
        layer.left = _product("left_", plan.left, None, spec, named)
        layer.right = _product("right_", plan.right, None, spec, named)
    layer.input_scale = named.get("input_scale")
    return layer


def restore(formats: Formats, named: Mapping[str, Tensor], _part: int) -> PackedLinear:
    """Return the canonical tensors of a layer."""
    spec = formats[0]
    plan = _plan(spec)
    scale = named.get("input_scale")
    form = plan.main_format
    fitted = None if form is None else _order(form).restore((form,), _without("main_", named), 0)

    def part(prefix: str, fit: Fit | AsStored | None, stored: WeightFormat, fused: PackedWeight | None) -> PackedWeight:
        own = _without(prefix, named)
        if fit is None:
            values = own["values"][: stored.rows, : stored.stored_per_row] if stored.bits is None else own["values"]
            return PackedWeight(
                stored, **{name: _copied(tensor) for name, tensor in (own | {"values": values}).items()}
            )
        alone = LinearFormat(fit.format)
        weight = fit.undo(fused or _order(alone).restore((alone,), own, 0).weight)
        if prefix == "main_" and plan.split is not None:
            high = None if plan.high is None else part("high_", plan.high, plan.split.part, None)
            zero = named.get("zero_point")
            weight = plan.split.undo(weight, high, None if zero is None else _copied(zero))
        if "padding" in own:
            put_padding(weight, own["padding"])
        return weight

    weight = part("main_", plan.main, spec.weight, None if fitted is None else fitted.weight)
    packed = PackedLinear(weight, input_scale=None if scale is None else _copied(scale), activation=spec.activation)
    if spec.left is not None and spec.right is not None:
        packed.left = part("left_", plan.left, spec.left, None if fitted is None else fitted.left)
        packed.right = part("right_", plan.right, spec.right, None if fitted is None else fitted.right)
    return packed


def run(x: Tensor, layer: ComposedLayer, bias: Tensor | None, kernels: Sequence[Kernel]) -> Tensor:
    """Compute y [..., rows] from x [..., columns]; every product is rounded to the dtype of x."""
    inputs = x.reshape(-1, layer.format.columns)
    scaled = inputs if layer.input_scale is None else inputs * layer.input_scale
    y = layer.main.run(scaled, bias, kernels)
    if layer.high is not None:
        y = y.add_(layer.high.run(scaled, None, kernels))
    if layer.offsets is not None and layer.plan.split is not None:
        y = y.addmm_(layer.plan.split.sums(round_inputs(scaled, layer.plan.activation)), layer.offsets)
    if layer.left is not None and layer.right is not None:
        read = inputs if layer.input_scale is not None else round_inputs(inputs, layer.plan.activation)
        y = layer.left.add_to(y, layer.right.run(read, None, kernels), kernels)
    return y.view(*x.shape[:-1], layer.format.rows)


def _elsewhere(device_type: str, device: torch.device) -> str:
    wanted = "a CUDA GPU" if device_type == "cuda" else f"a {device_type} device"
    return f"needs {wanted}, not {device.type}"


def composed(kernels: Sequence[Kernel], device_type: str = "cuda") -> Kernel:
    """Make the kernel that composes layers of products by ``kernels`` and by the device's dense product."""

    def accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
        if device.type != device_type:
            return _elsewhere(device_type, device)
        plan = plan_of(spec)
        if isinstance(plan, str):
            return plan
        if dtype != spec.weight.dtype or dtype.itemsize != 2:
            return "needs activations and scales of one 16-bit dtype"
        if MIXED_DENSE.accepts(spec, dtype, device, tokens) is None:
            return f"{MIXED_DENSE.name} takes these codes in another order, and a GPU holds a layer in one"
        for form in plan.kernel_formats():
            kernel, refusals = choose(kernels, form, dtype, device, tokens)
            if kernel is None:
                return "; ".join(dict.fromkeys(refusals.values()))
        return None

    return Kernel("cuda-composed", accepts, prepare, lambda x, layer, bias: run(x, layer, bias, kernels))


def decoded(device_type: str = "cuda") -> Kernel:
    """Make the kernel for forms that no other takes: decoded once, adapters and input scale included.

    The dense weight lies beside the packed one, so a layer takes more than its 16 bits a weight. Where others know the
    form, but not this device or number of tokens, the weight is rather decoded at every call than kept dense.
    """

    def accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, _tokens: int) -> str | None:
        if device.type != device_type:
            return _elsewhere(device_type, device)
        if dtype != spec.weight.dtype:
            return "would decode for inputs of the weight's dtype only"
        if spec != replace(_known(spec), activation=None, binary=spec.binary):
            return "does nothing to inputs but scale them"
        if dtype.itemsize == 2 and isinstance(plan_of(replace(spec, binary=None)), Plan):
            return "would keep 16 bits of every weight of a form that other kernels hold packed"
        return None

    return Kernel("cuda-decoded", accepts, _prepare_dense, _run_dense, binary=True)


def _prepare_dense(packed: PackedLinear) -> Tensor:
    return packed.decode().to(packed.format.weight.dtype)


def _run_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias).contiguous()


def _plan(spec: LinearFormat) -> Plan:
    plan = plan_of(spec)
    if isinstance(plan, str):
        raise KernelError(f"a layer of {spec.describe()} cannot be composed: {plan}")
    return plan


def _write(
    prefix: str, plan: Plan, weight: PackedWeight, left: PackedWeight | None = None, right: PackedWeight | None = None
) -> dict[str, Tensor]:
    """Write a matrix, and the adapters that go with it, for a kernel; return what is kept of them."""
    written = PackedLinear(weight if plan.main is None else plan.main.apply(weight))
    if left is not None and right is not None:
        written.left, written.right = _present(plan.left).apply(left), _present(plan.right).apply(right)
    order = _order(written.format)
    return _prefixed(prefix, order.tensors(order.prepare(written)))


def _product(
    prefix: str, fit: Fit | AsStored | None, form: LinearFormat | None, spec: LinearFormat, named: Mapping[str, Tensor]
) -> _Coded | _Dense:
    own = _without(prefix, named)
    if fit is not None:
        form = form or LinearFormat(fit.format)
        return _Coded(fit, _order(form).assemble((form,), own, 0))
    part = _present({"main_": spec.weight, "left_": spec.left, "right_": spec.right}[prefix])
    if part.bits is None:
        return _Dense(own["values"], spec.activation if prefix == "main_" else None)
    return _Dense(_fill_ranks(prefix, spec.rank, PackedWeight(part, **own).decode()))


def _fill_ranks(prefix: str, rank: int, values: Tensor) -> Tensor:
    """Give factors as many ranks as t has, and cuBLAS rows that begin where it reads fast."""
    missing = _filled(rank) - rank
    return functional.pad(values, (0, 0, 0, missing) if prefix == "right_" else (0, missing))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _prefixed(prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in named.items()}


def _without(prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}


def _present(part: T | None) -> T:
    if part is None:
        raise KernelError("a part of this layer is missing")
    return part


COMPOSED = register_layout(Layout("composed", prepare, lambda layer: layer.tensors, assemble, restore))
"""What a layer of several products keeps."""

DECODED = decoded()
