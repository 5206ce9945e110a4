"""Processes that are measured one at a time: who does what when, and what becomes of one that fails."""

from __future__ import annotations

import sys
from pathlib import Path

from slimc.bench.turns import take_turns

PROCESS = """
import sys, time
from pathlib import Path
from slimc.bench.turns import serve

log, name, *flaws = sys.argv[1:]

def note(text):
    with Path(log).open("a") as file:
        file.write(f"{text}\\n")

def steps():
    for turn in range(2):
        note("prepares")
        if flaws == [str(turn)]:
            raise SystemExit("it fails on purpose")
        print("not for the other process")
        yield None
        note(f"begins {name}")
        time.sleep(0.05)
        note(f"ends {name}")
        yield {"name": name, "turn": turn}

serve(steps())
"""


def commands(log: Path, *arguments: tuple[str, ...]) -> list[list[str]]:
    return [[sys.executable, "-c", PROCESS, str(log), *more] for more in arguments]


def test_they_prepare_together_and_are_measured_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = list(take_turns(commands(log, ("a",), ("b",), ("c",))))
    assert [(one["name"], one["turn"]) for one in found] == [(name, turn) for turn in range(2) for name in "abc"]
    measured = [line for name in "abc" for line in (f"begins {name}", f"ends {name}")]
    assert log.read_text().splitlines() == (["prepares"] * 3 + measured) * 2


def test_the_others_go_on_without_one_that_fails(tmp_path: Path) -> None:
    found = list(take_turns(commands(tmp_path / "log", ("a", "0"), ("b", "1"), ("c",))))
    assert [(one["name"], one["turn"]) for one in found] == [("b", 0), ("c", 0), ("c", 1)]


def test_those_that_are_left_are_stopped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    turns = take_turns(commands(log, ("a",), ("b",)))
    next(turns)
    turns.close()  # type: ignore[attr-defined]
    assert log.read_text().splitlines() == ["prepares", "prepares", "begins a", "ends a"]
