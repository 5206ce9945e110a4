"""`SlimLinear`: a linear layer that holds only packed tensors.

Traced (``torch.compile``, ``torch.export``) it is one ``slim::linear`` node; called eagerly it runs the kernel that
the table chooses, from a state that is derived from the packed tensors on the first call and never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimc.errors import FormatError
from slimc.runtime import ops
from slimc.runtime.formats import LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear
from slimc.runtime.select import Choice, Explanation, Kernel, KernelTable, choices, choose

__all__ = ["SlimLinear", "explain", "use_kernels"]

TENSOR_NAMES = ops.LINEAR_TENSORS
"""The buffers of a `SlimLinear`; those that its format lacks are None."""

_Plan = tuple[Callable[[Tensor, Any, Tensor | None], Tensor], Any, Tensor | None]


class SlimLinear(nn.Module):
    """A linear layer ``y = (x * input_scale) @ W^T + (x @ right^T) @ left^T + bias`` over packed tensors.

    The packed tensors are buffers under the names of `PackedLinear.tensors`; the bias is a frozen Parameter. The
    ``state_dict`` holds the canonical bytes and nothing else.

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
        """The packed weight; its tensors are the buffers of this module."""
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
        super().__setattr__(name, value)
        if name in TENSOR_NAMES or name == "bias":
            self._forget_kernels()

    def _packed_tensors(self) -> dict[str, Tensor]:
        named = ((name, getattr(self, name)) for name in TENSOR_NAMES)
        return {name: tensor for name, tensor in named if tensor is not None}

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in the dtype of x [..., in_features]."""
        # Kernels have no gradients and cannot be traced, and autocast would change dtypes inside them.
        if (
            torch.compiler.is_compiling()
            or type(x) is not Tensor
            or (x.requires_grad and torch.is_grad_enabled())
            or torch.is_autocast_enabled(self._autocast_type)
        ):
            return self._reference(x)
        tokens = x.numel() // self.in_features
        plan = self._plans.get((x.dtype, (tokens - 1).bit_length()))
        if plan is None:
            plan = self._plan(x.dtype, tokens)
        if x.shape[-1] != self.in_features or not tokens:
            return self._reference(x)
        run, state, bias = plan
        return run(x, state, bias)

    def _reference(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.slim.linear.default(
            x,
            self.values,
            self.pattern,
            self.scale,
            self.zero_point,
            self.input_scale,
            self.left_values,
            self.left_scale,
            self.right_values,
            self.right_scale,
            self.bias,
            **self._attributes,
        )
        return result

    def _plan(self, dtype: torch.dtype, tokens: int) -> _Plan:
        """Choose a kernel for this many tokens, prepare it if it is new here, and remember both."""
        kernel, _ = choose(self._kernels, self.format, dtype, self.values.device, max(tokens, 1))
        if kernel is None:
            plan: _Plan = (lambda x, _state, _bias: self._reference(x), None, None)
        else:
            if kernel.prepare not in self._states:
                # Tensors made under inference mode could never be used outside it.
                with torch.inference_mode(False), torch.no_grad():
                    self._states[kernel.prepare] = kernel.prepare(self.packed)
            plan = (kernel.run, self._states[kernel.prepare], self.bias)
        self._plans[dtype, (tokens - 1).bit_length()] = plan
        return plan

    def _forget_kernels(self) -> None:
        """Drop everything that was derived from the packed tensors."""
        # Asking about a device without autocast, such as meta, is an error; the processor's answer does no harm.
        device = self.values.device.type
        self._autocast_type = device if torch.amp.is_autocast_available(device) else "cpu"
        self._plans: dict[tuple[torch.dtype, int], _Plan] = {}
        self._states: dict[Callable[..., Any], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kernel states out of copies; a copy derives its own."""
        return self.__dict__ | {"_plans": {}, "_states": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlimLinear:
        """Move or cast the tensors; codes are moved only, scales and 16-bit values are cast and the format follows."""

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
            carrier = getattr(self, f"{prefix}{'values' if form.bits is None else 'scale'}")
            return replace(form, dtype=carrier.dtype)

        form = self.format
        left = None if form.left is None else follow(form.left, "left_")
        right = None if form.right is None else follow(form.right, "right_")
        self._set_format(replace(form, weight=follow(form.weight), left=left, right=right))
        self._forget_kernels()

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
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._adopt_dtypes()

    def use_kernels(self, kernels: Sequence[Kernel]) -> None:
        """Choose from this table from now on."""
        self._kernels = kernels if isinstance(kernels, KernelTable) else KernelTable(kernels)
        self._forget_kernels()

    @property
    def kernels(self) -> KernelTable:
        """The table that kernels are chosen from."""
        return self._kernels

    def choose_again(self) -> None:
        """Choose kernels anew from the next call on, because more is known of their times."""
        self._plans.clear()

    def choices(self, dtype: torch.dtype | None = None) -> list[Choice]:
        """Return which kernel runs at which token counts for inputs of ``dtype`` (default: the weight's)."""
        return choices(self._kernels, self.format, dtype or self.format.weight.dtype, self.values.device)

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
