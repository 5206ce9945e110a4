"""What the nodes of Dynamo's graph are asked when a part of it is looked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

__all__ = ["MismatchError", "as_node", "example_of", "is_call", "is_method", "require"]


class MismatchError(Exception):
    """The graph is not what is looked for; who looks catches it, and leaves the graph as it is."""


def require(holds: bool) -> None:
    """Raise `MismatchError` unless a condition holds."""
    if not holds:
        raise MismatchError


def as_node(node: Any) -> fx.Node:
    """Return a node; an argument that is none, such as a number, is a mismatch."""
    if not isinstance(node, fx.Node):
        raise MismatchError
    return node


def example_of(node: Any) -> Tensor:
    """Return the fake tensor that Dynamo saw as the value of a node."""
    example = as_node(node).meta.get("example_value")
    if not isinstance(example, Tensor):
        raise MismatchError
    return example


def is_call(node: Any, target: Callable[..., Any]) -> bool:
    """Whether a node calls a function."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def is_method(node: Any, name: str, *rest: Any) -> bool:
    """Whether a node calls a method, with these arguments if any are given."""
    if not isinstance(node, fx.Node) or node.op != "call_method" or node.target != name:
        return False
    return not rest or tuple(node.args[1:]) == rest
