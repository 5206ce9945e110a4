"""What kernels derive from packed layers, and how a compiled graph reaches it.

A compiled graph must not hold a kernel's state: weights may be loaded, cast or moved after it was compiled, and
another model of the same class may run the same graph. Nor can a state be an operand, for only its kernel knows what it
is made of. So each layer has a *handle*, a tensor of one byte that Dynamo lifts as an input like any weight, and the
operators of this module find the layer by the handle's address. A change of the layer brings a new handle, and with it
a new address, which is what CUDA graphs are checked by before a replay. A handle that was captured in a graph is kept
for good, so that its address never comes to mean another layer.

Siblings, layers that read the same input, can be run as one: `SiblingLayers` puts their states into shared memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from slimc.errors import InputError, KernelError
from slimc.runtime.formats import LinearFormat
from slimc.runtime.layouts import Formats
from slimc.runtime.ops import apply_packed
from slimc.runtime.packing import PackedLinear
from slimc.runtime.select import Choice, Kernel, choices, choose, ranges

__all__ = ["PreparedLayer", "SiblingLayers", "derive", "prepared_layer", "sibling_layers"]

_Run = Callable[[Tensor, Any, Tensor | None], Tensor]
_Stack = Callable[[Sequence[Any]], tuple[Any, Sequence[Any]]]
_State = TypeVar("_State")

REFERENCE = Kernel(
    "slim::linear",
    lambda *_case: None,
    lambda packed: packed,
    lambda x, packed, bias: apply_packed(x, packed, bias),
    transient=True,
    binary=True,
)
"""The op itself, for a layer that no kernel of its table computes."""


class Owner(Protocol):
    """The module whose layer is prepared."""

    @property
    def format(self) -> LinearFormat:
        """The format of the packed weight."""

    @property
    def packed(self) -> PackedLinear:
        """The packed weight."""

    @property
    def usable_kernels(self) -> Sequence[Kernel]:
        """The kernels that may be chosen for what the module holds, which is decided now."""

    @property
    def holds_canonical(self) -> bool:
        """Whether the canonical tensors are there, and need not be made of what is held in their place."""

    def derive(self, kernel: Kernel) -> Any:
        """Return the state of a kernel."""

    def hold_part(self, kernel: Kernel, formats: Formats, part: int, shared: Any, state: Any) -> None:
        """Hold a part of the shared state of siblings in place of what is held."""


class PreparedLayer:
    """The kernels of one layer: which runs at which number of tokens, and the states that they derived.

    Args:
        owner: holds the packed tensors, and the kernels to choose from; what all refuse is computed by the reference
            op. It is referred to weakly; whoever changes what it holds drops this object.
        device: where the layer is.
    """

    def __init__(self, owner: Owner, device: torch.device) -> None:
        """Choose and prepare nothing yet."""
        self._owner = weakref.ref(owner)
        self._device = device
        self._plans: dict[tuple[torch.dtype, torch.device, int], tuple[_Run, Any, int]] = {}
        self._states: dict[Callable[..., Any], Any] = {}
        self._siblings: list[SiblingLayers] = []
        self.captured = False
        # A tensor made under inference mode could not be an input of a graph that is compiled outside it.
        with torch.inference_mode(False):
            self.handle = torch.zeros(1, dtype=torch.uint8, device=device)
        if type(self.handle) is Tensor and device.type != "meta":
            _layers[self.handle.data_ptr()] = self

    @property
    def format(self) -> LinearFormat:
        """The format of the packed weight."""
        return self._living_owner().format

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return y [..., rows] of x [..., columns], at least one token, by the kernel chosen for this many."""
        tokens = x.numel() // x.shape[-1]
        plan = self._plans.get((x.dtype, x.device, (tokens - 1).bit_length()))
        if plan is None:
            plan = self._plan(x, tokens)
        if x.is_cuda and not self.captured and torch.cuda.is_current_stream_capturing():
            self.capture()
        run, state, rows = plan
        return run(x, state, None if bias is None else usable_bias(bias, x, rows))

    def capture(self) -> None:
        """Note that a CUDA graph reads the states from now on: they must stay where they are."""
        self.captured = True
        _captured_handles.append(self.handle)

    def prepare(self) -> None:
        """Derive the states of all kernels that inputs of the weight's dtype may choose."""
        for _, kernel in self.kernels():
            if not self._is_made_anew(kernel):
                self.state(kernel)

    def kernels(self) -> list[tuple[int, Kernel]]:
        """Return the kernels that inputs of the weight's dtype may choose, each with the fewest tokens it is for."""
        spec = self.format
        made = choices(self._table(), spec, spec.weight.dtype, self._device)
        return [(choice.first_tokens, choice.kernel or REFERENCE) for choice in made]

    @property
    def stacks(self) -> list[SiblingLayers]:
        """The siblings with which a compiled graph runs the layer as one, where a kernel can."""
        return [siblings for siblings in self._siblings if siblings.complete]

    def choose(
        self, dtype: torch.dtype, tokens: int, stack: Sequence[LinearFormat] = ()
    ) -> tuple[Kernel, dict[str, str]]:
        """Return the kernel for this many tokens, and why not others.

        ``stack`` has the formats of all layers that are run as one, if this is the widest of several.
        """
        kernel, refusals = choose(self._table(), self.format, dtype, self._device, tokens, stack)
        return kernel or REFERENCE, refusals

    def accepts(self, kernel: Kernel, dtype: torch.dtype, tokens: int) -> bool:
        """Return whether a kernel, chosen by a sibling, computes this layer too."""
        known = any(own.prepare is kernel.prepare for own in (*self._table(), REFERENCE))
        return known and choose((kernel,), self.format, dtype, self._device, tokens)[0] is not None

    def state(self, kernel: Kernel) -> Any:
        """Return a kernel's state, derived on the first call.

        Raises:
            KernelError: that would be while a CUDA graph is captured.
        """
        if kernel.prepare not in self._states:
            self._states[kernel.prepare] = self._living_owner().derive(kernel)
        return self._states[kernel.prepare]

    def keep(self, siblings: SiblingLayers) -> None:
        """Keep siblings alive as long as this layer is, and no longer those of which one is gone."""
        self._siblings = [*(known for known in self._siblings if known.complete), siblings]

    def adopt(self, kernel: Kernel, formats: Formats, part: int, shared: Any, state: Any) -> None:
        """Take a state that reads the memory shared with siblings in place of its own, unless a graph reads that."""
        if not self.captured:
            self._living_owner().hold_part(kernel, formats, part, shared, state)
            self._states[kernel.prepare] = state
            self._plans.clear()

    def choose_again(self) -> None:
        """Choose kernels anew from the next call on; graphs that were captured keep theirs."""
        self._plans.clear()
        for siblings in self._siblings:
            siblings.choose_again()

    def _table(self) -> Sequence[Kernel]:
        return self._living_owner().usable_kernels

    def _is_made_anew(self, kernel: Kernel) -> bool:
        """Whether a kernel's state is the canonical tensors, which are made for each call."""
        return kernel.transient and not self._living_owner().holds_canonical

    def _plan(self, x: Tensor, tokens: int) -> tuple[_Run, Any, int]:
        """Decide how inputs like x are computed.

        Raises:
            InputError: x and the layer are on different devices, or x is not floating point.
        """
        spec = self.format
        refuse_unusable(x, self._device, spec)
        kernel, _ = self.choose(x.dtype, tokens)
        run = run_on(kernel.run, self._device)
        if self._is_made_anew(kernel):

            def made_anew(x: Tensor, _state: None, bias: Tensor | None) -> Tensor:
                return run(x, kernel.prepare(self._living_owner().packed), bias)

            plan: tuple[_Run, Any, int] = made_anew, None, spec.rows
        else:
            plan = run, self.state(kernel), spec.rows
        self._plans[x.dtype, x.device, (tokens - 1).bit_length()] = plan
        return plan

    def _living_owner(self) -> Owner:
        owner = self._owner()
        if owner is None:
            raise KernelError("this compressed layer was deleted; compile the model that is called, not a copy of it")
        return owner


