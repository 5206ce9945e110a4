"""Where to compute."""

from __future__ import annotations

import copy

import torch
from torch import nn

from slimc.errors import InputError
from slimc.runtime.modules import SlimLinear


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


def devices_of(model: nn.Module) -> list[torch.device]:
    """Return the devices on which the modules of ``model`` compute, each once, in the order of the modules."""
    found: dict[torch.device, None] = {}
    for module in model.modules():
        if isinstance(module, SlimLinear):
            found[module.device] = None
        else:
            tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            found |= {tensor.device: None for tensor in tensors}
    return list(found)


def copy_to(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of ``model`` on ``device``, made without a second one where it is, or itself if it is there."""
    if set(devices_of(model)) <= {device}:
        return model
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        moved = tensor.detach().to(device)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(moved, requires_grad=tensor.requires_grad) if is_parameter else moved
    # Compressed layers may have moved their copies back to where they compute.
    return copy.deepcopy(model, memo).to(device)
