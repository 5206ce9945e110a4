"""A report as one HTML page: no other files, no network, nothing that a browser has to be allowed.

Everything that comes out of a model or a file is escaped. The script in it sorts tables, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, inf, log10
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import yaml

from slimc.progress import counted, duration, printable
from slimc.version import __version__

if TYPE_CHECKING:
    from slimc.passes.report import LeftRow, Report, SiteRow

__all__ = ["page"]

_PAGE = Path(__file__).with_suffix(".html")
"""What is around ``{title}`` and ``{body}``: style sheet and script."""

_COLOURS = ("#0f766e", "#b45309", "#6d28d9", "#be123c", "#1d4ed8", "#4d7c0f", "#a21caf", "#0369a1")
"""Of the lines of the plot; from the ninth on they come again, dashed."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 920, 300, 56, 34, 12, 12
"""Of the plot, in units of its own."""


def page(report: Report, title: str) -> str:
    """Return the page."""
    measured = any(row.output_error is not None for row in report.sites)
    parts = [
        f"<h1>{_text(title)}</h1>",
        _tiles(report),
        "<details><summary>Recipe</summary><pre>",
        _text(yaml.safe_dump(report.recipe, sort_keys=False, width=100), keep="\n"),
        "</pre></details>",
        f"<h2>{'Output' if measured else 'Weight'} error by depth</h2>",
        _plot(report.sites, _error if measured else lambda row: row.weight_error),
        "<h2>Layers</h2>",
        _sites(report.sites),
        "<h2>Left dense</h2>" if report.left else "",
        _left(report.left) if report.left else "",
        f'<p class="note">{_MEANING} Written by slimc {_text(__version__)}.</p>',
    ]
    before, _, rest = _PAGE.read_text("utf-8").partition("{title}")
    between, _, after = rest.partition("{body}")
    return "".join((before, _text(title), between, "\n".join(part for part in parts if part), after))


_MEANING = (
    "Bits count masks, scales, zero points and adapters. Errors are Frobenius norms relative to the exact quantity: "
    "of the weight, and of the layer's output on the calibration inputs."
)


def _text(value: str, *, keep: str = "") -> str:
    return escape(printable(value, keep=keep))


def _error(row: SiteRow) -> float | None:
    return row.output_error


# ------------------------------------------------------------------------------------------------------------- totals


def _tiles(report: Report) -> str:
    weights = sum(_weights(row.shape) for row in report.sites)
    packed = sum(row.bits * _weights(row.shape) for row in report.sites) / 8
    errors = [row.output_error for row in report.sites if row.output_error is not None]
    tiles = [
        (f"{report.bits_per_weight:.3f}", "bits a weight"),
        (_bytes(packed), f"in {counted(len(report.sites), 'layer')}; {_bytes(2 * weights)} in 16 bits"),
        (_count(weights), "weights compressed"),
        # Their weights do not add up: a tied embedding is listed under both of its names.
        (str(len(report.left)), "matrices left dense"),
    ]
    if errors:
        tiles.append((f"{fmean(errors):.4f}", f"mean output error; largest {max(errors):.4f}"))
    if report.calibration_tokens:
        tiles.append((f"{report.calibration_tokens:,}", "calibration tokens"))
    if report.seconds:
        tiles.append((duration(sum(report.seconds.values())), "of computing"))
    return (
        f'<div class="tiles">{"".join(f"<div><b>{_text(a)}</b><span>{_text(b)}</span></div>" for a, b in tiles)}</div>'
    )


