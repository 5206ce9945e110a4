"""Calibrate: how much text is run through the model to learn the statistics of every site's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slimc.errors import InputError, RecipeError
from slimc.passes.base import Pass, real_number, whole_number


@dataclass(frozen=True)
class Calibrate(Pass):
    """Run calibration data through the model, so that later passes know each site's input.

    ``samples`` and ``length`` shape text only, that which is given or that which the model writes. Ready-made batches
    are used as they are given, all of them at their own length; one tensor ``[samples, ...]`` is cut into batches.

    Attributes:
        samples: number of sequences.
        length: tokens in a sequence.
        batch: sequences that run together. The activations of all batches are kept, so a smaller one saves little
            memory; a larger one makes larger kernels.
        seed: of the sampling, when the model writes its own calibration text.
        held_out: share of the batches, the last ones, that nothing is fitted to. They run through the sweep like the
            others, and passes that choose between alternatives judge them by the error there; the report shows it. Of
            few samples fewer run together, so that it is about this share.
    """

    name: ClassVar[str] = "calibrate"

    samples: int = 128
    length: int = 2048
    batch: int = 8
    seed: int = 0
    held_out: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        for option in ("samples", "length", "batch"):
            value = getattr(self, option)
            valid = whole_number(value) and value >= 1
            self._require(valid, f"{option} must be a whole number of at least 1, not {value!r}")
        self._require(self.length >= 2, f"length must be at least 2 tokens, not {self.length}")
        valid = whole_number(self.seed) and 0 <= self.seed < 2**63
        self._require(valid, f"seed must be a whole number from 0 to 2^63 - 1, not {self.seed!r}")
        share = real_number(self.held_out) and 0 <= self.held_out < 1
        self._require(share, f"held_out must be a share of the batches from 0 to less than 1, not {self.held_out!r}")

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """Calibration comes first: statistics cannot be asked for after the fact."""
        if earlier:
            raise RecipeError(
                f"calibrate must be the first pass, but it comes after '{earlier[-1].name}'. Move it to the top."
            )

    def batch_of(self, samples: int) -> int:
        """Return how many of ``samples`` run together: no more than are held out, for batches are held out whole."""
        if not self.held_out:
            return self.batch
        return max(1, min(self.batch, int(samples * min(self.held_out, 1 - self.held_out))))

    def held_out_batches(self, batches: int) -> int:
        """Return how many of ``batches`` are held out: the nearest number to the share, but at least one.

        Raises:
            InputError: no batch would be left to fit anything to.
        """
        if not self.held_out:
            return 0
        held_out = max(1, round(self.held_out * batches))
        if held_out >= batches:
            raise InputError(
                f"calibrate: a share of {self.held_out} of the calibration batches is held out to judge choices by, "
                f"which leaves none of {batches} to fit them to. Give more batches (more samples), or hold out a "
                "smaller share."
            )
        return held_out
