"""Counters of launches, where they are handed out: none may have to be made while a graph is captured."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from slimc.backends.cuda import counters
from slimc.backends.cuda.counters import Counters


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a graph is being captured, the only entry."""
    now = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now[0])
    monkeypatch.setattr(counters, "_captured", [])
    return now


@pytest.mark.parametrize("count", [4, 264, 528, 100_000])
def test_a_graph_finds_counters_whatever_streams_were_before_it(capturing: list[bool], count: int) -> None:
    layer = Counters(torch.device("cpu"), count)
    # Eager calls on one stream, those of Inductor on another ahead of its capture, and a third.
    for stream, calls in product((0, 7, 9), (1, 40)):
        for _ in range(calls):
            layer.of_launch(stream)
        made = {tensor.data_ptr() for tensor in layer._free}
        capturing[0] = True
        taken = {layer.of_launch(stream) for _ in range(counters.TURNS)}
        capturing[0] = False
        assert len(taken) == counters.TURNS
        assert taken <= made


def test_launches_that_may_overlap_have_counters_of_their_own(capturing: list[bool]) -> None:
    layer = Counters(torch.device("cpu"), 528)
    first = [layer.of_launch(0) for _ in range(counters.TURNS)]
    second = [layer.of_launch(1) for _ in range(counters.TURNS)]
    capturing[0] = True
    third = [layer.of_launch(1) for _ in range(counters.TURNS)]
    assert len({*first, *second, *third}) == 3 * counters.TURNS
