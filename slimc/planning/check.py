"""What a plan does to the model once it is carried out: measured, where `slimc.planning.sensitivity` predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimc.ir.capture import Batch


@torch.no_grad()
def measured_damage(dense: nn.Module, small: nn.Module, batches: Sequence[Batch], *, vocabulary: int | None) -> float:
    """Return the damage in the unit of :class:`slimc.planning.sensitivity.Choice`, with nothing taken to add up.

    Args:
        dense: the model before, on the device of ``small``.
        small: the same model, compressed.
        batches: calls that nothing was fitted to.
        vocabulary: the number of logits a token if the model's first such output is a language model's; else ``None``.

    Returns:
        The Kullback-Leibler divergence in nats a token; without logits half the squared relative error of all outputs.
    """
    device = next(dense.parameters()).device
    divergence, tokens, errors = 0.0, 0, []
    for args, kwargs in batches:
        moved_args, moved_kwargs = torch.utils._pytree.tree_map_only(
            Tensor, lambda x: x.to(device), (args, dict(kwargs))
        )
        pairs = list(zip(*(_outputs(one(*moved_args, **moved_kwargs)) for one in (dense, small)), strict=True))
        logits = next((pair for pair in pairs if pair[0].shape[-1:] == (vocabulary,)), None)
        if logits is None:
            # As there, every output of a batch counts by its own size, and a batch is what is told.
            errors.append(sum(float((found - exact).norm() / exact.norm()) ** 2 for exact, found in pairs) / 2)
            continue
        for exact, found in zip(*(one.flatten(0, -2).split(_TOKENS) for one in logits), strict=True):
            log_exact, log_found = (functional.log_softmax(one.float(), -1) for one in (exact, found))
            divergence += float((log_exact.exp() * (log_exact - log_found)).sum(dtype=torch.float64))
            tokens += len(exact)
    return divergence / tokens if tokens else sum(errors) / len(errors)


_TOKENS = 512
"""Tokens whose distributions are compared at once: a vocabulary times these is all that is held in float32."""


def _outputs(result: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
