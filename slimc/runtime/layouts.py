"""Layouts that take the place of the canonical tensors: one form of a weight on a device, and the way back.

A kernel wants the packed tensors in an order of its own. Where that order holds the same information, keeping both
would only take memory, so a layer lets go of the canonical tensors and makes them again, exactly, for whoever asks.
Layers that read the same input may share one set of tensors, in which each of them has a part.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from slimc.errors import FormatError
from slimc.runtime.formats import LinearFormat
from slimc.runtime.packing import PackedLinear
from slimc.runtime.select import Kernel

__all__ = ["Formats", "Layout", "Resident", "layout_of", "register_layout"]

Formats = tuple[LinearFormat, ...]


@dataclass(frozen=True)
class Layout:
    """An order of the packed tensors that some kernels share.

    Kernels of the layout are those whose ``prepare`` is this one's; their state is what `assemble` returns.

    Attributes:
        name: of the layout, unique.
        prepare: makes the kernels' state from the canonical tensors of one layer.
        tensors: the tensors of a state, or of that of a stack, that must be kept, by name; all on the layer's device.
        assemble: makes the state of a part again, given the formats of all parts and the tensors.
        restore: makes the canonical tensors of a part; they share no memory with the tensors given. It inverts
            ``prepare`` for every weight that `PackedLinear.from_tensors` accepts.
    """

    name: str
    prepare: Callable[[PackedLinear], Any]
    tensors: Callable[[Any], dict[str, Tensor]]
    assemble: Callable[[Formats, Mapping[str, Tensor], int], Any]
    restore: Callable[[Formats, Mapping[str, Tensor], int], PackedLinear]


_layouts: dict[str, Layout] = {}


def register_layout(layout: Layout) -> Layout:
    """Make a layout known to layers and graphs by its name; return it."""
    _layouts[layout.name] = layout
    return layout


def layout_of(kernel: Kernel | None) -> Layout | None:
    """Return the layout whose state a kernel runs on, or None if that state takes the place of nothing."""
    if kernel is None:
        return None
    return next((layout for layout in _layouts.values() if layout.prepare is kernel.prepare), None)


@dataclass(eq=False)
class Resident:
    """What a layer holds instead of its canonical tensors: a part of the tensors of a layout.

    Attributes:
        layout: the order.
        formats: of all layers that share the tensors.
        part: which of them is this one.
        tensors: of all of them, by name.
        state: of the part, for the kernels.
        attributes: what ``slim::restore`` needs to know beside the tensors.
    """

    layout: Layout
    formats: Formats
    part: int
    tensors: dict[str, Tensor]
    state: Any
    attributes: dict[str, str | int] = field(init=False)

    def __post_init__(self) -> None:
        """Write the attributes down: while a graph is traced there is no JSON."""
        self.attributes = {
            "layout": self.layout.name,
            "names": ",".join(self.tensors),
            "formats": json.dumps([form.to_json() for form in self.formats], separators=(",", ":")),
            "part": self.part,
        }

    def restore(self) -> PackedLinear:
        """Make the canonical tensors of the part."""
        return self.layout.restore(self.formats, self.tensors, self.part)

    def __deepcopy__(self, memo: dict[int, Any]) -> Resident:
        """Copy the tensors, shared ones once, and derive the state anew: it may hold addresses."""
        copies = copy.deepcopy(list(self.tensors.values()), memo)
        tensors = dict(zip(self.tensors, copies, strict=True))
        state = self.layout.assemble(self.formats, tensors, self.part)
        return Resident(self.layout, self.formats, self.part, tensors, state)


@cache
def _parse(formats: str) -> Formats:
    return tuple(LinearFormat.from_json(form) for form in json.loads(formats))


@torch.library.custom_op(
    "slim::restore",
    mutates_args=(),
    schema="(Tensor[] tensors, *, str layout, str names, str formats, int part) -> Tensor[]",
)
def restore(tensors: Sequence[Tensor], *, layout: str, names: str, formats: str, part: int) -> list[Tensor]:
    """Return the canonical tensors of a part of the tensors of a layout, in the order of the format's specs.

    For graphs that are traced from layers that hold a layout, and must not depend on them.

    Args:
        tensors: of all parts.
        layout: name of the layout.
        names: of the tensors, with commas between.
        formats: of all parts, as JSON.
        part: whose to return.
    """
    if layout not in _layouts:
        raise FormatError(f"this process knows no layout {layout!r}; import slimc.backends before the graph runs")
    named = dict(zip(names.split(","), tensors, strict=True))
    made = _layouts[layout].restore(_parse(formats), named, part).tensors()
    return [made[name] for name in _parse(formats)[part].tensor_specs()]


@restore.register_fake
def _infer_restore(tensors: Sequence[Tensor], *, formats: str, part: int, **_order: str) -> list[Tensor]:
    specs = _parse(formats)[part].tensor_specs().values()
    return [tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in specs]
