"""The stable text form of a program: one line a node, for goldens, dumps and people.

A line names the result, its type, the operator with its operands and attributes, and the module it comes from::

    %linear : bf16[s0, s1, 576] = aten.linear(%mul_4, %dequant_nm)        # model.layers.0.self_attn.q_proj
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from slimc.ir.program import Program

_SHORT_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}

_NO_MODULE = "_empty_nn_module_stack"
"""What the exporter writes where it has put a node in itself."""


def text(program: Program) -> str:
    """Return the graph as text. Nodes that nobody reads are left out; equal graphs give equal text."""
    return "\n".join(_Writer().lines(program.graph)) + "\n"


class _Writer:
    """Writes one graph, and numbers what has no stable name of its own.

    The exporter numbers symbolic sizes differently from run to run, and fx never gives the name of an erased node
    away again; both are therefore counted in order of appearance.
    """

    def __init__(self) -> None:
        self.symbols: dict[str, str] = {}
        self.names: dict[fx.Node, str] = {}
        self.taken: set[str] = set()

    def lines(self, graph: fx.Graph) -> Iterator[str]:
        self.taken.update(node.name for node in graph.nodes if node.op == "placeholder")
        for node in graph.nodes:
            if not node.users and node.op in ("get_attr", "call_function") and not node.is_impure():
                continue
            line = self._line(node)
            path = innermost_module(node)
            yield f"{line:<100}  # {path}" if path and node.op != "get_attr" else line

    def _line(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {self._argument(node.args[0])}"
        kind = self._type(node)
        name = self._name(node)
        if node.op == "placeholder":
            return f"{name}{kind} = input"
        if node.op == "get_attr":
            return f"{name}{kind} = @{node.target}"
        arguments = ", ".join(self._argument(argument) for argument in _without_trailing_none(node.args))
        attributes = ", ".join(f"{key}={self._argument(value)}" for key, value in node.kwargs.items())
        return f"{name}{kind} = {operator_name(node)}({arguments})" + (f"{{{attributes}}}" if attributes else "")

    def _name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return f"%{node.name}"
        if node not in self.names:
            base = _base_name(node)
            candidates = itertools.chain([base], (f"{base}_{number}" for number in itertools.count(1)))
            name = next(candidate for candidate in candidates if candidate not in self.taken)
            self.taken.add(name)
            self.names[node] = name
        return f"%{self.names[node]}"

    def _argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._name(value)
        if isinstance(value, list | tuple):
            return f"[{', '.join(self._argument(item) for item in value)}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key}: {self._argument(item)}' for key, item in value.items())}}}"
        return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else repr(value)

    def _type(self, node: fx.Node) -> str:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return ""
        sizes = ", ".join(self._size(size) for size in value.shape)
        return f" : {_SHORT_NAMES.get(value.dtype, str(value.dtype))}[{sizes}]"

    def _size(self, size: Any) -> str:
        name = str(size)
        return name if name.isdigit() else self.symbols.setdefault(name, f"s{len(self.symbols)}")


def operator_name(node: fx.Node) -> str:
    """Return the name of what a node calls, ``aten.linear`` for ``torch.ops.aten.linear.default``."""
    target = node.target
    name = str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    return name.removesuffix(".default")


def _without_trailing_none(args: tuple[Any, ...]) -> tuple[Any, ...]:
    while args and args[-1] is None:
        args = args[:-1]
    return args


def _base_name(node: fx.Node) -> str:
    """Return what a result is called: after its operator, or after the constant that it reads."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket).rpartition(".")[2]
    return re.sub(r"(_\d+)+$", "", node.name)


def innermost_module(node: fx.Node) -> str:
    """Return the path of the module whose code made ``node``; repeated calls (``layer@1``) count as the same module."""
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    return "" if path.startswith(_NO_MODULE) else re.sub(r"@\d+", "", path)
