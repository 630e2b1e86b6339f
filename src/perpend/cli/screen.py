"""Two answers beside each other on a terminal, while they grow."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from perpend.cli.output import Output
from perpend.cli.text import printable
from perpend.tasks.chat import Plain, Screen

NARROW = 72
"""Columns below which answers are shown one below the other."""


def screen_of(out: Output) -> Screen:
    """Return where a conversation takes place: columns on a terminal, lines elsewhere, nothing where JSON is wanted."""
    asked = sys.stdin.isatty() and sys.stdout.isatty()
    if asked:
        import readline  # noqa: F401

    def read() -> str | None:
        try:
            return input("› " if asked else "")
        except EOFError:
            return None

    if out.style == "json":
        return Plain(read, lambda text: None)
    console = Console()
    kind = Columns if asked and console.width >= NARROW else Plain
    return kind(read, lambda text: out.text(text, end=""))


class Columns(Plain):
    """One answer as it grows; several beside each other."""

    def answers(self, names: Sequence[str], parts: Iterator[tuple[int, str]]) -> None:
        """Show answers."""
        if len(names) == 1:
            super().answers(names, parts)
            return
        console, texts = Console(), [""] * len(names)
        with Live(console=console, auto_refresh=False) as live:
            try:
                for k, piece in parts:
                    texts[k] += piece
                    if piece:
                        live.update(side_by_side(console, names, texts, console.height - 3), refresh=True)
            finally:
                live.update(side_by_side(console, names, texts), refresh=True)


def side_by_side(console: Console, names: Sequence[str], texts: Sequence[str], rows: int | None = None) -> Table:
    """Return texts of unknown origin beside each other, each under its name.

    Args:
        console: Whose width is shared out.
        names: Of the columns.
        texts: What stands in them.
        rows: Only so many lines of each, the last ones; None for all.
    """
    table = Table.grid(padding=(0, 2), expand=True)
    for name in names:
        table.add_column(Text(printable(name), style="bold"), ratio=1, overflow="fold")
    table.show_header = True
    width = (console.width - 2 * len(names)) // len(names)
    cells = [Text(printable(text)).wrap(console, width, overflow="fold") for text in texts]
    table.add_row(*(Text("\n").join(lines if rows is None else lines[-max(1, rows) :]) for lines in cells))
    return table
