"""What a kernel must compute, so sharply that a slot of weights read too late shows: layers whose weights are exact.

A kernel multiplies code and scale where a decoded weight was rounded once; in layers of a model's size these roundings
may add up to as much as the result. With scales that are powers of two nothing but t and y is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimc.runtime.packing import PackedLinear

__all__ = ["exact_product", "exact_weights"]


def exact_weights(packed: PackedLinear) -> PackedLinear:
    """Return a layer with powers of two for scales: 16 bits hold each weight, whoever multiplies code and scale."""
    tensors = {
        name: torch.exp2(torch.log2(tensor.float()).floor()).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in packed.tensors().items()
    }
    return PackedLinear.assemble(packed.format, tensors)


def exact_product(packed: PackedLinear, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what a layer of `exact_weights` gives for one input, and how far from it a result may be.

    A kernel rounds t and y to 16 bits, and adds up exact products in float32: that is 2^-20 of the sum of their sizes
    at most, which a tensor core may add up with fewer bits than an addition has.

    Args:
        packed: the layer.
        x: 16-bit [tokens, columns].
        bias: [rows] or ``None``.

    Returns:
        Both float64 [tokens, rows].
    """
    unit = torch.finfo(x.dtype).eps / 2
    weight, inputs = packed.weight.decode().double(), x.double()
    y, size = inputs @ weight.T, inputs.abs() @ weight.abs().T
    rounded = torch.zeros_like(y)
    if packed.left is not None and packed.right is not None:
        left, right = packed.left.decode().double(), packed.right.decode().double()
        t = inputs @ right.T
        y += t @ left.T
        rounded = t.abs() @ left.abs().T
        size += inputs.abs() @ right.abs().T @ left.abs().T
    if bias is not None:
        y += bias.double()
    # A rounded y is rounded t's; both at once are a unit of a unit more.
    return y, unit * (y.abs() + (1 + unit) * rounded) + 2**-20 * size
