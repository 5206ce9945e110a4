"""Tune: what is stored beside the codes, fitted by gradient to the output of the dense model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from slimc.errors import NumericsError, RecipeError, VerifyError
from slimc.ir.program import Program, Use
from slimc.passes.base import Pass, SitePass, Statistic, real_number, whole_number
from slimc.passes.constants import Constants
from slimc.progress import Progress
from slimc.runtime.activations import round_inputs
from slimc.runtime.decode import expand_groups
from slimc.runtime.packing import PackedLinear, PackedWeight, pack_weight


@dataclass(frozen=True)
class Tune(Pass):
    """Minimise the distance of the model's output to the dense model's over scales, and over values in 16 bits.

    Codes, masks and patterns stay, so the bytes do too. All scales of weights and adapters, and 16-bit values where
    there are any, are moved by Adam, each in proportion to its size. This is no one-shot compression any more:
    it needs the gradients of the whole model on one device, and as many passes over the calibration data as ``epochs``
    says. Where inputs are rounded (``Activations``), it is fitted to the rounded ones. The errors in the report remain
    those of the sweep.

    Attributes:
        epochs: how often the calibration batches are gone through.
        rate: of Adam, at its start; it falls to zero as a half cosine.
        loss: ``"kl"`` compares the last dimension of the output as distributions (logits), ``"mse"`` compares numbers.
    """

    name: ClassVar[str] = "tune"

    epochs: int = 8
    rate: float = 2e-3
    loss: Literal["kl", "mse"] = "kl"

    def __post_init__(self) -> None:
        """Check the options."""
        self._require(whole_number(self.epochs) and self.epochs >= 1, f"epochs must be 1 or more, not {self.epochs!r}")
        rate_is_valid = real_number(self.rate) and 0 < self.rate < 1
        self._require(rate_is_valid, f"rate must lie between 0 and 1, not {self.rate!r}")
        self._require(self.loss in ("kl", "mse"), f"loss must be 'kl' or 'mse', not {self.loss!r}")

    def statistics(self) -> frozenset[Statistic]:
        """It reads the calibration data itself."""
        return frozenset({"activations"})

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """There must be something to tune, and it must be final."""
        names = [one.name for one in earlier]
        if self.name in names:
            raise RecipeError("tune appears twice. Raise the epochs of the first one instead.")
        if not {"quantize", "prune"} & set(names):
            raise RecipeError("tune has nothing to tune: put quantize or prune before it.")
        if any(isinstance(one, SitePass) and one.stacks for one in earlier):
            raise RecipeError(
                "tune would move the right factor that siblings share for each of them. Leave shared of low_rank out, "
                "or tune."
            )

    def run(
        self,
        program: Program,
        inputs: Sequence[Sequence[Any]],
        *,
        held_out: int,
        device: torch.device | None,
        progress: Progress,
    ) -> None:
        """Change the scales of the sites of ``program``, whose graph is still the captured one.

        With held-out batches the best of all epochs there is kept, the start included.

        Raises:
            NumericsError: the loss is NaN or infinite.
        """
        constants = Constants(program.module, device)
        sites = {
            name: _TunedLinear(_packed(program, name), constants.device, site.bias)
            for name, site in program.sites.items()
        }
        dense = _Runner(program, constants, {})
        products = {use.node: (sites[site.name], use) for site in program.sites.values() for use in site.uses}
        student = _Runner(program, constants, products)
        parameters = [parameter for site in sites.values() for parameter in site.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self.rate, betas=(0.9, 0.95))
        fitted, judges = inputs[: len(inputs) - held_out], inputs[len(inputs) - held_out :]
        steps = self.epochs * len(fitted)
        best = self._judge(dense, student, judges), [parameter.detach().clone() for parameter in parameters]
        progress.start(self.name, steps)
        for step in range(steps):
            for settings in optimizer.param_groups:
                settings["lr"] = self.rate * (1 + math.cos(math.pi * step / steps)) / 2
            with torch.enable_grad():
                loss = self._distance(dense, student, fitted[step % len(fitted)])
            found = float(loss.detach())
            if not math.isfinite(found):
                raise NumericsError(
                    f"tune: the loss is {found} at step {step + 1} of {steps}. Lower the rate, or leave tune out."
                )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            progress.advance(self.name, note=f"loss {found:.4f}")
            if (step + 1) % len(fitted) == 0 and judges and (error := self._judge(dense, student, judges)) < best[0]:
                best = error, [parameter.detach().clone() for parameter in parameters]
        progress.finish(self.name)
        if judges:
            for parameter, value in zip(parameters, best[1], strict=True):
                parameter.data.copy_(value)
        for name, site in program.sites.items():
            site.packed = sites[name].pack()

    def _judge(self, dense: _Runner, student: _Runner, batches: Sequence[Sequence[Any]]) -> float:
        with torch.no_grad():
            return sum(float(self._distance(dense, student, batch)) for batch in batches)

    def _distance(self, dense: _Runner, student: _Runner, batch: Sequence[Any]) -> Tensor:
        with torch.no_grad():
            wanted = dense.result(batch)
        found = student.result(batch)
        if self.loss == "mse":
            return (found - wanted).square().mean() / wanted.square().mean()
        logits, exact = found.flatten(0, -2), wanted.flatten(0, -2)
        return functional.kl_div(
            functional.log_softmax(logits, -1),
            functional.log_softmax(exact, -1),
            reduction="batchmean",
            log_target=True,
        )


class _TunedMatrix(nn.Module):
    """A packed matrix whose scales, or whose values, are parameters: the part by which each is larger."""

    def __init__(self, packed: PackedWeight, device: torch.device) -> None:
        super().__init__()
        self.packed = packed
        stored, mask = packed.unpack()
        self.mask = None if mask is None else mask.to(device)
        start = packed.scale
        self.signed: Tensor | None = None
        if start is None:
            start = stored
            self.unit = stored.float().square().mean().sqrt().to(device)
        else:
            # Less their zero points, whatever the widths are: what they stand for where every scale is 1.
            steps = dataclasses.replace(packed, scale=torch.ones_like(start, dtype=torch.float32)).decode()
            self.signed = steps.short().to(device)
            self.unit = start.float().to(device)
        self.start = start.float().to(device)
        self.share = nn.Parameter(torch.zeros_like(self.start))

    def _spread(self, each: Tensor) -> Tensor:
        return expand_groups(each, self.packed.format.columns, self.packed.format.group or 0)

    def tuned(self) -> Tensor:
        """Return the scales or values as they are now, float32."""
        return self.start + self.share * self.unit

    def matrix(self) -> Tensor:
        """Return the dense matrix, float32."""
        now = self.tuned()
        whole = now if self.signed is None else self.signed * self._spread(now)
        return whole if self.mask is None else whole * self.mask

    def pack(self) -> PackedWeight:
        """Return the packed form with what has been found."""
        packed, now = self.packed, self.tuned().detach()
        if packed.scale is not None:
            smallest = torch.finfo(packed.scale.dtype).smallest_normal
            scale = now.clamp(min=smallest).to(packed.scale)
            return dataclasses.replace(packed, scale=scale)
        mask = None if self.mask is None else self.mask.to(packed.values.device)
        return pack_weight(now.to(packed.values), bits=None, mask=mask, sparsity=packed.format.sparsity)


class _TunedLinear(nn.Module):
    """A site's product with tuned parts."""

    def __init__(self, packed: PackedLinear, device: torch.device, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = None if bias is None else bias.to(device)
        self.weight = _TunedMatrix(packed.weight, device)
        self.left = None if packed.left is None else _TunedMatrix(packed.left, device)
        self.right = None if packed.right is None else _TunedMatrix(packed.right, device)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        scale = self.packed.input_scale
        scaled = x if scale is None else x * scale.to(x)
        given = bias if self.bias is None else self.bias
        rounded = self._rounded(scaled)
        y = functional.linear(rounded, self.weight.matrix().to(x.dtype), given)
        if self.left is None or self.right is None:
            return y
        inner = functional.linear(rounded if scale is None else x, self.right.matrix().to(x.dtype))
        return y + functional.linear(inner, self.left.matrix().to(x.dtype))

    def _rounded(self, x: Tensor) -> Tensor:
        """Return x rounded, if it is; gradients pass rounding as if it were not there, whose own are zero."""
        return x + (round_inputs(x, self.packed.activation) - x).detach()

    def pack(self) -> PackedLinear:
        return dataclasses.replace(
            self.packed,
            weight=self.weight.pack(),
            left=None if self.left is None else self.left.pack(),
            right=None if self.right is None else self.right.pack(),
        )


class _Runner(fx.Interpreter):
    """Runs the captured graph on a device, some of its products replaced."""

    def __init__(
        self, program: Program, constants: Constants, products: dict[fx.Node, tuple[_TunedLinear, Use]]
    ) -> None:
        super().__init__(program.module)
        self.constants = constants
        self.products = products

    def result(self, batch: Sequence[Any]) -> Tensor:
        """Return the first tensor of numbers that the model puts out, float32."""
        device = self.constants.device
        moved = [one.to(device) if isinstance(one, Tensor) else one for one in batch]
        return next(_floats(self.run(*moved, enable_io_processing=False))).float()

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node, a tuned product in place of a dense one."""
        if n.op == "get_attr":
            # Gradients of the user's own parameters are nobody's business here.
            value = self.constants[n]
            return value.detach() if isinstance(value, Tensor) else value
        if n in self.products:
            linear, use = self.products[n]
            return linear(self.env[use.input], None if use.bias is None else self.env[use.bias])
        if n.op == "call_module":
            function: Callable[..., Any] = self.constants.submodule(str(n.target))
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return function(*args, **kwargs)
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator; a device that the graph names is the one here."""
        args, kwargs = fx.node.map_aggregate(
            (args, kwargs), lambda leaf: self.constants.here(leaf) if isinstance(leaf, torch.device) else leaf
        )
        return super().call_function(target, args, kwargs)


def _floats(result: Any) -> Iterator[Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf


def _packed(program: Program, name: str) -> PackedLinear:
    packed = program.sites[name].packed
    if packed is None:
        raise VerifyError(f"tune came before the sweep had reached '{name}'; this is a bug in the pipeline.")
    return packed
