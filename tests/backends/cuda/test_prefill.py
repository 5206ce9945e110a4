"""How the launches for many tokens are divided, in the parts that need no GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slimc.backends.cuda import prefill
from slimc.backends.cuda.driver import TensorMap
from slimc.backends.cuda.layer import FACTOR_GROUP, prepare
from slimc.backends.cuda.prefill import Form, LaunchShape
from slimc.backends.cuda.rounding import kept_for

PROCESSORS = 132


def test_a_launch_beside_another_has_one_block_on_each_multiprocessor() -> None:
    alone = LaunchShape(64, 2, 1, blocks=2)
    beside = LaunchShape(64, 2, 1, blocks=2, beside=True)
    assert alone.divide(1000, 10, PROCESSORS, cost=1)[0] == 2 * PROCESSORS
    assert beside.divide(1000, 10, PROCESSORS, cost=1)[0] == PROCESSORS


def test_tiles_are_shared_only_where_enough_would_be_idle() -> None:
    shape = LaunchShape(128, 2, 2)
    assert shape.divide(2 * PROCESSORS, 39, PROCESSORS, cost=16) == (PROCESSORS, 0)
    clusters, shared = shape.divide(PROCESSORS + 40, 39, PROCESSORS, cost=16)
    assert (clusters, shared) == (PROCESSORS, PROCESSORS + 40)


@pytest.mark.parametrize("activation", [None, "int8"])
@pytest.mark.parametrize("tokens", [129, 256, 1024, 2048])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 8192), (4096, 4096), (4096, 11008), (22016, 4096), (57344, 8192)])
def test_chosen_shapes_leave_room_for_a_pipeline(
    rows: int, columns: int, tokens: int, activation: prefill.Activation | None
) -> None:
    shape, right = prefill._shapes(rows, columns, tokens, activation, PROCESSORS)
    assert Form(True, 0, True, activation).stages(shape) >= 4
    assert Form(False, FACTOR_GROUP, False, activation).stages(right) >= 4


def test_few_tiles_run_side_by_side_and_many_do_not() -> None:
    shape, right = prefill._shapes(4096, 4096, 256, None, PROCESSORS)
    assert shape.beside
    assert right.beside
    shape, right = prefill._shapes(22016, 4096, 2048, None, PROCESSORS)
    assert not shape.beside
    assert not right.beside


def test_a_launch_goes_through_a_band_of_tokens_at_a_time(make_packed: Any, launches: Launches) -> None:
    def bands(columns: int, tokens: int) -> list[tuple[int, int]]:
        launches.launched.clear()
        prefill.run(torch.zeros(tokens, columns).bfloat16(), prepare(make_packed(256, columns)), None)
        return [(arguments.band, arguments.token_tiles) for arguments, _ in launches.launched]

    # Tiles of 64 tokens: the layer has few of them.
    assert bands(512, 200) == [(4, 4)]
    assert bands(512, 4000) == [(1024 // 64, 63)]
    assert bands(8192, 4000) == [(512 // 64, 63)]


def test_a_thread_keeps_no_more_of_a_token_than_it_has_registers_for() -> None:
    assert [kept_for(columns, 128) for columns in (8, 1024, 1032, 4096, 8192, 8200)] == [1, 1, 2, 4, 8, 8]


class Launches:
    """A driver that notes what it is asked for, in place of a GPU's."""

    def __init__(self) -> None:
        self.loaded: list[dict[str, int | str]] = []
        self.described: list[tuple[int, int]] = []
        self.launched: list[tuple[prefill._Arguments, int]] = []

    def load(self, _source: str, _name: str, _device: int, defines: dict[str, int | str]) -> SimpleNamespace:
        self.loaded.append(defines)
        return SimpleNamespace(function=lambda _name, **_room: SimpleNamespace(prepare=lambda _kinds: self.launch))

    def describe(self, into: TensorMap, address: int, rows: int, columns: int, *_box: int) -> None:
        into.opaque[0], into.opaque[1] = address, rows << 32 | columns
        self.described.append((rows, columns))

    def replace(self, of: TensorMap, address: int) -> None:
        of.opaque[0] = address

    def launch(self, arguments: prefill._Arguments, *, grid: tuple[int, int, int], **_others: object) -> None:
        self.launched.append((arguments, grid[0]))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    fake = Launches()
    monkeypatch.setattr(prefill.driver, "load", fake.load)
    monkeypatch.setattr(prefill.driver, "encode_matrix_map", fake.describe)
    monkeypatch.setattr(prefill.driver, "replace_address", fake.replace)
    processors = SimpleNamespace(multi_processor_count=PROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: processors)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return fake


def test_a_prompt_of_another_length_takes_the_kernels_that_are_loaded(make_packed: Any, launches: Launches) -> None:
    layer = prepare(make_packed(256, 512, 20))
    prefill.run(torch.zeros(200, 512).bfloat16(), layer, None)
    loaded = list(launches.loaded)
    launches.described.clear()
    prefill.run(torch.zeros(201, 512).bfloat16(), layer, None)
    assert [one["ADAPTERS"] for one in loaded] == [1, 0]
    assert launches.loaded == loaded
    # x, t and y of the layer, and x and its result t of the launch before it; no weight is described again.
    assert launches.described == [(201, 512), (201, layer.ranks), (201, 256), (201, 512), (201, layer.ranks)]
    assert [arguments.tokens for arguments, _ in launches.launched] == [200, 200, 201, 201]


def test_a_launch_reads_and_writes_its_own_memory(make_packed: Any, launches: Launches) -> None:
    layer = prepare(make_packed(256, 512, 20))
    for _ in range(2):
        x = torch.zeros(200, 512).bfloat16()
        launches.launched.clear()
        y = prefill.run(x, layer, None)
        (right, _), (main, _) = launches.launched
        assert right.x_map.opaque[0] == main.x_map.opaque[0] == x.data_ptr()
        assert main.y_map.opaque[0] == main.y == y.data_ptr()
        assert main.t_map.opaque[0] == right.y_map.opaque[0] == right.y
        assert main.y_map.opaque[1] == 200 << 32 | 256


def test_a_layer_remembers_launches_of_few_lengths(
    make_packed: Any, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "MOST_PLANS", 3)
    layer = prepare(make_packed(256, 512))
    for tokens in range(130, 140):
        prefill.run(torch.zeros(tokens, 512).bfloat16(), layer, None)
        assert len(layer.plans[prefill.KERNEL_NAME, "plans"]) <= 3
    assert [arguments.tokens for arguments, _ in launches.launched] == list(range(130, 140))
