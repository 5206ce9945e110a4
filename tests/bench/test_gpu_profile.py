"""What the profiler wrote of a layer's launches is summed up as that layer's."""

from __future__ import annotations

import csv
import io
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_profile.py"
METRICS = {
    "SM Active Cycles": "1,000",
    "Elapsed Cycles": "2,000",
    "L1/TEX Cache Throughput": "60",
    "SM Busy": "20",
    "Issue Slots Busy": "10",
    "DRAM Throughput": "30",
    "Duration": "4,500",
    "SM Frequency": "1,800,000,000",
}


def written(path: Path, *, launches: int, launched: dict[str, Any] | None) -> Path:
    """Write a profile as ``ncu --csv`` does, among lines of its own, and what the program said."""
    text = io.StringIO()
    rows = csv.writer(text, quoting=csv.QUOTE_ALL)
    rows.writerow(["ID", "Grid Size", "Metric Name", "Metric Value"])
    for launch in range(launches):
        rows.writerows([str(launch), f"({launch + 1}, 1, 1)", name, value] for name, value in METRICS.items())
    said = "" if launched is None else json.dumps(launched) + "\n"
    path.write_text("==PROF== Connected to process 1\n" + said + text.getvalue(), encoding="utf-8")
    return path


def test_a_row_a_launch_with_what_was_launched(tmp_path: Path) -> None:
    launched = {"model": "llama-2-7b", "layers": ["o"], "tokens": 1}
    found = runpy.run_path(str(SCRIPT))["read"](written(tmp_path / "profile.csv", launches=4, launched=launched))
    assert list(found) == ["model", "tokens", "rows"]
    assert (found["model"], found["tokens"]) == ("llama-2-7b", 1)
    assert [(row["layer"], row["launch"], row["blocks"]) for row in found["rows"]] == [
        ("o", part, blocks) for blocks, part in enumerate(("t", "layer", "t", "layer"), 1)
    ]
    row = found["rows"][0]
    assert (row["us"], row["megahertz"], row["at_work"]) == (4.5, 1800, 0.5)
    # Of the cycles in which a multiprocessor works, half of all, and of device memory at all times.
    assert (row["tensor_cores"], row["issue_slots"], row["shared_memory"], row["memory"]) == (0.4, 0.2, 0.6, 0.3)


@pytest.mark.parametrize(
    ("launches", "launched", "message"),
    [
        (4, None, "is not all that the first command"),
        (3, {"model": "llama-2-7b", "layers": ["o"], "tokens": 1}, "has 3 launches, and o make 4"),
    ],
)
def test_a_profile_of_other_launches_is_refused(
    launches: int, launched: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "profile.csv", launches=launches, launched=launched)
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(SCRIPT))["read"](path)


@pytest.mark.parametrize("content", [None, '{\n "rows": []\n}\n'])
def test_what_is_no_profile_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match="is not all that the first command"):
        runpy.run_path(str(SCRIPT))["read"](path)
