"""Every error that slimc raises on purpose.

A message says what happened, where, and what to do about it. The command line prints it without a
traceback and exits with ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SlimError(Exception):
    """Base of all slimc errors; ``exit_code`` is what the command line exits with."""

    exit_code = 2


class InputError(SlimError):
    """What the user handed in (a model, a text, a batch, a path) cannot be used."""


class RecipeError(SlimError):
    """A recipe, a pass or the order of the passes is not valid."""


class CaptureError(SlimError):
    """``torch.export`` could not turn the model into a graph, or nothing in it can be compressed."""


class VerifyError(SlimError):
    """The graph broke one of the rules that hold between passes; this is a bug in a pass."""

    exit_code = 1


class NumericsError(SlimError):
    """NaN or Inf appeared in weights or activations."""


class FormatError(SlimError):
    """A file is truncated, malformed, hostile, or of a version that this slimc cannot read."""


class ResumeError(SlimError):
    """A journal does not belong to the run that wants to resume from it."""


class KernelError(SlimError):
    """A CUDA kernel cannot be compiled, loaded or launched on this machine."""


def closest(word: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice most like ``word``, or an empty string."""
    matches = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
