r"""The step that minimises the squared rounding error on a uniform integer grid, for many groups at once.

For values ``v`` and the grid ``step * {low, ..., high}`` the error is

    E(step) = sum_i (step * q_i(step) - v_i)^2,     q_i(step) = clamp(round(v_i / step), low, high).

E is continuous and piecewise quadratic, with many local minima. Two facts make the global one findable:

* *Where it can be.* At a minimum the step is the least-squares fit to its own codes,
  ``step = sum(q v) / sum(q^2)``. As ``|q| <= peak_code = -low`` and ``|q|`` grows with ``|v|`` (up to the factor
  ``low / high <= 2`` between the two sides of the grid), it follows that ``step >= mean|v| / (2 * peak_code)``. Above
  ``2 * max|v|`` every code is 0. A step that is known to have the error ``E`` says more: what the largest value loses
  by clipping alone is at most that, ``step >= (max|v| - sqrt(E)) / peak_code``; and as values up to ``a`` have the code
  0 at all steps above ``2 a``, these are out if such values have more energy than ``E``.
* *How far a scan can miss it.* Keep the optimal codes ``q*`` and move only the step: because ``step*`` is their
  least-squares fit, ``E(step) <= E(step*) + (step - step*)^2 * sum(q*^2)
  <= E(step*) + (step / step* - 1)^2 * sum(v^2)``. In a geometric scan with ratio ``r`` some point lies within a factor
  ``sqrt(r)`` of ``step*``, so a point whose error exceeds the best one found by more than
  ``(sqrt(r) - 1)^2 * sum(v^2)`` has no optimum near it and can be dropped; what is left is scanned four times finer.

That is branch and bound: the step found is optimal up to :data:`GAP` of its error (or to a :data:`NEGLIGIBLE` error),
not merely a local minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimc.passes.solvers.precision import processor_products

GAP = 1e-3
"""A group is done once no step can lower its squared error by more than this share."""

NEGLIGIBLE = 1e-7
"""A group is done, too, once its squared error is this share of its energy; a bfloat16 scale alone costs more."""

COARSEST = 4
"""Steps an octave in the first scan."""

FIRST_TRIED = (0.7, 1.0)
"""Steps that bound the first scan by their errors, as shares of ``max|v| / high``."""

SMALL_VALUES = (0.25, 0.125)
"""Values up to these shares of the largest bound the first scan by their energy."""

SCANS = 6
"""The first scan and its refinements, each four times finer: the last one has 4096 steps an octave."""

BINS = 2**19
"""Histogram bins from zero to the largest magnitude, for groups with more values than :data:`DIRECT`."""

DIRECT = 2**14
"""The most values for which the search looks at each value rather than at a histogram."""

_INTEGER_OF = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def storable(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive ``steps`` to ``dtype``, keep them positive and finite, and return them as float32."""
    limits = torch.finfo(dtype)
    # fp16 has few exponents, so its subnormals are used; a subnormal bf16 or fp32 step is of no use to anyone.
    smallest = limits.smallest_normal if limits.bits == 32 or dtype == torch.bfloat16 else 2.0**-24
    return steps.to(torch.float32).clamp(smallest, limits.max).to(dtype).to(torch.float32)


