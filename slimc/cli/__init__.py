"""The ``slimc`` command. Results go to standard output; progress, notes and errors to standard error.

The commands import what they need when they run, so that ``slimc --help`` answers at once.
"""

from __future__ import annotations

from slimc.cli.app import Command, app, main
from slimc.cli.benchmarking import bench
from slimc.cli.compressing import compress
from slimc.cli.exporting import export, verify
from slimc.cli.inspection import inspect
from slimc.cli.kernels import kernels
from slimc.cli.planning import plan
from slimc.cli.running import evaluate, generate
from slimc.cli.showing import recipes
from slimc.cli.tuning import tune

__all__ = ["app", "main"]

app.command(cls=Command)(compress)
app.command(cls=Command)(plan)
app.command("eval", cls=Command)(evaluate)
app.command(cls=Command)(generate)
app.command(cls=Command)(inspect)
app.command(cls=Command)(export)
app.command(cls=Command)(kernels)
app.command(cls=Command)(verify)
app.command(cls=Command)(recipes)
app.command(cls=Command)(tune)
app.command(cls=Command)(bench)
