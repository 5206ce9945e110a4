"""`SlimLinear`: a linear layer that holds only packed tensors.

Called eagerly or compiled it runs the kernel that the table chooses, from a state that is derived from the packed
tensors on the first call and never saved; in a compiled graph it is one ``slim::prepared_linear`` node. Exported, or
where gradients flow, it is one ``slim::linear`` node.

Where the kernels of a device share a layout (`slimc.runtime.layouts`), the layer holds its packed tensors in that
order instead of the canonical one, from the moment it is on the device. Whoever reads a canonical tensor, the
``state_dict`` included, gets it made again, bit for bit.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from slimc.errors import FormatError
from slimc.runtime import calls, ops
from slimc.runtime.formats import LinearFormat, WeightFormat
from slimc.runtime.layouts import Formats, Layout, Resident, layout_of
from slimc.runtime.packing import PackedLinear, check_specs
from slimc.runtime.prepared import PreparedLayer, derive
from slimc.runtime.select import LARGEST_EXPLAINED, Choice, Explanation, Kernel, KernelTable, choices, choose

__all__ = ["SlimLinear", "explain", "use_kernels"]

TENSOR_NAMES = ops.LINEAR_TENSORS
"""The buffers of a `SlimLinear`; those that its format lacks are None."""

RESIDENT = "resident_"
"""Prefix of the buffers, not part of the ``state_dict``, that hold a layout in the place of the canonical tensors."""

_changing = threading.RLock()
"""Held while a layer changes what it holds. One for all, because stacked layers change together, and rarely."""


def _canonical(name: str) -> Any:
    """Make the property that reads a canonical tensor, whatever the layer holds."""

    def read(self: SlimLinear) -> Tensor | None:
        if self._resident is None:
            if name not in self._buffers:
                raise AttributeError(f"this layer has no {name} yet")
            return self._buffers[name]
        return self._packed_tensors().get(name)

    return property(read, doc=f"The packed tensor ``{name}`` in the canonical layout.")


class SlimLinear(nn.Module):
    """A linear layer ``y = (x * input_scale) @ W^T + (x @ right^T) @ left^T + bias`` over packed tensors.

    A binary part, if there is one, is added to W (`slimc.runtime.packing.PackedBinary`).

    The packed tensors are buffers under the names of `PackedLinear.tensors`; the bias is a frozen Parameter. The
    ``state_dict`` holds the canonical bytes and nothing else. While the tensors of a layout take their place, reading
    one of them gives a copy that is made for the reader: assign to the attribute to change it.

    Args:
        packed: The weight, with its adapters and input scale.
        bias: [rows] or None.
        kernels: Ordered kernel table (`slimc.backends`); without one every call is the reference op.
    """

    values = _canonical("values")
    pattern = _canonical("pattern")
    scale = _canonical("scale")
    zero_point = _canonical("zero_point")
    input_scale = _canonical("input_scale")
    left_values = _canonical("left_values")
    left_scale = _canonical("left_scale")
    right_values = _canonical("right_values")
    right_scale = _canonical("right_scale")
    signs = _canonical("signs")
    sign_left = _canonical("sign_left")
    sign_right = _canonical("sign_right")
    bias: nn.Parameter | None
    _made: dict[str, weakref.ref[Tensor]]
    _not_undone: set[Callable[..., Any]]
    _was_captured: bool

    def __init__(self, packed: PackedLinear, bias: Tensor | None = None, *, kernels: Sequence[Kernel] = ()) -> None:
        """Take over the tensors of ``packed`` (no copy); raise `FormatError` if the parts do not fit."""
        super().__init__()
        self._resident: Resident | None = None
        self._set_format(packed.format)
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise FormatError(f"the bias must have {self.out_features} entries, not the shape {tuple(bias.shape)}")
        tensors = packed.tensors()
        for name in TENSOR_NAMES:
            self.register_buffer(name, tensors.get(name))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.use_kernels(kernels)

    @classmethod
    def empty(
        cls,
        spec: LinearFormat,
        bias: bool | torch.dtype = False,
        device: torch.device | str = "meta",
        *,
        kernels: Sequence[Kernel] = (),
    ) -> SlimLinear:
        """Build a layer of uninitialised tensors, to be filled by ``load_state_dict``.

        ``bias`` True makes a bias of the weight's dtype; a dtype makes one of that dtype.
        """
        tensors = {
            name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in spec.tensor_specs().items()
        }
        bias_dtype = bias if isinstance(bias, torch.dtype) else spec.weight.dtype if bias else None
        offset = None if bias_dtype is None else torch.empty(spec.rows, dtype=bias_dtype, device=device)
        return cls(PackedLinear.assemble(spec, tensors), offset, kernels=kernels)

    def _set_format(self, spec: LinearFormat) -> None:
        self.format = spec
        self.in_features, self.out_features = spec.columns, spec.rows
        self._attributes = ops.linear_attributes(spec)

    @property
    def packed(self) -> PackedLinear:
        """The packed weight; its tensors are the buffers of this module, or made of them."""
        return PackedLinear.assemble(self.format, self._packed_tensors())

    @property
    def weight(self) -> Tensor:
        """The effective dense weight [out_features, in_features], decoded at every access; it cannot be set.

        Input scale and adapters are multiplied in; the dtype is that of the packed weight.
        """
        return self.packed.decode().to(self.format.weight.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to replace the decoded weight: that would change nothing of what is computed."""
        if name == "weight":
            raise AttributeError(
                "the weight of a SlimLinear is decoded from packed tensors and cannot be set; "
                "put a torch.nn.Linear in its place, or compress the new weight with slimc.compile"
            )
        if name not in TENSOR_NAMES and name != "bias":
            super().__setattr__(name, value)
            return
        with _changing:
            if name != "bias":
                self.hold_canonical()
            super().__setattr__(name, value)
            self._forget_kernels()

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return next(held.device for held in self._buffers.values() if held is not None)

    def _packed_tensors(self) -> dict[str, Tensor]:
        """Return the canonical tensors; those that have to be made are the same for all who use them at once.

        So the ``state_dict`` of a model that names a layer twice has one tensor twice.
        """
        with _changing:
            if self._resident is None:
                return {name: held for name in TENSOR_NAMES if (held := self._buffers[name]) is not None}
            in_use = {name: found for name, kept in self._made.items() if (found := kept()) is not None}
            if self._made and len(in_use) == len(self._made):
                return in_use
            # Tensors made under inference mode could never be used outside it.
            with torch.inference_mode(False), torch.no_grad():
                made = self._resident.restore().tensors() | in_use
            self._made = {name: weakref.ref(tensor) for name, tensor in made.items()}
            return made

    def _checked(self) -> PackedLinear:
        """Return the packed weight; kernels do not look twice at shapes and dtypes.

        Raises:
            FormatError: the packed tensors have not the shapes and dtypes of the format.
        """
        packed = self.packed
        check_specs(self.format.tensor_specs(), packed.tensors())
        return packed

    def _settle(self) -> None:
        """Hold the layout of the kernels of this device if there is one, else what is held already."""
        with _changing:
            layout = self._wanted_layout()
            # What a captured graph reads stays where it is.
            if self._resident is not None and self._resident.layout is not layout and not self._prepared.captured:
                self.hold_canonical()
            if self._resident is not None or layout is None or layout.prepare in self._not_undone:
                return
            packed = self._checked()
            state = derive(self.device, lambda: layout.prepare(packed))
            resident = Resident(layout, (self.format,), 0, layout.tensors(state), state)
            if _same_bytes(resident.restore().tensors(), packed.tensors()):
                self._hold(resident)
            else:
                # Not a weight that its format allows: its bytes must not be lost, and kernels need not agree on it.
                self._not_undone.add(layout.prepare)

    def _wanted_layout(self) -> Layout | None:
        dtype = self.format.weight.dtype
        for tokens in (1, LARGEST_EXPLAINED):
            kernel, _ = choose(self._kernels, self.format, dtype, self.device, tokens)
            layout = layout_of(kernel)
            if layout is not None:
                return layout
        return None

    def _hold(self, resident: Resident) -> None:
        """Let go of what is held, and hold this instead."""
        self._resident = resident
        buffers = {RESIDENT + name: tensor for name, tensor in resident.tensors.items()}
        self._hold_buffers(buffers)
        self._non_persistent_buffers_set.update(buffers)

    def hold_canonical(self) -> None:
        """Hold the canonical tensors again, as those who trace a model want for a graph that others read.

        The next call, move, or `use_kernels` lets the layout of the kernels take their place.
        """
        with _changing:
            if self._resident is not None:
                made = self._packed_tensors()
                self._hold_buffers({name: made.get(name) for name in TENSOR_NAMES})
                self._resident = None
                self._forget_kernels()

    def _hold_buffers(self, buffers: Mapping[str, Tensor | None]) -> None:
        """Put these in the place of the buffers that hold the weight; others stay."""
        old = [name for name in self._buffers if name in TENSOR_NAMES or name.startswith(RESIDENT)]
        # Updated before anything is dropped: another thread may be reading.
        self._buffers.update(buffers)
        for name in old:
            if name not in buffers:
                del self._buffers[name]
        self._non_persistent_buffers_set.difference_update(old)

    @property
    def usable_kernels(self) -> KernelTable:
        """The kernels that may be chosen for what the layer holds, which is that of the best from now on."""
        self._settle()
        usable = [kernel for kernel in self._kernels if kernel.prepare not in self._not_undone]
        if self._resident is not None:
            lasting = tuple(kernel for kernel in usable if not kernel.transient)
            usable = [_last_resort(kernel, lasting) if kernel.transient else kernel for kernel in usable]
        return KernelTable(usable, self._kernels.timings)

    @property
    def holds_canonical(self) -> bool:
        """Whether the canonical tensors are what is held."""
        return self._resident is None

    def derive(self, kernel: Kernel) -> Any:
        """Return the state of a kernel.

        Raises:
            FormatError: the packed tensors have not the shapes and dtypes of the format.
            KernelError: a CUDA graph is being captured.
        """
        with _changing:
            self._settle()
            resident = self._resident
            if resident is not None and resident.layout is layout_of(kernel):
                return derive(self.device, lambda: resident.state)
            packed = self._checked()
            # It may run on another thread, which must not wait for this one.
            return derive(self.device, lambda: kernel.prepare(packed))

    def hold_part(self, kernel: Kernel, formats: Formats, part: int, shared: Any, state: Any) -> None:
        """Hold a part of the shared state of siblings in place of what is held, if that is of the same layout."""
        with _changing:
            if self._resident is not None and self._resident.layout is layout_of(kernel):
                layout = self._resident.layout
                self._hold(Resident(layout, formats, part, layout.tensors(shared), state))

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in the dtype of x [..., in_features]."""
        # Kernels have no gradients, and an exported graph is to hold what the layer means. (The flag is behind
        # torch.compiler.is_exporting(), which Dynamo took for true in every graph before torch 2.13.)
        if torch.compiler._is_exporting_flag or (x.requires_grad and torch.is_grad_enabled()):
            return self._reference(x)
        if torch.compiler.is_compiling():
            sizes = {"rows": self.out_features, "columns": self.in_features}
            result: Tensor = calls.prepared_linear(x, self._handle, self.bias, **sizes)
            return result
        # Autocast would change dtypes inside kernels, and only the op tells what is wrong with a shape.
        if (
            type(x) is not Tensor
            or not x.dim()
            or x.shape[-1] != self.in_features
            or not x.numel()
            or torch.is_autocast_enabled(self._autocast_type)
        ):
            return self._reference(x)
        return self._prepared(x, self.bias)

    def _reference(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            tensors: Mapping[str, Tensor | None] = self._packed_tensors()
        elif self._resident is None:
            tensors = self._buffers
        else:
            # One node in the graph, which then depends on nothing but the tensors that are held.
            held = [self._buffers[RESIDENT + name] for name in self._resident.tensors]
            made = torch.ops.slim.restore.default(held, **self._resident.attributes)
            tensors = dict(zip(self.format.tensor_specs(), made, strict=True))
        operands = [tensors.get(name) for name in TENSOR_NAMES]
        result: Tensor = torch.ops.slim.linear.default(x, *operands, self.bias, **self._attributes)
        return result

    def _forget_kernels(self) -> None:
        """Drop everything that was derived from the tensors that are held."""
        device = self.device
        # Asking about a device without autocast, such as meta, is an error; the processor's answer does no harm.
        self._autocast_type = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
        self._made, self._not_undone = {}, set()
        before = self.__dict__.get("_prepared")
        self._was_captured = self.__dict__.get("_was_captured", False) or (before is not None and before.captured)
        self._prepared = PreparedLayer(self, device)
        # No buffer: nobody is to move, copy or save it.
        self._handle = self._prepared.handle

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the canonical tensors, and nothing that is derived from them."""
        with _changing:
            state = {name: value for name, value in self.__dict__.items() if name not in _DERIVED}
            if self._resident is None:
                return state
            made = self._packed_tensors()
            others = {name: held for name, held in self._buffers.items() if not name.startswith(RESIDENT)}
            state["_buffers"] = {name: made.get(name) for name in TENSOR_NAMES} | others
            state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set & others.keys()
            return state | {"_resident": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Let a copy derive its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget_kernels()

    def __deepcopy__(self, memo: dict[int, Any]) -> SlimLinear:
        """Copy what is held; layers that share tensors share those of the copies."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with _changing:
            own = {name: value for name, value in self.__dict__.items() if name not in (*_DERIVED, "_kernels")}
            twin.__dict__.update(copy.deepcopy(own, memo), _kernels=self._kernels)
        twin._forget_kernels()
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlimLinear:
        """Move or cast the tensors; codes are moved only, scales and 16-bit values are cast and the format follows."""
        with _changing:
            if not self._stays(fn):
                self.hold_canonical()
            return self._apply_to_held(fn, recurse)

    def _stays(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Whether a function leaves tensors of this layer's device and dtypes as they are."""
        dtypes = {dtype for _, dtype in self.format.tensor_specs().values()}
        probes = [torch.empty(0, dtype=dtype, device=self.device) for dtype in dtypes]
        return all(fn(probe) is probe for probe in probes)

    def _apply_to_held(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> SlimLinear:
        def move_codes_cast_others(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        super()._apply(move_codes_cast_others, recurse)  # type: ignore[no-untyped-call]
        self._adopt_dtypes()
        return self

    def _adopt_dtypes(self) -> None:
        """Let the format follow the tensors after a cast."""

        def follow(form: WeightFormat, prefix: str = "") -> WeightFormat:
            carrier = self._buffers[f"{prefix}{'values' if form.bits is None else 'scale'}"]
            return form if carrier is None else replace(form, dtype=carrier.dtype)

        if self._resident is None:
            form = self.format
            left = None if form.left is None else follow(form.left, "left_")
            right = None if form.right is None else follow(form.right, "right_")
            magnitude = self._buffers["sign_left"]
            binary = form.binary
            if binary is not None and magnitude is not None:
                binary = replace(binary, dtype=magnitude.dtype)
            self._set_format(replace(form, weight=follow(form.weight), left=left, right=right, binary=binary))
        self._forget_kernels()
        self._settle()
        # A graph that is captured anew would find a layer without its kernels' forms.
        if self._was_captured and self.device.type == "cuda":
            self._prepared.prepare()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the packed tensors; codes may not come from another dtype, which a plain copy would convert."""
        self.hold_canonical()
        for name, own in self._packed_tensors().items():
            other = state_dict.get(prefix + name)
            if isinstance(other, Tensor) and other.is_floating_point() != own.is_floating_point():
                error_msgs.append(f"dtype of {prefix}{name}: {other.dtype} cannot be loaded into {own.dtype}.")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._adopt_dtypes()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Put the canonical tensors into a ``state_dict``, whatever is held."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._resident is not None:
            made = self._packed_tensors()
            destination.update({prefix + name: made[name] for name in TENSOR_NAMES if name in made})

    def use_kernels(self, kernels: Sequence[Kernel]) -> None:
        """Choose from this table from now on, and hold what its kernels on this device want."""
        with _changing:
            self._kernels = kernels if isinstance(kernels, KernelTable) else KernelTable(kernels)
            self._forget_kernels()
            self._settle()

    @property
    def kernels(self) -> KernelTable:
        """The table that kernels are chosen from."""
        return self._kernels

    def choose_again(self) -> None:
        """Choose kernels anew, because more is known of their times; graphs that were captured keep theirs."""
        with _changing:
            self._prepared.choose_again()
            self._settle()

    def choices(self, dtype: torch.dtype | None = None) -> list[Choice]:
        """Return which kernel runs at which token counts for inputs of ``dtype`` (default: the weight's)."""
        return choices(self.usable_kernels, self.format, dtype or self.format.weight.dtype, self.device)

    def extra_repr(self) -> str:
        """Return sizes, bias and format, as ``repr`` of a model shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format='{self.format.describe()}', bits_per_weight={self.format.bits_per_weight():.2f}"
        )


def use_kernels(model: nn.Module, kernels: Sequence[Kernel]) -> None:
    """Give every `SlimLinear` in ``model`` this kernel table."""
    for module in model.modules():
        if isinstance(module, SlimLinear):
            module.use_kernels(kernels)


def explain(model: nn.Module, dtype: torch.dtype | None = None) -> Explanation:
    """Return, by module name, which kernel each `SlimLinear` of ``model`` runs at which token counts, and why.

    Layers that a compiled graph has put together have an entry more, under their names joined by `` + ``: which kernel
    runs them as one. At token counts that it leaves out each of them runs by itself.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SlimLinear)}
    names = {module._prepared: name for name, module in layers.items()}
    stacks = dict.fromkeys(stack for prepared in names for stack in prepared.stacks)
    found = Explanation((name, module.choices(dtype)) for name, module in layers.items())
    for stack in stacks:
        members = [member for member in stack.members if member in names]
        as_one = stack.choices(dtype or members[0].format.weight.dtype)
        if as_one and len(members) == len(stack.members):
            found[" + ".join(names[member] for member in members)] = as_one
    return found


_DERIVED = ("_prepared", "_handle", "_made", "_not_undone", "_was_captured")
"""Attributes of a layer that are derived from its tensors."""


@cache
def _last_resort(kernel: Kernel, others: tuple[Kernel, ...]) -> Kernel:
    """Return a kernel that reads canonical tensors, for where they are not kept: it refuses what others compute."""

    def accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
        reason = kernel.refuses(spec, dtype, device, tokens)
        if reason is not None:
            return reason
        other, _ = choose(others, spec, dtype, device, tokens)
        return None if other is None else f"reads canonical tensors, which are not kept beside those of {other.name}"

    return replace(kernel, accepts=accepts)


def _same_bytes(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Compare tensors by their bytes: two NaNs may be the same."""
    if ours.keys() != theirs.keys():
        return False
    # Flat, because a single column may be contiguous with strides in which no byte view is allowed.
    pairs = [(tensor.contiguous().view(-1), theirs[name].contiguous().view(-1)) for name, tensor in ours.items()]
    return all(a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
