"""Which kernel computes a layer: an ordered table of kernels, each of which accepts a case or says why not.

The table comes from the backends; this module only knows how to choose. The choice depends on what is fixed for a
layer (its format, device and dtype), on the layers that are run with it as one, and on the number of tokens, which is
rounded up to a power of two, so that thresholds in a kernel's ``accepts`` and ``expects`` should be powers of two.

Where the kernels that accept were timed on this device, the fastest is chosen. Elsewhere it is the first in the table
that is expected to be fast. Choosing never measures anything, so it may happen while a CUDA graph is captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from slimc.runtime.formats import LinearFormat
from slimc.runtime.packing import PackedLinear

__all__ = [
    "LARGEST_TIMED",
    "Case",
    "Choice",
    "Explanation",
    "Kernel",
    "KernelTable",
    "Timings",
    "choices",
    "choose",
    "ranges",
    "token_bucket",
]

LARGEST_EXPLAINED = 1 << 14
"""Token counts above this choose like this one in `choices`."""

LARGEST_TIMED = 1 << 12
"""Token counts above this go by the times at this one: more of the same takes as much longer everywhere."""


@dataclass(frozen=True)
class Case:
    """A call of one layer, or of layers that read the same input and are run as one, as far as it decides the speed.

    Attributes:
        format: of the layer; of the widest one of a stack.
        dtype: of x.
        device: on which it is computed.
        tokens: of the call, rounded up to a power of two.
        stack: formats of all layers that are run as one, in their order; none or one for a layer by itself.
    """

    format: LinearFormat
    dtype: torch.dtype
    device: torch.device
    tokens: int
    stack: tuple[LinearFormat, ...] = ()

    @property
    def members(self) -> tuple[LinearFormat, ...]:
        """Formats of all layers that the call computes."""
        return self.stack or (self.format,)


@dataclass(frozen=True)
class Kernel:
    """One way to compute a compressed linear layer.

    Attributes:
        name: Shown to people, and the name under which times are kept.
        accepts: Given the format, the dtype of x, the device and the number of tokens: None if the kernel can
            compute this case, else the reason for people.
        prepare: Derives from the canonical tensors what ``run`` needs; called once a layer and device, also for
            several kernels that share it. The state must be a function of the packed bytes alone.
        run: Computes y [tokens, rows] from x [..., columns], the state and the bias.
        stack: Given the states of layers that read the same input, returns a state with all their rows in that order,
            and for each layer a state in place of its own, so that all share one memory; raises `KernelError` if they
            do not fit each other. None if the kernel runs one layer at a time.
        transient: the state is little more than the canonical tensors themselves, so that it is not kept where a
            layout has taken their place.
        expects: What is known of the speed without measuring, of a case that is accepted: None if the kernel is
            expected to be the best from here on in the table, else why it is not. Times overrule it. Unlike
            ``accepts``, which is asked of each layer, it is asked once of all that are run as one.
        timed: Whether it competes with others by time; a kernel of last resort does not.
        binary: Whether it knows of binary parts; one that does not is never asked about a layer that has one.
    """

    name: str
    accepts: Callable[[LinearFormat, torch.dtype, torch.device, int], str | None]
    prepare: Callable[[PackedLinear], Any]
    run: Callable[[Tensor, Any, Tensor | None], Tensor]
    stack: Callable[[Sequence[Any]], tuple[Any, Sequence[Any]]] | None = None
    transient: bool = False
    expects: Callable[[Case], str | None] | None = None
    timed: bool = True
    binary: bool = False

    def refuses(self, spec: LinearFormat, dtype: torch.dtype, device: torch.device, tokens: int) -> str | None:
        """Say why the kernel cannot compute a case, or return None if it can."""
        if spec.binary is not None and not self.binary:
            return f"does not compute the binary part ({spec.binary.describe()})"
        return self.accepts(spec, dtype, device, tokens)


class Timings(Protocol):
    """What is known of the speed of kernels on the devices of this machine."""

    def of(self, spec: LinearFormat, dtype: torch.dtype, device: torch.device) -> Mapping[int, Mapping[str, float]]:
        """Return microseconds a call, by number of tokens and name of the kernel; infinite if it failed."""
        ...


class KernelTable(tuple[Kernel, ...]):
    """Kernels, best first as far as it can be told beforehand, with what is known of their times.

    Args:
        kernels: in their order.
        timings: of the kernels on this machine.
        origin: the module in which the table is called ``KERNELS``, if it is: there pickle finds it again. What a
            kernel does need not be a function of a module, so that a table without is pickled only if all are.
    """

    timings: Timings | None
    origin: str | None

    def __new__(
        cls, kernels: Iterable[Kernel] = (), timings: Timings | None = None, origin: str | None = None
    ) -> KernelTable:
        """Take the kernels in their order."""
        table = super().__new__(cls, kernels)
        table.timings, table.origin = timings, origin
        return table

    def __deepcopy__(self, _memo: dict[int, Any]) -> KernelTable:
        """Share the table: it never changes, and the timings belong to the machine."""
        return self

    def __reduce__(self) -> tuple[Callable[..., KernelTable], tuple[Any, ...]]:
        """Name the table, or keep the timings with the kernels."""
        if self.origin is not None:
            return _named_table, (self.origin,)
        return KernelTable, (tuple(self), self.timings)


def _named_table(origin: str) -> KernelTable:
    table = import_module(origin).KERNELS
    return table if isinstance(table, KernelTable) else KernelTable(table)


@dataclass(frozen=True)
class Choice:
    """The kernel for a range of token counts, and why other kernels were not chosen.

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
        alike: dict[str, list[str]] = {}
        for name, reason in self.refusals.items():
            alike.setdefault(reason, []).append(name)
        reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in alike.items())
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
    kernels: Sequence[Kernel],
    spec: LinearFormat,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    stack: Sequence[LinearFormat] = (),
) -> tuple[Kernel | None, dict[str, str]]:
    """Return the kernel for a case, and the reasons against those that come before it or were slower.

    It is the fastest where a `KernelTable` knows times; of a stack, where they are of its widest layer, the fastest
    that expects to be fast for the stack too. Elsewhere it is the first that accepts and expects to be fast, or failing
    that the first that accepts.

    Args:
        kernels: to choose from.
        spec: the format of the layer, or of the widest one of a stack: a kernel is chosen that accepts it, and by
            its times.
        dtype: of x.
        device: on which it is computed.
        tokens: of the call.
        stack: the formats of all layers that are run as one, if there are several.
    """
    case = Case(spec, dtype, device, token_bucket(tokens), tuple(stack))
    asked = spec, dtype, device, case.tokens
    times = _times(kernels, case)
    # Of kernels that refuse now, for which less may be stored than was when they were timed, times say nothing.
    if not any(times.get(kernel.name, math.inf) < math.inf and kernel.refuses(*asked) is None for kernel in kernels):
        times = {}
    refusals: dict[str, str] = {}
    able: list[Kernel] = []
    for kernel in kernels:
        reason = kernel.refuses(*asked)
        if reason is not None:
            refusals[kernel.name] = reason
            continue
        able.append(kernel)
        if not times:
            reason = kernel.expects(case) if kernel.expects else None
            if reason is None:
                return kernel, refusals
            refusals[kernel.name] = reason
    timed = [kernel for kernel in able if times.get(kernel.name, math.inf) < math.inf]
    if timed:
        # Layers were timed one by one: of more of them than one a kernel may know better.
        doubts = {kernel.name: kernel.expects(case) for kernel in timed if kernel.expects and len(stack) > 1}
        best = min(timed, key=lambda kernel: (doubts.get(kernel.name) is not None, times[kernel.name]))
        refusals |= {
            kernel.name: doubts.get(kernel.name) or _slower(kernel, best, times)
            for kernel in able
            if kernel.timed and kernel is not best
        }
        return best, {kernel.name: refusals[kernel.name] for kernel in kernels if kernel.name in refusals}
    if able:
        refusals.pop(able[0].name, None)
    return (able[0] if able else None), refusals


