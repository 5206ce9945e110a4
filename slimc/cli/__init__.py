"""The ``slimc`` command. Results go to standard output; progress, notes and errors to standard error.

The commands import what they need when they run, so that ``slimc --help`` answers at once.
"""

from __future__ import annotations

from slimc.cli.app import app, main
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

app.command()(compress)
app.command()(plan)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(inspect)
app.command()(export)
app.command()(kernels)
app.command()(verify)
app.command()(recipes)
app.command()(tune)
app.command()(bench)
