"""Layers with a binary part: the rest by the kernels that there are for it, the signs by a product of their own.

    y = rest(x) + sum_k ((x * right[k]) @ B^T) * left[:, k]

So every kernel serves such layers too, and none of them knows of signs: a kernel is never asked about a layer with a
binary part unless it says that it computes one (`slimc.runtime.select.Kernel.binary`). Where both parts would be
decoded, they are decoded into one matrix for one product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from slimc.errors import KernelError
from slimc.runtime.formats import LinearFormat
from slimc.runtime.layouts import Formats, Layout, register_layout
from slimc.runtime.packing import PackedBinary, PackedLinear
from slimc.runtime.select import Kernel, choose, token_bucket

__all__ = ["Product", "SignedLayer", "signed", "signed_layout"]


class Adds(Protocol):
    """Something that can be added to a result."""

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Add the product with x [tokens, columns] to y [tokens, rows], perhaps in place; return it."""


class Product(Adds, Protocol):
    """A binary part that can be added to a result."""

    packed: PackedBinary


Join = Callable[[Sequence[Any]], Adds]
"""Makes one product of those of layers that read the same inputs; raises `KernelError` if they do not fit."""

Together = Callable[[Tensor, Any, Any, Tensor | None], Tensor | None]
"""Computes y [tokens, rows] of x [tokens, columns], a state of kernels, a product with signs and a bias by one product;
returns ``None`` where two are faster."""


@dataclass
class SignedLayer:
    """A layer with a binary part, or several that read the same inputs.

    Attributes:
        formats: what the layer stores, or each of a stack.
        rest: the state of the kernels that compute the layer without its binary part.
        products: the binary part of each.
        product: all of them.
        chosen: those of the kernels that were chosen so far, by dtype and rounded number of tokens.
    """

    formats: Formats
    rest: Any
    products: tuple[Product, ...]
    product: Adds
    chosen: dict[tuple[torch.dtype, int], Kernel] = field(default_factory=dict)

    @classmethod
    def single(cls, form: LinearFormat, rest: Any, product: Product) -> SignedLayer:
        """Return a layer that is no stack."""
        return cls((form,), rest, (product,), product)

    @property
    def rows(self) -> int:
        """Rows of all layers."""
        return sum(form.rows for form in self.formats)

    @cached_property
    def is_plain(self) -> bool:
        """Whether nothing is computed but products with weights and signs."""
        return all(form == LinearFormat(form.weight, binary=form.binary) for form in self.formats)

    @property
    def widest(self) -> LinearFormat:
        """The format of the layer with most rows: a kernel must accept it; what kernels expect, they say of all."""
        return max(self.formats, key=lambda form: form.rows)