class SiblingLayers:
    """Layers that read the same input, run as one where a kernel can, and one by one where none can.

    Args:
        members: the layers, in the order of their results. Each of them keeps this object alive.
    """

    def __init__(self, members: Sequence[PreparedLayer]) -> None:
        """Prepare nothing yet."""
        # The handles keep their addresses, by which this object is found, from coming to mean other layers.
        self._handles = [member.handle for member in members]
        self._plans: dict[tuple[torch.dtype, torch.device, int], tuple[_Run, Any] | None] = {}
        self._states: dict[Callable[..., Any], Any] = {}
        for member in members:
            member.keep(self)

    @property
    def complete(self) -> bool:
        """Whether all of the layers are still there, unchanged."""
        return all(handle.data_ptr() in _layers for handle in self._handles)

    def choose_again(self) -> None:
        """Choose kernels anew from the next call on."""
        self._plans.clear()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the results [..., rows of all] for x [..., columns], at least one token; biases are left out.

        Raises:
            InputError: x and the layers are on different devices, or x is not floating point.
        """
        tokens = x.numel() // x.shape[-1]
        key = (x.dtype, x.device, (tokens - 1).bit_length())
        if key not in self._plans:
            for member in self.members:
                refuse_unusable(x, member.handle.device, member.format)
            self._plans[key] = self._plan(x.dtype, tokens)
        plan = self._plans[key]
        if plan is None:
            return torch.cat([member(x, None) for member in self.members], dim=-1)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            for member in self.members:
                if not member.captured:
                    member.capture()
        run, state = plan
        return run(x, state, None)

    def prepare(self) -> bool:
        """Derive the states that inputs of the weight's dtype need; return whether a kernel runs all layers as one."""
        dtype = self.members[0].format.weight.dtype
        plans = [self._plan(dtype, choice.first_tokens) for choice in self.choices(dtype)]
        return any(plan is not None for plan in plans)

    @property
    def members(self) -> list[PreparedLayer]:
        """The layers, in the order of their results.

        Raises:
            KernelError: one of them is gone, or has changed since.
        """
        return [prepared_layer(handle) for handle in self._handles]

    def choices(self, dtype: torch.dtype) -> list[Choice]:
        """Return which kernel runs all layers as one, and at which numbers of tokens; at others each runs by itself."""
        return [choice for choice in ranges(lambda tokens: self._choose(dtype, tokens)) if choice.kernel is not None]

    def _choose(self, dtype: torch.dtype, tokens: int) -> tuple[Kernel | None, dict[str, str]]:
        """Return the kernel that runs all layers as one, or None, and why not others."""
        members = self.members
        formats = [member.format for member in members]
        # Kernels are chosen that accept the widest, where most of the work is.
        widest = max(members, key=lambda member: member.format.rows)
        kernel, refusals = widest.choose(dtype, tokens, formats)
        fit = kernel.stack is not None and self._states.get(kernel.prepare, True) is not None
        as_one = fit and all(member.accepts(kernel, dtype, tokens) for member in members)
        return (kernel if as_one else None), refusals

    def _plan(self, dtype: torch.dtype, tokens: int) -> tuple[_Run, Any] | None:
        kernel, _ = self._choose(dtype, tokens)
        if kernel is None or kernel.stack is None:
            return None
        state = self._state(kernel, kernel.stack)
        return None if state is None else (run_on(kernel.run, self._handles[0].device), state)

    def _state(self, kernel: Kernel, stack: _Stack) -> Any:
        """Return the shared state, or None if these layers do not fit each other."""
        if kernel.prepare not in self._states:
            members = self.members
            states = [member.state(kernel) for member in members]
            try:
                shared, parts = derive(members[0].handle.device, lambda: stack(states))
            except KernelError:
                shared, parts = None, ()
            self._states[kernel.prepare] = shared
            formats = tuple(member.format for member in members)
            for index, part in enumerate(parts):
                members[index].adopt(kernel, formats, index, shared, part)
        return self._states[kernel.prepare]


