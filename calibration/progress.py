"""How long work tells where it is: bars on a terminal, one JSON object per line for programs, or
nothing but warnings.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from plugins.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars

__all__ = [
    "JsonProgress",
    "NullProgress",
    "PlainProgress",
    "Progress",
    "QuietProgress",
    "RichProgress",
    "duration",
    "make_progress",
]


_QUIET = 30  # seconds


def duration(seconds: float) -> str:
    """A time for people, in two or three digits: "4.1 s", "41 s", "1.4 min", "22 min", "3.5 h"."""
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 59.5 * size:
            return f"{seconds / size:.{int(seconds < 9.95 * size)}f} {unit}"
    return f"{seconds / 3600:.1f} h"


def _left(began: float, done: int, total: int) -> float:
    """Seconds for the rest of a stage, if its steps take as long as those that are done."""
    return (time.monotonic() - began) / done * max(total - done, 0) if done else 0.0


class Progress(Protocol):
    """What a stage calls; one stage at a time."""

    def start(self, stage: str, total: int) -> None:
        """A stage begins that has `total` steps."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Steps are done; the note names the current piece of work."""

    def skip(self, steps: int) -> None:
        """So many steps of the stage need not be done: it has that many less."""

    def finish(self) -> None:
        """The stage is done."""

    def message(self, text: str) -> None:
        """One line for the user."""

    def warning(self, text: str) -> None:
        """One line that the user should see: the result is not all that was asked for."""

    def close(self) -> None:
        """Work has ended, well or not: give the terminal back."""


class NullProgress:
    """Says nothing."""

    def start(self, stage: str, total: int) -> None:
        """Ignored."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Ignored."""

    def skip(self, steps: int) -> None:
        """Ignored."""

    def finish(self) -> None:
        """Ignored."""

    def message(self, text: str) -> None:
        """Ignored."""

    def warning(self, text: str) -> None:
        """Ignored."""

    def close(self) -> None:
        """Ignored."""


class QuietProgress(NullProgress):
    """Says nothing but warnings, on stderr."""

    def warning(self, text: str) -> None:
        """Print the text."""
        print(printable(text), file=sys.stderr, flush=True)


class JsonProgress:
    """One JSON object per line: {"event", "stage", "done", "total", "seconds"}, and "note" and "left",
    the seconds that the rest of the stage will take, behind steps.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._stage, self._total, self._done, self._began = "", 0, 0, time.monotonic()

    def _emit(self, event: str, **fields: Any) -> None:
        seconds = round(time.monotonic() - self._began, 3)
        line = {
            "event": event,
            "stage": self._stage,
            "done": self._done,
            "total": self._total,
            "seconds": seconds,
            **fields,
        }
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def start(self, stage: str, total: int) -> None:
        """Emit a start event."""
        self._stage, self._total, self._done, self._began = stage, total, 0, time.monotonic()
        self._emit("start")

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Emit a progress event."""
        self._done += steps
        left = _left(self._began, self._done, self._total)
        self._emit("progress", note=note, left=round(left, 1))

    def skip(self, steps: int) -> None:
        """Later events have the smaller total."""
        self._total -= steps

    def finish(self) -> None:
        """Emit a finish event."""
        self._emit("finish")

    def message(self, text: str) -> None:
        """Emit a message event."""
        self._emit("message", text=text)

    def warning(self, text: str) -> None:
        """Emit a message event, and print the text on stderr too."""
        self.message(text)
        print(printable(text), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Every line is out already."""


class PlainProgress:
    """One line per stage, for logs and pipes, and of a long one where it is, twice a minute."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._stage, self._total, self._done = "", 0, 0
        self._began = self._told = time.monotonic()

    def start(self, stage: str, total: int) -> None:
        """Remember when the stage began."""
        self._stage, self._total, self._done = stage, total, 0
        self._began = self._told = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Print how far the stage is, if nothing was printed for a while."""
        self._done += steps
        left = _left(self._began, self._done, self._total)
        if left and time.monotonic() - self._told >= _QUIET:
            where = f"{self._stage}: {self._done} of {self._total}"
            self.message(f"{where}, about {duration(left)} left")

    def skip(self, steps: int) -> None:
        """Later lines have the smaller total."""
        self._total -= steps

    def finish(self) -> None:
        """Print the stage and its time."""
        self.message(f"{self._stage}: {time.monotonic() - self._began:.1f} s")

    def message(self, text: str) -> None:
        """Print the text."""
        self._told = time.monotonic()
        print(printable(text), file=self._stream, flush=True)

    def warning(self, text: str) -> None:
        """Print the text."""
        self.message(text)

    def close(self) -> None:
        """Every line is out already."""


class RichProgress:
    """A live bar per stage on a terminal, with the elapsed and the remaining time."""

    def __init__(self) -> None:
        self._bars: RichBars | None = None
        self._stage, self._began = "", time.monotonic()

    def start(self, stage: str, total: int) -> None:
        """Show a bar."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self._stage, self._began = stage, time.monotonic()
        self._bars = Bars(
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._bars.add_task(stage, total=max(total, 1), note="")
        self._bars.start()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move the bar."""
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], advance=steps, note=printable(note))

    def skip(self, steps: int) -> None:
        """Shorten the bar."""
        if self._bars is not None:
            [task] = self._bars.tasks
            self._bars.update(task.id, total=(task.total or 0) - steps)

    def finish(self) -> None:
        """Replace the bar by one line."""
        self.close()
        self.message(f"{self._stage}: {time.monotonic() - self._began:.1f} s")

    def message(self, text: str) -> None:
        """Print above the bar."""
        from rich.console import Console
        from rich.text import Text

        console = self._bars.console if self._bars is not None else Console(stderr=True)
        console.print(Text(printable(text)), soft_wrap=True)  # names are no markup

    def warning(self, text: str) -> None:
        """Print above the bar."""
        self.message(text)

    def close(self) -> None:
        """Take the bar away and show the cursor again."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def make_progress(kind: str) -> Progress:
    """The display for --progress auto|rich|plain|json|none; auto is bars on a terminal, else plain
    lines.
    """
    if kind == "auto":
        kind = "rich" if sys.stderr.isatty() else "plain"
    kinds: dict[str, type[Progress]] = {
        "rich": RichProgress,
        "plain": PlainProgress,
        "json": JsonProgress,
        "none": QuietProgress,
    }
    return kinds[kind]()
