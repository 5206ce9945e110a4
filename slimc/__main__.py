"""``python -m slimc`` is the ``slimc`` command."""

from __future__ import annotations

from slimc.cli import main

main()
