"""Rewrite rules: a pattern, a check that gives its reasons, and a rewrite. The docstring is the equation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from slimc.ir.match import Match, Pattern, Refusal, match
from slimc.ir.program import Program

_CARRIED_METADATA = ("val", "nn_module_stack", "stack_trace", "source_fn_stack")


class Rule:
    """One rewrite. Rules hold no state; arithmetic on weights happens in passes, never here."""

    benefit: ClassVar[int] = 1
    """Rules of higher benefit are tried first."""

    def pattern(self) -> Pattern:
        """Return what the rule looks for, root first."""
        raise TypeError(f"{type(self).__name__} has no pattern")

    def check(self, found: Match) -> None:
        """Refuse a match that fits in form only, with ``found.require(condition, reason)``."""

    def rewrite(self, graph: fx.Graph, found: Match) -> fx.Node:
        """Insert and return the node that takes the place of ``found.root``."""
        raise TypeError(f"{type(self).__name__} has no rewrite")


@dataclass(frozen=True)
class Miss:
    """A place where a rule almost applied, and why it did not."""

    rule: str
    node: str
    reason: str


def apply_rules(program: Program, rules: Sequence[Rule], *, fuel: int | None = None) -> int:
    """Apply ``rules`` until none matches or ``fuel`` applications are made; return how many there were.

    New nodes take the place, the metadata and the name of the rule (``meta["slim_rule"]``); what nobody reads any more is
    removed. A second call changes nothing.
    """
    applied = 0
    for rule in sorted(rules, key=lambda rule: -rule.benefit):
        for node in list(program.graph.nodes):
            if node._erased or (fuel is not None and applied >= fuel):
                continue
            found = _try(rule, node)
            if isinstance(found, Match):
                _replace(program.graph, rule, found)
                applied += 1
    program.graph.eliminate_dead_code()
    program.module.recompile()
    return applied


def explain(program: Program, rule: Rule) -> list[Miss]:
    """Return the places where the root of ``rule`` fits but the rule does not apply, each with its reason."""
    return [
        Miss(type(rule).__name__, node.name, found.reason)
        for node, found in ((node, _try(rule, node)) for node in program.graph.nodes)
        if isinstance(found, Refusal) and found.node is not node
    ]


def _try(rule: Rule, node: fx.Node) -> Match | Refusal:
    try:
        found = match(rule.pattern(), node)
        rule.check(found)
    except Refusal as refusal:
        return refusal
    return found


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
