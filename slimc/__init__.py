"""slimc makes large language models small and fast without retraining.

>>> import slimc
>>> small = slimc.compile(model, calibration=batches)          # doctest: +SKIP
>>> slimc.save(small, "out/"); small = slimc.load("out/")       # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimc.version import __version__

if TYPE_CHECKING:
    from slimc.api import (
        compile,  # noqa: A004 - slimc.compile, like torch.compile
        explain,
        export_hf,
        export_onnx,
        load,
        plan,
        report,
        save,
        sensitivities,
        tune,
    )

__all__ = [
    "__version__",
    "compile",
    "explain",
    "export_hf",
    "export_onnx",
    "load",
    "plan",
    "report",
    "save",
    "sensitivities",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import the public functions when they are first asked for: the command line's help needs no torch."""
    if name in __all__:
        from slimc import api

        return getattr(api, name)
    raise AttributeError(f"module 'slimc' has no attribute '{name}'")


def __dir__() -> list[str]:
    """List the public names, those that are not imported yet too."""
    return sorted(__all__)
