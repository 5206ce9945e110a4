"""What a kernel must compute, so sharply that a slot of weights read too late shows: layers whose weights are exact.

A kernel multiplies code and scale where a decoded weight was rounded once; in layers of a model's size these roundings
may add up to as much as the result. With scales that are powers of two nothing but t and y is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimc.runtime.packing import PackedLinear

__all__ = ["exact_product", "exact_weights"]

SLOT_COLUMNS = 64
"""Columns, or ranks, of which the blocks of a kernel that share them have whole multiples."""


def exact_weights(packed: PackedLinear) -> PackedLinear:
    """Return a layer with powers of two for scales: 16 bits hold each weight, whoever multiplies code and scale."""
    tensors = {
        name: torch.exp2(torch.log2(tensor.float()).floor()).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in packed.tensors().items()
    }
    return PackedLinear.assemble(packed.format, tensors)


def exact_product(
    packed: PackedLinear, x: Tensor, bias: Tensor | None = None, *, blocks: int = 1, blocks_of_t: int = 1
) -> tuple[Tensor, Tensor]:
    """Return what a layer of `exact_weights` gives for one input, and how far from it a result may be.

    A kernel rounds t and y to 16 bits, and adds up exact products in float32: that is 2^-20 of the sum of their sizes
    at most, which a tensor core may add up with fewer bits than an addition has. Where y is bfloat16 and blocks share
    columns, all but one may hand over their sums, of y or of t, as float16, with one exponent for many.

    Args:
        packed: the layer.
        x: 16-bit [tokens, columns].
        bias: [rows] or ``None``.
        blocks: that share the layer's columns and hand over sums so; 1 if none does.
        blocks_of_t: the same of the launch for t.

    Returns:
        Both float64 [tokens, rows].
    """
    unit = torch.finfo(x.dtype).eps / 2
    weight, inputs = packed.weight.decode().double(), x.double()
    y, reach = _sums(inputs, weight)
    size = inputs.abs() @ weight.abs().T
    rounded, through_t = torch.zeros_like(y), torch.zeros_like(y)
    if packed.left is not None and packed.right is not None:
        left, right = packed.left.decode().double(), packed.right.decode().double()
        t, reach_of_t = _sums(inputs, right)
        added, reach_of_left = _sums(t, left)
        y += added
        reach += reach_of_left
        rounded = t.abs() @ left.abs().T
        through_t = _handed_over(reach_of_t, blocks_of_t) @ left.abs().T
        size += inputs.abs() @ right.abs().T @ left.abs().T
    if bias is not None:
        y += bias.double()
    # A rounded y is rounded t's; both at once are a unit of a unit more.
    bound = unit * (y.abs() + (1 + unit) * rounded) + 2**-20 * size
    if x.dtype == torch.bfloat16:
        # Parts of L's products are of a t that is rounded, and may have been handed over.
        bound += (1 + unit) * (_handed_over(reach + unit * rounded + through_t, blocks) + (1 + unit) * through_t)
    return y, bound


def _handed_over(reach: Tensor, blocks: int) -> Tensor:
    """Return how much all but one block's sums of at most this size may be off as float16, the largest at 2^14."""
    return (blocks - 1) * (2**-11 * reach + 2**-39 * reach.max())


def _sums(inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return `inputs @ weight.T`, and what the products of no run of columns, in whole slots, exceed: sum and size."""
    y = inputs.new_zeros(len(inputs), len(weight))
    most, least = y.clone(), y.clone()
    for begin in range(0, weight.shape[1], SLOT_COLUMNS):
        y += inputs[:, begin : begin + SLOT_COLUMNS] @ weight[:, begin : begin + SLOT_COLUMNS].T
        most, least = torch.maximum(most, y), torch.minimum(least, y)
    return y, most - least
