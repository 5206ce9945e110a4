"""Where the commands write: results to standard output, everything else to standard error."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

_LOG_WIDTH = 240
"""Columns of a table where there is no terminal."""

out = Console(highlight=False, soft_wrap=True)
err = Console(highlight=False, soft_wrap=True, stderr=True)


def show(table: Table) -> None:
    """Print a table as a result: as wide as the terminal, or so wide that nothing is cut."""
    console = Console(highlight=False, width=None if out.is_terminal else _LOG_WIDTH)
    console.print(table)


def note(message: str) -> None:
    """Tell the user something that is not the result."""
    err.print(Text(message))


def fail(message: str, *, label: str = "error: ") -> None:
    """Print an error message."""
    err.print(Text.assemble((label, "bold red"), message))


def megabytes(size: int) -> str:
    """Return a size in bytes as megabytes (a million bytes), or as kilobytes if it is small."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"
