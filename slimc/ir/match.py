"""Patterns over fx graphs: what a rule looks for, and why it did not find it.

Arguments are compared by the names of the operator's schema, so positional, keyword and defaulted arguments are the
same thing. Equal names bind equal nodes. Interior nodes of a match must have no reader outside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx
from torch._ops import OpOverload

from slimc.ir.text import operator_name


class RefusedError(Exception):
    """A match that fits in form only: what a check that does not hold raises."""


@dataclass(frozen=True)
class Miss:
    """Why a pattern or a check did not hold, and how many calls had matched by then."""

    reason: str
    depth: int


@dataclass(frozen=True)
class Anything:
    """Matches any value and binds it to ``name``."""

    name: str


@dataclass(frozen=True)
class Call:
    """Matches a call of one of ``targets`` whose arguments match ``arguments`` (those not named may be anything).

    ``commutes`` names two arguments that are tried both ways round. ``name`` binds the node itself. A ``shareable``
    call may have readers outside the match: it is cheap to do again, so it stays for them.
    """

    targets: tuple[OpOverload, ...]
    arguments: Mapping[str, Pattern] = field(default_factory=dict)
    name: str | None = None
    commutes: tuple[str, str] | None = None
    shareable: bool = False


@dataclass(frozen=True)
class OneOf:
    """Matches what any of several patterns does; earlier ones are tried first."""

    patterns: tuple[Pattern, ...]


Pattern = Anything | Call | OneOf


@dataclass(frozen=True)
class Match:
    """What a pattern found: ``bound`` values by name, the nodes it covers, and its root."""

    root: fx.Node
    bound: Mapping[str, Any] = field(default_factory=dict)
    covered: tuple[fx.Node, ...] = ()
    shareable: frozenset[fx.Node] = frozenset()

    def __getitem__(self, name: str) -> Any:
        """Return the value bound to ``name``, or ``None``."""
        return self.bound.get(name)

    def require(self, condition: bool, reason: str) -> None:
        """Refuse the match with ``reason`` unless ``condition`` holds."""
        if not condition:
            raise RefusedError(reason)


def matches(pattern: Pattern, node: fx.Node, misses: list[Miss]) -> Iterator[Match]:
    """Yield every way in which ``pattern`` matches with ``node`` as its root; add to ``misses`` where it stopped."""
    for found in _solve(pattern, node, Match(node), misses):
        reader = _outside_reader(found)
        if reader is None:
            yield found
        else:
            misses.append(Miss(reader, len(found.covered)))


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by schema name, defaults included."""
    if not isinstance(node.target, OpOverload):
        return {}
    schema = node.target._schema.arguments
    values = {one.name: one.default_value for one in schema if one.has_default_value()}
    return values | dict(zip((one.name for one in schema), node.args, strict=False)) | dict(node.kwargs)


def _outside_reader(found: Match) -> str | None:
    for covered in found.covered:
        if covered is found.root or covered in found.shareable:
            continue
        outside = [user for user in covered.users if user not in found.covered]
        if outside:
            return f"%{covered.name} is used elsewhere, by %{outside[0].name}"
    return None


def _solve(pattern: Pattern, value: Any, found: Match, misses: list[Miss]) -> Iterator[Match]:
    """Yield each extension of ``found`` in which ``pattern`` matches ``value``."""
    if isinstance(pattern, Anything):
        yield from _bind(pattern.name, value, found, misses)
    elif isinstance(pattern, OneOf):
        for one in pattern.patterns:
            yield from _solve(one, value, found, misses)
    else:
        yield from _solve_call(pattern, value, found, misses)


def _solve_call(pattern: Call, value: Any, found: Match, misses: list[Miss]) -> Iterator[Match]:
    if not isinstance(value, fx.Node) or value.target not in pattern.targets:
        wanted = " or ".join(str(target).removesuffix(".default") for target in pattern.targets)
        misses.append(Miss(f"expected {wanted}, found {_described(value)}", len(found.covered)))
        return
    shareable = found.shareable | {value} if pattern.shareable else found.shareable
    found = replace(found, covered=(*found.covered, value), shareable=shareable)
    given = arguments(value)
    orders = [pattern.arguments]
    if pattern.commutes:
        first, second = pattern.commutes
        orders.append({**pattern.arguments, first: pattern.arguments[second], second: pattern.arguments[first]})
    for named in _bind(pattern.name, value, found, misses) if pattern.name else (found,):
        for order in orders:
            pairs = [(inner, given.get(name)) for name, inner in order.items()]
            yield from _solve_all(pairs, named, misses)


def _solve_all(pairs: Sequence[tuple[Pattern, Any]], found: Match, misses: list[Miss]) -> Iterator[Match]:
    if not pairs:
        yield found
        return
    (pattern, value), *rest = pairs
    for extended in _solve(pattern, value, found, misses):
        yield from _solve_all(rest, extended, misses)


def _bind(name: str, value: Any, found: Match, misses: list[Miss]) -> Iterator[Match]:
    if name in found.bound and found.bound[name] is not value:
        reason = f"'{name}' is {_described(found.bound[name])} in one place and {_described(value)} in another"
        misses.append(Miss(reason, len(found.covered)))
        return
    yield replace(found, bound={**found.bound, name: value})


def _described(value: Any) -> str:
    if not isinstance(value, fx.Node):
        return repr(value)
    return f"%{value.name} ({operator_name(value)})" if value.op == "call_function" else f"%{value.name}"
