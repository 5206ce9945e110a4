"""The benchmark of linear layers, in the parts that need no GPU."""

from __future__ import annotations

from threading import Lock

import pytest
import torch

from slimc.bench import linear
from slimc.bench.linear import COLD_BYTES, LAYERS, SERVED, copies, geometric_mean, print_means


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
    assert row == "| m | 1 | 2.00x (from 1.00x) |  |"


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


def test_copies_of_a_peers_layer_have_memory_of_their_own() -> None:
    module = torch.nn.Linear(2, 2)
    copied = linear._another(module, lambda: pytest.fail("it can be copied"))
    assert copied.weight.data_ptr() != module.weight.data_ptr()  # type: ignore[attr-defined]
    module.handle = Lock()  # type: ignore[assignment]
    assert linear._another(module, lambda: len) is len
    assert linear._another(len, lambda: repr) is repr  # type: ignore[arg-type]
