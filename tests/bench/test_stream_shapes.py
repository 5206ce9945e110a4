"""The search of launch shapes: it ends in time, and never takes a pair that is slower than the present one."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from slimc.backends.cuda import shapes
from slimc.backends.cuda.shapes import LaunchShape

FOLDER = Path(__file__).parents[2] / "benchmarks"
PROCESSORS = 132


@pytest.fixture(scope="module")
def search() -> Iterator[ModuleType]:
    """The script, which is no part of the package, and finds its neighbour in its folder."""
    spec = importlib.util.spec_from_file_location("stream_shapes", FOLDER / "stream_shapes.py")
    assert spec is not None
    assert spec.loader is not None
    sys.path.insert(0, str(FOLDER))
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("launch_clock", None)


class CalculatedClock:
    """Takes for the time of a pair what a function says."""

    layer, ranks = ((4096,), 4096), 448

    def __init__(self, cost: Callable[[LaunchShape, LaunchShape], float]) -> None:
        self.cost = cost

    def time(self, _tokens: int, main: LaunchShape, right: LaunchShape, _replays: int) -> float:
        return self.cost(main, right)


@pytest.fixture
def kernels(search: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """All kernels compile at once."""
    monkeypatch.setattr(search, "_compiles", lambda *_shape_and_form: True)
    made = search.Kernels()
    yield made
    made.close()


def test_a_search_finds_the_fields_that_make_a_pair_fast(search: ModuleType, kernels: Any, tmp_path: Path) -> None:
    def cost(main: LaunchShape, right: LaunchShape) -> float:
        away = abs(main.window - 4) + abs(main.turn - 5) + abs(right.turn - 3) + abs(right.cluster - 4)
        return 20 + away + 2 * (not main.apart) + abs(math.log2(main.row_groups / 2))

    with (tmp_path / "log").open("w") as log:
        found = search.Search(CalculatedClock(cost), kernels, 128, time.monotonic() + 60, PROCESSORS, log)
        before, taken, (main, right) = found.run()
    assert (main.window, main.turn, main.apart, main.row_groups, right.turn, right.cluster) == (4, 5, True, 2, 3, 4)
    assert taken == 20 < before == cost(*found.present)
    assert all(main.fits(search.LAYER) and right.fits(search.FACTOR) for main, right in found.times)
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert logged[-1][:3] == [[4096], 4096, 128]


def test_the_present_pair_stays_where_none_is_faster(search: ModuleType, kernels: Any) -> None:
    clock = CalculatedClock(lambda _main, _right: math.inf)
    found = search.Search(clock, kernels, 128, time.monotonic() + 60, PROCESSORS, None)
    clock.cost = lambda *pair: 10.0 if pair == found.present else 11.0
    assert found.run() == (10, 10, found.present)


def test_a_search_ends_in_time(search: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiles: there is nothing to wait for after the time that it has."""
    made = search.Kernels()
    monkeypatch.setattr(made, "ask", lambda wanted, _form: [Future() for _ in wanted])
    begun = time.monotonic()
    found = search.Search(CalculatedClock(lambda _main, _right: 7.0), made, 64, begun + 0.2, PROCESSORS, None)
    assert found.run() == (7, 7, found.present)
    assert time.monotonic() - begun < 10
    made.close()


def test_even_launches_spare_what_the_one_for_t_takes(search: ModuleType) -> None:
    right = LaunchShape(64, 1, 2, 1, cluster=4, blocks=1, step=128)
    assert shapes.blocks_of(right, 448) == 16
    main = LaunchShape(128, 1, 4, 1, 1, 1, 128, even=True)
    # 2 tiles of 64 tokens: 32 multiprocessors of 132; the 16 tiles of the layer get 6 blocks each of the other 100.
    assert search.sparing(main, right, (4096,), 448, 128, PROCESSORS).spared == PROCESSORS - 96
    whole = LaunchShape(128, 1, 4, 1, 1, 1, 128)
    assert search.sparing(whole, right, (4096,), 448, 128, PROCESSORS) == whole


def test_entries_of_other_layers_stay_in_the_file(
    search: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.torch.cuda, "get_device_name", lambda: "a card")
    path = tmp_path / "shapes.json"
    path.write_text((Path(shapes.__file__).with_name("stream_shapes.json")).read_text())
    before = json.loads(path.read_text())
    table = search.Found(path)
    entry = {"rows": 4096, "columns": 4096, "tokens": 128, "shape": {"tokens": 128}}
    table.add("layers", entry)
    table.write()
    after = json.loads(path.read_text())
    assert after["note"] == before["note"]
    assert after["measured"]["factors"] == before["measured"]["factors"]
    assert entry in after["measured"]["layers"]
    assert len(after["measured"]["layers"]) == len(before["measured"]["layers"])
