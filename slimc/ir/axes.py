"""Which axes of which values are one and the same index: what a proof about channels is made of.

An axis is a product of :class:`Index` es, the first of which varies slowest. A view that splits an axis splits its
index; operators that read and write the same position tie axes of different values together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx


@dataclass(eq=False)
class Index:
    """One index, or part of one, that runs along axes of values.

    Attributes:
        size: how many values it takes.
        fixed: why its values must stay in their order, if they must.
    """

    size: int
    fixed: str | None = None
    _now: tuple[Index, ...] = field(default=(), repr=False)

    def parts(self) -> list[Index]:
        """Return what the index consists of by now, slowest first."""
        if not self._now:
            return [self]
        return [part for one in self._now for part in one.parts()]

    def fix(self, reason: str) -> None:
        """Keep the order of its values; the first reason stays."""
        for part in self.parts():
            part.fixed = part.fixed or reason

    def split(self, slower: int) -> None:
        """Take the index apart into one of ``slower`` values and the rest."""
        self._now = (Index(slower, self.fixed), Index(self.size // slower, self.fixed))

    def become(self, other: Index) -> None:
        """Be the same index as ``other``, of equal size."""
        if self.fixed:
            other.fix(self.fixed)
        self._now = (other,)


Axis = list[Index]
"""The indices whose product an axis is; empty: nothing is known of it, and nothing need be."""


def resolved(axis: Iterable[Index]) -> Axis:
    """Return the indices of an axis as they are split by now."""
    return [part for one in axis for part in one.parts()]


def unify(first: Axis, second: Axis) -> bool:
    """Make two axes of equal size the same; return whether their sizes allowed it."""
    left, right = resolved(first), resolved(second)
    while left and right:
        ours, theirs = left.pop(0), right.pop(0)
        if ours is theirs:
            continue
        if ours.size == theirs.size:
            theirs.become(ours)
            # What became another may stand in the remainders, too.
            left, right = resolved(left), resolved(right)
            continue
        larger, smaller = (ours, theirs) if ours.size > theirs.size else (theirs, ours)
        if larger.size % smaller.size:
            return False
        larger.split(smaller.size)
        left, right = resolved([ours, *left]), resolved([theirs, *right])
    return not left and not right


def divide(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Divide an axis into several of the given sizes, or return ``None`` if it does not come apart there."""
    rest, divided = resolved(axis), list[Axis]()
    for size in sizes:
        taken: Axis = []
        while (missing := size // math.prod(one.size for one in taken)) > 1:
            if not rest:
                return None
            if rest[0].size > missing:
                if rest[0].size % missing:
                    return None
                rest[0].split(missing)
                rest = resolved(rest)
            if missing % rest[0].size:
                return None
            taken.append(rest.pop(0))
        divided.append(taken)
    return None if rest else divided


@dataclass(frozen=True)
class Tie:
    """Axes of one value that are, as a product, axes of another.

    Attributes:
        first: a value.
        first_axes: some of its axes, neighbours in order.
        second: another value.
        second_axes: the axes that hold the same elements.
    """

    first: fx.Node
    first_axes: tuple[int, ...]
    second: fx.Node
    second_axes: tuple[int, ...]


class Axes:
    """What is known of the axes of the values of a graph."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, list[Axis]] = {}

    def of(self, node: fx.Node, axis: int) -> Axis:
        """Return the indices along an axis."""
        return resolved(self.known[node][axis]) if node in self.known else []

    def indices(self, node: fx.Node) -> Axis:
        """Return all indices of a value."""
        return [one for axis in self.known.get(node, []) for one in resolved(axis)]

    def set(self, node: fx.Node, axis: int, indices: Axis) -> None:
        """Say what an axis is."""
        shape = sizes(node)
        self.known.setdefault(node, [[] for _ in shape])[axis] = indices

    def apply(self, tie: Tie) -> list[fx.Node]:
        """Carry over what is known of either side to the other; return the values of which more is known now."""
        first = [self.of(tie.first, axis) for axis in tie.first_axes]
        second = [self.of(tie.second, axis) for axis in tie.second_axes]
        if not any(first) and not any(second):
            return []
        learnt = []
        if not any(first):
            learnt = (
                [tie.first] if self._fill(tie.first, tie.first_axes, self._joined(tie.second, tie.second_axes)) else []
            )
        elif not any(second):
            learnt = (
                [tie.second] if self._fill(tie.second, tie.second_axes, self._joined(tie.first, tie.first_axes)) else []
            )
        else:
            ours, theirs = self._joined(tie.first, tie.first_axes), self._joined(tie.second, tie.second_axes)
            if not unify(ours, theirs):
                _fix([*ours, *theirs], f"%{tie.second.name} takes its elements in another order")
        return learnt

    def _joined(self, node: fx.Node, axes: Sequence[int]) -> Axis:
        """Return the product of some axes; of those that nothing is known of, the order is kept."""
        shape, joined = sizes(node), Axis()
        for axis in axes:
            indices = self.of(node, axis)
            size = shape[axis]
            if not indices and size != 1:
                if size is None:
                    return _fix(
                        joined + [one for other in axes for one in self.of(node, other)], _MIXED.format(node.name)
                    )
                indices = [Index(size, _MIXED.format(node.name))]
                self.set(node, axis, indices)
            joined += indices
        return joined

    def _fill(self, node: fx.Node, axes: Sequence[int], joined: Axis) -> bool:
        shape = [sizes(node)[axis] for axis in axes]
        known = [size for size in shape if size is not None]
        parts = divide(joined, known) if len(known) == len(shape) else None
        if parts is None:
            _fix(joined, _MIXED.format(node.name))
            return False
        for axis, part in zip(axes, parts, strict=True):
            self.set(node, axis, part)
        return True


_MIXED = "%{} mixes them with others"


def sizes(node: fx.Node) -> list[int | None]:
    """Return the sizes of a value's axes; those that vary are ``None``."""
    return [int(text) if (text := str(size)).isdigit() else None for size in node.meta["val"].shape]


def _fix(axis: Axis, reason: str) -> Axis:
    for one in axis:
        one.fix(reason)
    return axis
