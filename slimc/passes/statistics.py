"""What the sweep remembers of a site's input."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from slimc.errors import NumericsError
from slimc.passes.solvers.hessian import Metric, damped
from slimc.passes.solvers.precision import processor_products

SAMPLE_TOKENS = 1024
"""Tokens kept to measure output errors; enough for three digits, and independent of the calibration's size."""


class InputStatistics:
    """Statistics of one activation, over all calibration tokens and all uses of a weight.

    Attributes:
        count: number of tokens seen.
        total: sum of ``x``, float32 ``[columns]``.
        sum_abs: sum of ``|x|``, float32 ``[columns]``.
        sum_squares: sum of ``x^2``, float32 ``[columns]``.
        gram: ``X^T X``, float32 ``[columns, columns]``, or ``None`` when no pass asked for it.
        sample: evenly spaced tokens, float32 ``[<= SAMPLE_TOKENS, columns]``.
        cross_gram: ``X_dense^T X``, float32 ``[columns, columns]``, where ``X_dense`` is what the dense model computes
            for the same tokens, or ``None`` when no pass asked for it.
        dense_sample: the rows of ``X_dense`` for the tokens of ``sample``, or ``None``.
        dense_total: sum of the rows of ``X_dense``, float32 ``[columns]``, or ``None``.
    """

    def __init__(self, columns: int, device: torch.device, wanted: Collection[str]) -> None:
        """Start empty, for inputs of ``columns`` features on ``device``."""
        self.count = 0
        self.total = torch.zeros(columns, device=device)
        self.sum_abs = torch.zeros(columns, device=device)
        self.sum_squares = torch.zeros(columns, device=device)
        self.gram = torch.zeros(columns, columns, device=device) if "gram" in wanted else None
        self.sample = torch.zeros(0, columns, device=device)
        self.cross_gram = torch.zeros(columns, columns, device=device) if "cross_gram" in wanted else None
        self.dense_sample: Tensor | None = None
        self.dense_total: Tensor | None = None
        self._metrics: dict[float, Metric] = {}

    def metric(self, damping: float) -> Metric | None:
        """Return the damped Gram matrix as a norm, the same one at each call; ``None`` without a Gram matrix.

        Whatever solvers derive from it is kept for the other sites that read this input.
        """
        if self.gram is None:
            return None
        if damping not in self._metrics:
            self._metrics[damping] = Metric(damped(self.gram, damping))
        return self._metrics[damping]

    @property
    def mean_abs(self) -> Tensor:
        """Mean of ``|x|`` by channel, float32 ``[columns]``."""
        return self.sum_abs / max(self.count, 1)

    @property
    def mean(self) -> Tensor:
        """Mean of ``x`` by channel, float32 ``[columns]``."""
        return self.total / max(self.count, 1)

    @property
    def dense_mean(self) -> Tensor:
        """Mean of ``x`` in the dense model; that of ``x`` itself where that is not known."""
        return self.mean if self.dense_total is None else self.dense_total / max(self.count, 1)

    @property
    def is_silent(self) -> bool:
        """Whether every input was zero, or there was none."""
        return not bool(self.sum_abs.any())

    @classmethod
    def gather(
        cls,
        activations: Sequence[Tensor],
        wanted: Collection[str],
        where: str,
        *,
        dense: Sequence[Tensor] | None = None,
    ) -> InputStatistics:
        """Accumulate over ``activations``, each ``[..., columns]``.

        ``dense`` are the same tokens in the dense model, for ``"cross_gram"``.

        Raises:
            NumericsError: a value is NaN or infinite; ``where`` names the site in the message.
        """
        columns = activations[0].shape[-1]
        statistics = cls(columns, activations[0].device, wanted)
        chosen = evenly_spaced(sum(activation.numel() // columns for activation in activations))
        kept: list[Tensor] = []
        kept_dense: list[Tensor] = []
        for index, activation in enumerate(activations):
            rows = _rows(activation)
            here = chosen[(chosen >= statistics.count) & (chosen < statistics.count + len(rows))] - statistics.count
            here = here.to(rows.device)
            kept.append(rows[here])
            with _products_of(activation):
                statistics._add(rows)
            if statistics.cross_gram is not None and dense is not None:
                exact = _rows(dense[index])
                with _products_of(activation):
                    statistics.cross_gram.addmm_(exact.t(), rows)
                before = 0.0 if statistics.dense_total is None else statistics.dense_total
                statistics.dense_total = exact.sum(0) + before
                kept_dense.append(exact[here])
        statistics.sample = torch.cat(kept)
        statistics.dense_sample = torch.cat(kept_dense) if kept_dense else None
        if not bool(torch.isfinite(statistics.sum_squares).all()):
            raise NumericsError(
                f"The calibration inputs of '{where}' contain NaN or Inf (or overflow float32 when squared). "
                "Check the calibration data, and that the dense model runs without NaN in this dtype on this text."
            )
        if statistics.cross_gram is not None and not bool(torch.isfinite(statistics.cross_gram).all()):
            raise NumericsError(
                f"The inputs of '{where}' in the dense model contain NaN or Inf (or overflow float32), though those of "
                "the compressed one do not. Check that the dense model runs without NaN in this dtype on this text."
            )
        return statistics

    def _add(self, rows: Tensor) -> None:
        self.count += rows.shape[0]
        self.total += rows.sum(0)
        self.sum_abs += rows.abs().sum(0)
        self.sum_squares += rows.square().sum(0)
        if self.gram is not None:
            self.gram.addmm_(rows.t(), rows)


@dataclass(frozen=True, eq=False)
class Shortfall:
    """What the dense model has more of, in the sum that a product's result is added to (a residual connection).

    Attributes:
        cross: ``D^T X``, float32 ``[out_features, columns]``, where a row of ``D`` is the difference of the other
            operand of the sum, dense less compressed, at a token, and a row of ``X`` the input of the product there.
        sample: the rows of ``D`` for the tokens of ``InputStatistics.sample``.
    """

    cross: Tensor
    sample: Tensor

    @classmethod
    def gather(cls, activations: Sequence[Tensor], actual: Sequence[Tensor], dense: Sequence[Tensor]) -> Shortfall:
        """Accumulate over batches; the operands of the sum are ``[..., out_features]``."""
        columns, rows = activations[0].shape[-1], dense[0].shape[-1]
        cross = torch.zeros(rows, columns, device=activations[0].device)
        chosen = evenly_spaced(sum(activation.numel() // columns for activation in activations))
        kept: list[Tensor] = []
        count = 0
        for activation, ours, theirs in zip(activations, actual, dense, strict=True):
            inputs, difference = _rows(activation), _rows(theirs) - _rows(ours)
            with _products_of(activation):
                cross.addmm_(difference.t(), inputs)
            here = chosen[(chosen >= count) & (chosen < count + len(inputs))] - count
            kept.append(difference[here.to(difference.device)])
            count += len(inputs)
        return cls(cross, torch.cat(kept))


def _products_of(activation: Tensor) -> AbstractContextManager[None]:
    """Let the CPU multiply float32 copies of bfloat16 activations as bfloat16, where it has instructions for that.

    Nothing is lost: such a product is exact in float32, in which it is summed and returned either way. (What is no
    activation, a difference of two, is rounded to bfloat16, by less than the noise of any sample of tokens.)
    """
    in_bfloat16 = activation.dtype == torch.bfloat16 and activation.device.type == "cpu"
    return processor_products("bf16") if in_bfloat16 else nullcontext()


def _rows(activation: Tensor) -> Tensor:
    return activation.detach().reshape(-1, activation.shape[-1]).float()


def evenly_spaced(tokens: int, at_most: int = SAMPLE_TOKENS) -> Tensor:
    """Return the positions of the sampled tokens among all of them, whatever batches they come in."""
    size = min(tokens, at_most)
    return torch.arange(size) * tokens // max(size, 1)
