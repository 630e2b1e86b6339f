"""Progress on stderr: one live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from perpend.cli.text import printable
from perpend.progress import Unit
from perpend.units import seconds, size

EVERY = 15.0
"""Seconds between two plain lines."""
BRIEF = 2.0
"""Steps shorter than this, in seconds, leave no line on a terminal."""


@dataclass
class Step:
    """An open task.

    Attributes:
        label: What is done.
        total: Units in all, None when unknown.
        began: Clock at the start, in seconds.
        outermost: No other task was open when it started.
        unit: What the units are.
        done: Units done.
        told: A line about it has been printed.
    """

    label: str
    total: int | None
    began: float
    outermost: bool
    unit: Unit = ""
    done: int = 0
    told: bool = False

    def rate(self, now: float) -> float:
        """Return units per second so far, 0 before anything is done."""
        elapsed = now - self.began
        return self.done / elapsed if elapsed > 0 else 0.0

    def standing(self, now: float) -> str:
        """Return where the task stands: done, rate and time left."""
        rate = self.rate(now)
        of = f" of {amount(self.total, self.unit)}" if self.total else ""
        left = f", {seconds((self.total - self.done) / rate)} left" if self.total and rate else ""
        return f"{self.label}: {amount(self.done, self.unit)}{of}, {per_second(rate, self.unit)}{left}"

    def closing(self, now: float) -> str:
        """Return what was done in how long."""
        done = amount(self.done, self.unit)
        if self.total is not None and self.done < self.total:
            done = f"stopped at {done} of {amount(self.total, self.unit)}"
        return f"{self.label}: {done} in {seconds(now - self.began)}"


def amount(units: float, unit: Unit) -> str:
    """Return so many units: `12`, or `211 kB` of bytes."""
    return size(units) if unit == "B" else f"{units:.0f}"


def per_second(rate: float, unit: Unit = "") -> str:
    """Return a rate with the unit that reads best: `12/s`, `1.4/s`, `6.0/min`; `211 kB/s` of bytes."""
    if unit == "B":
        return f"{size(rate)}/s"
    if rate >= 10:
        return f"{rate:.0f}/s"
    return f"{rate:.1f}/s" if rate >= 0.5 or rate == 0 else f"{rate * 60:.1f}/min"


class Lines:
    """Plain lines: start and finish of outermost tasks, and at most one line each `EVERY` seconds in between."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._steps: dict[int, Step] = {}
        self._next, self._last = 0, clock()
        self._stood, self._standing = -math.inf, ""

    def start(self, label: str, total: int | None, unit: Unit = "") -> int:
        """Open a task."""
        self._next += 1
        step = Step(printable(label), total, self._clock(), outermost=not self._steps, unit=unit)
        self._steps[self._next] = step
        if step.outermost:
            self._say(step, f"{step.label}: {amount(total, unit)} to do" if total else f"{step.label}: started")
        return self._next

    def advance(self, task: int, amount: int = 1) -> None:
        """Count units; says where the task stands when the last line is old enough."""
        step = self._steps.get(task)
        if step is None:
            return
        step.done += amount
        if self._clock() - self._last >= EVERY:
            self._say(step, step.standing(self._clock()))

    def finish(self, task: int) -> None:
        """Close a task."""
        step = self._steps.pop(task, None)
        if step is not None and step.outermost:
            self._stand()
        if step is not None and step.told:
            self._say(step, step.closing(self._clock()))

    def note(self, message: str) -> None:
        """Tell one line."""
        self._write(printable(message))

    def standing(self, message: str) -> None:
        """Keep the lines for the end of the task; tells them now when those before are old enough."""
        self._standing = printable(message)
        if self._clock() - self._stood >= EVERY:
            self._stand()

    def _stand(self) -> None:
        if self._standing:
            self._write(self._standing)
            self._stood, self._standing = self._clock(), ""

    def _say(self, step: Step, line: str) -> None:
        step.told, self._last = True, self._clock()
        self._write(line)


class _Done(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        total = "?" if task.total is None else amount(task.total, unit)
        done = amount(task.completed, unit)
        return Text(f"{done:>{len(total)}}/{total}", style="progress.download")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(per_second(task.speed, task.fields["unit"]) if task.speed else "", style="dim")


class _Bars(Progress):
    """Bars below a few lines of text."""

    above: Text | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.above is not None:
            yield self.above
        yield from super().get_renderables()


class Live:
    """One live display for all open tasks; it is there only while a task is open."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._steps: dict[int, Step] = {}
        label = TextColumn("{task.description}", markup=False)
        columns = (label, BarColumn(bar_width=28), _Done(), _Rate(), TimeRemainingColumn(compact=True))
        self._progress = _Bars(*columns, console=console, transient=True, refresh_per_second=5, redirect_stdout=False)

    def start(self, label: str, total: int | None, unit: Unit = "") -> int:
        """Open a task."""
        if not self._steps:
            self._progress.start()
        task = self._progress.add_task(printable(label), total=total, unit=unit)
        self._steps[task] = Step(printable(label), total, self._clock(), outermost=not self._steps, unit=unit)
        return task

    def advance(self, task: int, amount: int = 1) -> None:
        """Move a bar on."""
        if task in self._steps:
            self._steps[task].done += amount
            self._progress.advance(TaskID(task), amount)

    def finish(self, task: int) -> None:
        """Close a task; a long outermost one leaves a line, and how it stood at last."""
        step = self._steps.pop(task, None)
        if step is None:
            return
        self._progress.remove_task(TaskID(task))
        stood = self._progress.above if step.outermost else None
        if step.outermost:
            self._progress.above = None
        if not self._steps:
            self._progress.stop()
        if stood is not None:
            self._console.print(stood, highlight=False)
        now = self._clock()
        if step.outermost and now - step.began >= BRIEF:
            self._console.print(Text(step.closing(now), style="dim"))

    def note(self, message: str) -> None:
        """Tell one line, above the bars."""
        self._console.print(printable(message), markup=False, highlight=False)

    def standing(self, message: str) -> None:
        """Show lines above the bars, in place of those before."""
        if self._steps:
            self._progress.above = Text(printable(message))
            self._progress.refresh()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the display down inside the block, so that something else can be printed."""
        self._progress.stop()
        try:
            yield
        finally:
            if self._steps:
                self._progress.start()

    def close(self) -> None:
        """Take the display down, whatever is open."""
        self._steps.clear()
        self._progress.stop()


class Quiet:
    """Nothing at all."""

    def start(self, label: str, total: int | None, unit: Unit = "") -> int:
        """Open a task."""
        return 0

    def advance(self, task: int, amount: int = 1) -> None:
        """Count nothing."""

    def finish(self, task: int) -> None:
        """Close a task."""

    def note(self, message: str) -> None:
        """Tell nothing."""

    def standing(self, message: str) -> None:
        """Show nothing."""


@contextmanager
def live(console: Console) -> Iterator[Live]:
    """Yield a `Live` reporter and leave the terminal clean after it."""
    reporter = Live(console)
    try:
        yield reporter
    finally:
        reporter.close()
