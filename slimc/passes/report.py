"""What a compression did: a row for every site, and a reason for every weight left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class SiteRow:
    """One compressed weight.

    Errors are Frobenius norms relative to the exact quantity: ``weight_error = |W' - W| / |W|`` and
    ``output_error = |X (W' - W)^T| / |X W^T|`` on the calibration inputs; ``base_output_error`` is the
    same without the adapters. An output error is ``None`` when no pass asked for the site's inputs, so that none were
    gathered; it is measured on at most :data:`slimc.passes.statistics.SAMPLE_TOKENS` of the calibration tokens.
    ``held_out_error`` is the output error on batches that nothing was fitted to, and ``stream_error`` is
    ``|X W'^T - X_dense W^T| / |X_dense W^T|``, which counts the errors of all earlier sites; ``None`` where no held-out
    batches and no dense stream were asked for.
    """

    name: str
    shape: tuple[int, int]
    expression: str
    bits: float
    weight_error: float
    base_output_error: float | None = None
    output_error: float | None = None
    held_out_error: float | None = None
    stream_error: float | None = None


@dataclass(frozen=True)
class LeftRow:
    """One weight matrix left as it was, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Report:
    """The record of one compression: the recipe in config form, the sites, and what was left alone.

    ``graph`` is the text form of the final program. ``seconds`` holds wall-clock time by stage; it is kept apart
    because it differs from run to run.
    """

    recipe: list[dict[str, Any]]
    sites: list[SiteRow]
    left: list[LeftRow]
    calibration_tokens: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    graph: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Mean bits a weight over all compressed sites, adapters, masks and scales included."""
        weights = sum(row.shape[0] * row.shape[1] for row in self.sites)
        return sum(row.bits * row.shape[0] * row.shape[1] for row in self.sites) / max(weights, 1)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON types, without the timings and the graph."""
        return {
            "recipe": self.recipe,
            "sites": [asdict(row) | {"shape": list(row.shape)} for row in self.sites],
            "left": [asdict(row) | {"shape": list(row.shape)} for row in self.left],
            "calibration_tokens": self.calibration_tokens,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Report:
        """Rebuild a report from :meth:`to_json`; keys are trusted (the file reader has validated them)."""
        return cls(
            recipe=list(record["recipe"]),
            sites=[SiteRow(**{**row, "shape": tuple(row["shape"])}) for row in record["sites"]],
            left=[LeftRow(**{**row, "shape": tuple(row["shape"])}) for row in record["left"]],
            calibration_tokens=record["calibration_tokens"],
        )
