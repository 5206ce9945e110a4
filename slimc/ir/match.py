"""Patterns over fx graphs: what a rule looks for, and why it did not find it.

Arguments are compared by the names of the operator's schema, so positional, keyword and defaulted arguments are the same thing.
Equal names bind equal nodes. Interior nodes of a match must have no reader outside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch._ops import OpOverload

from slimc.ir.text import operator_name


class Refusal(Exception):
    """A pattern or a check that did not hold; ``node`` is where."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


@dataclass(frozen=True)
class Anything:
    """Matches any value and binds it to ``name``; with ``attribute``, only a constant of that name (its last part)."""

    name: str
    attribute: str | None = None


@dataclass(frozen=True)
class Call:
    """Matches a call of one of ``targets`` whose arguments match ``arguments`` (those not named may be anything).

    ``commutes`` names two arguments that are tried both ways round. ``name`` binds the node itself. A ``shareable`` call may have
    readers outside the match: it is cheap to do again, so it stays for them.
    """

    targets: tuple[OpOverload, ...]
    arguments: Mapping[str, Pattern] = field(default_factory=dict)
    name: str | None = None
    commutes: tuple[str, str] | None = None
    shareable: bool = False


@dataclass(frozen=True)
class OneOf:
    """Matches the first of several patterns that does."""

    patterns: tuple[Pattern, ...]


Pattern = Anything | Call | OneOf


@dataclass
class Match:
    """What a pattern found: ``bound`` values by name, the nodes it covers, and its root."""

    root: fx.Node
    bound: dict[str, Any] = field(default_factory=dict)
    covered: list[fx.Node] = field(default_factory=list)
    shareable: set[fx.Node] = field(default_factory=set)

    def __getitem__(self, name: str) -> Any:
        """Return the value bound to ``name``, or ``None``."""
        return self.bound.get(name)

    def require(self, condition: bool, reason: str, node: fx.Node | None = None) -> None:
        """Refuse the match with ``reason`` unless ``condition`` holds."""
        if not condition:
            raise Refusal(reason, node or self.root)


def match(pattern: Pattern, node: fx.Node) -> Match:
    """Match ``pattern`` with ``node`` as its root.

    Raises:
        Refusal: saying where the pattern stopped fitting.
    """
    found = Match(node)
    _match(pattern, node, found)
    for covered in found.covered:
        outside = [user for user in covered.users if user not in found.covered]
        if covered is not node and outside and covered not in found.shareable:
            raise Refusal(f"%{covered.name} is used elsewhere, by %{outside[0].name}", covered)
    return found


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by schema name, defaults included."""
    if not isinstance(node.target, OpOverload):
        return {}
    schema = node.target._schema.arguments
    values = {one.name: one.default_value for one in schema if one.has_default_value()}
    return values | dict(zip((one.name for one in schema), node.args, strict=False)) | dict(node.kwargs)


def _match(pattern: Pattern, value: Any, found: Match) -> None:
    if isinstance(pattern, Anything):
        _require_attribute(pattern.attribute, value, found)
        _bind(pattern.name, value, found)
    elif isinstance(pattern, OneOf):
        _first_that_fits([lambda one=one: _match(one, value, found) for one in pattern.patterns], found)
    else:
        _match_call(pattern, value, found)


def _match_call(pattern: Call, value: Any, found: Match) -> None:
    wanted = " or ".join(str(target).removesuffix(".default") for target in pattern.targets)
    if not isinstance(value, fx.Node) or value.op != "call_function":
        raise Refusal(f"expected {wanted}, found {value!r}", found.root)
    if value.target not in pattern.targets:
        raise Refusal(f"expected {wanted}, found {operator_name(value)}", value)
    found.covered.append(value)
    if pattern.shareable:
        found.shareable.add(value)
    if pattern.name:
        _bind(pattern.name, value, found)
    given = arguments(value)
    orders = [pattern.arguments]
    if pattern.commutes:
        first, second = pattern.commutes
        orders.append({**pattern.arguments, first: pattern.arguments[second], second: pattern.arguments[first]})
    _first_that_fits([lambda order=order: _match_arguments(order, given, found) for order in orders], found)


def _match_arguments(wanted: Mapping[str, Pattern], given: Mapping[str, Any], found: Match) -> None:
    for name, inner in wanted.items():
        _match(inner, given.get(name), found)


def _first_that_fits(attempts: Sequence[Callable[[], None]], found: Match) -> None:
    """Run the attempts until one does not refuse; undo what a refused one had bound."""
    refusals = []
    for attempt in attempts:
        bound, covered = dict(found.bound), list(found.covered)
        try:
            attempt()
            return
        except Refusal as refusal:
            refusals.append(refusal)
            found.bound, found.covered = bound, covered
    raise refusals[-1]


def _require_attribute(name: str | None, value: Any, found: Match) -> None:
    if name is None:
        return
    constant = isinstance(value, fx.Node) and value.op == "get_attr"
    if not constant or not str(value.target).endswith(name):
        raise Refusal(f"expected the constant '{name}', found {value}", found.root)


def _bind(name: str, value: Any, found: Match) -> None:
    if name in found.bound and found.bound[name] is not value:
        raise Refusal(f"'{name}' is {found.bound[name]} in one place and {value} in another", found.root)
    found.bound[name] = value
