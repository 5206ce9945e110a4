"""The door to transformers: imported when first needed, kept quiet, its errors explained."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slimc.errors import FormatError, InputError, SlimError


def require(package: str, purpose: str) -> Any:
    """Import and return ``package``, or raise an InputError that says why it is needed.

    It is returned untyped: its annotations differ from one release to the next.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{purpose} needs the package {package}: pip install 'slimc[hf]'")
    return importlib.import_module(package)


def transformers() -> Any:
    """Import and return transformers."""
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
    try:
        with quiet():
            yield
    except (SlimError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:400]
        raise FormatError(f"{source}: transformers {transformers().__version__} cannot open it: {reason}") from error
