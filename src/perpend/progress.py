"""Progress, told by the lower floors and shown by whoever installs a reporter.

Library code writes `for batch in track(batches, "generate", total=n, size=len):` and knows nothing of terminals. The
command line installs a reporter with `reporting(...)`; without one nothing is printed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")

Unit = Literal["", "B"]
"""What is counted: things that the label names, or bytes."""


class Reporter(Protocol):
    """What a terminal, a log or a test offers to long steps."""

    def start(self, label: str, total: int | None, unit: Unit = "") -> int:
        """Open a task of `total` units (None: unknown), things or bytes, and return its handle."""

    def advance(self, task: int, amount: int = 1) -> None:
        """Move a task on by `amount` units."""

    def finish(self, task: int) -> None:
        """Close a task."""

    def note(self, message: str) -> None:
        """Tell one line that the user should see, such as a batch size halved after running out of memory."""

    def standing(self, message: str) -> None:
        """Show how things stand, in place of what was shown before, until the outermost task is closed."""


class _Silent:
    def start(self, label: str, total: int | None, unit: Unit = "") -> int:
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
    items: Iterable[T],
    label: str,
    *,
    total: int | None = None,
    size: Callable[[T], int] | None = None,
    unit: Unit = "",
) -> Iterator[T]:
    """Yield `items`, advancing a progress task by `size(item)` (default 1) after each.

    Args:
        items: What to go through.
        label: A short verb phrase, shown left of the bar.
        total: Units in all; `len(items)` when it has one and `size` is not given.
        size: Units that one item stands for, such as the rows of a batch.
        unit: What the units are: things, or bytes.
    """
    if total is None and size is None and isinstance(items, Sized):
        total = len(items)
    reporter = _reporter.get()
    task = reporter.start(label, total, unit)
    try:
        for item in items:
            yield item
            reporter.advance(task, size(item) if size else 1)
    finally:
        reporter.finish(task)


@contextmanager
def meter(label: str, total: int | None, unit: Unit = "") -> Iterator[Callable[[int], None]]:
    """Yield a function that moves a progress task on to so many units; for work that others do as well.

    Args:
        label: A short noun or verb phrase, shown left of the bar.
        total: Units in all.
        unit: What they are: things, or bytes.
    """
    reporter = _reporter.get()
    task, done = reporter.start(label, total, unit), 0

    def reach(units: int) -> None:
        nonlocal done
        if units > done:
            reporter.advance(task, units - done)
            done = units

    try:
        yield reach
    finally:
        reporter.finish(task)


class Bar:
    """What another library takes for a `tqdm` of its own: it draws nothing, counts, and says how far it is.

    Attributes:
        n: Units done.
        total: Units in all, None when unknown.
        format_dict: Empty; there is no rate to show.
    """

    def __init__(
        self,
        items: Iterable[Any] | None = None,
        *,
        total: float | None = None,
        moved: Callable[[int], None] | None = None,
        closed: Callable[[], None] | None = None,
        **_: Any,
    ) -> None:
        self.n, self.total, self.format_dict = 0, total, dict[str, Any]()
        self._items, self._moved, self._closed, self._lock = items, moved, closed, threading.Lock()

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self._items or ():
                yield item
                self.update()
        finally:
            self.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_, **__: None  # refresh, set_description and the like

    def update(self, n: float | None = 1) -> None:
        """Count units; from any thread."""
        with self._lock:
            self.n += int(n or 0)
            if self._moved:
                self._moved(self.n)

    def close(self) -> None:
        """Count no more."""
        if self._closed:
            self._closed()


@contextmanager
def bars(label: Callable[[str], str]) -> Iterator[Callable[..., Bar]]:
    """Yield what another library can take for `tqdm`: each bar that it opens is a step of ours.

    Args:
        label: From a bar's own description, or an empty one, to the label of the step; empty for no step.
    """
    with ExitStack() as every:

        def opened(items: Iterable[Any] | None = None, *, desc: str | None = None, **options: Any) -> Bar:
            total = options.pop("total", None)
            total = len(items) if total is None and isinstance(items, Sized) else total
            name = label(desc or "")
            if not name:
                return Bar(items, total=total)
            one = every.enter_context(ExitStack())
            return Bar(items, total=total, moved=one.enter_context(meter(name, total)), closed=one.close)

        yield opened
