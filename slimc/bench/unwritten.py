"""What a kernel must not do: read memory that it was given and has not written, or leave some of its result unwritten.

Memory from PyTorch's allocator mostly holds what the same kernel wrote there the last time, so neither shows by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from slimc.errors import NumericsError

__all__ = ["into_nans"]

RUNS = 2


class FilledWithNaNs(TorchFunctionMode):
    """Memory that is asked for without values holds NaN, or all ones where it is for integers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch, and fill what it made."""
        made = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, Tensor.new_empty):
            made.fill_(float("nan") if made.is_floating_point() else -1)
        return made


def into_nans(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Compute as it is, and twice in memory that holds NaN before, and return the result, which must not change.

    That is all memory that Python code asks PyTorch for on the way: for results, partial sums, decoded weights. What
    registered operators ask for themselves is not seen, so ``compute`` calls a kernel, not an operator.

    Raises:
        NumericsError: a result differs from the first, bit by bit.
    """
    result = compute(*arguments)
    for _ in range(RUNS):
        with FilledWithNaNs():
            again = compute(*arguments)
        if not torch.equal(again, result):
            raise NumericsError(
                f"{int((again != result).sum())} of {result.numel()} results differ when memory holds NaN before: some "
                "was read, or given out, without being written"
            )
    return result
