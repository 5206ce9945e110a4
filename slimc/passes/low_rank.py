"""LowRank: adapters that give back what quantisation and pruning took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from slimc.errors import RecipeError
from slimc.passes.base import Pass, SitePass, Statistic, real_number, whole_number
from slimc.passes.solvers.checks import share_of
from slimc.passes.solvers.covariance import covariance_adapters, quantized_covariance_adapters
from slimc.passes.solvers.hessian import Metric
from slimc.passes.solvers.low_rank import plain_adapters, quantize_factor, resolve_rank, slim_adapters
from slimc.passes.solvers.quantization import BITS, Quantized
from slimc.passes.stored import improve_stored, solve_stored
from slimc.passes.work import SiteWork


@dataclass(frozen=True)
class LowRank(SitePass):
    """``y = linear(x, w) + low_rank(x, l, r)`` with ``l r`` the best rank-r correction of what earlier passes changed.

    Attributes:
        method: ``"slim"`` weighs the error of each input channel by its saliency (SLiM-LoRA, paper section 3.2), where
            calibration saw any input; ``"svd"`` does not. ``"covariance"`` takes the whole second moment of the inputs,
            so that the error of the *output* is what it makes least; in codes, each factor makes good what
            rounding has cost before.
        rank: a share of ``min(in, out)``, rounded down, or a whole number.
        bits: ``None`` stores the adapters in the weight's dtype, 4 (or 2, 3, 8) in codes with a scale a group.
        group: columns of a factor that share a scale: along ``in`` for ``r``, along the rank for ``l``.
        rounds: how often, once the adapters are known, ``mask * (W - l r)`` is stored on a fresh grid in place of
            ``mask * W``; between rounds the adapters are solved again for what that leaves. The paper has no such step
            (0 rounds), the authors' code has one; more than one is alternating minimisation, which measures far better
            on real models. The two halves minimise different norms, so a round can also make things worse: the best
            state is kept. It is the one with the least output error on held-out batches where there are any
            (``Calibrate(held_out=...)``), else with the least error weighted as the adapters weigh it. With
            ``"covariance"`` both halves minimise the output error: a round stores ``W - l r`` anew, as ``Prune`` does
            with method ``"joint"`` (the later half of the rounds goes on from what is stored), lowers its error by
            ``sweeps`` of coordinate descent, with mask, codes and scales free, and solves the adapters again.
        sweeps: of coordinate descent in a round of ``"covariance"``.
        damping: of the Gram matrix, as a share of its mean diagonal, for ``"covariance"``.
        before: share of the rank that ``"covariance"`` spends before anything is stored: that much of the weight itself
            is taken out first (SRR, arXiv 2602.02001), and the whole rank is then solved for what is missing.
        shared: ``"siblings"``: sites that read one input (q, k and v; gate and up) are solved as one site, their
            weights below each other, by this pass and all before it. They have one ``r``, which is stored once, and a
            part of ``l`` each; ``rank`` is that of the whole. A scale that is one for a tensor is one for all of
            them.
    """

    name: ClassVar[str] = "low_rank"

    method: Literal["slim", "svd", "covariance"] = "slim"
    rank: float | int = 0.1
    bits: int | None = None
    group: int = 64
    rounds: int = 0
    sweeps: int = 1
    damping: float = 0.01
    before: float = 0.0
    shared: Literal["siblings"] | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        self._require(
            self.method in ("slim", "svd", "covariance"),
            f"method must be 'slim', 'svd' or 'covariance', not {self.method!r}",
        )
        share = isinstance(self.rank, float) and 0 < self.rank <= 1
        number = whole_number(self.rank) and self.rank >= 1
        self._require(
            share or number, f"rank must be a share in (0, 1] or a whole number of at least 1, not {self.rank!r}"
        )
        bits_are_valid = self.bits is None or (whole_number(self.bits) and self.bits in BITS)
        self._require(bits_are_valid, f"bits must be null, 2, 3, 4, 5, 6 or 8, not {self.bits!r}")
        self._require(whole_number(self.rounds) and self.rounds >= 0, f"rounds must be 0 or more, not {self.rounds!r}")
        self._require(whole_number(self.sweeps) and self.sweeps >= 0, f"sweeps must be 0 or more, not {self.sweeps!r}")
        damping_is_valid = real_number(self.damping) and 0 < self.damping <= 1
        self._require(damping_is_valid, f"damping must lie in (0, 1], not {self.damping!r}")
        before_is_valid = real_number(self.before) and 0 <= self.before <= 1
        self._require(before_is_valid, f"before must be a share from 0 to 1, not {self.before!r}")
        self._require(self.shared in (None, "siblings"), f"shared must be 'siblings' or null, not {self.shared!r}")
        group_is_valid = whole_number(self.group) and self.group >= 2
        self._require(group_is_valid, f"group must be 2 or more columns, not {self.group!r}")

    @property
    def stacks(self) -> bool:
        """Whether siblings are solved as one site."""
        return self.shared is not None

    def statistics(self) -> frozenset[Statistic]:
        """The saliency is the mean magnitude of each input channel, the covariance needs the Gram matrix."""
        needs = {"slim": {"activations"}, "covariance": {"activations", "gram"}}
        return frozenset(needs.get(self.method, ()))

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """There must be an error to correct, and one set of adapters."""
        names = [one.name for one in earlier]
        if self.name in names:
            raise RecipeError(
                "low_rank appears twice: a site has one pair of adapters. Raise the rank of the first one instead."
            )
        if not {"quantize", "prune", "decompose"} & set(names):
            raise RecipeError("low_rank has no error to correct: put quantize, prune or decompose before it.")
        options = [one.options() for one in earlier]
        fed_back = any(one.get("method") == "sparsegpt" or one.get("feedback") for one in options)
        if self.rounds and self.method != "covariance" and fed_back:
            raise RecipeError(
                f"low_rank: rounds={self.rounds} would store mask * (W - l r) in place of the weights that SparseGPT "
                "corrected, which measures worse. Use rounds=0 with sparsegpt, or prune with wanda."
            )

    def check_site(self, name: str, shape: tuple[int, int]) -> None:
        """The rank must fit."""
        try:
            resolve_rank(self.rank, *shape)
        except RecipeError as error:
            raise RecipeError(f"low_rank: '{name}': {error}, or leave the site out with exclude=['{name}'].") from error

    def apply(self, work: SiteWork) -> None:
        """Solve the adapters and, if asked, what is stored beside them."""
        if self.method == "covariance":
            self._apply_covariance(work, work.require_metric(self.name, self.damping))
            return
        work.adapters = self._adapters(work)
        best, least = _State.of(work), self._remaining(work)
        for finished in range(self.rounds):
            if finished:
                work.adapters = self._adapters(work)
            self._express_residual(work)
            if (remaining := self._remaining(work)) < least:
                best, least = _State.of(work), remaining
        best.put_back(work)

    def _apply_covariance(self, work: SiteWork, metric: Metric) -> None:
        """Alternate what is stored and the adapters, both in the norm of the output."""
        rank = resolve_rank(self.rank, *work.dense.shape)
        if first := share_of(self.before, rank):
            left, right = covariance_adapters(work.target, metric, first)
            solve_stored(work, work.target - left @ right - work.binary_part(), metric)
        work.adapters = self._adapters(work, metric, final=not self.rounds)
        best, least = _State.of(work), self._remaining(work, metric)
        for finished in range(self.rounds):
            residual = work.target - work.correction() - work.binary_part()
            if 2 * finished < self.rounds:
                solve_stored(work, residual, metric)
            improve_stored(work, residual, metric, self.sweeps)
            work.adapters = self._adapters(work, metric)
            if (remaining := self._remaining(work, metric)) < least:
                best, least = _State.of(work), remaining
        best.put_back(work)
        if self.rounds:
            # What is stored has not seen the last adapters yet.
            residual = work.target - work.correction() - work.binary_part()
            improve_stored(work, residual, metric, self.sweeps)
            if self._remaining(work, metric) > least:
                best.put_back(work)

    def _remaining(self, work: SiteWork, metric: Metric | None = None) -> float:
        """Return the error that is left: of held-out outputs, or else the norm weighted as the adapters weigh it."""
        judged = work.judge(work.effective_base() + work.correction())
        if judged is not None:
            return judged
        error = work.target - work.effective_base() - work.correction()
        if metric is not None:
            return float((error @ metric.gram).mul_(error).sum(dtype=torch.float64))
        saliency = self._saliency(work)
        return float(torch.linalg.vector_norm(error if saliency is None else error * saliency, dtype=torch.float64))

    def _saliency(self, work: SiteWork) -> Tensor | None:
        """Return the mean magnitude of each input channel, ``None`` if all count alike."""
        if self.method == "svd" or not work.reached:
            return None
        return work.require_statistics(self.name).mean_abs

    def _express_residual(self, work: SiteWork) -> None:
        """Store what the adapters leave, on a fresh grid, in the mask that is there."""
        residual = work.target - work.correction() - work.binary_part()
        if work.input_scale is not None:
            residual = residual / work.input_scale
        work.base = residual if work.mask is None else residual * work.mask
        work.quantize()

    def _adapters(
        self, work: SiteWork, metric: Metric | None = None, *, final: bool = True
    ) -> tuple[Tensor | Quantized, Tensor | Quantized]:
        error = work.target - work.effective_base()
        rank = resolve_rank(self.rank, *work.dense.shape)
        if metric is not None and self.bits is not None:
            return quantized_covariance_adapters(
                error,
                metric,
                rank,
                self.bits,
                self.group,
                scale_dtype=work.scale_dtype,
                sweeps=self.sweeps if final else 0,
            )
        if metric is not None:
            left, right = covariance_adapters(error, metric, rank)
        else:
            saliency = self._saliency(work)
            left, right = plain_adapters(error, rank) if saliency is None else slim_adapters(error, saliency, rank)
        if self.bits is None:
            return left.to(work.dtype).float(), right.to(work.dtype).float()
        return (
            quantize_factor(left, self.bits, self.group, scale_dtype=work.scale_dtype),
            quantize_factor(right, self.bits, self.group, scale_dtype=work.scale_dtype),
        )


@dataclass(frozen=True)
class _State:
    """How a site is expressed after a round."""

    base: Tensor
    mask: Tensor | None
    quantized: Quantized | None
    adapters: tuple[Tensor | Quantized, Tensor | Quantized] | None

    @classmethod
    def of(cls, work: SiteWork) -> _State:
        return cls(work.base, work.mask, work.quantized, work.adapters)

    def put_back(self, work: SiteWork) -> None:
        work.base, work.mask, work.quantized, work.adapters = self.base, self.mask, self.quantized, self.adapters