def _weights(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _count(number: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number:,}"


def _bytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


# --------------------------------------------------------------------------------------------------------------- plot


def _plot(rows: Sequence[SiteRow], error: Callable[[SiteRow], float | None]) -> str:
    """Draw a line for each kind of layer over the number of its block, or all layers in their order."""
    lines = _by_block(rows, error) or {"all layers, in order": _in_order(rows, error)}
    points = [point for line in lines.values() for point in line]
    if not points:
        return '<p class="note">No error was measured.</p>'
    top = _ceiling(max(y for _, y in points))
    first, last = min(x for x, _ in points), max(x for x, _ in points)

    def at(x: float, y: float) -> tuple[str, str]:
        across = (x - first) / max(last - first, 1) * (_WIDTH - _LEFT - _RIGHT)
        return f"{_LEFT + across:.1f}", f"{_HEIGHT - _BOTTOM - y / top * (_HEIGHT - _BOTTOM - _TOP):.1f}"

    drawn = [_grid(at, first, last, top)]
    for index, (kind, line) in enumerate(sorted(lines.items())):
        colour, dashes = _COLOURS[index % len(_COLOURS)], ' stroke-dasharray="5 3"' * (index >= len(_COLOURS))
        path = " ".join(",".join(at(*point)) for point in line)
        dots = "".join(
            f'<circle cx="{at(x, y)[0]}" cy="{at(x, y)[1]}" r="3"><title>{_text(kind)} {x}: {y:.4f}</title></circle>'
            for x, y in line
        )
        drawn.append(f'<g fill="{colour}"><polyline points="{path}" stroke="{colour}"{dashes}/>{dots}</g>')
    legend = "".join(
        f'<li><i style="background:{_COLOURS[index % len(_COLOURS)]}"></i>{_text(kind)}</li>'
        for index, kind in enumerate(sorted(lines))
    )
    label = "Error of each layer over its depth in the model"
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'
    return f'<figure>{picture}<ul class="legend">{legend}</ul></figure>'


def _by_block(
    rows: Sequence[SiteRow], error: Callable[[SiteRow], float | None]
) -> dict[str, list[tuple[int, float]]] | None:
    """Return for each kind of layer its mean error in each block, None if names have no numbers of blocks.

    A block's number is the first number in a name; later ones, such as those of experts, make no kinds of their own.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        parts = row.name.split(".")
        place = next((index for index, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
        value = error(row)
        if place is None or value is None or not parts[place + 1 :]:
            continue
        kind = ".".join("*" if part.isdigit() else part for part in parts[place + 1 :])
        found.setdefault(kind, {}).setdefault(int(parts[place]), []).append(value)
    if len({block for blocks in found.values() for block in blocks}) < 2:
        return None
    return {
        kind: [(block, fmean(values)) for block, values in sorted(blocks.items())] for kind, blocks in found.items()
    }


def _in_order(rows: Sequence[SiteRow], error: Callable[[SiteRow], float | None]) -> list[tuple[int, float]]:
    return [(index, value) for index, row in enumerate(rows) if (value := error(row)) is not None]


def _grid(at: Callable[[float, float], tuple[str, str]], first: int, last: int, top: float) -> str:
    """Draw four horizontal lines with their errors, and the numbers of at most 16 blocks."""
    lines = []
    for step in range(5):
        _, y = at(first, top * step / 4)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y}" dy="4" text-anchor="end">{top * step / 4:.3g}</text>')
    for block in range(first, last + 1, max(ceil((last - first + 1) / 16), 1)):
        x, _ = at(block, 0)
        lines.append(f'<text x="{x}" y="{_HEIGHT - 10}" text-anchor="middle">{block}</text>')
    return "".join(lines)


def _ceiling(value: float) -> float:
    """Return the next number of one digit, times a power of ten, that is a multiple of 1, 2, 4 or 8."""
    if not 0 < value < inf:
        return 1.0
    unit: float = 10.0 ** int(log10(value) // 1)
    return next((step * unit for step in (1, 2, 4, 8) if step * unit >= value), 10 * unit)


# -------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class _Column:
    """A column of numbers, or of words if ``bar`` and ``digits`` are None.

    Attributes:
        heading: of the column.
        value: of a row; None is a dash.
        digits: after the point.
        bar: the class of its bars, as long as the value is large among the column's.
    """

    heading: str
    value: Callable[[SiteRow], float | str | None]
    digits: int | None = None
    bar: str | None = None


_COLUMNS = (
    _Column("layer", lambda row: row.name),
    _Column("shape", lambda row: " × ".join(map(str, row.shape))),
    _Column("expression", lambda row: row.expression),
    _Column("bits", lambda row: row.bits, 3, "bits"),
    _Column("output error", lambda row: row.output_error, 4, "error"),
    _Column("weight error", lambda row: row.weight_error, 4, "error"),
    _Column("without adapters", lambda row: row.base_output_error, 4),
    _Column("held out", lambda row: row.held_out_error, 4),
    _Column("with earlier errors", lambda row: row.stream_error, 4),
    _Column("published ratio", lambda row: row.compression_ratio, 4),
    _Column("inputs not rounded", lambda row: row.unrounded),
    _Column("instead", lambda row: row.fallback),
)


def _sites(rows: Sequence[SiteRow]) -> str:
    """Return the table of layers, without columns that are empty."""
    columns = [one for one in _COLUMNS if any(one.value(row) is not None for row in rows)]
    largest = {
        one.heading: max((value for row in rows if isinstance(value := one.value(row), int | float)), default=0)
        for one in columns
    }
    lines = ["".join(_cell(one, row, largest[one.heading]) for one in columns) for row in rows]
    headings = [(one.heading, one.digits is not None) for one in columns]
    return _table(headings, lines)


def _cell(column: _Column, row: SiteRow, largest: float) -> str:
    value = column.value(row)
    if isinstance(value, str):
        return f"<td>{_text(value)}</td>"
    if value is None:
        return '<td class="number" data-value="-1">-</td>' if column.digits is not None else "<td>-</td>"
    shown = f"{value:.{column.digits}f}"
    if column.bar is not None:
        share = 100 * value / largest if largest > 0 else 0
        shown = f'{shown}<span class="bar {column.bar}" style="width:{max(min(share, 100), 0):.1f}%"></span>'
    return f'<td class="number" data-value="{value:.6g}">{shown}</td>'


def _left(rows: Sequence[LeftRow]) -> str:
    lines = []
    for row in rows:
        weights = _weights(row.shape)
        shape = " × ".join(map(str, row.shape))
        number = f'<td class="number" data-value="{weights}">{weights:,}</td>'
        lines.append(f"<td>{_text(row.name)}</td><td>{shape}</td>{number}<td>{_text(row.reason)}</td>")
    return _table([("weight", False), ("shape", False), ("weights", True), ("reason", False)], lines)


def _table(headings: Iterable[tuple[str, bool]], lines: Iterable[str]) -> str:
    """Return a table that can be sorted; a heading comes with whether its column holds numbers."""
    head = "".join(
        f'<th{" class=number" * number}><button type="button">{_text(heading)}</button></th>'
        for heading, number in headings
    )
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
