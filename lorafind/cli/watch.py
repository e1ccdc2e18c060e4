"""Shows how a long run goes: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from lorafind.cli.output import Sink, clean

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: Seconds between two lines where no bar can be shown.
PATIENCE = 60.0


class Watch(ExitStack):
    """Progress of a library call (``stage`` and ``advance``), shown until the block ends."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._title = ""
        self._files = self._size = self._done = self._read = 0
        self._began = self._told = time.monotonic()
        if sys.stderr.isatty() and not sink.quiet:
            self._bars = self.enter_context(_bars())

    def stage(self, title: str, files: int, size: int) -> None:
        """A stage begins; see :class:`lorafind.index.progress.Progress`."""
        self._title, self._files, self._size = title, files, size
        self._done = self._read = 0
        self._began = self._told = time.monotonic()
        if self._bars is not None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(clean(title), total=files or None, rate="")

    def advance(self, files: int, size: int) -> None:
        """So much more is done."""
        self._done += files
        self._read += size
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._done, rate=self._rate())
        elif time.monotonic() - self._told > PATIENCE:
            self._told = time.monotonic()
            self._sink.note(f"{self._title}: {self._done} of {self._files}, {self._rate()}")

    def note(self, sentence: str) -> None:
        """A line for the user."""
        self._sink.note(sentence)

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-3)
        rate = f"{self._done / seconds:.0f}/s"
        if self._size:
            rate = f"{self._done / seconds:.0f} files/s, {self._read / seconds / 1e6:.0f} MB/s"
            left = (self._size - self._read) * seconds / max(self._read, 1)
            rate += f", {duration(left)} left"
        elif self._files:
            rate += f", {duration((self._files - self._done) * seconds / max(self._done, 1))} left"
        return rate


def duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _bars() -> Progress:
    from rich import progress

    from lorafind.cli.output import console

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}", markup=False),
        console=console(sys.stderr),
        transient=True,
    )
