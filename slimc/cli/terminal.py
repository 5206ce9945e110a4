"""Where the commands write: results to standard output, everything else to standard error.

Paths, names and generated text are printed as they are: nothing in them is markup, an emoji or a terminal command.
"""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slimc.progress import printable

_LOG_WIDTH = 240
"""Columns of a table where there is no terminal."""

_LINES = "\n\t"
"""The control characters that a text of several lines needs."""

out = Console(emoji=False, markup=False, highlight=False, soft_wrap=True)
err = Console(emoji=False, markup=False, highlight=False, soft_wrap=True, stderr=True)


def say(text: str = "", *, end: str = "\n") -> None:
    """Print a text as a result, unchanged but for control characters, which are escaped."""
    typer.echo(printable(text, keep=_LINES) + end, nl=False)


def show(table: Table) -> None:
    """Print a table as a result: as wide as the terminal, or so wide that nothing is cut, without padding."""
    width = None if out.is_terminal else _LOG_WIDTH
    console = Console(emoji=False, markup=False, highlight=False, width=width)
    if out.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def note(message: str) -> None:
    """Tell the user something that is not the result."""
    err.print(Text(printable(message, keep=_LINES)))


def fail(message: str, *, label: str = "error: ") -> None:
    """Print an error message."""
    err.print(Text.assemble((label, "bold red"), printable(message, keep=_LINES)))


def megabytes(size: int) -> str:
    """Return a size in bytes as megabytes (a million bytes), or as kilobytes if it is small."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"
