"""Progress, told by the lower floors and shown by whoever installs a reporter.

Library code writes `for batch in track(batches, "generate", total=n, size=len):` and knows nothing of terminals. The
command line installs a reporter with `reporting(...)`; without one nothing is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")


class Reporter(Protocol):
    """What a terminal, a log or a test offers to long steps."""

    def start(self, label: str, total: int | None) -> int:
        """Open a task of `total` units (None: unknown) and return its handle."""

    def advance(self, task: int, amount: int = 1) -> None:
        """Move a task on by `amount` units."""

    def finish(self, task: int) -> None:
        """Close a task."""

    def note(self, message: str) -> None:
        """Tell one line that the user should see, such as a batch size halved after running out of memory."""

    def standing(self, message: str) -> None:
        """Show how things stand, in place of what was shown before, until the outermost task is closed."""


class _Silent:
    def start(self, label: str, total: int | None) -> int:
        return 0

    def advance(self, task: int, amount: int = 1) -> None: ...

    def finish(self, task: int) -> None: ...

    def note(self, message: str) -> None: ...

    def standing(self, message: str) -> None: ...


_reporter: ContextVar[Reporter] = ContextVar("perpend_reporter", default=_Silent())  # noqa: B039


@contextmanager
def reporting(reporter: Reporter) -> Iterator[Reporter]:
    """Send progress to `reporter` inside the block."""
    token = _reporter.set(reporter)
    try:
        yield reporter
    finally:
        _reporter.reset(token)


def note(message: str) -> None:
    """Tell the user one line, on stderr when a terminal is attached, nowhere otherwise."""
    _reporter.get().note(message)


def standing(message: str) -> None:
    """Show the user in a few lines how a long task stands; the next call replaces them."""
    _reporter.get().standing(message)


def track(
    items: Iterable[T], label: str, *, total: int | None = None, size: Callable[[T], int] | None = None
) -> Iterator[T]:
    """Yield `items`, advancing a progress task by `size(item)` (default 1) after each.

    Args:
        items: What to go through.
        label: A short verb phrase, shown left of the bar.
        total: Units in all; `len(items)` when it has one and `size` is not given.
        size: Units that one item stands for, such as the rows of a batch.
    """
    if total is None and size is None and isinstance(items, Sized):
        total = len(items)
    reporter = _reporter.get()
    task = reporter.start(label, total)
    try:
        for item in items:
            yield item
            reporter.advance(task, size(item) if size else 1)
    finally:
        reporter.finish(task)


@contextmanager
def meter(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves a progress task on to so many units; for work that others do as well.

    Args:
        label: A short noun or verb phrase, shown left of the bar.
        total: Units in all.
    """
    reporter = _reporter.get()
    task, done = reporter.start(label, total), 0

    def reach(units: int) -> None:
        nonlocal done
        if units > done:
            reporter.advance(task, units - done)
            done = units

    try:
        yield reach
    finally:
        reporter.finish(task)
