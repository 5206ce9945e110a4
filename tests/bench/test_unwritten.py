"""The harness that shows memory which is read, or given out, without being written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slimc.bench.unwritten import into_nans
from slimc.errors import NumericsError

X = torch.arange(6.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int32])
def test_what_writes_all_of_its_memory_passes(dtype: torch.dtype) -> None:
    def double(x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(x) + x.new_empty(6).copy_(x)

    x = X.to(dtype)
    assert torch.equal(into_nans(double, x), 2 * x)


@pytest.mark.parametrize(
    "ask",
    [lambda x: torch.empty(6), torch.empty_like, lambda x: x.new_empty(6)],
    ids=["empty", "empty_like", "new_empty"],
)
def test_a_result_that_is_partly_unwritten_is_refused(ask: Callable[[Tensor], Tensor]) -> None:
    def all_but_the_last(x: Tensor) -> Tensor:
        y = ask(x)
        y[:5] = x[:5]
        return y

    with pytest.raises(NumericsError, match="1 of 6 results differ"):
        into_nans(all_but_the_last, X)


def test_memory_that_is_read_before_it_is_written_is_refused() -> None:
    kept = torch.zeros(6)

    def add_to_what_was_there(x: Tensor) -> Tensor:
        partial = torch.empty_like(x)
        # As an allocator does that hands out the same memory again.
        partial = partial if partial.isnan().all() else kept
        return partial + x

    with pytest.raises(NumericsError, match="6 of 6"):
        into_nans(add_to_what_was_there, X)
