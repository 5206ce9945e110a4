"""Low-rank adapters that leave the least output error: the norm is the Gram matrix of the inputs, not its diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from slimc.passes.solvers.checks import require_finite, require_matrix, require_shape
from slimc.passes.solvers.descent import descend
from slimc.passes.solvers.hessian import factored
from slimc.passes.solvers.low_rank import balanced, project
from slimc.passes.solvers.quantization import Quantized, quantize_slim


def covariance_adapters(error: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the adapters of least output error ``|X (error - left @ right)^T|``, in closed form.

    With ``H = X^T X = C C^T`` the error is ``|(error - left @ right) C|``, so by Eckart and Young ``left @ right @ C``
    is the truncated SVD of ``error @ C``. With ``U`` its left singular vectors that is ``left = U, right = U^T error``:
    neither the inverse nor the square root of ``H`` is needed, and where ``rows <= columns`` no factor of it either,
    since ``U`` are the eigenvectors of ``error H error^T``. (EoRA, arXiv 2410.21271, and QERA, arXiv 2410.06040,
    give the same optimum in other forms.)

    Args:
        error: ``W - W_compressed``, ``[rows, columns]``.
        gram: ``X^T X``, positive semi-definite, ``[columns, columns]``.
        rank: 1 .. min(rows, columns).

    Returns:
        ``left [rows, rank]`` and ``right [rank, columns]``, float32; column i of ``left`` and row i of ``right`` have
        the same norm.

    Raises:
        RecipeError: if the rank does not fit.
        InputError: if a shape is wrong.
        NumericsError: if an argument holds NaN or Inf, or ``gram`` is no Gram matrix.
    """
    require_matrix("covariance_adapters", error=error)
    require_shape("covariance_adapters", (error.shape[1], error.shape[1]), gram=gram)
    require_finite("covariance_adapters", error=error, gram=gram)
    exact = error.double()
    return balanced(*project(exact @ factored(gram, _LEAST), exact, rank))


def quantized_covariance_adapters(
    error: Tensor,
    gram: Tensor,
    rank: int,
    bits: int,
    group: int,
    *,
    scale_dtype: torch.dtype = torch.float32,
    sweeps: int = 1,
) -> tuple[Quantized, Quantized]:
    """Return the same adapters in codes, each factor rounded so that it makes good what rounding has cost so far.

    The right factor is rounded column by column with error feedback in the norm of the inputs. The left one is then
    fitted anew to the right one as it is stored, ``left = error H right^T (right H right^T)^-1``, and rounded with
    feedback in the norm of what it reads, ``right H right^T``.

    Args:
        error: ``[rows, columns]``.
        gram: ``X^T X``, damped, ``[columns, columns]``.
        rank: 1 .. min(rows, columns).
        bits: of a code.
        group: columns of a factor that share a scale.
        scale_dtype: float32, float16 or bfloat16.
        sweeps: of coordinate descent over the codes of each factor.
    """
    _, right = covariance_adapters(error, gram, rank)
    stored_right = _rounded(right, gram, bits, group, scale_dtype, sweeps)
    read = stored_right.dequantize().double()
    through = read @ gram.double()
    inner = through @ read.T
    lower = factored(inner, _LEAST)
    mean = inner.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    left = torch.cholesky_solve((error.double() @ through.T / mean).T, lower).T.float()
    stored_left = _rounded(left, inner, bits, group, scale_dtype, sweeps)
    return stored_left, stored_right


_LEAST = 1e-6
"""Damping where a matrix need only be factored, not guarded against too few tokens."""


def _rounded(factor: Tensor, gram: Tensor, bits: int, group: int, scale_dtype: torch.dtype, sweeps: int) -> Quantized:
    """Round a factor to nearest, then let coordinate descent make good what that has cost."""
    return descend(factor, gram, quantize_slim(factor, bits, group, scale_dtype=scale_dtype), sweeps=sweeps)[0]
