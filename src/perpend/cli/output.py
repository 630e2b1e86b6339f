"""The one place that prints: data on stdout, everything else on stderr; for people, for programs, or nothing."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from perpend.cli import errors
from perpend.cli.text import printable, printable_json
from perpend.errors import PerpendError
from perpend.export.beside import PAGE, REPORT
from perpend.launched import first
from perpend.tasks.output import to_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from perpend.cli.reporters import Live

Style = Literal["human", "json", "quiet"]
PIPED_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""

_SILENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Result(Protocol):
    """What every task returns: a frozen dataclass that can be written as JSON."""

    def to_json(self) -> dict[str, Any]:
        """Return plain mappings, lists, strings and numbers."""


Renderer = Callable[[dict[str, Any]], "Iterator[RenderableType]"]
"""From a result's JSON to what a person reads."""


class Output:
    """Prints results, notes, progress and errors in the style that the user asked for.

    Attributes:
        style: human, json or quiet. Quiet prints the data of a result and nothing on stderr but errors.
        verbose: Also tells what other libraries warn about.
        debug: Also prints the traceback of an error.
    """

    def __init__(self, style: Style = "human", *, verbose: bool = False, debug: bool = False) -> None:
        self.style, self.verbose, self.debug = style, verbose or debug, debug
        self._live: Live | None = None

    def result(self, result: Result, render: Renderer) -> None:
        """Print what a command found, on stdout."""
        data = _with_pages(result.to_json())
        if self.style == "json":
            self._write(printable_json(to_text(data, indent=2)))
        elif self.style == "quiet":
            path = data.get("output")
            if path:
                self._write(printable(str(path)))
        else:
            self._show(render(data))

    def teller(self, renderers: Mapping[str, Renderer]) -> Callable[[str, dict[str, Any]], None]:
        """Return a function that shows a part of a long result as soon as it is known; only to people."""

        def tell(name: str, data: dict[str, Any]) -> None:
            if self.style == "human" and name in renderers:
                self._show(renderers[name](data))

        return tell

    def document(self, result: Result, text: str) -> None:
        """Print a result that is a text by nature, such as a recipe: the text alone, also when quiet."""
        if self.style == "json":
            self.result(result, lambda data: iter(()))
        else:
            self._write(printable(text), end="")

    def text(self, text: str, *, end: str = "\n") -> None:
        """Print data that is text by nature, such as a recipe or a reply, on stdout."""
        self._write(printable(text), end=end)

    def note(self, message: str) -> None:
        """Tell one line on stderr, unless quiet."""
        if self.style != "quiet" and first():
            _console(stderr=True).print(printable(message), markup=False, highlight=False, soft_wrap=True)

    def error(self, error: BaseException) -> int:
        """Tell an error on one line of stderr, with `--json` as JSON on stdout too; return the exit code."""
        told = errors.explain(error)
        if self.debug:
            sys.stderr.write(printable("".join(traceback.format_exception(error))))
        if self.style == "json":
            self._write(printable_json(json.dumps(errors.to_json(told), ensure_ascii=False, indent=2)))
        sys.stderr.write(f"perpend: {printable(_one_line(told))}\n")
        sys.stderr.flush()
        return told.exit_code

    @contextmanager
    def working(self) -> Iterator[None]:
        """Show progress, and keep other libraries off the terminal, inside the block."""
        from perpend.cli import reporters
        from perpend.progress import Reporter, reporting

        with ExitStack() as stack:
            if not self.verbose:
                stack.enter_context(_others_silenced())
            reporter: Reporter
            if self.style == "quiet" or not first():
                reporter = reporters.Quiet()
            elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
                reporter = self._live = stack.enter_context(reporters.live(_console(stderr=True)))
            else:
                reporter = reporters.Lines(_stderr_line)
            stack.enter_context(reporting(reporter))
            yield

    def _show(self, parts: Iterator[RenderableType]) -> None:
        from rich.text import Text

        console = _console(stderr=False)
        with console.capture() as captured:
            for part in parts:
                whole = isinstance(part, Text) and part.no_wrap is True  # which `print` alone would not look at
                console.print(part, markup=False, highlight=False, crop=False, soft_wrap=whole)
        if text := captured.get():
            self._write("\n".join(line.rstrip() for line in text.splitlines()))

    def _write(self, text: str, end: str = "\n") -> None:
        if not first():
            return
        with self._live.aside() if self._live else nullcontext():
            sys.stdout.write(text + end)
            sys.stdout.flush()


def _with_pages(data: dict[str, Any]) -> dict[str, Any]:
    """Return a result with the report that lies in its folder as `pages`; results of single files list their own."""
    if data.get("dry_run") or data.get("pages"):
        return data
    run = data.get("run")  # of a demo, whose report is that of its run
    for made in (data, run if isinstance(run, dict) else {}):
        pages = [Path(str(made["output"])) / name for name in (REPORT, PAGE)] if made.get("output") else []
        if pages and all(page.is_file() for page in pages):
            return data | {"pages": [str(page) for page in pages]}
    return data


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console


def _stderr_line(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _one_line(error: PerpendError) -> str:
    return " ".join(str(error).split())


@contextmanager
def _others_silenced() -> Iterator[None]:
    """Keep bars, warnings and log lines of other libraries off the terminal inside the block."""
    for name, value in _SILENT.items():  # read by those libraries when they are first imported
        os.environ.setdefault(name, value)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
