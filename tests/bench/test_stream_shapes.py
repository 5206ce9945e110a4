"""The search of launch shapes: it ends in time, and never takes a pair that is slower than the present one."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends.cuda import shapes
from slimc.backends.cuda.shapes import LaunchShape
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear

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
        for neighbour in ("launch_clock", "decoder_step"):
            sys.modules.pop(neighbour, None)


class CalculatedClock:
    """Takes for the time of a pair what a function says."""

    layer, ranks = ((4096,), 4096), 448

    def __init__(self, cost: Callable[[LaunchShape, LaunchShape], float]) -> None:
        self.cost = cost

    def time(self, _tokens: int, main: LaunchShape, right: LaunchShape, _replays: int) -> float:
        return self.cost(main, right)

    def time_prefill(self, tokens: int, _replays: int) -> float:
        return tokens / 10


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
    assert found.rival is None


@pytest.mark.parametrize(("taken", "faster"), [(25.5, True), (25.7, False)])
def test_two_tiles_of_tokens_are_taken_where_the_kernel_for_many_takes_longer(
    search: ModuleType, kernels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: float, faster: bool
) -> None:
    monkeypatch.setattr(search.torch.cuda, "get_device_name", lambda: "a card")
    clock, path = CalculatedClock(lambda _main, _right: taken), tmp_path / "shapes.json"
    shape = {"tokens": 128}
    entry = {"rows": 4096, "columns": 4096, "tokens": 256, "ranks": 448, "shape": shape}
    others = {table: [{"rows": 64, "columns": 64, "tokens": 8, "shape": shape}] for table in ("layers", "factors")}
    factors = [{"rows": 448, "columns": 4096, "tokens": 256, "beside": rows, "shape": shape} for rows in (4096, 8192)]
    with_entry = {"layers": [*others["layers"], entry], "factors": [*others["factors"], *factors]}
    path.write_text(json.dumps({"measured": with_entry}))
    found = search.Search(clock, kernels, 256, time.monotonic() + 60, PROCESSORS, None)
    _, best, pair = found.run()
    assert (best, found.rival) == (taken, 25.6)
    # A measurement of the other kernel that failed says nothing.
    for rival, kept in ((found.rival, faster), (math.inf, False)):
        table = search.Found(path)
        table.take(clock, 256, pair, best, rival)
        table.write()
        after = json.loads(path.read_text())["measured"]
        first, *rest = after["layers"]
        assert first == others["layers"][0]
        assert [(one["ranks"], one["shape"]) for one in rest] == ([(448, asdict(pair[0]))] if kept else [])
        # That of another layer stays.
        own, theirs = ([one["shape"] for one in after["factors"] if one.get("beside") == rows] for rows in (4096, 8192))
        assert own == ([asdict(pair[1])] if kept else [])
        assert theirs == [shape]


def test_what_was_found_in_a_step_says_so_and_is_left_out_of_other_searches(
    search: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.torch.cuda, "get_device_name", lambda: "a card")
    clock, path = CalculatedClock(lambda _main, _right: 1.0), tmp_path / "shapes.json"
    pairs = [(LaunchShape(16, 1, groups, 1, 1, 2, 128), LaunchShape(16, 1, 1, groups, 4, 3, 128)) for groups in (1, 2)]
    for pair, in_step, kept in ((pairs[0], False, False), (pairs[1], True, True)):
        table = search.Found(path, in_step=in_step)
        table.take(clock, 16, pair, 1.0, None)
        table.write()
        after = json.loads(path.read_text())["measured"]
        found = [one for kind in ("layers", "factors") for one in after[kind]]
        assert [one["shape"] for one in found] == [asdict(shape) for shape in pair]
        assert [one.get("in_step", False) for one in found] == [kept, kept]
        layer = "o", (4096,), 4096
        assert search.Found(path).unsettled(layer, [1, 9, 16, 256]) == ([1, 256] if kept else [1, 9, 16, 256])
        assert search.Found(path, in_step=True).unsettled(layer, [1, 16]) == [1, 16]


def test_a_step_launches_each_layer_once_and_one_in_other_shapes(
    search: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder_step = sys.modules["decoder_step"]
    launched: list[tuple[str, tuple[LaunchShape, ...], tuple[int, ...]]] = []
    rows = {"qkv": (256, 128, 128), "o": (256,), "gate_up": (384, 384), "down": (256,)}
    columns = {"qkv": 256, "o": 256, "gate_up": 256, "down": 384}
    on_cpu = partial(torch.randn, device="cpu")

    def launch(plan: tuple[Any, ...], x: Tensor, layer: Any, bias: None) -> Tensor:
        launched.append((*plan, tuple(x.shape)))
        return x.new_zeros(len(x), sum(rows[layer.name]))

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        keys = rest[2]
        assert q.shape == (3, 2, 1, 128)
        assert k.shape == v.shape == (3, 1, 1, 128)
        assert keys.shape[:2] == (3, 1)
        return q

    def randn(*sizes: int, dtype: torch.dtype, device: str) -> Tensor:
        assert device == "cuda"
        return on_cpu(*sizes, dtype=dtype)

    fakes = {
        "stream": SimpleNamespace(make_plan=lambda layer, _dtype, _tokens, *pair: (layer.name, pair), launch=launch),
        "attend_next": attend,
        "add_norm": lambda x, residual, _weight, _epsilon: (x + residual, x),
        "gate_by": torch.mul,
        "torch": SimpleNamespace(
            randn=randn, ones=lambda size, **_: torch.ones(size), tensor=lambda value, **_: torch.tensor(value)
        ),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(decoder_step, name, fake)
    layers = {
        name: [SimpleNamespace(name=name, format=SimpleNamespace(columns=columns[name]))] for name in search.SERVED
    }
    pair = LaunchShape(16, 1, 1, 1, 1, 2, 128), LaunchShape(16, 1, 1, 2, 4, 3, 128)
    assert decoder_step.Step(layers, rows["qkv"], "gate_up").decoder(0, pair, 3)().shape == (3, 256)
    assert launched == [
        (name, pair if name == "gate_up" else (), (3, columns[name])) for name in ("qkv", "o", "gate_up", "down")
    ]


class Ends:
    """The other end of a pipe, behind which a process has no time, or has ended."""

    def __init__(self, *, hangs: bool) -> None:
        self.hangs = hangs

    def poll(self, _seconds: float) -> bool:
        return not self.hangs

    def recv(self) -> Any:
        raise EOFError


@pytest.mark.parametrize(
    ("hangs", "trouble"), [(True, "were not made within"), (False, "the process that makes layers")]
)
def test_a_process_that_does_not_start_again_costs_a_pair_and_not_the_search(
    search: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hangs: bool, trouble: str
) -> None:
    started: list[Any] = []

    def start(clock: Any) -> None:
        clock._is_ready, clock._connection = False, Ends(hangs=hangs)
        started.append(clock)

    monkeypatch.setattr(search.Clock, "_start", start)
    monkeypatch.setattr(search.Clock, "close", lambda _clock: None)
    clock = search.Clock((4096,), 4096)
    assert not search.is_ready(clock)
    clock._ranks = 448  # as it is once the layers were there
    shape = LaunchShape(128, 1, 1, 1, 1, 1, 128)
    assert clock.time(128, shape, shape, 1) == clock.time_prefill(256, 1) == math.inf
    assert search.is_ready(clock)
    assert len(started) == 3
    assert capsys.readouterr().out.count(trouble) == 3


def test_results_are_compared_with_the_product_of_decoded_weights(
    search: ModuleType,
) -> None:
    module = sys.modules[search.Clock.__module__]
    parts = [module.exact_weights(random_layer(rows, 2048, 200)) for rows in (32, 16)]
    x = torch.randn(3, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact, bound = module.product(parts, x)
    y = torch.cat([as_a_kernel(part, x) for part in parts], 1)
    assert bool(((y - exact).abs() <= bound).all())
    assert bool((bound <= 0.1 * exact.std()).all())
    # A slot of 128 columns that was read too late has the codes of the next one.
    codes = parts[1].weight.values
    codes[:, 64:96] = codes[:, 96:128]
    late = torch.cat([y[:, :32], as_a_kernel(parts[1], x)], 1)
    assert not bool(((late - exact).abs() <= bound).all())


@pytest.mark.parametrize("shares", [2, 3, 4])
def test_the_bound_has_room_for_sums_that_blocks_hand_over(search: ModuleType, shares: int) -> None:
    module = sys.modules[search.Clock.__module__]
    part = module.exact_weights(random_layer(64, 2048, 200))
    x = torch.randn(16, 2048, generator=torch.Generator().manual_seed(shares)).bfloat16()
    x[3] *= 1e4
    exact, bound = module.exact_product(part, x, blocks=shares, blocks_of_t=shares)

    def added(inputs: Tensor, weight: Tensor) -> Tensor:
        slots = inputs.shape[1] // 64
        bounds = [64 * (slots * share // shares) for share in range(shares)] + [inputs.shape[1]]
        parts = [inputs[:, begin:end] @ weight[:, begin:end].T for begin, end in itertools.pairwise(bounds)]
        power = 2.0 ** (14 - max(math.floor(math.log2(one.abs().max())) for one in parts[1:]))
        return parts[0] + sum((one * power).half().float() / power for one in parts[1:])

    t = added(x.float(), part.right.decode().float()).bfloat16().float()
    y = added(x.float(), part.weight.decode().float()) + added(t, part.left.decode().float())
    assert bool(((y.bfloat16().float() - exact).abs() <= bound).all())
    assert bool((bound <= 0.1 * exact.std(1, keepdim=True)).all())


def as_a_kernel(packed: PackedLinear, x: Tensor) -> Tensor:
    assert packed.left is not None
    assert packed.right is not None
    t = (x.float() @ packed.right.decode().float().T).bfloat16()
    y = x.float() @ packed.weight.decode().float().T + t.float() @ packed.left.decode().float().T
    return y.bfloat16().float()


def random_layer(rows: int, columns: int, rank: int) -> PackedLinear:
    weight = WeightFormat(rows, columns, 4, per_tensor=True, sparsity=NM(2, 4), dtype=torch.bfloat16)
    factors = [WeightFormat(*size, 4, group=64, dtype=torch.bfloat16) for size in ((rows, rank), (rank, columns))]
    spec, generator = LinearFormat(weight, *factors), torch.Generator().manual_seed(rows)
    tensors = {
        name: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        if kind == torch.uint8
        else (torch.rand(shape, generator=generator) * 0.01 + 0.005).to(kind)
        for name, (shape, kind) in spec.tensor_specs().items()
    }
    # The first two of every four.
    tensors["pattern"].fill_(0x33)
    return PackedLinear.assemble(spec, tensors)


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
    # 2 tiles of 64 tokens.
    assert search.sparing(main, right, 448, 128, PROCESSORS).spared == 32
    whole = LaunchShape(128, 1, 4, 1, 1, 1, 128)
    assert search.sparing(whole, right, 448, 128, PROCESSORS) == whole


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


def test_a_decoding_step_has_no_more_tokens_than_a_block(
    search: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["stream_shapes.py", "--in-step", "--tokens", "16,256"])
    with pytest.raises(SystemExit):
        search.main()
    assert "--in-step is for --tokens up to 128" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["stream_shapes.py", "--in-step", "--layers", "gate"])
    with pytest.raises(SystemExit):
        search.main()
    assert "--layers" in capsys.readouterr().err
