"""Which kernel computes a layer: an ordered table of kernels, each of which accepts a case or says why not.

The table comes from the backends; this module only knows how to choose. The choice depends on what is fixed for a
layer (its format, device and dtype) and on the number of tokens, which is rounded up to a power of two, so that
thresholds in a kernel's ``accepts`` should be powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimc.runtime.formats import LinearFormat
from slimc.runtime.packing import PackedLinear

__all__ = ["Choice", "Explanation", "Kernel", "choices", "choose", "token_bucket"]

LARGEST_EXPLAINED = 1 << 14
"""Token counts above this choose like this one in `choices`."""


@dataclass(frozen=True)
class Kernel:
    """One way to compute a compressed linear layer.

    Attributes:
        name: Shown to people.
        accepts: Given the format, the dtype of x, the device and the number of tokens: None if the kernel can
            compute this case and is worth it, else the reason for people.
        prepare: Derives from the canonical tensors what ``run`` needs; called once a layer and device, also for
            several kernels that share it. The state must be a function of the packed bytes alone.
        run: Computes y [tokens, rows] from x [..., columns], the state and the bias.
        stack: Given the states of layers that read the same input, returns a state with all their rows in that order,
            and for each layer a state in place of its own, so that all share one memory; raises `KernelError` if they
            do not fit each other. None if the kernel runs one layer at a time.
        transient: the state is little more than the canonical tensors themselves, so that it is not kept where a
            layout has taken their place.
    """

    name: str
    accepts: Callable[[LinearFormat, torch.dtype, torch.device, int], str | None]
    prepare: Callable[[PackedLinear], Any]
    run: Callable[[Tensor, Any, Tensor | None], Tensor]
    stack: Callable[[Sequence[Any]], tuple[Any, Sequence[Any]]] | None = None
    transient: bool = False


@dataclass(frozen=True)
class Choice:
    """The kernel for a range of token counts, and why the kernels before it in the table refused.

    ``kernel`` is None if all refused, which leaves the reference op; ``last_tokens`` None means no upper end.
    """

    first_tokens: int
    last_tokens: int | None
    kernel: Kernel | None
    refusals: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line: ``1 to 8 tokens: int4pack`` with the refusals in brackets."""
        if self.last_tokens is None:
            tokens = f"{self.first_tokens} tokens or more"
        elif self.last_tokens == self.first_tokens:
            tokens = f"{self.first_tokens} token{'s' if self.first_tokens > 1 else ''}"
        else:
            tokens = f"{self.first_tokens} to {self.last_tokens} tokens"
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refusals.items())
        return f"{tokens}: {self.kernel.name if self.kernel else 'slim::linear'}{f' ({reasons})' if reasons else ''}"


class Explanation(dict[str, list[Choice]]):
    """The choices of each layer by its name; ``str()`` of it is text for people, layers that choose alike together."""

    def __str__(self) -> str:
        alike: dict[tuple[str, ...], list[str]] = {}
        for name, made in self.items():
            alike.setdefault(tuple(str(choice) for choice in made), []).append(name)
        return "\n\n".join("\n".join([*names, *(f"    {choice}" for choice in made)]) for made, names in alike.items())


def token_bucket(tokens: int) -> int:
    """Return the power of two that ``tokens`` (at least 1) is rounded up to."""
    return 1 << (tokens - 1).bit_length()


def choose(
    kernels: Sequence[Kernel], spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int
) -> tuple[Kernel | None, dict[str, str]]:
    """Return the first kernel that accepts, and the reasons of those before it."""
    refusals: dict[str, str] = {}
    for kernel in kernels:
        reason = kernel.accepts(spec, dtype, device, token_bucket(tokens))
        if reason is None:
            return kernel, refusals
        refusals[kernel.name] = reason
    return None, refusals


def choices(kernels: Sequence[Kernel], spec: LinearFormat, dtype: torch.dtype, device: torch.device) -> list[Choice]:
    """Return what is chosen at every number of tokens, as few ranges as tell it all."""
    found: list[Choice] = []
    first = 1
    tokens = 1
    while tokens <= LARGEST_EXPLAINED:
        kernel, refusals = choose(kernels, spec, dtype, device, tokens)
        if found and found[-1].kernel is kernel and found[-1].refusals == refusals:
            first = found.pop().first_tokens
        found.append(Choice(first, tokens, kernel, refusals))
        first = tokens + 1
        tokens *= 2
    last = found.pop()
    return [*found, Choice(last.first_tokens, None, last.kernel, last.refusals)]
