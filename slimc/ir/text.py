"""The stable text form of a program: one line a node, for goldens, dumps and people.

    %linear : bf16[s0, s1, 576] = aten.linear(%mul_4, %dequant_nm)        # model.layers.0.self_attn.q_proj
"""

from __future__ import annotations

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


def text(program: Program) -> str:
    """Return the graph as text. Nodes that nobody reads are left out; equal graphs give equal text."""
    return "\n".join(_lines(program.graph)) + "\n"


def _lines(graph: fx.Graph) -> Iterator[str]:
    symbols: dict[str, str] = {}
    for node in graph.nodes:
        if not node.users and node.op in ("get_attr", "call_function") and not node.is_impure():
            continue
        line = _line(node, symbols)
        path = _module_path(node)
        yield f"{line:<100}  # {path}" if path and node.op != "get_attr" else line


def _line(node: fx.Node, symbols: dict[str, str]) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    kind = _type(node, symbols)
    if node.op == "placeholder":
        return f"%{node.name}{kind} = input"
    if node.op == "get_attr":
        return f"%{node.name}{kind} = @{node.target}"
    arguments = ", ".join(_argument(argument) for argument in _without_trailing_none(node.args))
    attributes = ", ".join(f"{key}={_argument(value)}" for key, value in node.kwargs.items())
    return f"%{node.name}{kind} = {operator_name(node)}({arguments})" + (f"{{{attributes}}}" if attributes else "")


def operator_name(node: fx.Node) -> str:
    """Return the name of what a node calls, ``aten.linear`` for ``torch.ops.aten.linear.default``."""
    target = node.target
    name = str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    return name.removesuffix(".default")


def _without_trailing_none(args: tuple[Any, ...]) -> tuple[Any, ...]:
    while args and args[-1] is None:
        args = args[:-1]
    return args


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_argument(item)}' for key, item in value.items())}}}"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else repr(value)


def _type(node: fx.Node, symbols: dict[str, str]) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    sizes = ", ".join(_size(size, symbols) for size in value.shape)
    return f" : {_SHORT_NAMES.get(value.dtype, str(value.dtype))}[{sizes}]"


def _size(size: Any, symbols: dict[str, str]) -> str:
    """Name symbolic sizes s0, s1... in order of appearance: the exporter's own numbers change from run to run."""
    if isinstance(size, int):
        return str(size)
    return symbols.setdefault(str(size), f"s{len(symbols)}")


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""
