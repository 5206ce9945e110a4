"""``cuda-dense``: decode the weight (``expand.cu``), then multiply densely. For many tokens, on any card.

Fragments become a dense weight in memory of PyTorch's allocator for the time of a call, so that layer
after layer of a stream decodes into the same place, and a captured graph has a place of its own. Writing it takes as
long as a card takes to write 16 bits a weight: an H100 has that much time to spare from some 2048 tokens on.

Adapters are two products more, the second of which adds to y. For very many tokens ``W + L @ R`` is less work.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from slimc.backends.cuda.expand import expand_left, expand_right, expand_weight, expand_with_signs
from slimc.backends.cuda.layer import FragmentLayer, prepare, refuses, stack_shared
from slimc.backends.cuda.rounding import round_inputs
from slimc.backends.cuda.signs import SignProduct, StackedSigns, are_few
from slimc.runtime.formats import LinearFormat
from slimc.runtime.select import Kernel

__all__ = ["DENSE", "add_adapters", "run", "run_with_signs"]


def run(x: Tensor, layer: FragmentLayer, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns]."""
    spec = layer.format
    flat = round_inputs(x.reshape(-1, spec.columns), spec.activation)
    weight = expand_weight(layer)
    if layer.right is not None and len(flat) > _merging_pays(spec):
        y = functional.linear(flat, _merge(weight, layer), bias)
    else:
        y = add_adapters(functional.linear(flat, weight, bias), flat, layer)
    return y.view(*x.shape[:-1], spec.rows)


def run_with_signs(
    x: Tensor, layer: FragmentLayer, signs: SignProduct | StackedSigns, bias: Tensor | None
) -> Tensor | None:
    """Compute y [tokens, rows] from x [tokens, columns] by a weight that is nothing else, and its binary part.

    Return ``None`` for so few tokens that other products are faster.
    """
    return None if are_few(x) else functional.linear(x, expand_with_signs(layer, signs), bias)


def add_adapters(y: Tensor, x: Tensor, layer: FragmentLayer) -> Tensor:
    """Add ``(x @ R^T) @ L^T`` of each layer of a stack to its part of y [tokens, rows], in place; return y."""
    if layer.right is None:
        return y
    inner, left = torch.mm(x, expand_right(layer).t()), expand_left(layer)
    for rows, ranks in layer.parts:
        width = ranks.stop - ranks.start
        y[:, rows].addmm_(inner[:, ranks], left[rows, :width].t())
    return y


def _merge(weight: Tensor, layer: FragmentLayer) -> Tensor:
    """Return W + L @ R, rounded once more than W, in the place of W."""
    left, right = expand_left(layer), expand_right(layer)
    for rows, ranks in layer.parts:
        weight[rows].addmm_(left[rows, : ranks.stop - ranks.start], right[ranks])
    return weight


def _merging_pays(spec: LinearFormat) -> float:
    """Return for how many tokens multiplying by the factors is as much work as multiplying them."""
    return spec.rows * spec.columns / (spec.rows + spec.columns)


def _accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, _tokens: int) -> str | None:
    return refuses(spec, dtype, device)


DENSE = Kernel("cuda-dense", _accepts, prepare, run, stack_shared)
