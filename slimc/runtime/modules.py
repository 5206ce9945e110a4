"""`SlimLinear`: a linear layer that holds only packed tensors.

Called eagerly or compiled it runs the kernel that the table chooses, from a state that is derived from the packed
tensors on the first call and never saved; in a compiled graph it is one ``slim::prepared_linear`` node. Exported, or
where gradients flow, it is one ``slim::linear`` node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimc.errors import FormatError
from slimc.runtime import calls, ops
from slimc.runtime.formats import LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear
from slimc.runtime.prepared import PreparedLayer
from slimc.runtime.select import Choice, Explanation, Kernel, choices

__all__ = ["SlimLinear", "explain", "use_kernels"]

TENSOR_NAMES = ops.LINEAR_TENSORS
"""The buffers of a `SlimLinear`; those that its format lacks are None."""


class SlimLinear(nn.Module):
    """A linear layer ``y = (x * input_scale) @ W^T + (x @ right^T) @ left^T + bias`` over packed tensors.

    The packed tensors are buffers under the names of `PackedLinear.tensors`; the bias is a frozen Parameter. The
    ``state_dict`` holds the canonical bytes and nothing else. Once a GPU's kernels have a form of their own, the packed
    tensors wait in main memory, and come back when something other than a kernel needs them there.

    Args:
        packed: The weight, with its adapters and input scale.
        bias: [rows] or None.
        kernels: Ordered kernel table (`slimc.backends`); without one every call is the reference op.
    """

    values: Tensor
    pattern: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None
    input_scale: Tensor | None
    left_values: Tensor | None
    left_scale: Tensor | None
    right_values: Tensor | None
    right_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, packed: PackedLinear, bias: Tensor | None = None, *, kernels: Sequence[Kernel] = ()) -> None:
        """Take over the tensors of ``packed`` (no copy); raise `FormatError` if the parts do not fit."""
        super().__init__()
        self._set_format(packed.format)
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise FormatError(f"the bias must have {self.out_features} entries, not the shape {tuple(bias.shape)}")
        tensors = packed.tensors()
        for name in TENSOR_NAMES:
            self.register_buffer(name, tensors.get(name))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self._kernels = tuple(kernels)
        self._forget_kernels()

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
        """The packed weight on the device of this layer; its tensors are the buffers, or copies if those are away."""
        tensors = {name: tensor.to(self._device) for name, tensor in self._packed_tensors().items()}
        return PackedLinear.assemble(self.format, tensors)

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
        away = name in TENSOR_NAMES and self._away
        super().__setattr__(name, value)
        if name in TENSOR_NAMES or name == "bias":
            if away:
                self._return_to_device()
            self._forget_kernels()

    def _packed_tensors(self) -> dict[str, Tensor]:
        named = ((name, getattr(self, name)) for name in TENSOR_NAMES)
        return {name: tensor for name, tensor in named if tensor is not None}

    @property
    def device(self) -> torch.device:
        """Where this layer computes; its packed tensors may wait in main memory."""
        return self._device

    @property
    def _away(self) -> bool:
        """Whether the packed tensors are in main memory and the layer is not."""
        return "_device" in self.__dict__ and self.values.device != self._device

    def leave_device(self) -> None:
        """Keep the packed tensors in main memory from now on; kernels have what they need."""
        for name, tensor in self._packed_tensors().items():
            self._buffers[name] = tensor.cpu()

    def _return_to_device(self) -> None:
        for name, tensor in self._packed_tensors().items():
            self._buffers[name] = tensor.to(self._device)

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
            or x.shape[-1] != self.in_features
            or not x.numel()
            or torch.is_autocast_enabled(self._autocast_type)
        ):
            return self._reference(x)
        return self._prepared(x, self.bias)

    def _reference(self, x: Tensor) -> Tensor:
        operands: list[Tensor | None] = [getattr(self, name) for name in TENSOR_NAMES]
        if self.values.device != self._device:
            operands = [None if one is None else one.to(self._device) for one in operands]
        result: Tensor = torch.ops.slim.linear.default(x, *operands, self.bias, **self._attributes)
        return result

    def _forget_kernels(self) -> None:
        """Drop everything that was derived from the packed tensors."""
        device = self._device = self.values.device
        # Asking about a device without autocast, such as meta, is an error; the processor's answer does no harm.
        self._autocast_type = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
        self._prepared = PreparedLayer(self, self._kernels, device)
        # No buffer: nobody is to move, copy or save it.
        self._handle = self._prepared.handle

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kernels' states out of copies, and have the packed tensors of the copy where this layer is."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("_prepared", "_handle")}
        if self._away:
            returned = {name: tensor.to(self._device) for name, tensor in self._packed_tensors().items()}
            state["_buffers"] = self._buffers | returned
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Let a copy derive its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget_kernels()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlimLinear:
        """Move or cast the tensors; codes are moved only, scales and 16-bit values are cast and the format follows."""

        def move_codes_cast_others(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        self._return_to_device()
        super()._apply(move_codes_cast_others, recurse)  # type: ignore[no-untyped-call]
        self._adopt_dtypes()
        return self

    def _adopt_dtypes(self) -> None:
        """Let the format follow the tensors after a cast."""

        def follow(form: WeightFormat, prefix: str = "") -> WeightFormat:
            carrier = getattr(self, f"{prefix}{'values' if form.bits is None else 'scale'}")
            return replace(form, dtype=carrier.dtype)

        form = self.format
        left = None if form.left is None else follow(form.left, "left_")
        right = None if form.right is None else follow(form.right, "right_")
        self._set_format(replace(form, weight=follow(form.weight), left=left, right=right))
        captured = self._prepared.captured
        self._forget_kernels()
        # A graph that is captured anew would find a layer without its kernels' forms.
        if captured and self._device.type == "cuda":
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
        for name, own in self._packed_tensors().items():
            other = state_dict.get(prefix + name)
            if isinstance(other, Tensor) and other.is_floating_point() != own.is_floating_point():
                error_msgs.append(f"dtype of {prefix}{name}: {other.dtype} cannot be loaded into {own.dtype}.")
                return
        self._return_to_device()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._adopt_dtypes()

    def use_kernels(self, kernels: Sequence[Kernel]) -> None:
        """Choose from this table from now on."""
        self._kernels = tuple(kernels)
        self._forget_kernels()

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
