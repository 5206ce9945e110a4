"""What every solver demands of its arguments, said in one voice."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimc.errors import InputError, NumericsError, RecipeError


def require_finite(caller: str, **arguments: Tensor | None) -> None:
    """Raise :class:`NumericsError` naming the first argument that holds a NaN or an Inf."""
    for name, tensor in arguments.items():
        # The extremes of a tensor with a NaN are NaN, so one pass without a temporary settles the usual case.
        if tensor is None or bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
            continue
        broken = (~torch.isfinite(tensor)).nonzero()
        raise NumericsError(
            f"{caller}: argument '{name}' of shape {tuple(tensor.shape)} holds {len(broken)} NaN or Inf value(s), the "
            f"first at index {tuple(broken[0].tolist())}; repair the weights or the calibration inputs behind it"
        )


def require_matrix(caller: str, **arguments: Tensor) -> None:
    """Raise :class:`InputError` naming the first argument that is not a non-empty matrix."""
    for name, tensor in arguments.items():
        if tensor.ndim != 2 or tensor.numel() == 0:
            raise InputError(
                f"{caller}: argument '{name}' has shape {tuple(tensor.shape)}; give a non-empty matrix [rows, columns]"
            )


def require_shape(caller: str, shape: tuple[int, ...], **arguments: Tensor | None) -> None:
    """Raise :class:`InputError` naming the first argument whose shape is not ``shape``."""
    for name, tensor in arguments.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(f"{caller}: argument '{name}' has shape {tuple(tensor.shape)} where {shape} is needed")


def require_pattern(caller: str, n: int, m: int, shape: tuple[int, ...]) -> None:
    """Raise :class:`RecipeError` unless ``n`` of every ``m`` columns of a ``shape`` matrix can be kept."""
    if not 1 <= n <= m:
        raise RecipeError(f"{caller}: the pattern {n}:{m} keeps {n} of every {m}; give 1 <= n <= m, such as 2:4")
    if shape[1] % m:
        raise RecipeError(
            f"{caller}: the pattern {n}:{m} does not divide a matrix of shape {shape}: {shape[1]} columns are no "
            f"multiple of {m}; choose an m that divides {shape[1]}, use unstructured sparsity, or exclude this weight"
        )


def share_of(share: float, size: int) -> int:
    """Return ``floor(share * size)`` as decimal arithmetic gives it (0.29 of 100 is 29, not 28)."""
    return math.floor(share * size + 1e-9)
