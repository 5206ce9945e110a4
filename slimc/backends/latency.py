"""How long a layer of some form takes on the GPU of this machine, for plans that are to be fast."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from slimc.backends import KERNELS, tuning
from slimc.errors import RecipeError
from slimc.planning.menu import DENSE
from slimc.planning.sensitivity import Choice
from slimc.progress import Progress
from slimc.runtime.bits import pack_bits
from slimc.runtime.formats import LinearFormat, WeightFormat
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import NM, PackedLinear

STAGE = "time layers"


class DecodeTimes:
    """Microseconds of layers that are called with one token, cold weights, the fastest kernel of each form.

    Kernels are chosen by :func:`slimc.backends.tuning.tune`, which keeps its times on disk; nothing is captured, so
    that all times hold the launches.

    Args:
        target: ``"decode"``, or ``"decode@CARD"`` with a part of a card's name (``"decode@h100"``).
        progress: told once a form.

    Raises:
        RecipeError: there is no such target, or no such card in this machine.
    """

    def __init__(self, target: str, progress: Progress) -> None:
        matched = re.fullmatch(r"decode(?:@([\w -]+))?", target)
        if matched is None:
            raise RecipeError(f"there is no target '{target}'; there are 'size', 'decode' and 'decode@CARD'")
        self._device = torch.device("cuda")
        self._progress = progress
        self._known: dict[LinearFormat, float] = {}
        here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        wanted = matched[1]
        if here is None or (wanted is not None and wanted.lower() not in here.lower()):
            found = "none" if here is None else f"'{here}'"
            raise RecipeError(
                f"The target '{target}' counts times that are measured on the card itself, and this machine has "
                f"{found}. Plan on a machine with that card, or for the target 'size'."
            )

    def __call__(self, choices: Iterable[Choice]) -> Mapping[LinearFormat, float]:
        """Return microseconds by form; a form is timed once."""
        missing = {choice.format: choice.name == DENSE for choice in choices if choice.format not in self._known}
        self._progress.start(STAGE, len(missing))
        with torch.inference_mode(False), torch.no_grad():
            for form, dense in missing.items():
                self._known[form] = self._time(form, dense)
                self._progress.advance(STAGE, note=form.describe())
        self._progress.finish(STAGE)
        return self._known

    def _time(self, form: LinearFormat, dense: bool) -> float:
        dtype = form.weight.dtype
        x = torch.randn(1, form.columns, device=self._device).to(dtype)
        if dense:
            weight = torch.randn(form.rows, form.columns, device=self._device).to(dtype)
            return tuning.microseconds(lambda: F.linear(x, weight), self._device)
        layer = SlimLinear(example(form, self._device), kernels=KERNELS)
        tuning.tune(layer, tokens=[1])
        return tuning.microseconds(lambda: layer(x), self._device)


def example(form: LinearFormat, device: torch.device) -> PackedLinear:
    """Return a layer of ``form`` with some content: any bytes are codes."""
    generator = torch.Generator(device).manual_seed(0)

    def fill(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if name == "pattern":
            return pack_bits(_kept(form.weight, device).to(torch.uint8), 1)
        if name == "zero_point":
            return torch.zeros(shape, dtype=dtype, device=device)
        if dtype.is_floating_point:
            return torch.full(shape, 2.0**-6, dtype=dtype, device=device)
        codes = torch.randint(0, 256, shape, generator=generator, device=device, dtype=dtype)
        # Layouts do not keep the bits after the last code, and a layer that they would change stays without them.
        codes[..., -1] = 0
        return codes

    specs = form.tensor_specs()
    return PackedLinear.assemble(form, {name: fill(name, shape, dtype) for name, (shape, dtype) in specs.items()})


def _kept(form: WeightFormat, device: torch.device) -> Tensor:
    """Return which entries are stored: the first of each block, or the first of all."""
    if isinstance(form.sparsity, NM):
        kept = torch.arange(form.columns, device=device) % form.sparsity.m < form.sparsity.n
        return kept.expand(form.rows, form.columns)
    order = torch.arange(form.rows * form.columns, device=device)
    return (order < (form.nonzeros or 0)).view(form.rows, form.columns)
