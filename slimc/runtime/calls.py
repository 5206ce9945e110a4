"""The operators of compiled graphs: layers that are already prepared for their kernels, found by their handles.

The ops of `slimc.runtime.ops` say what a layer computes, these say how: they have no gradients, and a graph with them
cannot be exported. The kernel is chosen at each call, by the number of tokens, so that a graph that is compiled for
any batch runs the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slimc.runtime.prepared import prepared_layer, sibling_layers

__all__ = ["define", "prepared_linear", "run_layers", "sibling_linears"]


def _run_prepared(x: Tensor, handle: Tensor, bias: Tensor | None, *, rows: int, columns: int) -> Tensor:  # noqa: ARG001
    layer = prepared_layer(handle)
    return _without_autocast(x, rows, lambda: layer(x, bias))


def _run_siblings(x: Tensor, handles: Sequence[Tensor], *, rows: int, columns: int) -> Tensor:  # noqa: ARG001
    layers = sibling_layers(handles)
    return _without_autocast(x, rows, lambda: layers(x))


def run_layers(x: Tensor, handles: Sequence[Tensor], rows: int) -> Tensor:
    """Return y [..., rows of all] of x [..., columns] for one layer or several that read the same input; no biases."""
    if len(handles) == 1:
        return _run_prepared(x, handles[0], None, rows=rows, columns=x.shape[-1])
    return _run_siblings(x, handles, rows=rows, columns=x.shape[-1])


def _without_autocast(x: Tensor, rows: int, compute: Callable[[], Tensor]) -> Tensor:
    """Compute in the dtype of x, as the shape inference promises."""
    if not x.numel():
        return x.new_empty((*x.shape[:-1], rows))
    if not torch.is_autocast_enabled(x.device.type):
        return compute()
    with torch.autocast(x.device.type, enabled=False):
        return compute()


def _infer_prepared(x: Tensor, handle: Tensor, bias: Tensor | None, *, rows: int, columns: int) -> Tensor:  # noqa: ARG001
    return _infer(x, rows, columns)


def _infer_siblings(x: Tensor, handles: Sequence[Tensor], *, rows: int, columns: int) -> Tensor:  # noqa: ARG001
    return _infer(x, rows, columns)


def _infer(x: Tensor, rows: int, columns: int) -> Tensor:
    torch._check(  # type: ignore[no-untyped-call]
        x.dim() > 0 and x.shape[-1] == columns, lambda: f"x must be [..., {columns}], not {tuple(x.shape)}"
    )
    return x.new_empty((*x.shape[:-1], rows))


def define(name: str, schema: str, run: Callable[..., Any], infer: Callable[..., Any]) -> None:
    """Define an operator of compiled graphs: what it computes, and the shapes that it returns."""
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd", run)
    torch.library.register_fake(name, infer)


define(
    "slim::prepared_linear",
    "(Tensor x, Tensor handle, Tensor? bias, *, int rows, int columns) -> Tensor",
    _run_prepared,
    _infer_prepared,
)
define(
    "slim::sibling_linears",
    "(Tensor x, Tensor[] handles, *, int rows, int columns) -> Tensor",
    _run_siblings,
    _infer_siblings,
)

prepared_linear = torch.ops.slim.prepared_linear.default
"""y [..., rows] of x [..., columns] for the layer of a handle."""

sibling_linears = torch.ops.slim.sibling_linears.default
"""y [..., rows of all] of x [..., columns] for layers that read the same input, without their biases."""
