"""Layouts that take the place of the canonical tensors: one form of a weight on a device, and the way back.

A kernel wants the packed tensors in an order of its own. Where that order holds the same information, keeping both
would only take memory, so a layer lets go of the canonical tensors and makes them again, exactly, for whoever asks.
Layers that read the same input may share one set of tensors, in which each of them has a part.

Traced, a layer in such a layout is one ``slim::resident_linear`` node over the tensors that it holds. Nodes of layers
that share them name the same tensors, which is how a backend finds calls that can be merged.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from slimc.errors import FormatError
from slimc.runtime.formats import LinearFormat
from slimc.runtime.ops import apply_packed
from slimc.runtime.packing import PackedLinear
from slimc.runtime.select import Kernel, choose, token_bucket

__all__ = [
    "WHOLE",
    "Layout",
    "Resident",
    "formats_text",
    "layout_of",
    "part_rows",
    "register_layout",
    "run_on",
    "usable_bias",
]

WHOLE = -1
"""In the place of the number of a part: all of them, one above the other."""

Formats = tuple[LinearFormat, ...]


@dataclass(frozen=True)
class Layout:
    """An order of the packed tensors that some kernels share.

    Kernels of the layout are those whose ``prepare`` is this one's; their state is what `assemble` returns.

    Attributes:
        name: of the layout, unique.
        prepare: makes the kernels' state from the canonical tensors of one layer.
        tensors: the tensors of a state that must be kept, by name; all on the layer's device.
        assemble: makes the state of a part again, given the formats of all parts and the tensors.
        restore: makes the canonical tensors of a part; they share no memory with the tensors given. It inverts
            ``prepare`` for every weight that `PackedLinear.from_tensors` accepts.
        stack: makes one state of the states of several layers, in their order; its tensors have them as parts. It
            raises `KernelError` with the reason if these cannot be stacked. None if no layers can.
    """

    name: str
    prepare: Callable[[PackedLinear], Any]
    tensors: Callable[[Any], dict[str, Tensor]]
    assemble: Callable[[Formats, Mapping[str, Tensor], int], Any]
    restore: Callable[[Formats, Mapping[str, Tensor], int], PackedLinear]
    stack: Callable[[Sequence[Any]], Any] | None = None


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


def usable_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bias as kernels take it: in the dtype of x, one entry after another."""
    return bias if bias.dtype == dtype and bias.is_contiguous() else bias.detach().to(dtype).contiguous()


