"""What a compression did: a row for every site, and a reason for every weight left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slimc.errors import InputError
from slimc.passes.report_page import page
from slimc.progress import counted, printable
from slimc.runtime.files import json_bytes, write_bytes


@dataclass(frozen=True)
class SiteRow:
    """One compressed weight.

    Errors are Frobenius norms relative to the exact quantity: ``weight_error = |W' - W| / |W|`` and
    ``output_error = |X (W' - W)^T| / |X W^T|`` on the calibration inputs; ``base_output_error`` is the
    same without the adapters. An output error is ``None`` when no pass asked for the site's inputs, so that none were
    gathered; it is measured on at most :data:`slimc.passes.statistics.SAMPLE_TOKENS` of the calibration tokens.
    ``held_out_error`` is the output error on batches that nothing was fitted to, and ``stream_error`` is
    ``|X W'^T - X_dense W^T| / |X_dense W^T|``, which counts the errors of all earlier sites; ``None`` where no held-out
    batches and no dense stream were asked for. ``unrounded`` is why the pass ``activations`` left the inputs of this
    site as they are; the errors count rounded inputs in. ``base_output_error`` leaves the signs of ``decompose`` out
    too. ``compression_ratio`` is what the literature calls so, where a pass was asked for one: it does not count where
    values are, unlike ``bits``. ``fallback`` is what a pass did in place of what it was asked for, and why.
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
    unrounded: str | None = None
    compression_ratio: float | None = None
    fallback: str | None = None


@dataclass(frozen=True)
class LeftRow:
    """One weight matrix left as it was, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Report:
    """The record of one compression: the recipe in config form, the sites, and what was left alone.

    ``str()`` of it is a table for people. ``graph`` is the text form of the final program. ``seconds`` holds wall-clock
    time by stage, and ``fingerprint`` what decided the result, if the run kept a journal; they are kept apart because
    they may differ where the results are equal.
    """

    recipe: list[dict[str, Any]]
    sites: list[SiteRow]
    left: list[LeftRow]
    calibration_tokens: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    graph: str = ""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits a weight over all compressed sites, adapters, masks and scales included."""
        weights = sum(row.shape[0] * row.shape[1] for row in self.sites)
        return sum(row.bits * row.shape[0] * row.shape[1] for row in self.sites) / max(weights, 1)

    def __str__(self) -> str:
        """Return a row a site, a row for each weight left alone with its reason, and what the sites take in all."""
        parts = [*aligned(table_of_sites(self.sites)), ""]
        narrow = [row for row in self.sites if row.output_error is not None and row.shape[1] > self.calibration_tokens]
        if narrow:
            parts += [
                (
                    f"Calibrated on {counted(self.calibration_tokens, 'token')}, fewer than the inputs of "
                    f"{counted(len(narrow), 'layer')}: what no token showed there is regularised. More text would help."
                ),
                "",
            ]
        if self.left:
            parts += ["Left dense:", *aligned(table_of_left(self.left)), ""]
        parts.append(f"{counted(len(self.sites), 'layer')}: {self.bits_per_weight:.3f} bits a weight")
        return "\n".join(parts)

    def to_html(self, path: str | Path, *, title: str = "What slimc compressed", overwrite: bool = False) -> None:
        """Write the report as one page for a browser: totals, errors by depth, a row a site that can be sorted by.

        The page needs no other file and no network.

        Args:
            path: the file.
            title: above everything.
            overwrite: replace an existing file.

        Raises:
            InputError: the file exists or cannot be written.
        """
        _write(Path(path), page(self, title).encode(), overwrite=overwrite)

    def to_json(self, path: str | Path | None = None, *, overwrite: bool = False) -> dict[str, Any]:
        """Return the report as plain JSON types, without the timings, the graph and the fingerprint.

        Args:
            path: a file to write it to, too.
            overwrite: replace an existing file.

        Raises:
            InputError: the file exists or cannot be written.
        """
        record = self._record()
        if path is not None:
            _write(Path(path), json_bytes(record), overwrite=overwrite)
        return record

    def _record(self) -> dict[str, Any]:
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


def _write(path: Path, content: bytes, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise InputError(
            f"{path}: already exists; choose another file, or replace it with overwrite=True (--overwrite)"
        )
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file to write to")
    write_bytes(path, content)


UNROUNDED = "inputs not rounded"
"""The heading of the column of reasons."""

PUBLISHED_RATIO = "published ratio"
"""The heading of the column of compression ratios."""

FALLBACK = "instead"
"""The heading of the column that says what was done in place of what was asked for."""


def table_of_sites(rows: Sequence[SiteRow]) -> list[list[str]]:
    """Return the headings and a line a site, as text; an error that was not measured is a dash."""
    held_out = any(row.held_out_error is not None for row in rows)
    unrounded = any(row.unrounded is not None for row in rows)
    fallback = any(row.fallback is not None for row in rows)
    headings = ["layer", "shape", "expression", "bits", "weight error", "output error", "without adapters"]
    ratio = any(row.compression_ratio is not None for row in rows)
    more = ["held out"] * held_out + [UNROUNDED] * unrounded + [PUBLISHED_RATIO] * ratio + [FALLBACK] * fallback
    lines = [headings + more]
    for row in rows:
        errors = [row.weight_error, row.output_error, row.base_output_error, *[row.held_out_error] * held_out]
        start = [printable(row.name), _shape(row.shape), printable(row.expression), f"{row.bits:.3f}"]
        notes = [printable(row.unrounded or "-")] * unrounded
        notes += ["-" if row.compression_ratio is None else f"{row.compression_ratio:.4f}"] * ratio
        notes += [printable(row.fallback or "-")] * fallback
        lines.append(start + ["-" if error is None else f"{error:.4f}" for error in errors] + notes)
    return lines


def table_of_left(rows: Sequence[LeftRow]) -> list[list[str]]:
    """Return the headings and a line a weight that was left as it was, as text."""
    return [["weight", "shape", "reason"], *([printable(r.name), _shape(r.shape), printable(r.reason)] for r in rows)]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table with its columns below each other."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
