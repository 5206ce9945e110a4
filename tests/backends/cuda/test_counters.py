"""Counters of launches, where they are handed out: none may have to be made while a graph is captured."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

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


@pytest.mark.usefixtures("capturing")
def test_threads_take_counters_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    making: list[bool] = []
    derive = counters.derive

    def slowly(device: torch.device, make: Callable[[], Any]) -> Any:
        assert not making
        making.append(True)
        time.sleep(0.02)
        making.pop()
        return derive(device, make)

    monkeypatch.setattr(counters, "derive", slowly)
    layer = Counters(torch.device("cpu"), 1 << 14)
    streams = range(4)
    with ThreadPoolExecutor(len(streams)) as threads:
        found = list(threads.map(lambda stream: [layer.of_launch(stream) for _ in range(counters.TURNS)], streams))
    assert len({address for one in found for address in one}) == len(streams) * counters.TURNS
