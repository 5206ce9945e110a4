from __future__ import annotations

import io

import pytest
from rich.console import Console

from slimc.progress import PlainProgress, RichProgress, duration, for_console


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_timed_and_few() -> None:
    clock, lines = Clock(), []
    progress = PlainProgress(lines.append, every=10, clock=clock)
    progress.start("compress", 10)
    for step in range(10):
        clock.now += 4
        progress.advance("compress", note=f"site{step}")
    progress.finish("compress")
    assert lines == [
        "[    0.0 s] compress: 10 steps",
        "[   12.0 s] compress: 3/10, about 28 s left, site2",
        "[   24.0 s] compress: 6/10, about 16 s left, site5",
        "[   36.0 s] compress: 9/10, about 4.0 s left, site8",
        "[   40.0 s] compress: done in 40 s",
    ]


def test_a_stage_that_has_not_moved_promises_no_end() -> None:
    clock, lines = Clock(), []
    progress = PlainProgress(lines.append, every=1, clock=clock)
    progress.start("sample", 5)
    clock.now += 2
    progress.advance("sample", n=0, note="warming up")
    assert lines[-1] == "[    2.0 s] sample: 0/5, warming up"


def test_stages_may_overlap_and_return() -> None:
    clock, lines = Clock(), []
    progress = PlainProgress(lines.append, clock=clock)
    for _ in range(2):
        progress.start("outer", 1)
        progress.start("inner", 1)
        progress.advance("inner")
        progress.finish("inner")
        progress.advance("outer")
        progress.finish("outer")
    assert [line.split("] ")[1] for line in lines[:4]] == [
        "outer: 1 step",
        "inner: 1 step",
        "inner: done in 0.0 s",
        "outer: done in 0.0 s",
    ]


def test_a_pipe_gets_lines_and_a_terminal_gets_bars() -> None:
    pipe = io.StringIO()
    with for_console(Console(file=pipe)) as progress:
        assert isinstance(progress, PlainProgress)
        progress.start("compress [0]", 1)
        progress.advance("compress [0]")
        progress.finish("compress [0]")
    assert "compress [0]: done" in pipe.getvalue()

    terminal = io.StringIO()
    with for_console(Console(file=terminal, force_terminal=True, width=120, _environ={"TERM": "xterm"})) as progress:
        assert isinstance(progress, RichProgress)
        progress.start("compress", 4)
        progress.advance("compress", 3, note="layers.0 [odd]")
        progress.finish("compress")
    shown = terminal.getvalue()
    assert "compress" in shown
    assert "4/4" in shown


def test_quiet_says_nothing() -> None:
    stream = io.StringIO()
    with for_console(Console(file=stream), quiet=True) as progress:
        progress.start("compress", 1)
        progress.advance("compress")
        progress.finish("compress")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (12, "12 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words
