"""The flags of the program: the options of the library as typer takes them, and those that only a program has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from perpend.options.commands import OPTIONS
from perpend.options.table import EDIT, OUTPUT, SEARCH, Option

PATHS = ("--output", "--config", "--edit", "--offload-folder", "--chat-template")
"""Options that name a file or a folder, which the shell completes by itself."""

FLAGS: dict[str, Option] = {
    **OPTIONS,
    "output": Option(
        "Where the result goes; must not exist or be empty.",
        OUTPUT,
        kind=Path,
        metavar="PATH",
        names=("--output", "-o"),
    ),
    "edit": Option("Edit made by `perpend fit`.", EDIT, kind=Path, metavar="FILE", names=("--edit", "-e")),
    "search": Option("Search for the edit, as perpend search does.", SEARCH, kind=bool, names=("--search",)),
    "storage": Option(
        "Journal file or postgresql:// URL for machines that share trials, also by PERPEND_STORAGE; without -o: join.",
        SEARCH,
        kind=str,
        metavar="WHERE",
        names=("--storage",),
    ),
    "workers": Option(
        "Processes on this machine, each on a device of its own.",
        SEARCH,
        kind=int,
        default="1",
        metavar="N",
        names=("--workers",),
    ),
    "dry_run": Option(
        "Check everything that can be checked and say what would be done.", OUTPUT, kind=bool, names=("--dry-run",)
    ),
    "json": Option("Print the result as JSON on stdout.", OUTPUT, kind=bool, names=("--json",)),
    "quiet": Option(
        "Print nothing but the path of what was written, and errors.", OUTPUT, kind=bool, names=("--quiet", "-q")
    ),
    "verbose": Option(
        "Also show what the libraries underneath have to say.", OUTPUT, kind=bool, names=("--verbose", "-v")
    ),
    "debug": Option("Print the traceback of an error.", OUTPUT, kind=bool, names=("--debug",)),
}

EVERYWHERE = ("json", "quiet", "verbose", "debug")


def typed(flag: Option) -> Any:
    """Return an option as typer takes it."""
    text = f"{flag.help} \\[default: {flag.default}]" if flag.default else flag.help
    return typer.Option(
        *flag.names,
        help=text,
        rich_help_panel=flag.panel,
        metavar=" " if flag.kind is bool else flag.metavar,
        show_default=False,
        autocompletion=_completer(flag) if flag.kind is not bool and flag.names[0] not in PATHS else None,
    )


def completions(flag: Option, incomplete: str) -> list[str]:
    """Return what the shell may complete for the value of a flag."""
    from perpend.options.asked import choices
    from perpend.tasks.config import completed_assignments

    if flag.names[0] == "--set":
        return completed_assignments(incomplete)
    listed = (*choices(flag.key or flag.machine, of_machine=bool(flag.machine)), *flag.listed)
    return [choice for choice in listed if choice.startswith(incomplete)]


def _completer(flag: Option) -> Any:
    def complete(incomplete: str) -> list[str]:
        return completions(flag, incomplete)

    return complete
