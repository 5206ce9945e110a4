"""The loop that GPTQ and SparseGPT share: what a column loses is made good by the columns after it.

With ``U`` the upper Cholesky factor of the inverse damped Hessian, ``(gram + damping * mean(diag(gram)) * I)^-1 =
U^T U``, the columns are visited one by one, and the change ``w_j - q_j`` of a column moves into the ones after it as
``-(w_j - q_j) * U[j, j:] / U[j, j]``. All changes together then raise the squared output error by
``sum_j |w_j - q_j|^2 / U_jj^2`` (Frantar & Alistarh 2023).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimc.errors import NumericsError


def visiting_order(gram: Tensor, width: int) -> Tensor:
    """Return the columns, whole blocks of ``width`` by falling energy, int64 ``[columns]``.

    A short last block stays last.

    Args:
        gram: ``[columns, columns]``; its diagonal is the energy of each column.
        width: 1 orders single columns.
    """
    energy = gram.diagonal()
    whole = len(energy) // width * width
    blocks = energy[:whole].view(-1, width).sum(1).argsort(descending=True, stable=True)
    places = torch.arange(len(energy), device=gram.device)
    return torch.cat([(blocks[:, None] * width + places[:width]).flatten(), places[whole:]])


Note = Callable[[str], None]
"""Told what a solver did in place of what it was asked for."""


def inverse_factor(caller: str, gram: Tensor, dead: Tensor, damping: float, note: Note | None = None) -> Tensor:
    """Return the upper triangular ``U`` with ``U^T U = (gram + damping * mean * I)^-1`` up to a factor, float32.

    Factored backwards, ``J H J = L L^T`` with ``J`` the reversal of the order, the inverse need never be formed:
    ``H^-1 = (J L^-1 J)^T (J L^-1 J)``, and ``J L^-1 J`` is upper triangular. Done in float64, since the condition
    number of a Gram matrix is the square of that of the inputs. A matrix that cannot be factored gets ten times the
    damping, up to 1.

    Args:
        caller: whom errors name.
        gram: ``X^T X``, ``[columns, columns]``.
        dead: bool ``[columns]``, channels that saw nothing; they get the mean energy.
        damping: what is added to the diagonal, as a share of its mean.
        note: told of a damping that had to be raised.

    Raises:
        NumericsError: no damping up to 1 makes the matrix positive definite.
    """
    hessian = gram.to(torch.float64)
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    hessian = hessian / mean
    hessian.diagonal()[dead] = 1.0
    identity = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    asked = damping
    while damping <= 1:
        lower, failed = torch.linalg.cholesky_ex((hessian + damping * identity).flip(0, 1))
        if not int(failed):
            if damping > asked and note is not None:
                note(
                    f"the Gram matrix is singular with {asked:g} of its mean diagonal added, so {damping:g} of it was "
                    f"added ({caller})"
                )
            inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            # The scale of the Hessian cancels out of the updates and of the ranking of the scores.
            return inverse.flip(0, 1).to(torch.float32).contiguous()
        damping *= 10
    raise NumericsError(
        f"{caller}: the Gram matrix cannot be factored even with a strongly damped diagonal, so it is not X^T X of any "
        "input; gather it anew, in float32 or wider"
    )


def by_columns(weight: Tensor) -> Tensor:
    """Return a copy of ``weight`` ``[rows, columns]`` in which each column is contiguous, for :func:`feed_back`."""
    return weight.t().clone(memory_format=torch.contiguous_format).t()


def feed_back(
    weight: Tensor,
    factor: Tensor,
    settle: Callable[[int, Tensor], Tensor],
    *,
    block: int,
    reach: Callable[[slice], None] | None = None,
) -> None:
    """Visit the columns of ``weight`` from left to right, and change it in place.

    Args:
        weight: float32 ``[rows, columns]``, best from :func:`by_columns`; in the end each column is what ``settle``
            chose for it.
        factor: what :func:`inverse_factor` returns, for the columns in this order.
        settle: given the number of a column and what it holds now, ``[rows]``, returns what it shall hold. Columns of
            the same block are up to date in ``weight``.
        block: how many columns are updated at once before the rest of the matrix is.
        reach: called with each block before its first column is visited.
    """
    columns = weight.shape[1]
    reciprocals = factor.diagonal().reciprocal()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part = slice(start, stop)
        current, here = weight[:, part], factor[part, part]
        errors = torch.empty_like(current)
        if reach is not None:
            reach(part)
        for column in range(stop - start):
            now = current[:, column]
            chosen = settle(start + column, now)
            error = torch.sub(now, chosen, out=errors[:, column]).mul_(reciprocals[start + column])
            now.copy_(chosen)
            current[:, column + 1 :].addr_(error, here[column, column + 1 :], alpha=-1)
        weight[:, stop:] -= errors @ factor[part, stop:]
