"""Patterns of sites' names, as recipes and the command line write them."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from slimc.errors import RecipeError


def matches(pattern: str, name: str) -> bool:
    """Tell whether ``pattern`` names ``name``: by shell wildcards, or as a regular expression after ``re:``.

    Raises:
        RecipeError: what follows ``re:`` is no regular expression.
    """
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise RecipeError(f"'{pattern}' is not a regular expression: {error}.") from error
