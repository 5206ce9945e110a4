"""The version of slimc: read by the package, its files, the command line and the build."""

from __future__ import annotations

__version__ = "0.1.0"
