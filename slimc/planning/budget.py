"""Budgets as people write them: ``"3.2bpw"``, ``"45MB"``, ``"0.25x"``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from slimc.errors import RecipeError

_BYTES: Mapping[str, float] = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_MICROSECONDS: Mapping[str, float] = {"us": 1.0, "ms": 1e3}
_FORMS = (
    "3.2bpw (bits a weight), 45MB (or kB, GB, MiB, GiB) or 0.25x (of what they take now); for a target in time 2ms, "
    "800us or 0.5x"
)


@dataclass(frozen=True)
class Budget:
    """What the planned layers may take, all together.

    Attributes:
        amount: in ``unit``.
        unit: ``"bpw"``, ``"x"``, or one of bytes or of time.
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: object) -> Budget:
        """Read a budget.

        Raises:
            RecipeError: it is none; the message shows the forms.
        """
        matched = (
            re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([A-Za-z%]+)\s*", text) if isinstance(text, str) else None
        )
        units = {unit.lower(): unit for unit in ("bpw", "x", *_BYTES, *_MICROSECONDS)}
        if matched is None or matched[2].lower() not in units or not float(matched[1]):
            raise RecipeError(f"'{text}' is no budget; write {_FORMS}")
        return cls(float(matched[1]), units[matched[2].lower()])

    @property
    def is_time(self) -> bool:
        """Whether it can only be a time."""
        return self.unit in _MICROSECONDS

    @property
    def in_bytes(self) -> bool:
        """Whether it can only be a size."""
        return self.unit == "bpw" or self.unit in _BYTES

    def nbytes(self, weights: int, dense: float) -> float:
        """Return the bytes that it allows for layers of ``weights`` weights, which take ``dense`` bytes as they are."""
        if self.unit == "bpw":
            return self.amount * weights / 8
        return self.amount * (dense if self.unit == "x" else _BYTES[self.unit])

    def microseconds(self, dense: float) -> float:
        """Return the time that it allows for layers that take ``dense`` microseconds as they are."""
        return self.amount * (dense if self.unit == "x" else _MICROSECONDS[self.unit])

    def __str__(self) -> str:
        """As it is written: :meth:`parse` reads the same budget from it."""
        return f"{Decimal(repr(self.amount)).normalize():f}{self.unit}"
