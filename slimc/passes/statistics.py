"""What the sweep remembers of a site's input."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from slimc.errors import NumericsError

SAMPLE_TOKENS = 1024
"""Tokens kept to measure output errors; enough for three digits, and independent of the calibration's size."""


class InputStatistics:
    """Statistics of one activation, over all calibration tokens and all uses of a weight.

    Attributes:
        count: number of tokens seen.
        sum_abs: sum of ``|x|``, float32 ``[columns]``.
        sum_squares: sum of ``x^2``, float32 ``[columns]``.
        gram: ``X^T X``, float32 ``[columns, columns]``, or ``None`` when no pass asked for it.
        sample: evenly spaced tokens, float32 ``[<= SAMPLE_TOKENS, columns]``.
    """

    def __init__(self, columns: int, device: torch.device, wanted: Collection[str]) -> None:
        """Start empty, for inputs of ``columns`` features on ``device``."""
        self.count = 0
        self.sum_abs = torch.zeros(columns, device=device)
        self.sum_squares = torch.zeros(columns, device=device)
        self.gram = torch.zeros(columns, columns, device=device) if "gram" in wanted else None
        self.sample = torch.zeros(0, columns, device=device)

    @property
    def mean_abs(self) -> Tensor:
        """Mean of ``|x|`` by channel, float32 ``[columns]``."""
        return self.sum_abs / max(self.count, 1)

    @property
    def is_silent(self) -> bool:
        """Whether every input was zero, or there was none."""
        return not bool(self.sum_abs.any())

    @classmethod
    def gather(cls, activations: Sequence[Tensor], wanted: Collection[str], where: str) -> InputStatistics:
        """Accumulate over ``activations``, each ``[..., columns]``.

        Raises:
            NumericsError: a value is NaN or infinite; ``where`` names the site in the message.
        """
        columns = activations[0].shape[-1]
        statistics = cls(columns, activations[0].device, wanted)
        chosen = _evenly_spaced(sum(activation.numel() // columns for activation in activations))
        kept = []
        for activation in activations:
            rows = activation.detach().reshape(-1, columns).float()
            here = chosen[(chosen >= statistics.count) & (chosen < statistics.count + len(rows))] - statistics.count
            kept.append(rows[here.to(rows.device)])
            statistics._add(rows)
        statistics.sample = torch.cat(kept)
        if not bool(torch.isfinite(statistics.sum_squares).all()):
            raise NumericsError(
                f"The calibration inputs of '{where}' contain NaN or Inf (or overflow float32 when squared). "
                "Check the calibration data, and that the dense model runs without NaN in this dtype on this text."
            )
        return statistics

    def _add(self, rows: Tensor) -> None:
        self.count += rows.shape[0]
        self.sum_abs += rows.abs().sum(0)
        self.sum_squares += rows.square().sum(0)
        if self.gram is not None:
            self.gram.addmm_(rows.t(), rows)


def _evenly_spaced(tokens: int) -> Tensor:
    """Return the positions of the sampled tokens among all of them, whatever batches they come in."""
    size = min(tokens, SAMPLE_TOKENS)
    return torch.arange(size) * tokens // max(size, 1)
