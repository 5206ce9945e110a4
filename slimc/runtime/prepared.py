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

from slimc.errors import KernelError
from slimc.runtime.formats import LinearFormat
from slimc.runtime.ops import apply_packed
from slimc.runtime.packing import PackedLinear
from slimc.runtime.select import Kernel, choices, choose

__all__ = ["PreparedLayer", "SiblingLayers", "prepared_layer", "sibling_layers"]

_Run = Callable[[Tensor, Any, Tensor | None], Tensor]
_State = TypeVar("_State")

REFERENCE = Kernel(
    "slim::linear", lambda *_case: None, lambda packed: packed, lambda x, packed, bias: apply_packed(x, packed, bias)
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

    def leave_device(self) -> None:
        """Keep the packed tensors in main memory: no kernel reads them any more."""


class PreparedLayer:
    """The kernels of one layer: which runs at which number of tokens, and the states that they derived.

    Args:
        owner: holds the packed tensors. It is referred to weakly; whoever changes them drops this object.
        kernels: the table to choose from. What all refuse is computed by the reference op.
        device: where the layer is.
    """

    def __init__(self, owner: Owner, kernels: Sequence[Kernel], device: torch.device) -> None:
        """Choose and prepare nothing yet."""
        self._owner = weakref.ref(owner)
        self._kernels = (*kernels, REFERENCE)
        self._device = device
        self._plans: dict[tuple[torch.dtype, int], tuple[_Run, Any]] = {}
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
        plan = self._plans.get((x.dtype, (tokens - 1).bit_length()))
        if plan is None:
            plan = self._plan(x.dtype, tokens)
        if x.is_cuda and not self.captured and torch.cuda.is_current_stream_capturing():
            self.capture()
        run, state = plan
        return run(x, state, bias)

    def capture(self) -> None:
        """Note that a CUDA graph reads the states from now on: they must stay where they are."""
        self.captured = True
        _captured_handles.append(self.handle)

    def prepare(self) -> None:
        """Derive the states of all kernels that inputs of the weight's dtype may choose."""
        for _, kernel in self.kernels():
            self.state(kernel)

    def kernels(self) -> list[tuple[int, Kernel]]:
        """Return the kernels that inputs of the weight's dtype may choose, each with the fewest tokens it is for."""
        spec = self.format
        made = choices(self._kernels, spec, spec.weight.dtype, self._device)
        return [(choice.first_tokens, choice.kernel or REFERENCE) for choice in made]

    def choose(self, dtype: torch.dtype, tokens: int) -> Kernel:
        """Return the kernel for this many tokens."""
        kernel, _ = choose(self._kernels, self.format, dtype, self._device, tokens)
        return kernel or REFERENCE

    def accepts(self, kernel: Kernel, dtype: torch.dtype, tokens: int) -> bool:
        """Return whether a kernel, chosen by a sibling, computes this layer too."""
        return choose((kernel,), self.format, dtype, self._device, tokens)[0] is not None

    def state(self, kernel: Kernel) -> Any:
        """Return a kernel's state, derived on the first call.

        Raises:
            KernelError: that would be while a CUDA graph is captured.
        """
        if kernel.prepare not in self._states:
            owner = self._living_owner()
            self._states[kernel.prepare] = derive(self._device, lambda: kernel.prepare(owner.packed))
            self._leave_device()
        return self._states[kernel.prepare]

    def _leave_device(self) -> None:
        """Let a GPU hold a layer once: in its kernels' form, if that does for any number of tokens."""
        if self._device.type == "cuda" and all(
            kernel.standalone and kernel.prepare in self._states for _, kernel in self.kernels()
        ):
            self._living_owner().leave_device()

    def keep(self, siblings: SiblingLayers) -> None:
        """Keep siblings alive as long as this layer is, and no longer those of which one is gone."""
        self._siblings = [*(known for known in self._siblings if known.complete), siblings]

    def adopt(self, kernel: Kernel, state: Any) -> None:
        """Take a state that reads the memory shared with siblings in place of its own, unless a graph reads that."""
        if not self.captured:
            self._states[kernel.prepare] = state
            self._plans.clear()

    def _plan(self, dtype: torch.dtype, tokens: int) -> tuple[_Run, Any]:
        kernel = self.choose(dtype, tokens)
        plan = self._plans[dtype, (tokens - 1).bit_length()] = kernel.run, self.state(kernel)
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
        self._plans: dict[tuple[torch.dtype, int], tuple[_Run, Any] | None] = {}
        self._states: dict[Callable[..., Any], Any] = {}
        for member in members:
            member.keep(self)

    @property
    def complete(self) -> bool:
        """Whether all of the layers are still there, unchanged."""
        return all(handle.data_ptr() in _layers for handle in self._handles)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the results [..., rows of all] for x [..., columns], at least one token; biases are left out."""
        tokens = x.numel() // x.shape[-1]
        key = (x.dtype, (tokens - 1).bit_length())
        if key not in self._plans:
            self._plans[key] = self._plan(x.dtype, tokens)
        plan = self._plans[key]
        if plan is None:
            return torch.cat([member(x, None) for member in self._members()], dim=-1)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            for member in self._members():
                if not member.captured:
                    member.capture()
        run, state = plan
        return run(x, state, None)

    def prepare(self) -> bool:
        """Derive the states that inputs of the weight's dtype need; return whether a kernel runs all layers as one."""
        widest = self._widest(self._members())
        dtype = widest.format.weight.dtype
        plans = [self._plan(dtype, tokens) for tokens, _ in widest.kernels()]
        return any(plan is not None for plan in plans)

    def _members(self) -> list[PreparedLayer]:
        return [prepared_layer(handle) for handle in self._handles]

    @staticmethod
    def _widest(members: Sequence[PreparedLayer]) -> PreparedLayer:
        """Return the layer with most rows, which chooses the kernel for all."""
        return max(members, key=lambda member: member.format.rows)

    def _plan(self, dtype: torch.dtype, tokens: int) -> tuple[_Run, Any] | None:
        members = self._members()
        kernel = self._widest(members).choose(dtype, tokens)
        if not all(member.accepts(kernel, dtype, tokens) for member in members):
            return None
        state = self._state(kernel, members)
        return None if state is None else (kernel.run, state)

    def _state(self, kernel: Kernel, members: Sequence[PreparedLayer]) -> Any:
        """Return the shared state, or None if these layers do not fit each other."""
        if kernel.stack is None:
            return None
        if kernel.prepare not in self._states:
            stack, states = kernel.stack, [member.state(kernel) for member in members]
            try:
                shared, parts = derive(members[0].handle.device, lambda: stack(states))
            except KernelError:
                shared, parts = None, ()
            self._states[kernel.prepare] = shared
            for member, part in zip(members, parts, strict=bool(parts)):
                member.adopt(kernel, part)
        return self._states[kernel.prepare]


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
