"""Low-rank adapters ``left @ right`` that approximate what compression has taken from a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from slimc.errors import InputError, NumericsError, RecipeError
from slimc.passes.solvers.checks import require_finite, require_matrix, require_shape, share_of
from slimc.passes.solvers.quantization import Quantized, quantize_absmax


def resolve_rank(rank: float | int, rows: int, columns: int) -> int:
    """Return the rank of an adapter for a ``rows x columns`` weight.

    Args:
        rank: a whole number, taken as it is; or a share, which gives ``floor(rank * min(rows, columns))``, at least 1.
        rows: output features.
        columns: input features.

    Raises:
        RecipeError: if the number is not in 1 .. min(rows, columns) or the share not in (0, 1].
    """
    smaller = min(rows, columns)
    if isinstance(rank, int) and not isinstance(rank, bool):
        if not 1 <= rank <= smaller:
            raise RecipeError(
                f"rank {rank} does not fit a {rows} x {columns} weight; give 1 to {smaller}, or a share such as 0.1"
            )
        return rank
    if isinstance(rank, bool) or not 0 < rank <= 1:
        raise RecipeError(f"rank {rank!r} is neither a whole number of at least 1 nor a share above 0, at most 1")
    return max(1, share_of(rank, smaller))


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of a rank in the Frobenius norm (Eckart and Young).

    Args:
        matrix: ``[rows, columns]``.
        rank: 1 .. min(rows, columns).

    Returns:
        ``left [rows, rank]`` and ``right [rank, columns]``, float32, with the square root of a singular value in each.

    Raises:
        RecipeError: if the rank does not fit.
        NumericsError: if the matrix holds NaN or Inf.
    """
    require_matrix("truncated_svd", matrix=matrix)
    require_finite("truncated_svd", matrix=matrix)
    return balanced(*project(matrix.double(), matrix.double(), rank))


def plain_adapters(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return adapters that leave the least weight error: Naive-LoRA in SLiM's tables, the SVD of the error.

    Args:
        error: ``W - W_compressed``, ``[rows, columns]``.
        rank: 1 .. min(rows, columns).

    Returns:
        ``left [rows, rank]`` and ``right [rank, columns]``, float32, such that ``W ~ W_compressed + left @ right``.

    Raises:
        RecipeError: if the rank does not fit.
        NumericsError: if the error holds NaN or Inf.
    """
    require_matrix("plain_adapters", error=error)
    require_finite("plain_adapters", error=error)
    return balanced(*project(error.double(), error.double(), rank))


def slim_adapters(error: Tensor, saliency: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return adapters that leave the least saliency-weighted error: SLiM-LoRA (SLiM, section 3.2, algorithm 2).

    The paper takes the mean absolute activation ``x~`` of each input channel, shifts it, ``x = x~ + min(x~)``, to keep
    it away from zero, approximates ``error @ diag(x)`` by a truncated SVD and divides the right factor by ``x``.
    Two things are put differently here:

    * The shift is by the smallest *positive* entry, which is the same unless a channel is dead; dead channels then get
      half of the weight of the least live one, where the paper's shift of 0 would leave them at zero and its division
      undefined.
    * With ``V`` the leading left singular vectors of ``error @ diag(x)``, the paper's adapters are
      ``V (V^T error)``: dividing by ``x`` undoes the multiplication exactly, so it is not done and no small ``x`` can
      spoil the numbers.

    Args:
        error: ``W - W_compressed``, ``[rows, columns]``.
        saliency: ``x~``, mean ``|x|`` of each input channel before the shift, ``[columns]``, not negative. (The
            authors' code has the root mean square instead; the output error differs by under 0.1 %.)
        rank: 1 .. min(rows, columns).

    Returns:
        ``left [rows, rank]`` and ``right [rank, columns]``, float32, such that ``W ~ W_compressed + left @ right``;
        column i of ``left`` and row i of ``right`` have the same norm.

    Raises:
        RecipeError: if the rank does not fit.
        InputError: if a shape is wrong or a saliency is negative.
        NumericsError: if an argument holds NaN or Inf, or no channel has any saliency.
    """
    require_matrix("slim_adapters", error=error)
    require_shape("slim_adapters", (error.shape[1],), saliency=saliency)
    require_finite("slim_adapters", error=error, saliency=saliency)
    if bool((saliency < 0).any()):
        raise InputError("slim_adapters: argument 'saliency' has negative entries; give the mean absolute activation")
    positive = saliency[saliency > 0].double()
    if positive.numel() == 0:
        raise NumericsError(
            "slim_adapters: every input channel has saliency 0, so calibration never reached this weight and no "
            "adapter is better than another; calibrate on inputs that do, or use plain_adapters"
        )
    exact = error.double()
    return balanced(*project(exact * (saliency.double() + positive.min()), exact, rank))


def quantize_factor(
    factor: Tensor, bits: int, group: int | None = 64, scale_dtype: torch.dtype = torch.float32
) -> Quantized:
    """Quantise an adapter's factor by group absmax (SLiM-LoRA^Q, section 3.3).

    Args:
        factor: ``left [rows, rank]``, whose groups run along the rank, or ``right [rank, columns]``, whose groups run
            along the input.
        bits: 2, 3, 4, 5, 6 or 8.
        group: how many columns of the factor share a scale, the last group may be short; ``None``: a whole row.
        scale_dtype: float32, float16 or bfloat16.

    Raises:
        RecipeError: if ``bits``, ``group`` or ``scale_dtype`` is not supported.
        NumericsError: if the factor holds NaN or Inf.
    """
    return quantize_absmax(factor, bits, "channel" if group is None else group, scale_dtype=scale_dtype)


def project(weighted: Tensor, exact: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal ``V [rows, rank]``, the leading left singular vectors of ``weighted``, and ``V^T exact``.

    The eigenvectors of the smaller Gram matrix, in float64, cost a fraction of a full SVD; squaring loses only
    singular values under 1e-8 of the largest, which is below the resolution of float32.
    """
    rows, columns = weighted.shape
    rank = resolve_rank(int(rank), rows, columns)
    # So that squares can neither overflow nor vanish.
    weighted = weighted / weighted.abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
    if rows <= columns:
        basis = torch.linalg.eigh(weighted @ weighted.T).eigenvectors.flip(1)[:, :rank]
    else:
        right = torch.linalg.eigh(weighted.T @ weighted).eigenvectors.flip(1)[:, :rank]
        # The columns of the product are orthogonal already, save where the singular value is nearly zero.
        basis = torch.linalg.qr(weighted @ right).Q
    return basis, basis.T @ exact


def balanced(basis: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Give each column of ``basis`` and its row of ``coefficients`` the same norm, and round to float32."""
    norms = coefficients.norm(dim=1)
    root = norms.sqrt()
    right = torch.where(norms[:, None] > 0, coefficients / root[:, None], 0.0)
    return (basis * root).to(torch.float32), right.to(torch.float32)
