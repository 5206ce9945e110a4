"""Layers with a binary part: the rest by the kernels that there are for it, the signs by a product of their own.

    y = rest(x) + sum_k ((x * right[k]) @ B^T) * left[:, k]

So every kernel serves such layers too, and none of them knows of signs: a kernel is never asked about a layer with a
binary part unless it says that it computes one (`slimc.runtime.select.Kernel.binary`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from slimc.errors import KernelError
from slimc.runtime.formats import LinearFormat
from slimc.runtime.layouts import Formats, Layout, register_layout
from slimc.runtime.packing import PackedBinary, PackedLinear
from slimc.runtime.select import Kernel, choose, token_bucket

__all__ = ["Product", "SignedLayer", "signed", "signed_layout"]


class Product(Protocol):
    """A binary part that can be added to a result."""

    packed: PackedBinary

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Add the product with x [tokens, columns] to y [tokens, rows], perhaps in place; return it."""


@dataclass
class SignedLayer:
    """A layer with a binary part.

    Attributes:
        format: what the layer stores.
        rest: the state of the kernels that compute the layer without its binary part.
        product: the binary part.
        chosen: those of the kernels that were chosen so far, by dtype and rounded number of tokens.
    """

    format: LinearFormat
    rest: Any
    product: Product
    chosen: dict[tuple[torch.dtype, int], Kernel] = field(default_factory=dict)


def signed(
    name: str,
    kernels: Sequence[Kernel],
    make: Callable[[PackedBinary], Product],
    prepare: Callable[[PackedLinear], SignedLayer] | None = None,
) -> Kernel:
    """Make the kernel that adds signs to what some kernels compute.

    Args:
        name: of the kernel.
        kernels: they share one state; the best for the rest of a layer computes it.
        make: makes the product with the signs.
        prepare: that of the layout in which the layer is held, if the kernels share one.
    """

    def accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
        if spec.binary is None:
            return "is for layers with a binary part"
        if dtype != spec.binary.dtype:
            return f"needs a magnitude of signs in the dtype of x, not {str(spec.binary.dtype).removeprefix('torch.')}"
        kernel, refusals = choose(kernels, replace(spec, binary=None), dtype, device, tokens)
        return None if kernel is not None else "; ".join(dict.fromkeys(refusals.values()))

    def run(x: Tensor, layer: SignedLayer, bias: Tensor | None) -> Tensor:
        spec = layer.format
        inputs = x.reshape(-1, spec.columns)
        case = (x.dtype, token_bucket(len(inputs)))
        kernel = layer.chosen.get(case)
        if kernel is None:
            kernel, refusals = choose(kernels, replace(spec, binary=None), x.dtype, x.device, len(inputs))
            if kernel is None:
                raise KernelError(f"no kernel computes {len(inputs)} tokens of {spec.describe()}: {refusals}")
            layer.chosen[case] = kernel
        y = kernel.run(inputs, layer.rest, bias)
        return layer.product.add(y, inputs).view(*x.shape[:-1], spec.rows)

    return Kernel(
        name,
        accepts,
        prepare or _preparation(kernels[0].prepare, make),
        run,
        transient=kernels[0].transient,
        timed=kernels[0].timed,
        binary=True,
    )


def signed_layout(layout: Layout, make: Callable[[PackedBinary], Product]) -> Layout:
    """Make the layout that holds signs, as they are stored, beside the tensors of another layout."""

    def tensors(layer: SignedLayer) -> dict[str, Tensor]:
        return layout.tensors(layer.rest) | layer.product.packed.tensors()

    def assemble(formats: Formats, named: Mapping[str, Tensor], part: int) -> SignedLayer:
        rest = layout.assemble(_rests(formats), _without_signs(formats[part], named), part)
        return SignedLayer(formats[part], rest, make(_signs(formats[part], named)))

    def restore(formats: Formats, named: Mapping[str, Tensor], part: int) -> PackedLinear:
        packed = layout.restore(_rests(formats), _without_signs(formats[part], named), part)
        copied = {name: tensor.clone() for name, tensor in named.items()}
        return replace(packed, binary=_signs(formats[part], copied))

    return register_layout(
        Layout(f"{layout.name} and signs", _preparation(layout.prepare, make), tensors, assemble, restore)
    )


def _preparation(
    prepare: Callable[[PackedLinear], Any], make: Callable[[PackedBinary], Product]
) -> Callable[[PackedLinear], SignedLayer]:
    def prepare_signed(packed: PackedLinear) -> SignedLayer:
        if packed.binary is None:
            raise KernelError(f"a layer of {packed.format.describe()} has no signs to add")
        return SignedLayer(packed.format, prepare(replace(packed, binary=None)), make(packed.binary))

    return prepare_signed


def _rests(formats: Formats) -> Formats:
    return tuple(replace(form, binary=None) for form in formats)


def _signs(form: LinearFormat, named: Mapping[str, Tensor]) -> PackedBinary:
    if form.binary is None:
        raise KernelError(f"a layer of {form.describe()} has no signs")
    return PackedBinary(*(named[name] for name in form.binary.tensor_specs()))


def _without_signs(form: LinearFormat, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = () if form.binary is None else form.binary.tensor_specs()
    return {name: tensor for name, tensor in named.items() if name not in own}
