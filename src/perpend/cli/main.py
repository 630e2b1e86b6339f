"""The program `perpend`: its commands, and what happens around them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from perpend._version import __version__
from perpend.cli import config, export, quant
from perpend.cli.adapter import adapter
from perpend.cli.apply import apply
from perpend.cli.audit import audit
from perpend.cli.bench import bench
from perpend.cli.chat import chat
from perpend.cli.demo import demo
from perpend.cli.diff import diff
from perpend.cli.eval import evaluate
from perpend.cli.fit import fit
from perpend.cli.inspect import inspect
from perpend.cli.ls import ls
from perpend.cli.organism import organism
from perpend.cli.output import Output
from perpend.cli.push import push
from perpend.cli.report import report
from perpend.cli.run import run
from perpend.cli.search import search
from perpend.cli.serve import serve
from perpend.cli.vector import vector
from perpend.errors import Interrupted, UsageError

COMMANDS = (
    run,
    search,
    fit,
    apply,
    adapter,
    vector,
    push,
    evaluate,
    bench,
    report,
    inspect,
    diff,
    audit,
    chat,
    serve,
    demo,
    organism,
    ls,
)

app = typer.Typer(
    name="perpend",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Directional ablation for open-weight language models: measured, edited, proven on the saved file.",
    epilog="Examples\n\n  [cyan]perpend demo -o demo[/cyan]\n\n  [cyan]perpend run google/gemma-3-4b-it -o out[/cyan]",
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"perpend {__version__}\n")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


for _command in COMMANDS:
    _command.add_to(app)
for _group in (export, quant, config):
    app.add_typer(_group.app, rich_help_panel=_group.PANEL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: What follows `perpend`; None takes the process's own.

    Returns:
        The exit code: 0 done, 1 the work failed, 2 cannot be done as typed, 130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text that the terminal cannot show must not end a run
            stream.reconfigure(errors="backslashreplace")
    out = Output("json" if "--json" in given else "human", debug="--debug" in given)
    try:
        return _run(given or ["--help"])
    except BrokenPipeError:
        return _reader_gone()
    except SystemExit as left:  # typer leaves this way when a pipe breaks
        return _reader_gone() if isinstance(left.__context__, OSError) else int(left.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            return 0
        return out.error(error)


def _run(arguments: list[str]) -> int:
    program: Any = typer.main.get_command(app)
    if arguments[0] == "help":
        raise UsageError("no command 'help'", hint=f"perpend {''.join(_commands_of(arguments[1:], program))}--help")
    code: Any = program.main(arguments, prog_name="perpend", standalone_mode=False)
    sys.stdout.flush()
    if code == Interrupted.exit_code:  # typer has swallowed Ctrl-C
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _commands_of(words: list[str], command: Any) -> Iterator[str]:
    """Yield the leading words that lead to a command, each with a blank."""
    for word in words:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            return
        yield f"{word} "


def _reader_gone() -> int:
    """Go quietly when whoever read the output has stopped: the work itself was done."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
