"""``slimc recipes``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from slimc import recipes as presets
from slimc.cli.terminal import say, show


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A preset or a recipe file.", show_default=False)
    ] = None,
) -> None:
    """List the recipes that come with slimc, or print one as YAML.

    [bold]Examples[/bold]

      slimc recipes

      slimc recipes joint-w4-2x4 > mine.yaml      a start for your own
    """
    if name is not None:
        say(presets.load(name).to_yaml(), end="")
        return
    table = Table("recipe", "what it does", box=None, pad_edge=False)
    for known in presets.names():
        table.add_row(known, _first_sentences(presets.load(known).description))
    show(table)
    say(f"\nThe default is {presets.DEFAULT}; 'slimc recipes NAME' prints one.")


def _first_sentences(description: str) -> str:
    """Return the first paragraph as one line."""
    return " ".join(description.split("\n\n")[0].split())
