"""Permute: the order of a model's inner channels in which N:M sparsity and groups of scales cost least."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from slimc.ir.channels import Channels, Stretch, permutable
from slimc.ir.program import Program, attribute
from slimc.passes.base import ProgramPass, Statistic, whole_number
from slimc.passes.observe import observe
from slimc.passes.solvers.permutation import best_order
from slimc.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Permute(ProgramPass):
    """``down(act(gate(x)) * up(x)) = down[:, p](act(gate[p](x)) * up[p](x))``, with ``p`` chosen for what follows.

    Rows of what produces inner channels and columns of what consumes them are stored in another order, together with
    biases and vectors in between. Nothing is gathered at run time, and the model computes the same function. Which
    channels those are, the captured graph says (:mod:`slimc.ir.channels`): those inside an MLP, and those of the
    values in each head of attention, in one order for all the queries that share a head of the values. The residual
    stream, tied weights and channels that anything reads in their order stay as they are.

    Attributes:
        pattern: the N:M that ``prune`` will store. Channels are put beside each other so that the entries that N of M
            can keep have most of ``|w|`` times the root mean square of the input (Wanda's score; J. Pool and C. Yu,
            "Channel Permutations for N:M Sparsity", NeurIPS 2021). ``None``: every channel by itself.
        sort: by what groups of M channels are ordered, so that those that share a scale are alike: ``"magnitude"`` of
            their weights, ``"energy"`` of their inputs, or ``None``.
        batches: how many calibration batches the mean squares of the inputs are taken from, at most.
    """

    name: ClassVar[str] = "permute"

    pattern: str | None = "2:4"
    sort: Literal["magnitude", "energy"] | None = "magnitude"
    batches: int = 8

    def __post_init__(self) -> None:
        """Check the options."""
        if self.pattern is not None:
            self._require(
                re.fullmatch(r"[0-9]{1,3}:[0-9]{1,3}", str(self.pattern)) is not None and 1 <= self.nm[0] < self.nm[1],
                f"pattern must be 'n:m' with 1 <= n < m (such as '2:4'), or null, not {self.pattern!r}",
            )
        self._require(
            self.sort in ("magnitude", "energy", None), f"sort must be 'magnitude', 'energy' or null, not {self.sort!r}"
        )
        self._require(
            self.pattern is not None or self.sort is not None, "pattern and sort are both null: nothing to do"
        )
        self._require(
            whole_number(self.batches) and self.batches >= 1, f"batches must be 1 or more, not {self.batches!r}"
        )

    @property
    def nm(self) -> tuple[int, int]:
        """The pattern as numbers; (1, 1) without one."""
        if self.pattern is None:
            return 1, 1
        kept, of = self.pattern.split(":")
        return int(kept), int(of)

    def statistics(self) -> frozenset[Statistic]:
        """The mean square of each input channel."""
        return frozenset({"activations"})

    def run(
        self,
        program: Program,
        inputs: Sequence[Sequence[Any]],
        *,
        held_out: int,
        device: torch.device | None,
        progress: Progress,
    ) -> None:
        """Reorder the channels of ``program``."""
        found = permutable(program)
        for site, reason in found.refused.items():
            log.info("permute: the input channels of %s stay in their order: %s", site, reason)
        channels = [one for one in found.channels if self._fits(one)]
        consumers = {site for one in channels for site in one.consumed}
        energies = observe(
            program,
            inputs[: len(inputs) - held_out][: self.batches],
            lambda work: work.require_statistics(self.name).sum_squares,
            sites=consumers,
            held_out=0,
            device=device,
            progress=progress,
            stage=self.name,
        )
        for one in channels:
            permutation = self._order(program, one, energies)
            for stretch in (*one.produced, *one.consumed.values()):
                reorder(program, stretch, permutation)

    def _fits(self, channels: Channels) -> bool:
        """Tell whether blocks consist of whole groups of M."""
        _, m = self.nm
        if channels.size % m:
            log.info("permute: %s stay in their order: blocks of %d are no multiple of %d", channels, channels.size, m)
        return channels.size % m == 0

    def _order(self, program: Program, channels: Channels, energies: dict[str, Tensor]) -> Tensor:
        """Return which channel comes to each position, int64 ``[channels]``."""
        n, m = self.nm
        weights, scores, energies_by_channel = [], [], []
        for name, stretch in channels.consumed.items():
            weight = program.dense_weight(program.sites[name]).to(energies[name].device).float()
            weights.append(_by_channel(weight.abs(), stretch, channels))
            scores.append(_by_channel(weight.abs() * energies[name].sqrt(), stretch, channels))
            energies_by_channel.append(_by_channel(energies[name][None], stretch, channels))
        score = torch.cat(scores)
        key = (torch.cat(weights).square() if self.sort == "magnitude" else torch.cat(energies_by_channel)).sum(0)
        order = []
        for block in range(channels.blocks):
            first = block * channels.size
            part = slice(first, first + channels.size)
            chosen = best_order(score[:, part], n, m)
            if self.sort is not None:
                groups = chosen.reshape(-1, m)
                chosen = groups[key[part][groups].sum(1).argsort(descending=True, stable=True)].reshape(-1)
            order.append(first + chosen)
        return torch.cat(order).cpu()


def _by_channel(values: Tensor, stretch: Stretch, channels: Channels) -> Tensor:
    """Bring columns ``[rows, positions]`` into the order of the channels, copies below each other."""
    copies = int(stretch.repeats.max()) + 1
    place = (stretch.repeats * channels.count + stretch.order).argsort().to(values.device)
    return values[:, place].reshape(len(values), copies, channels.count).flatten(0, 1)


def reorder(program: Program, stretch: Stretch, permutation: Tensor) -> None:
    """Store part of an axis of a tensor of ``program`` in another order."""
    tensor: Tensor = attribute(program.module, stretch.tensor).detach()
    places = torch.arange(tensor.shape[stretch.axis])
    places[stretch.start : stretch.start + len(stretch.order)] = stretch.start + stretch.sources(permutation)
    program.replace(stretch.tensor, tensor.index_select(stretch.axis, places.to(tensor.device)))