def run_on(kernel: Kernel, device: torch.device) -> Callable[[Tensor, Any, Tensor | None], Tensor]:
    """Return a kernel's ``run``, with the layer's GPU made the current one where there are several."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return kernel.run

    def run(x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        with torch.cuda.device(device):
            return kernel.run(x, state, bias)

    return run


@dataclass(eq=False)
class Resident:
    """What a layer holds instead of its canonical tensors: a part of the tensors of a layout.

    Attributes:
        layout: the order.
        formats: of all parts.
        part: which of them is the layer's, or `WHOLE`.
        tensors: of all parts, by name.
        state: of the part, for the kernels.
        kernels: the table to choose from; without one the part is restored and computed by the reference op.
        whole: all parts together, which a merged call runs; None if there is only one.
        bias: of all parts, in the order of their rows, if ``whole`` is not None and a part has one.
    """

    layout: Layout
    formats: Formats
    part: int
    tensors: dict[str, Tensor]
    state: Any
    kernels: tuple[Kernel, ...] = ()
    whole: Resident | None = None
    bias: Tensor | None = None
    _chosen: dict[tuple[torch.dtype, int], Kernel | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Let calls from graphs find this by its tensors."""
        # Whoever holds a tensor alive keeps others from its address, so an address in this table is never stale.
        _residents[_place(self.tensors.values(), self.part)] = self

    @property
    def format(self) -> LinearFormat:
        """The canonical format of the part; that of a whole is one that its kernels know."""
        if self.part != WHOLE:
            return self.formats[self.part]
        whole: LinearFormat = self.state.format
        return whole

    @property
    def row_range(self) -> tuple[int, int]:
        """The first row of the part, and the row after its last."""
        return _row_range(self.formats, self.part)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    def use_kernels(self, kernels: tuple[Kernel, ...]) -> None:
        """Choose from this table from now on."""
        for one in (self, self.whole):
            if one is not None:
                one.kernels, one._chosen = kernels, {}

    def restore(self) -> PackedLinear:
        """Make the canonical tensors of the part."""
        return self.layout.restore(self.formats, self.tensors, self.part)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute y [..., rows of the part] from x [..., columns]; ``bias`` is that of the part."""
        tokens = token_bucket(max(x.numel() // max(x.shape[-1], 1), 1))
        case = (x.dtype, tokens)
        if case not in self._chosen:
            own = [kernel for kernel in self.kernels if layout_of(kernel) is self.layout]
            self._chosen[case] = choose(own, self.format, x.dtype, self.device, tokens)[0]
        kernel = self._chosen[case]
        if kernel is not None and x.numel():
            return run_on(kernel, self.device)(x, self.state, None if bias is None else usable_bias(bias, x.dtype))
        if self.part != WHOLE:
            return apply_packed(x, self.restore(), bias)
        parts = [self.layout.restore(self.formats, self.tensors, part) for part in range(len(self.formats))]
        ranges = [_row_range(self.formats, part) for part in range(len(parts))]
        biases = [None if bias is None else bias[first:last] for first, last in ranges]
        return torch.cat([apply_packed(x, one, own) for one, own in zip(parts, biases, strict=True)], dim=-1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Resident:
        """Copy the tensors, shared ones once, and derive the state anew: it may hold addresses."""
        names = list(self.tensors)
        tensors = dict(zip(names, copy.deepcopy(list(self.tensors.values()), memo), strict=True))
        return Resident(
            self.layout,
            self.formats,
            self.part,
            tensors,
            self.layout.assemble(self.formats, tensors, self.part),
            self.kernels,
            copy.deepcopy(self.whole, memo),
            copy.deepcopy(self.bias, memo),
        )


_residents: WeakValueDictionary[tuple[int, ...], Resident] = WeakValueDictionary()


def _place(tensors: Any, part: int) -> tuple[int, ...]:
    return (part, *(tensor.data_ptr() for tensor in tensors))


def formats_text(formats: Formats) -> str:
    """Return the formats as a node attribute."""
    return json.dumps([form.to_json() for form in formats], separators=(",", ":"))


@cache
def _parse(formats: str) -> Formats:
    return tuple(LinearFormat.from_json(form) for form in json.loads(formats))


def part_rows(formats: str, part: int) -> tuple[int, int]:
    """Return the first row of a part and the row after its last."""
    return _row_range(_parse(formats), part)


def _row_range(formats: Formats, part: int) -> tuple[int, int]:
    rows = [form.rows for form in formats]
    return (0, sum(rows)) if part == WHOLE else (sum(rows[:part]), sum(rows[: part + 1]))


def _known_layout(name: str) -> Layout:
    if name not in _layouts:
        raise FormatError(f"this process knows no layout {name!r}; import slimc.backends before the graph runs")
    return _layouts[name]


def _named(names: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names.split(","), tensors, strict=True))


@torch.library.custom_op(
    "slim::resident_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] tensors, Tensor? bias, *, str layout, str names, str formats, int part) -> Tensor",
)
def resident_linear(
    x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, *, layout: str, names: str, formats: str, part: int
) -> Tensor:
    """Compute the linear layer that is a part of the tensors of a layout.

    Args:
        x: [..., columns].
        tensors: of all parts.
        bias: [rows of all parts], or None.
        layout: name of the layout.
        names: of the tensors, with commas between.
        formats: of all parts, as `formats_text` writes them.
        part: which to compute; `WHOLE` for all, one above the other.
    """
    _infer_resident_linear(x, tensors, bias, layout=layout, names=names, formats=formats, part=part)
    resident = _residents.get(_place(tensors, part))
    if resident is None:
        found, forms, named = _known_layout(layout), _parse(formats), _named(names, tensors)
        resident = Resident(found, forms, part, named, found.assemble(forms, named, part))
    first, last = part_rows(formats, part)
    return resident.run(x, None if bias is None else bias[first:last])


@resident_linear.register_fake
def _infer_resident_linear(
    x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, *, formats: str, part: int, **_order: str
) -> Tensor:
    forms = _parse(formats)
    columns = forms[0].columns
    torch._check(x.is_floating_point(), lambda: f"x must be floating point, not {x.dtype}")  # type: ignore[no-untyped-call]
    torch._check(  # type: ignore[no-untyped-call]
        x.dim() > 0 and x.shape[-1] == columns, lambda: f"x must be [..., {columns}], not {tuple(x.shape)}"
    )
    torch._check(  # type: ignore[no-untyped-call]
        all(tensor.device == x.device for tensor in (*tensors, x if bias is None else bias)),
        lambda: f"x is on {x.device}, the layer on {tensors[0].device}",
    )
    _, rows = part_rows(formats, WHOLE)
    torch._check(  # type: ignore[no-untyped-call]
        bias is None or tuple(bias.shape) == (rows,), lambda: f"the bias must have {rows} entries"
    )
    first, last = part_rows(formats, part)
    return x.new_empty((*x.shape[:-1], last - first))


@torch.library.custom_op(
    "slim::restore",
    mutates_args=(),
    schema="(Tensor[] tensors, *, str layout, str names, str formats, int part) -> Tensor[]",
)
def restore_op(tensors: Sequence[Tensor], *, layout: str, names: str, formats: str, part: int) -> list[Tensor]:
    """Return the canonical tensors of a part of the tensors of a layout, in the order of the format's specs."""
    packed = _known_layout(layout).restore(_parse(formats), _named(names, tensors), part)
    named = packed.tensors()
    return [named[name] for name in _parse(formats)[part].tensor_specs()]


@restore_op.register_fake
def _infer_restore(tensors: Sequence[Tensor], *, formats: str, part: int, **_order: str) -> list[Tensor]:
    specs = _parse(formats)[part].tensor_specs().values()
    return [tensors[0].new_empty(shape, dtype=dtype) for shape, dtype in specs]
