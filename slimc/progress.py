"""Progress of long work: a live bar with the time left on a terminal, plain timed lines elsewhere.

Whoever does the work is handed a :class:`Progress` and need not know where its words go.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


class Progress(Protocol):
    """What long-running work reports to. A stage has a name and a number of steps."""

    def start(self, stage: str, total: int) -> None:
        """Begin ``stage``, which takes ``total`` steps."""

    def advance(self, stage: str, n: int = 1, note: str = "") -> None:
        """Record ``n`` more steps of ``stage``; ``note`` says what was just done."""

    def finish(self, stage: str) -> None:
        """End ``stage``."""


class SilentProgress:
    """Says nothing."""

    def start(self, stage: str, total: int) -> None:
        """Ignore the start."""

    def advance(self, stage: str, n: int = 1, note: str = "") -> None:
        """Ignore the steps."""

    def finish(self, stage: str) -> None:
        """Ignore the end."""


@dataclass
class _Stage:
    total: int
    started: float
    done: int = 0
    spoken: float = 0.0


class PlainProgress:
    """Timed lines, for logs and pipes: one when a stage starts and ends, and one now and then between.

    Args:
        write: Takes a line without its newline.
        every: Seconds between two lines of a stage.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, write: Callable[[str], object], *, every: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._every = every
        self._clock = clock
        self._begun = clock()
        self._stages: dict[str, _Stage] = {}

    def start(self, stage: str, total: int) -> None:
        """Begin ``stage``, which takes ``total`` steps."""
        now = self._clock()
        self._stages[stage] = _Stage(total, started=now, spoken=now)
        self._line(f"{stage}: {counted(total, 'step')}")

    def advance(self, stage: str, n: int = 1, note: str = "") -> None:
        """Record ``n`` more steps; a line is written if the last one is long enough ago."""
        state = self._stages[stage]
        state.done += n
        now = self._clock()
        if now - state.spoken < self._every or state.done >= state.total:
            return
        state.spoken = now
        left = (now - state.started) / state.done * (state.total - state.done) if state.done else None
        parts = [
            f"{stage}: {state.done}/{state.total}",
            "" if left is None else f"about {duration(left)} left",
            note,
        ]
        self._line(", ".join(part for part in parts if part))

    def finish(self, stage: str) -> None:
        """End ``stage`` with a line that tells how long it took."""
        state = self._stages.pop(stage)
        self._line(f"{stage}: done in {duration(self._clock() - state.started)}")

    def _line(self, text: str) -> None:
        self._write(f"[{self._clock() - self._begun:7.1f} s] {text}")


class RichProgress:
    """One live bar a stage, with the steps, the time left and the latest note; drawn inside its ``with`` block."""

    def __init__(self, console: Console) -> None:
        from rich import progress

        self._tasks: dict[str, TaskID] = {}
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(elapsed_when_finished=False),
            progress.TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
        )

    def start(self, stage: str, total: int) -> None:
        """Begin ``stage``, which takes ``total`` steps."""
        self._tasks[stage] = self._bars.add_task(printable(stage), total=total, note="")

    def advance(self, stage: str, n: int = 1, note: str = "") -> None:
        """Record ``n`` more steps of ``stage`` and show ``note`` beside its bar."""
        self._bars.update(self._tasks[stage], advance=n, note=printable(note))

    def finish(self, stage: str) -> None:
        """End ``stage``; its bar stays, full, with the time that it took."""
        task = self._tasks.pop(stage)
        self._bars.update(task, completed=self._bars.tasks[self._bars.task_ids.index(task)].total, note="")
        self._bars.stop_task(task)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bars.stop()


def for_console(console: Console, *, quiet: bool = False) -> AbstractContextManager[Progress]:
    """Return the progress that fits ``console``: live bars on a terminal, lines elsewhere, nothing if ``quiet``."""
    if quiet:
        return nullcontext(SilentProgress())
    if console.is_terminal and not console.is_dumb_terminal:
        return RichProgress(console)
    return nullcontext(PlainProgress(lambda line: console.out(printable(line), highlight=False)))


def duration(seconds: float) -> str:
    """Return a length of time as a person says it: ``"12 s"``, ``"3 min 20 s"``, ``"2 h 5 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def counted(number: int, thing: str) -> str:
    """Return a number of things as a person says it: ``"1 window"``, ``"16 windows"``."""
    return f"{number} {thing}{'s' * (number != 1)}"


def printable(text: str, *, keep: str = "") -> str:
    r"""Return ``text`` with control characters and lone surrogates, but those in ``keep``, as escapes.

    Names come out of files; what a terminal would obey, or could not encode, is shown instead: ``"\x1b[2J"``.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in {"Cc", "Cs"} and character not in keep
        else character
        for character in text
    )