def signed(
    name: str,
    kernels: Sequence[Kernel],
    make: Callable[[PackedBinary], Product],
    prepare: Callable[[PackedLinear], SignedLayer] | None = None,
    join: Join | None = None,
    together: Together | None = None,
) -> Kernel:
    """Make the kernel that adds signs to what some kernels compute.

    Args:
        name: of the kernel.
        kernels: they share one state; the best for the rest of a layer computes it.
        make: makes the product with the signs.
        prepare: that of the layout in which the layer is held, if the kernels share one.
        join: puts products of layers that read the same inputs together; such layers are computed as one by those of
            the kernels that can.
        together: computes with the signs as a part of the weight, where the rest of a layer is nothing but a weight.
            Sums of both are rounded once more for each rank.
    """
    stacking = [kernel for kernel in kernels if kernel.stack is not None]

    def accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
        if spec.binary is None:
            return "is for layers with a binary part"
        if dtype != spec.binary.dtype:
            return f"needs a magnitude of signs in the dtype of x, not {str(spec.binary.dtype).removeprefix('torch.')}"
        kernel, refusals = choose(kernels, replace(spec, binary=None), dtype, device, tokens)
        return None if kernel is not None else "; ".join(dict.fromkeys(refusals.values()))

    def run(x: Tensor, layer: SignedLayer, bias: Tensor | None) -> Tensor:
        spec = layer.widest
        inputs = x.reshape(-1, spec.columns)
        if together is not None and layer.is_plain:
            y = together(inputs, layer.rest, layer.product, bias)
            if y is not None:
                return y.view(*x.shape[:-1], layer.rows)
        case = (x.dtype, token_bucket(len(inputs)))
        kernel = layer.chosen.get(case)
        if kernel is None:
            able = kernels if len(layer.formats) == 1 else stacking
            rest, rests = replace(spec, binary=None), _rests(layer.formats)
            kernel, refusals = choose(able, rest, x.dtype, x.device, len(inputs), rests)
            if kernel is None:
                raise KernelError(f"no kernel computes {len(inputs)} tokens of {spec.describe()}: {refusals}")
            layer.chosen[case] = kernel
        y = kernel.run(inputs, layer.rest, bias)
        return layer.product.add(y, inputs).view(*x.shape[:-1], layer.rows)

    def stack(layers: Sequence[SignedLayer]) -> tuple[SignedLayer, list[SignedLayer]]:
        if join is None or not stacking or stacking[0].stack is None:
            raise KernelError("the kernels of these layers compute one at a time")
        products = tuple(product for one in layers for product in one.products)
        product = join(products)
        rest, parts = stacking[0].stack([one.rest for one in layers])
        shared = SignedLayer(tuple(form for one in layers for form in one.formats), rest, products, product)
        return shared, [replace(one, rest=part, chosen={}) for one, part in zip(layers, parts, strict=True)]

    return Kernel(
        name,
        accepts,
        prepare or _preparation(kernels[0].prepare, make),
        run,
        None if join is None else stack,
        transient=kernels[0].transient,
        timed=kernels[0].timed,
        binary=True,
    )


def signed_layout(layout: Layout, make: Callable[[PackedBinary], Product]) -> Layout:
    """Make the layout that holds signs, as they are stored, beside the tensors of another layout."""

    def tensors(layer: SignedLayer) -> dict[str, Tensor]:
        signs = {
            _name(name, part, len(layer.products)): tensor
            for part, product in enumerate(layer.products)
            for name, tensor in product.packed.tensors().items()
        }
        return layout.tensors(layer.rest) | signs

    def assemble(formats: Formats, named: Mapping[str, Tensor], part: int) -> SignedLayer:
        rest = layout.assemble(_rests(formats), _without_signs(formats, named), part)
        return SignedLayer.single(formats[part], rest, make(_signs(formats, named, part)))

    def restore(formats: Formats, named: Mapping[str, Tensor], part: int) -> PackedLinear:
        packed = layout.restore(_rests(formats), _without_signs(formats, named), part)
        copied = [tensor.clone() for tensor in _signs(formats, named, part).tensors().values()]
        return replace(packed, binary=PackedBinary(*copied))

    return register_layout(
        Layout(f"{layout.name} and signs", _preparation(layout.prepare, make), tensors, assemble, restore)
    )


def _preparation(
    prepare: Callable[[PackedLinear], Any], make: Callable[[PackedBinary], Product]
) -> Callable[[PackedLinear], SignedLayer]:
    def prepare_signed(packed: PackedLinear) -> SignedLayer:
        if packed.binary is None:
            raise KernelError(f"a layer of {packed.format.describe()} has no signs to add")
        rest = prepare(replace(packed, binary=None))
        return SignedLayer.single(packed.format, rest, make(packed.binary))

    return prepare_signed


def _rests(formats: Formats) -> Formats:
    return tuple(replace(form, binary=None) for form in formats)


def _name(name: str, part: int, parts: int) -> str:
    """Return the name of a part's tensor among those of all parts."""
    return name if parts == 1 else f"{name}_{part}"


def _signs(formats: Formats, named: Mapping[str, Tensor], part: int) -> PackedBinary:
    binary = formats[part].binary
    if binary is None:
        raise KernelError(f"a layer of {formats[part].describe()} has no signs")
    return PackedBinary(*(named[_name(name, part, len(formats))] for name in binary.tensor_specs()))


def _without_signs(formats: Formats, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = {
        _name(name, part, len(formats))
        for part, form in enumerate(formats)
        if form.binary is not None
        for name in form.binary.tensor_specs()
    }
    return {name: tensor for name, tensor in named.items() if name not in own}
