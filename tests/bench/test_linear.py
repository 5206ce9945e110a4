"""The benchmark of linear layers, in the parts that need no GPU."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
import torch
from matplotlib import image

from slimc.bench import linear
from slimc.bench.linear import COLD_BYTES, LAYERS, SERVED, copies, geometric_mean, print_means
from slimc.runtime.formats import LinearFormat, WeightFormat
from slimc.runtime.select import Kernel


def test_copies_exceed_the_cache_and_are_two_at_least() -> None:
    for nbytes in (1e6, 7e7, 1e9):
        assert copies(nbytes) >= 2
        assert copies(nbytes) * nbytes >= COLD_BYTES


def test_every_model_has_the_layers_that_means_are_taken_over() -> None:
    assert set(linear.SHOWN) <= set(LAYERS)
    for layers in LAYERS.values():
        assert set(SERVED) <= {name for name, _, _ in layers}


def test_means_are_geometric_and_over_the_served_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert geometric_mean([1, 4, 16]) == pytest.approx(4)
    rows: list[dict[str, object]] = [
        {"model": "m", "layer": name, "tokens": 1, "over_cublas": ratio, "over_humming": 1.0}
        for name, ratio in zip((*SERVED, "gate"), (1, 1, 4, 4, 100), strict=True)
    ]
    del rows[0]["over_humming"]
    print_means(rows)
    *_, row = capsys.readouterr().out.splitlines()
    # What was not measured for all of them has no mean.
    assert row == "| m | 1 | 2.00x (from 1.00x) |  |  |"
    for one, taken in zip(rows, (1.0, 1.0, 4.0, 2.0, 0.1), strict=True):
        one |= {"cublas_us": 4.0, "slimc_us": taken}
    print_means(rows)
    # Layers weigh as much as they take.
    assert capsys.readouterr().out.splitlines()[-1] == "| m | 1 | 2.00x (from 1.00x) |  | 2.00x |"
    print_means(rows, ["gate"])
    *_, row = capsys.readouterr().out.splitlines()
    assert row == "| m | 1 | 100.00x (from 100.00x) | 1.00x (from 1.00x) | 40.00x |"


def test_ratios_are_means_over_the_served_layers_of_what_was_timed_in_all() -> None:
    rows: list[dict[str, object]] = [
        {
            "model": "m",
            "layer": name,
            "tokens": 1,
            "cublas_us": 8.0,
            "slimc_us": taken,
            "int8_us": 4.0,
            "humming_us": 2.0,
        }
        for name, taken in zip((*SERVED, "gate"), (8.0, 8.0, 2.0, 2.0, 0.1), strict=True)
    ]
    del rows[0]["humming_us"]
    rows.append({"model": "other", "layer": "qkv", "tokens": 16, "cublas_us": 8.0, "slimc_us": 2.0})
    assert linear.ratios(rows, "m") == {
        "slimc": {1: pytest.approx(2)},
        "slimc, int8 inputs": {1: pytest.approx(2)},
    }
    assert linear.ratios(rows, "other") == {"slimc": {16: pytest.approx(4)}}


def test_an_earlier_run_is_shown_and_drawn_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "model": model,
            "layer": layer,
            "tokens": tokens,
            "cublas_us": 4.0 * tokens,
            "slimc_us": 2.0,
            "over_cublas": 2.0,
        }
        for model in ("one", "two")
        for layer in ("o", "down")
        for tokens in (1, 16)
    ]
    # A layer that is not served by itself has no mean, and its model no picture.
    rows.append(rows[0] | {"model": "three", "layer": "gate"})
    (tmp_path / "linear.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(
        "sys.argv", ["linear", "--read", str(tmp_path / "linear.json"), "--plot", str(tmp_path / "a.png")]
    )
    linear.main()
    assert "| one | 16 | 2.00x (from 2.00x) | 32.00x |" in capsys.readouterr().out
    drawn = image.imread(tmp_path / "a.png")
    height, width, _ = drawn.shape
    # A picture a model, side by side, each with lines on white.
    assert 1.5 * height < width < 2.7 * height
    for half in np.array_split(drawn[..., :3], 2, axis=1):
        assert 0.001 < (half < 1).any(-1).mean() < 0.5


def test_part_of_an_earlier_run_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"model": model, "layer": layer, "tokens": tokens, "over_cublas": float(tokens)}
        for model in ("llama-2-7b", "llama-3-8b")
        for layer in ("o", "gate")
        for tokens in (1, 16)
    ]
    (tmp_path / "linear.json").write_text(json.dumps({"rows": rows}))
    command = ["linear", "--read", str(tmp_path / "linear.json"), "--models", "llama-3-8b", "--layers"]
    monkeypatch.setattr("sys.argv", [*command, "gate", "--tokens", "16"])
    linear.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| llama")]
    assert table == ["| llama-3-8b | 16 | 16.00x (from 16.00x) |  |"]
    monkeypatch.setattr("sys.argv", [*command, "down"])
    with pytest.raises(SystemExit, match="2"):
        linear.main()
    assert "has none of the layers that were asked for" in capsys.readouterr().err


def test_a_plot_needs_a_library_and_says_so_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(linear, "find_spec", lambda _name: None)
    monkeypatch.setattr("sys.argv", ["linear", "--plot", str(tmp_path / "a.png")])
    with pytest.raises(SystemExit, match="2"):
        linear.main()
    assert "pip install 'slimc[report]'" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "not JSON", "{}", "[]", '{"rows": [{}]}'])
def test_what_is_no_earlier_run_is_refused(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "linear.json").write_text(content)
    monkeypatch.setattr("sys.argv", ["linear", "--read", str(tmp_path / "linear.json")])
    with pytest.raises(SystemExit, match="2"):
        linear.main()
    assert "linear.json is no file of figures that --json wrote" in capsys.readouterr().err


def test_what_is_asked_for_twice_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def measure(_parts: object, columns: int, tokens: list[int], *_others: object, **_options: object) -> list[object]:
        asked.append((columns, tokens))
        return []

    monkeypatch.setattr(linear, "measure", measure)
    monkeypatch.setattr(linear, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    linear.run(["llama-2-7b", "llama-2-7b"], [16, 1, 16], layers=["down"])
    assert asked == [(11008, [16, 1])]


def test_runs_that_were_put_together_have_no_layer_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"model": "one", "layer": "o", "tokens": 16, "over_cublas": 2.0}
    (tmp_path / "linear.json").write_text(json.dumps({"rows": [row, row | {"tokens": 1}, row]}))
    monkeypatch.setattr("sys.argv", ["linear", "--read", str(tmp_path / "linear.json")])
    with pytest.raises(SystemExit, match="2"):
        linear.main()
    assert "--json wrote: it has o of one with 16 tokens 2 times" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "qvk"], "--layers knows no 'qvk' (did you mean 'qkv'?)"),
        (["--models", "llama-2-7b", "--layers", "k"], "--layers knows no 'k'"),
        (["--tokens", "1,0"], "a call has one token or more: '1,0'"),
    ],
)
def test_what_nothing_is_called_by_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["linear", *arguments])
    with pytest.raises(SystemExit, match="2"):
        linear.main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_copies_of_a_peers_layer_have_memory_of_their_own() -> None:
    module = torch.nn.Linear(2, 2)
    copied = linear._another(module, lambda: pytest.fail("it can be copied"))
    assert copied.weight.data_ptr() != module.weight.data_ptr()  # type: ignore[attr-defined]
    module.handle = Lock()  # type: ignore[assignment]
    assert linear._another(module, lambda: len) is len
    assert linear._another(len, lambda: repr) is repr  # type: ignore[arg-type]


def test_nothing_is_timed_before_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("ended"))
    monkeypatch.setattr(linear.time, "sleep", lambda seconds: done.append(seconds))
    monkeypatch.setattr(linear, "microseconds", lambda calls: done.append(calls) or 7.5)
    assert linear._time("a kernel", 0.25, lambda what: [what], "a call") == 7.5
    assert done == ["ended", 0.25, ["a call"]]


def test_a_rest_is_no_less_than_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["linear", "--rest", "-1"])
    with pytest.raises(SystemExit, match="2"):
        linear.main()
    assert "--rest is a number of seconds" in capsys.readouterr().err


def test_a_selection_by_times_takes_what_was_the_fastest_for_all_layers_as_one() -> None:
    def kernel(name: str, doubt: str | None) -> Kernel:
        return Kernel(name, lambda *_: None, lambda packed: packed, lambda x, *_: x, expects=lambda _case: doubt)

    doubting, sure = kernel("doubting", "slow for stacks"), kernel("sure", None)
    formats = [LinearFormat(WeightFormat(rows, 64, 4, group=64, dtype=torch.bfloat16)) for rows in (64, 128)]
    device, times = torch.device("cpu"), {"doubting": 1.0, "sure": 2.0}
    assert linear.chosen_for([doubting, sure], formats, device, 16)[0] is sure
    assert linear.fastest_for([sure, doubting], formats, device, 16, times)[0] is doubting


class Milliseconds:
    """A graph, and the events around its replays, that take these times one after another."""

    def __init__(self, times: list[float]) -> None:
        self.times, self.replays = times, 0

    def replay(self) -> None:
        self.replays += 1

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _end: object) -> float:
        return self.times[self.replays - 2]


@pytest.mark.parametrize(("count", "rounds"), [(1, 32), (5, 7), (40, 1)])
def test_a_time_is_the_median_replay_of_a_graph_of_many_calls(
    monkeypatch: pytest.MonkeyPatch, count: int, rounds: int
) -> None:
    fake, made = Milliseconds([3.0, 9.0, 2.0]), []
    for name, value in {
        "CUDAGraph": lambda: fake,
        "graph": lambda _graph: nullcontext(),
        "Event": lambda **_: fake,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(linear.torch.cuda, name, value)
    taken = linear.microseconds([lambda one=one: made.append(one) for one in range(count)], replays=3)
    # Each once ahead of the capture; one replay is not timed.
    assert made == list(range(count)) * (rounds + 1)
    assert fake.replays == 4
    assert taken == pytest.approx(3000 / (rounds * count))