def optimal_steps(values: Tensor, low: int, high: int, step_dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the step of least squared error for every group.

    The search runs on real numbers; the last choice is made among the steps that ``step_dtype`` can store around
    the optimum and the conventional ``max|v| / high``, on the exact squared error, so the result is never worse than
    absmax.

    Errors are summed as products with a vector, which is fast, and in float32: "medium" of
    ``torch.set_float32_matmul_precision``, which rounds them to bfloat16 on a CPU, does not count here.

    Args:
        values: float32 ``[groups, n]``; zeros weigh nothing, so they serve as padding and as pruned entries.
        low: the lowest code, ``-2^(bits - 1)``.
        high: the highest code, ``2^(bits - 1) - 1``.
        step_dtype: float32, float16 or bfloat16.

    Returns:
        float32 ``[groups]``, positive, each exactly representable in ``step_dtype``; 1 where a group is all zero.
    """
    with processor_products("ieee"):
        return _optimal_steps(values, low, high, step_dtype)


def _optimal_steps(values: Tensor, low: int, high: int, step_dtype: torch.dtype) -> Tensor:
    lowest, highest = values.aminmax(dim=1)
    peaks = torch.maximum(-lowest, highest)
    steps = torch.ones_like(peaks)
    live = (peaks > 0).nonzero().squeeze(1)
    if live.numel() == 0:
        return steps
    values, peaks = values[live], peaks[live]
    # Powers of two bring every peak into [0.5, 1): squares can neither overflow nor vanish, and nothing is rounded.
    units = torch.exp2(torch.frexp(peaks).exponent.clamp(-100, 100).to(torch.float32))
    values, peaks = values / units[:, None], peaks / units

    one_long_row = values.shape[0] == 1 and values.shape[1] > DIRECT
    compact, counts = _histogram(values, peaks) if one_long_row else (values, None)
    found = _polish(compact, counts, _branch_and_bound(compact, counts, peaks, low, high), low, high)

    absmax = storable(peaks * units / high, step_dtype)
    candidates = torch.cat([_neighbours(found * units, step_dtype), absmax[:, None]], dim=1)
    errors = _squared_errors(
        values, None, _owners(candidates), (candidates / units[:, None]).flatten(), low, high
    ).view_as(candidates)
    steps[live] = candidates.gather(1, errors.argmin(dim=1, keepdim=True)).squeeze(1)
    return steps


def _branch_and_bound(values: Tensor, counts: Tensor | None, peaks: Tensor, low: int, high: int) -> Tensor:
    """Return the best real-valued step of each group as the module's docstring describes; float32 ``[groups]``."""
    ones = torch.ones_like(values[0]) if counts is None else counts[0]
    squares = values.square()
    energy = squares @ ones
    tried = peaks[:, None] / high * torch.tensor(FIRST_TRIED, device=peaks.device)
    errors = _squared_errors(values, counts, _owners(tried), tried.flatten(), low, high)
    best_error, winner = errors.view_as(tried).min(dim=1)
    best_step = tried.gather(1, winner[:, None]).squeeze(1)
    # What the largest value loses, clipped, is no more than the least error known.
    lowest = torch.maximum(values.abs() @ ones / ones.sum() / 2, peaks - best_error.sqrt()) / -low
    highest = 2 * peaks
    for share in SMALL_VALUES:
        small = torch.where(squares <= (share * peaks).square()[:, None], squares, 0.0) @ ones
        highest = torch.where(small > best_error, 2 * share * peaks, highest)
    lengths = (COARSEST * torch.log2(highest / lowest)).clamp(min=0).ceil().long() + 1
    owners = torch.arange(len(peaks), device=peaks.device).repeat_interleave(lengths)
    position = torch.arange(len(owners), device=peaks.device) - (lengths.cumsum(0) - lengths)[owners]
    steps = highest[owners] * torch.exp2(-position / COARSEST)

    quarters = torch.tensor([-0.375, -0.125, 0.125, 0.375], device=peaks.device)
    for scan in range(SCANS):
        octaves = 0.25**scan / COARSEST
        errors = _squared_errors(values, counts, owners, steps, low, high)
        lowest_error = torch.full_like(best_error, torch.inf).scatter_reduce(0, owners, errors, "amin")
        # Of equal errors the larger step is taken: a rule that does not depend on the order of evaluation.
        hits = torch.where(errors == lowest_error[owners], steps, 0.0)
        winner = torch.zeros_like(best_step).scatter_reduce(0, owners, hits, "amax")
        best_step = torch.where(lowest_error < best_error, winner, best_step)
        best_error = torch.minimum(best_error, lowest_error)
        slack = (2 ** (octaves / 2) - 1) ** 2 * energy
        unsettled = (slack > GAP * best_error) & (best_error > NEGLIGIBLE * energy)
        promising = (errors <= (best_error + slack)[owners]) & unsettled[owners]
        if scan == SCANS - 1 or not bool(promising.any()):
            break
        owners = owners[promising].repeat_interleave(4)
        steps = (steps[promising][:, None] * torch.exp2(quarters * octaves)).flatten()
    return best_step


def _polish(values: Tensor, counts: Tensor | None, steps: Tensor, low: int, high: int) -> Tensor:
    """Alternate codes and their least-squares step; the error cannot grow, since each half minimises it."""
    for _ in range(4):
        codes = (values / steps[:, None]).round_().clamp_(low, high)
        weighted = codes if counts is None else codes * counts
        square = (weighted * codes).sum(dim=1)
        fitted = (weighted * values).sum(dim=1) / square
        steps = torch.where((square > 0) & (fitted > 0), fitted, steps)
    return steps


def _squared_errors(
    values: Tensor, counts: Tensor | None, owners: Tensor, steps: Tensor, low: int, high: int
) -> Tensor:
    """Return E of step ``steps[i]`` on the values of group ``owners[i]``; float32, shaped like ``steps``."""
    # On a CPU the working set should stay in the cache; a GPU wants large launches instead.
    budget = 2**17 if values.device.type == "cpu" else 2**26
    length = values.shape[1]
    chunk = max(1, budget // length)
    # Only a single row is counted. A product with a vector adds up rows faster than a sum does.
    weights = torch.ones_like(values[0]) if counts is None else counts[0]
    errors = torch.zeros_like(steps)
    for start in range(0, len(steps), chunk):
        part = slice(start, start + chunk)
        step = steps[part, None]
        for begin in range(0, length, budget):
            columns = slice(begin, begin + budget)
            wanted = values[:, columns].index_select(0, owners[part])
            codes = (wanted / step).round_().clamp_(low, high)
            errors[part] += torch.addcmul(wanted, codes, step, value=-1).square_() @ weights[columns]
    return errors


def _histogram(values: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Replace one long row by its occupied bins: centres and counts, float32 ``[1, occupied]``.

    The bins are so fine (a few thousand to a step) that only the choice between steps of almost equal error can
    differ, and the last choice looks at the values themselves. Counting integers gives the same on every device.
    """
    width = peak / BINS
    counts = torch.bincount((values.flatten() / width).round_().add_(BINS).to(torch.int32), minlength=2 * BINS + 1)
    counts[BINS] = 0
    occupied = counts.nonzero().squeeze(1)
    return ((occupied - BINS) * width)[None], counts[occupied].to(torch.float32)[None]


def _neighbours(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of ``dtype`` just below, at and just above each step; float32 ``[groups, 3]``."""
    integer = _INTEGER_OF[dtype]
    bits = storable(steps, dtype).to(dtype).view(integer)
    # Positive floats are ordered like their bit patterns.
    around = bits[:, None] + torch.tensor([0, -1, 1], dtype=integer, device=steps.device)
    return storable(around.view(dtype), dtype)


def _owners(candidates: Tensor) -> Tensor:
    groups, each = candidates.shape
    return torch.arange(groups, device=candidates.device).repeat_interleave(each)
