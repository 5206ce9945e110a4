"""What a graph reads besides its inputs, on the device where the sweep computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimc.ir.program import attribute


class Constants:
    """The parameters, buffers and inner graphs of a captured module, brought to ``device`` when they are asked for.

    Nothing is kept: on another device than the module's own, every look-up is a copy, which goes when its reader does.
    A module that is spread over several devices comes together on ``device``, one constant at a time.

    Args:
        module: the captured module; it stays where it is.
        device: where the constants are needed; ``None`` is the module's own device.
    """

    def __init__(self, module: fx.GraphModule, device: torch.device | None = None) -> None:
        self.module = module
        self.home = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
        self.device = self.home if device is None else device
        self._homes = {tensor.device for tensor in (*module.parameters(), *module.buffers())}

    def __getitem__(self, node: fx.Node) -> Any:
        """Return what a ``get_attr`` node stands for."""
        value = attribute(self.module, str(node.target))
        return self._moved(value) if isinstance(value, nn.Module) else self.here(value)

    def submodule(self, target: str) -> nn.Module:
        """Return what a ``call_module`` node calls."""
        return self._moved(self.module.get_submodule(target))

    def here(self, value: Any) -> Any:
        """Bring a tensor over; a device on which some of the module is becomes the one here."""
        if isinstance(value, Tensor):
            return value.to(self.device)
        return self.device if isinstance(value, torch.device) and value in self._homes else value

    def _moved(self, module: nn.Module) -> nn.Module:
        if self._homes <= {self.device}:
            return module
        module = copy.deepcopy(module).to(self.device)
        for part in module.modules():
            if isinstance(part, fx.GraphModule):
                for node in part.graph.nodes:
                    node.args = fx.node.map_aggregate(node.args, self.here)
                    node.kwargs = fx.node.map_aggregate(node.kwargs, self.here)
                part.recompile()
        return module
