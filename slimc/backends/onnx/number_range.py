"""Whether the numbers of a model are numbers of the dtype that a graph is to compute in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimc.errors import InputError
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear

__all__ = ["check_range"]

_MOST_LOST = 2**-8
"""How much of a matrix may be lost, in the Frobenius norm: what rounding to bfloat16 may cost."""

_SURELY_KEPT = 2**-10
"""Parts of a layer that lose no more than this cannot cost it `_MOST_LOST`: a weight is a product of three at most."""


def check_range(model: nn.Module, dtype: torch.dtype) -> None:
    """Refuse a model with weights or scales that would become infinite in ``dtype``, or too small for it.

    Few numbers that vanish are no reason beside larger ones in their matrix; of a compressed layer the whole weight
    counts, so that an adapter which corrects next to nothing may vanish.

    Raises:
        InputError: there is such a tensor. (Other buffers, such as masks, may become infinite.)
    """
    for name, tensor in model.named_parameters():
        _check_largest(name, tensor, dtype)
        if tensor.dim() > 1 and (lost := _lost(tensor, dtype)) > _MOST_LOST:
            raise _too_small(name, tensor, dtype, lost)
    for name, module in model.named_modules():
        if isinstance(module, SlimLinear):
            _check_layer(name, module.packed, dtype)


def _check_layer(name: str, packed: PackedLinear, dtype: torch.dtype) -> None:
    numbers = {part: tensor for part, tensor in packed.tensors().items() if tensor.is_floating_point()}
    for part, tensor in numbers.items():
        _check_largest(f"{name}.{part}", tensor, dtype)
    losses = {part: _lost(tensor, dtype) for part, tensor in numbers.items()}
    worst = max(losses, key=lambda part: losses[part])
    if losses[worst] <= _SURELY_KEPT:
        return
    exact = _decoded(packed, torch.float32)
    lost = float((_decoded(packed, dtype) - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny))
    if lost > _MOST_LOST:
        raise _too_small(f"{name}.{worst}", numbers[worst], dtype, lost)


def _check_largest(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    if not tensor.is_floating_point() or torch.finfo(tensor.dtype).max <= limit or not tensor.numel():
        return
    largest = _largest(tensor)
    if limit < largest < float("inf"):
        raise InputError(
            f"'{name}' holds {largest:.4g}, and the largest number of {_named(dtype)} is {limit:.6g}; export the model "
            "with dtype float32"
        )


def _too_small(name: str, tensor: Tensor, dtype: torch.dtype, lost: float) -> InputError:
    """Return what to raise of a tensor of which ``lost`` of its matrix is lost."""
    return InputError(
        f"'{name}' holds numbers of {_largest(tensor):.4g} at most, and {_named(dtype)} keeps all digits from "
        f"{torch.finfo(dtype).tiny:.2g} on: {lost:.0%} of the matrix would be lost; export the model with dtype float32"
    )


def _lost(tensor: Tensor, dtype: torch.dtype) -> float:
    """Return how far rounding to ``dtype`` moves a tensor, relative to its norm; 0 if that is surely little."""
    if (
        not tensor.is_floating_point()
        or torch.finfo(tensor.dtype).tiny >= torch.finfo(dtype).tiny
        or not tensor.numel()
    ):
        return 0.0
    largest = _largest(tensor)
    half_step = torch.finfo(dtype).tiny * torch.finfo(dtype).eps / 2
    if largest == 0 or half_step * tensor.numel() ** 0.5 <= _SURELY_KEPT * largest:
        return 0.0
    # Squares of numbers that are too small for float16 may be too small for float32.
    exact = tensor.detach().float() / largest
    rounded = tensor.detach().to(dtype).float() / largest
    return float((rounded - exact).norm() / exact.norm())


def _decoded(packed: PackedLinear, dtype: torch.dtype) -> Tensor:
    """Return the weight of a layer, float32 [rows, columns], from numbers that were rounded to ``dtype``."""
    tensors = {
        name: tensor.to(dtype).float() if tensor.is_floating_point() else tensor
        for name, tensor in packed.tensors().items()
    }
    return PackedLinear.assemble(packed.format, tensors).decode()


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().amax())


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