def _times(kernels: Sequence[Kernel], case: Case) -> Mapping[str, float]:
    """Return what is known for a case, by name of the kernel."""
    if not isinstance(kernels, KernelTable) or kernels.timings is None:
        return {}
    known = kernels.timings.of(case.format, case.dtype, case.device)
    return known.get(min(case.tokens, LARGEST_TIMED), {})


def _slower(kernel: Kernel, best: Kernel, times: Mapping[str, float]) -> str:
    taken = times.get(kernel.name)
    if taken is None:
        return f"was not timed here, unlike {best.name}"
    if taken == math.inf:
        return "failed when it was timed here"
    return f"slower than {best.name} here: {taken:.3g} us against {times[best.name]:.3g} us"


def choices(kernels: Sequence[Kernel], spec: LinearFormat, dtype: torch.dtype, device: torch.device) -> list[Choice]:
    """Return what is chosen for a layer at every number of tokens, as few ranges as tell it all."""
    return ranges(lambda tokens: choose(kernels, spec, dtype, device, tokens))


def ranges(choose_for: Callable[[int], tuple[Kernel | None, dict[str, str]]]) -> list[Choice]:
    """Return what a function chooses at every number of tokens, and why nothing else, as few ranges as tell it all."""
    found: list[Choice] = []
    first = 1
    tokens = 1
    while tokens <= LARGEST_EXPLAINED:
        kernel, refusals = choose_for(tokens)
        if found and found[-1].kernel is kernel and found[-1].refusals == refusals:
            first = found.pop().first_tokens
        found.append(Choice(first, tokens, kernel, refusals))
        first = tokens + 1
        tokens *= 2
    last = found.pop()
    return [*found, Choice(last.first_tokens, None, last.kernel, last.refusals)]
