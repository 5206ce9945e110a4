"""Low-rank adapters that leave the least output error: the norm is the Gram matrix of the inputs, not its diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from slimc.passes.solvers.checks import require_finite, require_matrix, require_shape
from slimc.passes.solvers.descent import descend
from slimc.passes.solvers.hessian import Metric, factored
from slimc.passes.solvers.low_rank import balanced, project, quantize_factor, resolve_rank
from slimc.passes.solvers.quantization import Quantized, quantize_slim


def covariance_adapters(error: Tensor, gram: Tensor | Metric, rank: int) -> tuple[Tensor, Tensor]:
    """Return the adapters of least output error ``|X (error - left @ right)^T|``, in closed form.

    With ``H = X^T X = C C^T`` the error is ``|(error - left @ right) C|``, so by Eckart and Young ``left @ right @ C``
    is the truncated SVD of ``error @ C``. With ``U`` its left singular vectors that is ``left = U, right = U^T error``:
    neither the inverse nor the square root of ``H`` is needed, and where ``rows <= columns`` no factor of it either,
    since ``U`` are the eigenvectors of ``error H error^T``. Where both sides are longer than :data:`LARGEST_EXACT`,
    these are found by subspace iteration, to within some thousandths of the error. (EoRA, arXiv 2410.21271, and QERA,
    arXiv 2410.06040, give the same optimum in other forms.)

    Args:
        error: ``W - W_compressed``, ``[rows, columns]``.
        gram: ``X^T X``, positive semi-definite, ``[columns, columns]``; as a metric it keeps its factor.
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
    metric = Metric.of(gram)
    require_shape("covariance_adapters", (error.shape[1], error.shape[1]), gram=metric.gram)
    require_finite("covariance_adapters", error=error, gram=metric.gram)
    if min(error.shape) <= LARGEST_EXACT:
        exact = error.double()
        return balanced(*project(exact @ metric.derive(factored, _LEAST), exact, rank))
    basis = _leading_subspace(error.float(), metric.gram, resolve_rank(int(rank), *error.shape))
    return balanced(basis, basis.T @ error.float())


def quantized_covariance_adapters(
    error: Tensor,
    gram: Tensor | Metric,
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
    metric = Metric.of(gram)
    _, right = covariance_adapters(error, metric, rank)
    stored_right = _rounded(right, metric, bits, group, scale_dtype, sweeps)
    read = stored_right.dequantize().double()
    through = read @ metric.gram.double()
    inner = through @ read.T
    lower = factored(inner, _LEAST)
    mean = inner.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    left = torch.cholesky_solve((error.double() @ through.T / mean).T, lower).T.float()
    stored_left = _rounded(left, inner, bits, group, scale_dtype, sweeps)
    return stored_left, stored_right


LARGEST_EXACT = 256
"""The longest smaller side of a matrix for which all eigenvectors are computed."""

ITERATIONS = 6
"""Of the subspace; what they leave to gain is far less than what rounding the adapters costs."""

OVERSAMPLING = 32
"""Directions that are followed besides those that are wanted."""

_LEAST = 1e-6
"""Damping where a matrix need only be factored, not guarded against too few tokens."""


def _leading_subspace(error: Tensor, gram: Tensor, rank: int) -> Tensor:
    """Return orthonormal ``[rows, rank]``, nearly the leading eigenvectors of ``error gram error^T``.

    Subspace iteration from a seeded start (Halko, Martinsson and Tropp 2011): equal arguments give equal results.
    """
    rows, columns = error.shape
    scaled = gram / gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    error = error / error.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    generator = torch.Generator(error.device).manual_seed(0)
    width = min(rank + OVERSAMPLING, rows, columns)
    basis: Tensor = torch.randn(min(rows, columns), width, generator=generator, device=error.device)
    # On the shorter side of the error the matrices of the iteration are small; both have the same eigenvalues.
    if rows <= columns:
        whole = error @ scaled @ error.T
        for _ in range(ITERATIONS):
            basis = _orthonormal(whole @ basis)
        image = whole @ basis
    else:
        squared = error.T @ error
        for _ in range(ITERATIONS):
            basis = _orthonormal(squared @ (scaled @ basis))
        image = error @ (scaled @ basis)
    basis = torch.linalg.qr(image).Q
    through = error.T @ basis
    inner = (through.T @ (scaled @ through)).double()
    leading: Tensor = torch.linalg.eigh((inner + inner.T) / 2).eigenvectors.flip(1)[:, :rank]
    return basis @ leading.float()


def _orthonormal(image: Tensor) -> Tensor:
    """Return a basis, nearly orthonormal, of what the columns of ``image`` span, float32.

    By the Cholesky factor of their products, which takes a GPU a tenth of the time of reflections, and by these where
    the columns are too nearly dependent for it.
    """
    exact = image.double()
    exact = exact / exact.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    lower, failed = torch.linalg.cholesky_ex(exact.T @ exact)
    basis: Tensor
    if int(failed):
        basis = torch.linalg.qr(image).Q
    else:
        basis = torch.linalg.solve_triangular(lower, exact.T, upper=False).T.float()
    return basis


def _rounded(
    factor: Tensor, gram: Tensor | Metric, bits: int, group: int, scale_dtype: torch.dtype, sweeps: int
) -> Quantized:
    """Round a factor to nearest, then let coordinate descent make good what that has cost."""
    if not sweeps:
        return quantize_factor(factor, bits, group, scale_dtype)
    return descend(factor, gram, quantize_slim(factor, bits, group, scale_dtype=scale_dtype), sweeps=sweeps)[0]
