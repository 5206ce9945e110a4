"""The benchmark of linear layers, in the parts that need no GPU."""

from __future__ import annotations

import pytest

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
    # A mean is given only where every layer was measured.
    assert capsys.readouterr().out.splitlines()[-1] == "| m | 1 | 2.00x (from 1.00x) |  |"
