"""The door to transformers: imported when first needed, kept quiet, its errors explained."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from typing import Any

import torch

from slimc.errors import FormatError, InputError, SlimError


def require(package: str, purpose: str, *, extra: str = "hf") -> Any:
    """Import and return ``package``, or raise an InputError that says why it is needed and which extra brings it.

    It is returned untyped: its annotations differ from one release to the next.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{purpose} needs the package {package}: pip install 'slimc[{extra}]'")
    return importlib.import_module(package)


def transformers() -> Any:
    """Import and return transformers."""
    # PyTorch notes which functions make tensors when a device is first used as a context. transformers may be the first
    # to do so, with torch.linspace replaced; for the rest of the process the meta device would then miss it.
    with torch.device("meta"):
        torch.empty(0)
    return require("transformers", "working with a Hugging Face model")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from logging, and from drawing progress bars where there is no terminal."""
    logging = transformers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def explained(source: object) -> Iterator[None]:
    """Turn whatever transformers raises about ``source`` into a FormatError that names it."""
    # Some progress bars listen to no setting; they draw on whatever standard error is when they start.
    unheard: AbstractContextManager[object] = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with quiet(), unheard:
            yield
    except (SlimError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise FormatError(f"{source}: transformers {transformers().__version__} cannot open it: {reason}") from error
