"""An order of channels in which a pattern of N out of M neighbours takes away least.

Source of the problem: J. Pool and C. Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021. They exchange pairs
of columns one at a time; here one channel is taken out of every group at once, and what each would save in each
other's place is one matrix of distances.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256
"""How many rows of scores are looked at; more change the order of few channels."""


def best_order(scores: Tensor, n: int, m: int, *, rounds: int = 16) -> Tensor:
    """Return the order of channels in which the best ``n`` of every ``m`` neighbours keep most of ``scores``.

    Args:
        scores: what is kept with an entry, not negative, float ``[rows, channels]``; every row has its own best ones.
        n: how many of ``m`` are kept.
        m: divides the channels.
        rounds: after which the search ends even if exchanges still pay.

    Returns:
        int64 ``[channels]``: the channel that comes to each position.

    In each round every group lends one channel, at the same place in all groups. With the others in order, ``a_1 >=
    a_2 ...``, a group and a channel ``x`` keep ``a_1 + ... + a_(n-1) + max(a_n, x)`` in a row, so that what an
    exchange of two lent channels gains is told by the distances ``|a_n - x|``. The pairs that gain most are
    exchanged, best first, each group at most once: no round loses anything. It ends when no place of a group gains
    any more; channels stay as they are if they keep as much. Deterministic.
    """
    channels = scores.shape[1]
    order = torch.arange(channels, device=scores.device)
    if channels == m or n == m:
        return order
    columns = _sampled(scores).t().contiguous()
    order = _spread(columns, m)
    groups, idle = order.reshape(-1, m), 0
    for step in range(rounds):
        idle = 0 if _exchange(columns, groups, step % m, n) else idle + 1
        if idle == m:
            break
    found, given = groups.reshape(-1), torch.arange(channels, device=scores.device)
    return found if _kept(scores[:, found], n, m) > _kept(scores, n, m) else given


def _kept(scores: Tensor, n: int, m: int) -> float:
    return float(scores.reshape(len(scores), -1, m).topk(n, dim=-1).values.sum(dtype=torch.float64))


def _sampled(scores: Tensor) -> Tensor:
    rows = scores.shape[0]
    if rows <= ROWS:
        return scores
    return scores[torch.arange(ROWS, device=scores.device) * rows // ROWS]


def _spread(columns: Tensor, m: int) -> Tensor:
    """Deal the channels out by their sums, strongest first, to and fro, so that groups begin alike (RIA)."""
    ranked = columns.sum(1).argsort(descending=True, stable=True).reshape(m, -1)
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.t().reshape(-1).contiguous()


def _exchange(columns: Tensor, groups: Tensor, lent: int, n: int) -> bool:
    """Exchange the channels at place ``lent`` among groups, in place, where it pays; tell whether it did."""
    kept = torch.cat([groups[:, :lent], groups[:, lent + 1 :]], 1)
    threshold = columns[kept].topk(n, 1).values[:, -1]
    candidates = columns[groups[:, lent]]
    # max(a, x) = (a + x + |a - x|) / 2, and the sums of a and x stay.
    kept_with = torch.cdist(candidates, threshold, p=1.0) / 2
    now = kept_with.diagonal()
    gains = kept_with + kept_with.t() - now[:, None] - now
    smallest = 1e-6 * float(columns.sum()) / len(groups)
    pairs: list[tuple[int, int]] = []
    taken = [False] * len(groups)
    flat = gains.triu(1).flatten()
    count = min(len(flat), 8 * len(groups))
    values, places = flat.topk(count)
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        if value <= smallest:
            break
        first, second = divmod(place, len(groups))
        if taken[first] or taken[second]:
            continue
        taken[first] = taken[second] = True
        pairs.append((first, second))
    if not pairs:
        return False
    one, other = torch.tensor(pairs, device=groups.device).t()
    groups[one, lent], groups[other, lent] = groups[other, lent], groups[one, lent]
    return True


def kept_share(scores: Tensor, n: int, m: int) -> float:
    """Return the share of ``scores`` that the best ``n`` of every ``m`` neighbours have."""
    grouped = scores.reshape(len(scores), -1, m)
    return float(grouped.topk(n, 2).values.sum() / grouped.sum())
