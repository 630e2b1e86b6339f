"""Write docs/cli.md from the commands themselves; `--check` only says whether it is up to date."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from perpend.cli.main import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """\
# Command line

Made from the commands by `make docs`; do not edit. Every command also takes `--help`.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 the work failed, 2 cannot be done as typed,
130 interrupted.
"""


def plain(markup: str) -> str:
    """Return terminal markup as Markdown text for a table cell or a paragraph."""
    return Text.from_markup(markup).plain.replace("|", "\\|")


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every command below a group with its full name, groups before their members."""
    for name, command in group.commands.items():
        yield f"{path} {name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")


def section(path: str, command: Any) -> Iterator[str]:
    """Yield the lines that describe one command."""
    yield from ("", f"## {path}", "", plain(" ".join(command.help.split("\n\n")[0].split())))
    for paragraph in command.help.split("\n\n")[1:]:
        yield from ("", plain(" ".join(paragraph.split())))
    if hasattr(command, "commands"):
        return
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([path, "[OPTIONS]", *(p.metavar if p.required else f"[{p.metavar}]" for p in arguments)])
    yield from ("", "```sh", usage, "```")
    if arguments:
        yield from ("", "| argument | |", "| --- | --- |")
        yield from (f"| `{p.metavar}` | {plain(p.help)} |" for p in arguments)
    options: dict[str, list[Any]] = {}
    for option in command.params:
        if option.param_type_name == "option":
            options.setdefault(option.rich_help_panel or "Of this command", []).append(option)
    for panel, of_panel in options.items():
        yield from ("", f"| {panel} | |", "| --- | --- |")
        yield from (f"| {names(p)} | {plain(p.help or '')} |" for p in of_panel)
    yield from ("", "```sh", *re.findall(r"perpend .*", Text.from_markup(command.epilog).plain), "```")


def names(option: Any) -> str:
    """Return the names of an option, the short one last, with what stands for its value."""
    shown = ", ".join(f"`{name}`" for name in option.opts)
    value = (option.metavar or "").strip()
    return f"{shown} `{value}`" if value else shown


def page() -> str:
    """Return the whole page."""
    lines = [HEAD.rstrip()]
    for path, command in commands(typer.main.get_command(app), "perpend"):
        lines += section(path, command)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page, or say that it is out of date."""
    made = page()
    if "--check" not in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == made:
        return 0
    sys.stderr.write(f"{PAGE.name} is out of date; make docs\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
