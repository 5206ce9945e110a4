"""Times of kernels: measured once a form of layer, kept on disk, and obeyed."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimc.backends import KERNELS, cpu, tuning
from slimc.backends.private_folder import PrivateFolder
from slimc.backends.tuning import KernelTimings, tune
from slimc.errors import InputError, KernelError
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import LinearFormat, PackedLinear, WeightFormat
from slimc.runtime.select import Kernel, KernelTable, choose

CPU = torch.device("cpu")
SECONDS = {"flat": lambda tokens: 30.0, "steep": lambda tokens: 4.0 * tokens}


def make(name: str, accepts: Callable[..., str | None] = lambda *_: None, timed: bool = True) -> Kernel:
    return Kernel(name, accepts, lambda packed: name, lambda x, state, bias: x.new_full((len(x), 8), 0), timed=timed)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SLIMC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "timings"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Lets the processor count as a card on which each kernel takes as long as `SECONDS` says."""
    asked: list[tuple[str, int]] = []

    def time(kernel: Kernel, layer: SlimLinear, x: Tensor, states: dict[Any, Any]) -> float:
        asked.append((kernel.name, len(x)))
        return SECONDS[kernel.name](len(x)) if kernel.name in SECONDS else math.inf

    monkeypatch.setattr(tuning, "_time", time)
    monkeypatch.setattr(tuning, "describe", lambda device: "a card")
    return asked


def new_timings() -> KernelTimings:
    """What another process would have."""
    return KernelTimings(PrivateFolder("timings", ".json", "not kept"))


def new_layer(rows: int = 8, kernels: tuple[Kernel, ...] | None = None) -> SlimLinear:
    spec = LinearFormat(WeightFormat(rows, 16, bits=4))
    tensors = {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in spec.tensor_specs().items()}
    chosen = (make("flat"), make("steep"), make("last", timed=False)) if kernels is None else kernels
    return SlimLinear(PackedLinear.assemble(spec, tensors), kernels=KernelTable(chosen, new_timings()))


def names(layer: SlimLinear) -> list[str]:
    return [f"{choice.first_tokens}: {choice.kernel.name if choice.kernel else None}" for choice in layer.choices()]


def test_the_fastest_is_chosen_and_the_others_say_by_how_much(folder: Path, measured: list[tuple[str, int]]) -> None:
    layer = new_layer()
    assert names(layer) == ["1: flat"]
    tune(layer, tokens=(1, 4, 8, 4096))
    assert [str(choice) for choice in layer.choices()][:3] == [
        "1 token: steep (flat: slower than steep here: 30 us against 4 us)",
        "2 tokens: flat",
        "3 to 4 tokens: steep (flat: slower than steep here: 30 us against 16 us)",
    ]
    reason = choose(layer.kernels, layer.format, torch.float32, CPU, 1 << 20)[1]["steep"]
    assert reason == "slower than flat here: 1.64e+04 us against 30 us"


def test_another_process_reads_what_was_measured(folder: Path, measured: list[tuple[str, int]]) -> None:
    tune(new_layer(), tokens=(1, 8))
    measured.clear()
    other = new_layer()
    assert names(other)[0] == "1: steep"
    tune(other, tokens=(1, 8))
    assert measured == []
    tune(other, tokens=(1, 8, 16))
    assert measured == [("flat", 16), ("steep", 16)]
    tune(other, tokens=(1,), again=True)
    assert measured[2:] == [("flat", 1), ("steep", 1)]


def test_layers_that_are_alike_are_measured_once(folder: Path, measured: list[tuple[str, int]]) -> None:
    kernels = KernelTable((make("flat"), make("steep")), new_timings())
    model = nn.Sequential(new_layer(), new_layer(), new_layer(rows=24))
    for layer in model:
        layer.use_kernels(kernels)
    tune(model, tokens=(5,))
    assert measured == [("flat", 8), ("steep", 8)] * 2
    assert len(list(folder.iterdir())) == 2
    assert names(model[1]) == names(model[2])


def test_a_layer_follows_from_its_next_call_on(folder: Path, measured: list[tuple[str, int]]) -> None:
    layer = new_layer()
    called = []

    def note(name: str) -> Kernel:
        return Kernel(name, lambda *_: None, lambda _: None, lambda x, _s, _b: called.append(name) or x)  # type: ignore[func-returns-value]

    layer.use_kernels(KernelTable((note("flat"), note("steep")), new_timings()))
    layer(torch.zeros(1, 16))
    tune(layer, tokens=(1,))
    layer(torch.zeros(1, 16))
    assert called == ["flat", "steep"]


def test_a_kernel_that_fails_is_not_chosen(folder: Path, measured: list[tuple[str, int]]) -> None:
    layer = new_layer(kernels=(make("broken"), make("flat")))
    tune(layer, tokens=(1,))
    assert str(layer.choices()[0]) == "1 token: flat (broken: failed when it was timed here)"


def test_without_rivals_nothing_is_measured(folder: Path, measured: list[tuple[str, int]]) -> None:
    layer = new_layer(kernels=(make("flat"), make("steep", accepts=lambda *_: "never")))
    tune(layer)
    assert measured == []
    assert names(layer) == ["1: flat"]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"1": 2}', b'{"x": {}}', b"\xff"])
def test_a_file_of_another_form_counts_as_none(
    folder: Path, measured: list[tuple[str, int]], content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(new_layer(), tokens=(1,))
    (file,) = folder.iterdir()
    PrivateFolder("timings", ".json", "").write(file.stem, content)
    assert names(new_layer()) == ["1: flat"]


def test_the_key_is_all_that_decides_the_speed(folder: Path, measured: list[tuple[str, int]]) -> None:
    spec = LinearFormat(WeightFormat(8, 16, bits=4))
    other = LinearFormat(WeightFormat(8, 16, bits=3))
    key = tuning._key(spec, torch.float16, "a card")
    assert key == tuning._key(spec, torch.float16, "a card")
    assert len({key, tuning._key(other, torch.float16, "a card"), tuning._key(spec, torch.bfloat16, "a card")}) == 3
    assert key != tuning._key(spec, torch.float16, "another card")


def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with pytest.raises(InputError, match=r"must be positive, not \[0, 1\]"):
        tune(new_layer(), tokens=(0, 1))
    tune(new_layer())
    assert not folder.exists()
    monkeypatch.setattr(tuning, "describe", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(KernelError, match="while a CUDA graph is captured"):
        tune(new_layer())


def test_copies_share_the_table(measured: list[tuple[str, int]], folder: Path) -> None:
    layer = new_layer()
    layer.use_kernels(KERNELS)
    assert copy.deepcopy(layer).kernels is KERNELS
    assert pickle.loads(pickle.dumps(layer)).kernels is KERNELS
    own = KernelTable(cpu.KERNELS, tuning.TIMINGS)
    revived = pickle.loads(pickle.dumps(own))
    assert revived == own
    assert revived.timings is tuning.TIMINGS