def refuse_unusable(x: Tensor, device: torch.device, spec: LinearFormat) -> None:
    """Refuse an input that is not where its layer is, or of no numbers that a layer computes with.

    Raises:
        InputError: it is on another device, or its dtype is none of floating point of 16 bits or more.
    """
    if not x.is_floating_point() or x.element_size() < 2:
        raise InputError(
            f"x must be floating point of 16 bits or more, not {x.dtype}; the layer's weight is {spec.weight.dtype}"
        )
    if x.device != device:
        raise InputError(
            f"x is on {x.device}, but this compressed layer of {spec.columns} inputs is on {device}; move one of them "
            "with .to()"
        )


def usable_bias(bias: Tensor, x: Tensor, rows: int) -> Tensor:
    """Return a bias as kernels read it: in the dtype of x, one entry after another.

    Raises:
        InputError: it is on another device, or has not ``rows`` entries.
    """
    if bias.device != x.device or bias.shape != (rows,):
        raise InputError(
            f"the bias of a compressed layer with {rows} outputs on {x.device} has the shape {tuple(bias.shape)} on "
            f"{bias.device}; set one that fits"
        )
    return bias if bias.dtype == x.dtype and bias.is_contiguous() else bias.detach().to(x.dtype).contiguous()


def run_on(run: _Run, device: torch.device) -> _Run:
    """Return a kernel's ``run``, with the layer's GPU made the current one where there are several."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return run

    def run_there(x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        with torch.cuda.device(device):
            return run(x, state, bias)

    return run_there


def derive(device: torch.device, make: Callable[[], _State]) -> _State:
    """Return what ``make`` derives from tensors on a device, in memory that stays.

    Raises:
        KernelError: a CUDA graph is being captured, which would derive it again at every replay.
    """
    if device.type != "cuda":
        return _derive(make)
    if torch.cuda.is_current_stream_capturing():
        raise KernelError(
            "a compressed layer would be put into its kernel's form while a CUDA graph is captured; call the model "
            "once before the capture, and again after its weights were moved, cast or loaded"
        )
    before = torch.cuda.current_stream(device)

    def run() -> _State:
        stream = torch.cuda.current_stream(device)
        stream.wait_stream(before)
        made = _derive(make)
        stream.synchronize()
        return made

    # Before Inductor captures a graph it calls it with all memory of the thread taken from the graph's own pool.
    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(run).result()


def _derive(make: Callable[[], _State]) -> _State:
    # Tensors made under inference mode could never be used outside it.
    with torch.inference_mode(False), torch.no_grad():
        return make()


def prepared_layer(handle: Tensor) -> PreparedLayer:
    """Return the layer that a handle belongs to.

    Raises:
        KernelError: there is none, or it has changed since.
    """
    layer = _layers.get(handle.data_ptr())
    if layer is None:
        raise KernelError(
            "a compiled graph was called with the handle of a compressed layer that is gone; slimc's layers may be "
            "moved by Module.to() and copied by copy.deepcopy(), not by replacing their tensors one by one"
        )
    return layer


def sibling_layers(handles: Sequence[Tensor]) -> SiblingLayers:
    """Return the layers of these handles as siblings, the same object as long as one of them is alive."""
    key = tuple(handle.data_ptr() for handle in handles)
    found = _families.get(key)
    if found is None:
        members = [prepared_layer(handle) for handle in handles]
        found = _families[key] = SiblingLayers(members)
    return found


_layers: weakref.WeakValueDictionary[int, PreparedLayer] = weakref.WeakValueDictionary()
_families: weakref.WeakValueDictionary[tuple[int, ...], SiblingLayers] = weakref.WeakValueDictionary()
_captured_handles: list[Tensor] = []
