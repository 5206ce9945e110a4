"""Rewrite rules: a pattern, a check that gives its reasons, and a rewrite. The docstring is the equation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from slimc.ir.match import Match, Miss, Pattern, RefusedError, matches
from slimc.ir.program import Program

_CARRIED_METADATA = ("val", "nn_module_stack", "stack_trace", "source_fn_stack")


class Rule(ABC):
    """One rewrite. Rules hold no state; arithmetic on weights happens in passes, never here."""

    benefit: ClassVar[int] = 1
    """Rules of higher benefit are tried first."""

    near: ClassVar[int] = 2
    """How many calls must fit for a place to be worth explaining; fewer are found all over a graph."""

    @abstractmethod
    def pattern(self) -> Pattern:
        """Return what the rule looks for, root first."""

    @abstractmethod
    def check(self, found: Match) -> None:
        """Refuse a match that fits in form only, with ``found.require(condition, reason)``."""

    @abstractmethod
    def rewrite(self, graph: fx.Graph, found: Match) -> fx.Node:
        """Insert and return the node that takes the place of ``found.root``."""


@dataclass(frozen=True)
class NearMiss:
    """A place where a rule almost applied, and why it did not."""

    rule: str
    node: str
    reason: str


def apply_rules(program: Program, rules: Sequence[Rule], *, fuel: int | None = None) -> int:
    """Apply ``rules`` until none matches or ``fuel`` applications are made; return how many there were.

    A new node takes the place and the metadata of the root, and the name of its rule (``meta["slim_rule"]``); what
    nobody reads any more is removed. A second call changes nothing.
    """
    ordered = sorted(rules, key=lambda rule: -rule.benefit)
    applied = 0
    while (fuel is None or applied < fuel) and (found := _one_round(program, ordered, fuel, applied)):
        applied += found
    program.graph.eliminate_dead_code()
    program.module.recompile()
    return applied


def explain(program: Program, rule: Rule) -> list[NearMiss]:
    """Return the places where ``rule`` almost applies, each with the reason why it does not."""
    nearest = ((node, _try(rule, node)) for node in program.graph.nodes)
    return [
        NearMiss(type(rule).__name__, node.name, miss.reason)
        for node, miss in nearest
        if isinstance(miss, Miss) and miss.depth >= rule.near
    ]


def _one_round(program: Program, rules: Iterable[Rule], fuel: int | None, spent: int) -> int:
    """Offer every node of the graph to every rule once; return the number of applications."""
    applied = 0
    for rule in rules:
        for node in list(program.graph.nodes):
            if fuel is not None and spent + applied >= fuel:
                return applied
            found = None if node._erased else _try(rule, node)
            if isinstance(found, Match):
                _replace(program.graph, rule, found)
                applied += 1
    return applied


def _try(rule: Rule, node: fx.Node) -> Match | Miss:
    """Return the first match that the rule accepts, or the miss that came nearest."""
    misses: list[Miss] = []
    for found in matches(rule.pattern(), node, misses):
        try:
            rule.check(found)
        except RefusedError as refusal:
            misses.append(Miss(str(refusal), len(found.covered) + 1))
        else:
            return found
    return max(misses, key=lambda miss: miss.depth)


def _replace(graph: fx.Graph, rule: Rule, found: Match) -> None:
    root = found.root
    with graph.inserting_before(root):
        node = rule.rewrite(graph, found)
    for key in _CARRIED_METADATA:
        if key in root.meta:
            node.meta[key] = root.meta[key]
    node.meta["slim_rule"] = type(rule).__name__
    root.replace_all_uses_with(node)
    for covered in _readers_first(found.covered):
        if not covered.users:
            graph.erase_node(covered)


def _readers_first(nodes: Sequence[fx.Node]) -> Iterator[fx.Node]:
    yield from sorted(set(nodes), reverse=True)
