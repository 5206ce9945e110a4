"""``slimc inspect``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from slimc.cli.terminal import megabytes, note, out, say, show
from slimc.errors import InputError
from slimc.progress import counted

if TYPE_CHECKING:
    from slimc.passes.report import LeftRow, SiteRow
    from slimc.runtime.storage import NativeFolder


@dataclass(frozen=True)
class Totals:
    """Sizes of a compressed folder; bytes are what the weight files hold.

    Attributes:
        sites: how many weights are compressed.
        site_weights: how many numbers they hold.
        site_bytes: what they take, with their masks, scales and adapters.
        bits_per_weight: the same, a number.
        dense_bytes: what everything else takes: embeddings, norms, biases.
        file_bytes: the size of the weight files.
    """

    sites: int
    site_weights: int
    site_bytes: int
    bits_per_weight: float
    dense_bytes: int
    file_bytes: int


def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder that slimc wrote.", metavar="DIR", show_default=False)],
    sites: Annotated[str, typer.Option(metavar="PATTERN", help="Only layers whose name matches: '*.mlp.*'")] = "*",
    graph: Annotated[bool, typer.Option("--graph", help="Print the program as text instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page for a browser, of all layers, instead.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
) -> None:
    """Show what is in a compressed folder: a row a layer, what was left dense and why, and the totals.

    The errors are relative to the exact layer: that of its weight, and that of its output on the calibration inputs.

    [bold]Examples[/bold]

      slimc inspect small

      slimc inspect small --sites '*.layers.0.*'

      slimc inspect small --graph                   the program that the compressed layers are part of

      slimc inspect small --html report.html        tables to sort, and errors by depth
    """
    from slimc.passes.report import Report
    from slimc.runtime.storage import open_folder

    opened = open_folder(folder, verify=False)
    if graph:
        say(_graph(folder), end="")
        return
    report = Report.from_json(opened.report)
    if html is not None:
        report.to_html(html, title=folder.resolve().name, overwrite=overwrite)
        note(f"{html}: {counted(len(report.sites), 'layer')}; open it in a browser")
        return
    rows = [row for row in report.sites if fnmatchcase(row.name, sites)]
    if not rows:
        raise InputError(f"no compressed layer of {folder} matches '{sites}'; 'slimc inspect {folder}' lists them")
    totals = totals_of(opened)
    if as_json:
        record = report.to_json() | {"sites": [asdict(row) for row in rows], "totals": asdict(totals)}
        out.print_json(json.dumps(record), ensure_ascii=True)
        return
    _print_sites(rows)
    if sites == "*":
        _print_left(report.left)
    _print_totals(totals, shown=len(rows))


def totals_of(folder: NativeFolder) -> Totals:
    """Add up a compressed folder."""
    site_bytes = sum(folder.site_nbytes(name) for name in folder.formats)
    weights = sum(form.rows * form.columns for form in folder.formats.values())
    entries = [folder.entries[dense.name][1] for dense in folder.description.dense]
    return Totals(
        sites=len(folder.formats),
        site_weights=weights,
        site_bytes=site_bytes,
        bits_per_weight=8 * site_bytes / max(weights, 1),
        dense_bytes=sum(entry.end - entry.start for entry in entries),
        file_bytes=sum((folder.path / shard).stat().st_size for shard in folder.description.shards),
    )


def _graph(folder: Path) -> str:
    path = folder / "graph.txt"
    if not path.is_file():
        raise InputError(f"{folder} has no graph.txt, so the program was not saved with it; compress the model again")
    return path.read_text(encoding="utf-8")


def _print_sites(rows: list[SiteRow]) -> None:
    from slimc.passes.report import FALLBACK, UNROUNDED, table_of_sites

    headings, *lines = table_of_sites(rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        if heading in ("layer", "expression", UNROUNDED, FALLBACK):
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=heading == "shape")
    for line in lines:
        table.add_row(*line)
    show(table)


def _print_left(rows: list[LeftRow]) -> None:
    from slimc.passes.report import table_of_left

    say("\nLeft dense:")
    headings, *lines = table_of_left(rows)
    table = Table(*headings, box=None, pad_edge=False, header_style="bold")
    for line in lines:
        table.add_row(*line)
    show(table)


def _print_totals(totals: Totals, *, shown: int) -> None:
    say(f"\n{shown} of {counted(totals.sites, 'layer')} shown. The whole model:" if shown < totals.sites else "")
    say(
        f"{counted(totals.sites, 'layer')}: {totals.site_weights:,} weights in {megabytes(totals.site_bytes)}, "
        f"{totals.bits_per_weight:.3f} bits each with masks, scales and adapters"
    )
    say(f"everything else, dense: {megabytes(totals.dense_bytes)}")
    say(f"weight files: {megabytes(totals.file_bytes)}")
