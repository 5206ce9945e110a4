"""`SlimLinear`: a linear layer that holds only packed tensors.

Traced (``torch.compile``, ``torch.export``) it is one ``slim::linear`` node; called eagerly it runs the kernel that
the table chooses, from a state that is derived from the packed tensors on the first call and never saved.

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
from typing import Any

import torch
from torch import Tensor, nn

from slimc.errors import FormatError, InputError, KernelError
from slimc.runtime import ops
from slimc.runtime.formats import LinearFormat, WeightFormat
from slimc.runtime.layouts import WHOLE, Layout, Resident, formats_text, layout_of, run_on, usable_bias
from slimc.runtime.packing import PackedLinear, check_specs
from slimc.runtime.select import LARGEST_EXPLAINED, Choice, Explanation, Kernel, choices, choose

__all__ = ["SlimLinear", "explain", "stack_modules", "use_kernels"]

TENSOR_NAMES = ops.LINEAR_TENSORS
"""The buffers of a `SlimLinear`; those that its format lacks are None."""

RESIDENT = "resident_"
"""Prefix of the buffers, not part of the ``state_dict``, that hold a layout in the place of the canonical tensors."""

RESIDENT_BIAS = "resident_bias"
"""The buffer of the biases of all layers that share a layout's tensors."""

