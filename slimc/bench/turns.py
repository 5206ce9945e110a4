"""Processes that get ready side by side and are measured one at a time.

A process does a step for each line that it is sent, and answers each with a line of JSON: ``null`` once it is ready
for what must not be disturbed, then what it has measured, and so on until it ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import IO, Any, cast

__all__ = ["serve", "take_turns"]


class _Process:
    def __init__(self, command: Sequence[str]) -> None:
        self._running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._to, self._from = cast("IO[str]", self._running.stdin), cast("IO[str]", self._running.stdout)

    def begin(self) -> None:
        """Let it do its next step."""
        # One that has ended says so by its answer.
        with suppress(BrokenPipeError):
            self._to.write("\n")
            self._to.flush()

    def answer(self) -> tuple[bool, Any]:
        """Wait for the end of the step; return whether there was one, and the answer."""
        line = self._from.readline()
        return bool(line), json.loads(line) if line else None

    def stop(self) -> None:
        self._running.kill()
        self._running.wait()
        with suppress(BrokenPipeError):
            self._to.close()
        self._from.close()


def take_turns(commands: Iterable[Sequence[str]]) -> Iterator[Any]:
    """Run a process for each command, all at once, and yield what they measure, one after another.

    A process that fails says so by itself, on its standard error; the others go on without it.
    """
    running = [_Process(command) for command in commands]
    everyone = list(running)
    try:
        while running:
            for process in running:
                process.begin()
            running = [process for process in running if process.answer()[0]]
            measured = []
            for process in running:
                process.begin()
                there, found = process.answer()
                if there:
                    measured.append(process)
                    yield found
            running = measured
    finally:
        for process in everyone:
            process.stop()


def serve(steps: Iterator[Any]) -> None:
    """Do a step for each line of the standard input, as `take_turns` asks; what else is printed goes elsewhere."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for _ in sys.stdin:
        try:
            found = next(steps)
        except StopIteration:
            return
        print(json.dumps(found), file=answers, flush=True)
