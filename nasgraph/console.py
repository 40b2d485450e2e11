"""What a user sees while a search works: one bar per phase; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0  # without a terminal: a line at most this often


class Phase:
    """One bar: call :meth:`advance` for each finished piece of work."""

    def __init__(self, display: Display, name: str, total: int, done: int = 0) -> None:
        self.display, self.name, self.total, self.done = display, name, total, done
        self._spoken = time.monotonic()
        bars = display.bars
        self._bar = None if bars is None else bars.add_task(name, total=total, completed=done, note="")

    def advance(self, note: str = "") -> None:
        """One more piece is done; ``note`` is shown behind the bar."""
        self.done += 1
        if self.display.bars is not None and self._bar is not None:
            self.display.bars.update(self._bar, advance=1, note=note)
        elif not self.display.quiet and time.monotonic() - self._spoken >= PLAIN_EVERY_S:
            self._spoken = time.monotonic()
            self.display.say(f"{self.name}: {self.done}/{self.total} {note}")


class Display:
    """Progress of a run. ``seconds`` holds the wall time of each finished phase."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(markup=False)
        self.quiet = quiet
        self.bars: Progress | None = None
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print one line (not when quiet)."""
        if not self.quiet:
            self.console.print(text, highlight=False)

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Phase]:
        """A bar for ``total`` pieces of work, ``done`` of which were done in an earlier run."""
        start = time.monotonic()
        if self.quiet or not self.console.is_terminal:
            yield Phase(self, name, total, done)
        else:
            with Progress(
                TextColumn("[bold]{task.description:<14}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            ) as self.bars:
                yield Phase(self, name, total, done)
            self.bars = None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