_Plan = tuple[Callable[[Tensor, Any, Tensor | None], Tensor], Any, Tensor | None]

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
    bias: nn.Parameter | None
    _plans: dict[tuple[torch.dtype, torch.device, int], _Plan]
    _states: dict[Callable[..., Any], Any]
    _made: dict[str, weakref.ref[Tensor]]
    _not_undone: set[Callable[..., Any]]
    _traced_attributes: dict[str, Any]

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
            self.hold_canonical()
            super().__setattr__(name, value)
            self._forget_kernels()

    @property
    def _device(self) -> torch.device:
        held = next(tensor for tensor in self._buffers.values() if tensor is not None)
        return held.device

    def _packed_tensors(self) -> dict[str, Tensor]:
        with _changing:
            if self._resident is not None:
                return self._restored(self._resident)
            return {name: held for name in TENSOR_NAMES if (held := self._buffers[name]) is not None}

    def _restored(self, resident: Resident) -> dict[str, Tensor]:
        """Make the canonical tensors, or return those that are still in use since the last time.

        So that two who read one tensor, such as the ``state_dict`` of a layer that a model names twice, get one tensor.
        """
        in_use = {name: found for name, kept in self._made.items() if (found := kept()) is not None}
        if self._made and len(in_use) == len(self._made):
            return in_use
        # Tensors made under inference mode could never be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            made = resident.restore().tensors() | in_use
        self._made = {name: weakref.ref(tensor) for name, tensor in made.items()}
        return made

    def _settle(self) -> None:
        """Hold the layout of the kernels of this device if there is one, else the canonical tensors.

        Raises:
            FormatError: the packed tensors have not the shapes and dtypes of their format.
        """
        wanted = (choose(self._kernels, self.format, self.format.weight.dtype, self._device, tokens)[0]
                  for tokens in (1, LARGEST_EXPLAINED))  # fmt: skip
        layout = next((found for kernel in wanted if (found := layout_of(kernel)) is not None), None)
        with _changing:
            if self._resident is not None:
                if self._resident.layout is layout:
                    self._resident.use_kernels(self._kernels)
                    return
                self.hold_canonical()
            if layout is None:
                return
            if layout.prepare in self._not_undone:
                return
            with torch.inference_mode(False), torch.no_grad():
                packed = self._checked()
                state = layout.prepare(packed)
                resident = Resident(layout, (self.format,), 0, layout.tensors(state), state, self._kernels)
                if _same_bytes(resident.restore().tensors(), packed.tensors()):
                    self._hold(resident)
                else:
                    # Not a weight that its format allows: its bytes must not be lost, and kernels need not agree on it.
                    self._not_undone.add(layout.prepare)

    def _hold(self, resident: Resident) -> None:
        """Let go of what is held, and hold this instead."""
        self._resident = resident
        buffers = {RESIDENT + name: tensor for name, tensor in resident.tensors.items()}
        if resident.bias is not None:
            buffers[RESIDENT_BIAS] = resident.bias
        self._hold_buffers(buffers)
        self._non_persistent_buffers_set.update(buffers)
        self._share_bias()
        self._traced_attributes = {
            "layout": resident.layout.name,
            "names": ",".join(resident.tensors),
            "formats": formats_text(resident.formats),
            "part": resident.part,
        }

    def _share_bias(self) -> None:
        """Let the bias be the layer's part of the bias of a stack, so that what is written to one is in both."""
        resident = self._resident
        if resident is not None and resident.bias is not None and self.bias is not None:
            first, last = resident.row_range
            self._parameters["bias"] = nn.Parameter(resident.bias[first:last], requires_grad=False)

    def hold_canonical(self) -> None:
        """Hold the canonical tensors again, as those who trace a model want for a graph that others read.

        The next call, move, or `use_kernels` lets the layout of the kernels take their place.
        """
        with _changing, torch.inference_mode(False), torch.no_grad():
            if self._resident is None:
                return
            made = self._restored(self._resident)
            self._hold_buffers({name: made.get(name) for name in TENSOR_NAMES})
            if self._resident.bias is not None and self.bias is not None:
                self._parameters["bias"] = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
            self._resident = None
            self._forget_kernels()

    def _hold_buffers(self, buffers: Mapping[str, Tensor | None]) -> None:
        """Put these in the place of the buffers that hold the weight; others stay."""
        others = {
            name: tensor
            for name, tensor in self._buffers.items()
            if name not in TENSOR_NAMES and not name.startswith(RESIDENT)
        }
        self._non_persistent_buffers_set -= {name for name in self._buffers if name.startswith(RESIDENT)}
        # Updated before anything is dropped: another thread may be reading.
        self._buffers.update(buffers)
        for name in [name for name in self._buffers if name not in buffers and name not in others]:
            del self._buffers[name]

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in the dtype of x [..., in_features]."""
        # Kernels have no gradients and cannot be traced, and autocast would change dtypes inside them.
        if torch.compiler.is_compiling():
            return self._traced(x)
        if (
            type(x) is not Tensor
            or (x.requires_grad and torch.is_grad_enabled())
            or torch.is_autocast_enabled(self._autocast_type)
        ):
            return self._reference(x)
        if not x.dim() or x.shape[-1] != self.in_features:
            return self._reference(x)
        tokens = x.numel() // self.in_features
        plan = self._plans.get((x.dtype, x.device, (tokens - 1).bit_length()))
        if plan is None:
            plan = self._plan(x, tokens)
        run, state, bias = plan
        return run(x, state, bias)

    def _traced(self, x: Tensor) -> Tensor:
        """Be one node over the tensors that are held, and ``slim::linear`` where a graph is kept or differentiated."""
        if self._resident is None:
            return self._reference(x, self._buffers)
        names = self._traced_attributes["names"].split(",")
        tensors = [self._buffers[RESIDENT + name] for name in names]
        if torch.compiler.is_exporting() or (x.requires_grad and torch.is_grad_enabled()):
            made = torch.ops.slim.restore.default(tensors, **self._traced_attributes)
            return self._reference(x, dict(zip(self.format.tensor_specs(), made, strict=True)))
        bias = self._buffers.get(RESIDENT_BIAS, self.bias)
        result: Tensor = torch.ops.slim.resident_linear.default(x, tensors, bias, **self._traced_attributes)
        return result

    def _reference(self, x: Tensor, tensors: Mapping[str, Tensor | None] | None = None) -> Tensor:
        named = self._packed_tensors() if tensors is None else tensors
        operands = [named.get(name) for name in TENSOR_NAMES]
        result: Tensor = torch.ops.slim.linear.default(x, *operands, self.bias, **self._attributes)
        return result

    def _plan(self, x: Tensor, tokens: int) -> _Plan:
        """Choose a kernel for inputs like ``x``, prepare it if it is new here, and remember both.

        Raises:
            InputError: x and the layer are on different devices.
        """
        with _changing:
            device = self._device
            if x.device != device:
                raise InputError(
                    f"x is on {x.device}, but this {type(self).__name__} of {self.in_features} inputs is on {device}; "
                    "move one of them with .to()"
                )
            kernel, _ = choose(self._kernels, self.format, x.dtype, device, max(tokens, 1))
            plan = self._plan_kernel(kernel, x.dtype) if tokens else None
            plan = plan or (lambda x, _state, _bias: self._reference(x), None, None)
            self._plans[x.dtype, x.device, (tokens - 1).bit_length()] = plan
        return plan

    def _plan_kernel(self, kernel: Kernel | None, dtype: torch.dtype) -> _Plan | None:
        """Return how to run a kernel, or None for the reference op."""
        if kernel is None:
            return None
        layout = layout_of(kernel)
        if layout is not None and self._resident is None:
            self._settle()
        resident = self._resident
        if kernel.prepare in self._not_undone or (resident is not None and kernel.transient):
            return None
        if layout is not None and resident is not None and resident.layout is layout:
            state = resident.state
        else:
            if kernel.prepare not in self._states:
                with torch.inference_mode(False), torch.no_grad():
                    self._states[kernel.prepare] = kernel.prepare(self._checked())
            state = self._states[kernel.prepare]
        return run_on(kernel, self._device), state, self._usable_bias(dtype)

    def _checked(self) -> PackedLinear:
        """Return the packed weight; kernels do not look twice at shapes and dtypes."""
        packed = self.packed
        check_specs(self.format.tensor_specs(), packed.tensors())
        return packed

    def _usable_bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return the bias as kernels take it: on the layer's device, in the dtype of x, one entry after another."""
        bias = self.bias
        if bias is None:
            return None
        if bias.device != self._device or tuple(bias.shape) != (self.out_features,):
            raise InputError(
                f"the bias of a layer with {self.out_features} outputs on {self._device} is {tuple(bias.shape)} on "
                f"{bias.device}; set one that fits"
            )
        with torch.no_grad():
            return usable_bias(bias, dtype)

    def _forget_kernels(self) -> None:
        """Drop everything that was derived from the tensors that are held."""
        # Asking about a device without autocast, such as meta, is an error; the processor's answer does no harm.
        device = self._device.type
        self._autocast_type = device if torch.amp.is_autocast_available(device) else "cpu"
        self.__dict__.update(_derived())

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the canonical tensors, and nothing that is derived from them."""
        state = self.__dict__ | _derived()
        if self._resident is None:
            return state
        made = self._packed_tensors()
        buffers = {name: made.get(name) for name in TENSOR_NAMES}
        buffers |= {name: held for name, held in self._buffers.items() if not name.startswith(RESIDENT)}
        persistent = {name for name in self._non_persistent_buffers_set if not name.startswith(RESIDENT)}
        return state | {"_resident": None, "_buffers": buffers, "_non_persistent_buffers_set": persistent}

    def __deepcopy__(self, memo: dict[int, Any]) -> SlimLinear:
        """Copy what is held; layers that share tensors share those of the copies."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with _changing:
            kept = _derived() | {"_kernels": self._kernels}
            own = {name: value for name, value in self.__dict__.items() if name not in kept}
            twin.__dict__.update(copy.deepcopy(own, memo) | kept)
            twin._share_bias()
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
        probes = [torch.empty(0, dtype=dtype, device=self._device) for dtype in dtypes]
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

        if self._resident is not None:
            self._forget_kernels()
            return
        form = self.format
        left = None if form.left is None else follow(form.left, "left_")
        right = None if form.right is None else follow(form.right, "right_")
        self._set_format(replace(form, weight=follow(form.weight), left=left, right=right))
        self._forget_kernels()
        self._settle()

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
            self._kernels = tuple(kernels)
            self._forget_kernels()
            self._settle()

    def choices(self, dtype: torch.dtype | None = None) -> list[Choice]:
        """Return which kernel runs at which token counts for inputs of ``dtype`` (default: the weight's)."""
        return choices(self._kernels, self.format, dtype or self.format.weight.dtype, self._device)

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
    """Return, by module name, which kernel each `SlimLinear` of ``model`` runs at which token counts, and why."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, SlimLinear)]
    return Explanation((name, module.choices(dtype)) for name, module in layers)


def _derived() -> dict[str, Any]:
    """Return, empty, the attributes of a layer that are derived from its tensors."""
    return {"_plans": {}, "_states": {}, "_made": {}, "_not_undone": set()}


def stack_modules(modules: Sequence[SlimLinear]) -> None:
    """Let layers that read the same input share one set of tensors, in which each has its rows.

    Each stays usable alone, and its ``state_dict`` is what it was. Traced, their nodes name the same tensors, and can
    be merged into one of the part `slimc.runtime.layouts.WHOLE`. Layers that are stacked so already are left alone.
    A layer that is moved, changed or loaded anew leaves the stack.

    Args:
        modules: the layers, in the order in which their rows are to lie.

    Raises:
        KernelError: they cannot be stacked, with the reason; they are left as they were.
    """
    with _changing, torch.inference_mode(False), torch.no_grad():
        if _are_stacked(modules):
            return
        if len(modules) < 2 or len(set(modules)) < len(modules):
            raise KernelError("a stack has two layers or more, each of them once")
        layouts = {None if module._resident is None else module._resident.layout for module in modules}
        layout = layouts.pop()
        if layouts or layout is None or layout.stack is None:
            raise KernelError("layers can be stacked where they hold a layout for it, which is that of a CUDA GPU")
        if len({module._device for module in modules}) > 1:
            raise KernelError("layers on different devices cannot be stacked")
        state = layout.stack([_state_alone(module, layout) for module in modules])
        _share(modules, layout, state)


def _are_stacked(modules: Sequence[SlimLinear]) -> bool:
    wholes = {id(None if module._resident is None else module._resident.whole) for module in modules}
    residents = [module._resident for module in modules]
    return (
        len(wholes) == 1
        and all(one is not None and one.whole is not None and one.part == i for i, one in enumerate(residents))
        and residents[0] is not None
        and len(residents[0].formats) == len(modules)
    )


def _state_alone(module: SlimLinear, layout: Layout) -> Any:
    """Return the state of a layer that is in no stack."""
    resident = module._resident
    return resident.state if resident is not None and resident.whole is None else layout.prepare(module.packed)


def _share(modules: Sequence[SlimLinear], layout: Layout, state: Any) -> None:
    """Let layers hold their parts of one state."""
    formats = tuple(module.format for module in modules)
    tensors, kernels = layout.tensors(state), modules[0]._kernels
    bias = _stacked_bias(modules)
    whole = Resident(layout, formats, WHOLE, tensors, state, kernels)
    for part, module in enumerate(modules):
        own = layout.assemble(formats, tensors, part)
        module._hold(Resident(layout, formats, part, tensors, own, module._kernels, whole, bias))
        module._forget_kernels()


def _stacked_bias(modules: Sequence[SlimLinear]) -> Tensor | None:
    """Return the biases one after another, zeros for layers without one, or None if none has one."""
    given = [module.bias for module in modules if module.bias is not None]
    if not given:
        return None
    if len({bias.dtype for bias in given}) > 1:
        raise KernelError("layers with biases of different dtypes cannot be stacked")
    return torch.cat([given[0].new_zeros(m.out_features) if m.bias is None else m.bias.detach() for m in modules])


def _same_bytes(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Compare tensors by their bytes: two NaNs may be the same."""
    if ours.keys() != theirs.keys():
        return False
    pairs = [(tensor.contiguous(), theirs[name].contiguous()) for name, tensor in ours.items()]
    return all(a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
