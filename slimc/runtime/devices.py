"""Where to compute."""

from __future__ import annotations

import copy
from pickle import PicklingError

import torch
from torch import Tensor, nn

from slimc.errors import InputError

CANNOT_BE_COPIED = (TypeError, RuntimeError, PicklingError)
"""What ``copy.deepcopy`` raises for a module that holds something without a copy: a lock, a generator, a file."""


def default_device() -> torch.device:
    """Return the CUDA GPU if there is one, else the CPU.

    Other accelerators are used only by name: Apple's has no float64, in which the solvers compute.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None and found.type == "cuda" else torch.device("cpu")


def usable_device(name: str | torch.device) -> torch.device:
    """Return the device called ``name``.

    Raises:
        InputError: there is none, or it cannot be used.
    """
    try:
        known = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"there is no device '{name}'; name cpu, cuda or cuda:N (cuda:0, cuda:1...)") from error
    if known.type == "meta":
        raise InputError("the device 'meta' has no memory to compute in; name cpu, cuda or cuda:N")
    try:
        # A tensor knows its device by index ("cuda" is "cuda:0"), which makes devices comparable.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the device '{name}' cannot be used ({reason}); 'cpu' always can") from error


def home_of(model: nn.Module, *, chosen: torch.device | None = None) -> torch.device:
    """Return the device that ``model`` is on; the CPU for one without a tensor.

    Args:
        model: any module.
        chosen: where its layers are going to be computed, if that is chosen; then the model may be spread.

    Raises:
        InputError: a tensor has no values yet (the meta device), or the model is spread and no device is chosen.
    """
    homes: dict[torch.device, str] = {}
    for name, tensor in _named_tensors(model):
        homes.setdefault(tensor.device, name)
    for device, name in homes.items():
        if device.type == "meta":
            raise InputError(
                f"'{name}' of {type(model).__name__} is on the meta device and has no values; load the model's weights "
                "first (with device_map=, let nothing be offloaded)"
            )
    if len(homes) > 1 and chosen is None:
        places = " and ".join(f"{device} ('{name}')" for device, name in homes.items())
        raise InputError(
            f"{type(model).__name__} is spread over {places}. Name the device that computes, each layer in its turn, "
            "with device= (the model may stay where it is), or move the model to one device first."
        )
    return next(iter(homes), torch.device("cpu"))


def copy_to(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of ``model`` on ``device``, made without a second one where it is, or itself if it is there.

    Raises:
        InputError: the model holds something that cannot be copied.
    """
    tensors = [tensor for _, tensor in _named_tensors(model)]
    if all(tensor.device == device for tensor in tensors):
        return model
    memo: dict[int, object] = {}
    for tensor in tensors:
        moved = tensor.detach().to(device)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(moved, requires_grad=tensor.requires_grad) if is_parameter else moved
    try:
        # Compressed layers hold what kernels of their own device want; the copies shall hold what those of theirs do.
        return copy.deepcopy(model, memo).to(device)
    except CANNOT_BE_COPIED as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied to {device} ({error}). Move the model itself there, with "
            f"model.to('{device}'), and leave device= out."
        ) from error


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
