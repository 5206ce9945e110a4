"""The Gram matrix of a layer's inputs as a norm: made invertible, and used to move a target."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import torch
from torch import Tensor

from slimc.errors import NumericsError, RecipeError
from slimc.passes.solvers.checks import require_finite, require_matrix, require_shape

T = TypeVar("T")


class Metric:
    """A damped Gram matrix as the norm of output errors, with what solvers derive from it, each thing once.

    Sites that read one input share it, and so do all rounds at a site.

    Attributes:
        gram: ``X^T X``, positive definite, float32 ``[columns, columns]``.
    """

    def __init__(self, gram: Tensor) -> None:
        """Start with nothing derived."""
        self.gram = gram.to(torch.float32)
        self._derived: dict[Hashable, object] = {}

    @classmethod
    def of(cls, gram: Tensor | Metric) -> Metric:
        """Return ``gram`` itself if it is a metric."""
        return gram if isinstance(gram, Metric) else cls(gram)

    def derive(self, build: Callable[..., T], *arguments: Hashable) -> T:
        """Return ``build(gram, *arguments)``, computed the first time that it is asked for."""
        key = (build, *arguments)
        if key not in self._derived:
            self._derived[key] = build(self.gram, *arguments)
        return cast(T, self._derived[key])

    def scaled(self, scale: Tensor) -> Metric:
        """Return the norm for inputs that are multiplied by ``scale``, ``[columns]``."""
        return Metric(self.gram * scale[:, None] * scale)


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return ``gram / mean(diag(gram)) + damping * I``, float64: of mean diagonal ``1 + damping``, and invertible.

    A Gram matrix of fewer tokens than columns is singular, and one of few more is nearly so; the identity stands for
    the inputs that calibration did not show. A matrix of zeros becomes the identity, so that all channels count alike.

    Args:
        gram: ``X^T X``, positive semi-definite, ``[columns, columns]``.
        damping: above 0, at most 1.

    Raises:
        RecipeError: if ``damping`` is out of range.
        InputError: if the matrix is not square.
        NumericsError: if it holds NaN or Inf, or a negative diagonal entry.
    """
    if not 0 < damping <= 1:
        raise RecipeError(f"damped: damping={damping} must be above 0, at most 1")
    require_matrix("damped", gram=gram)
    require_shape("damped", (gram.shape[1], gram.shape[1]), gram=gram)
    require_finite("damped", gram=gram)
    hessian = gram.to(torch.float64)
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()):
        raise NumericsError(
            "damped: the Gram matrix has a negative diagonal entry, so it is not X^T X of any input; gather it anew, "
            "in float32 or wider"
        )
    mean = diagonal.mean()
    hessian = hessian / mean if float(mean) > 0 else torch.eye(len(hessian), dtype=torch.float64, device=gram.device)
    hessian = hessian.clone()
    hessian.diagonal().add_(damping)
    return hessian


def regression(gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Return ``cross (gram + damping * mean(diag(gram)) * I)^-1``: ridge regression, float64 ``[rows, columns]``.

    It is the matrix ``A`` with the least ``|X A^T - Y|^2 + damping * mean * |A|^2`` where ``gram = X^T X`` and
    ``cross = Y^T X``.

    Args:
        gram: ``[columns, columns]``.
        cross: ``[rows, columns]``, on the scale of ``gram``.
        damping: above 0, at most 1; multiplied by ten, up to 1, until the matrix can be factored.

    Raises:
        NumericsError: if the matrix cannot be factored, or an argument holds NaN or Inf.
    """
    require_matrix("regression", cross=cross)
    require_shape("regression", (cross.shape[1], cross.shape[1]), gram=gram)
    require_finite("regression", cross=cross)
    mean = gram.diagonal().double().mean().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.cholesky_solve((cross.double() / mean).T, factored(gram, damping)).T


def factored(gram: Tensor, damping: float) -> Tensor:
    """Return the lower Cholesky factor of the damped matrix, float64; see :func:`damped`.

    ``damping`` is multiplied by ten, up to 1, until the matrix can be factored.

    Raises:
        NumericsError: if it cannot be, so that it is no Gram matrix.
    """
    hessian = damped(gram, damping)
    while True:
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            return lower
        if damping >= 1:
            raise NumericsError(
                "factored: the Gram matrix cannot be factored even with a strongly damped diagonal, so it is not X^T X "
                "of any input; gather it anew, in float32 or wider"
            )
        stronger = min(damping * 10, 1.0)
        hessian.diagonal().add_(stronger - damping)
        damping = stronger
