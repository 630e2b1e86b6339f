"""The table from exceptions to the one line a user reads, and to the exit code."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import typer

from perpend.errors import Interrupted, PerpendError, RunFailed, UsageError, nearest

DEBUG_HINT = "run again with --debug"


def _ancestor(name: str) -> type[Exception]:
    """Return a base class of typer's usage errors by name; its own click is not a public module."""
    return next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == name)


ParseError = _ancestor("ClickException")


def explain(error: BaseException) -> PerpendError:
    """Return what to tell the user about any exception; those of Perpend are returned as they are."""
    if isinstance(error, PerpendError):
        return error
    for kind, row in _TABLE:
        if isinstance(error, kind):
            return row(error)
    if type(error).__name__ in {"OutOfMemoryError", "MemoryError"} or "can't allocate memory" in str(error):
        return RunFailed("out of memory", hint="--batch-size 1, or fewer tokens or prompts")
    return RunFailed(f"unexpected {type(error).__name__}: {_first_line(error)}", hint=DEBUG_HINT)


def to_json(error: PerpendError) -> dict[str, Any]:
    """Return the error as the object that `--json` prints."""
    fields = {"what": error.what, "where": error.where, "valid": error.valid, "hint": error.hint}
    return {"error": {"type": type(error).__name__, **fields, "exit_code": error.exit_code}}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _interrupted(error: BaseException) -> PerpendError:
    return Interrupted("interrupted", hint="the same command again")


def _parse(error: Any) -> PerpendError:
    """Turn a complaint of the command-line parser into one line with the nearest valid name."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path.removeprefix("perpend").strip() if context else ""
    usage = f"perpend {path}".strip() + " --help"
    option = getattr(error, "option_name", None)
    message = error.format_message()
    if option and message.startswith("No such option"):
        return _no_option(option, context, path, usage)
    if message.startswith("No such command"):
        word, commands = message.split("'")[1], context.command.list_commands(context)
        hint = usage if word == "help" else nearest(word, commands)
        return UsageError(f"no command '{word}'", where=path, valid=", ".join(commands), hint=hint)
    text = f"{message[0].lower()}{message[1:]}".rstrip(".")
    return UsageError(text, where=path, hint=usage)


def _no_option(option: str, context: Any, path: str, usage: str) -> UsageError:
    """Say what else an unknown option may be: a mistyped one, a key of the recipe, or that of another command."""
    known = _options(context.command)
    elsewhere = [name for name, command in _commands(context.find_root().command) if option in _options(command)]
    if elsewhere:
        others = f"{len(elsewhere)} commands do, such as {elsewhere[0]}" if len(elsewhere) > 3 else _listed(elsewhere)
        return UsageError(f"takes no option '{option}'; {others}", where=path, hint=usage)
    hint = nearest(option, known)
    if not hint and "--set" in known:
        leaf = option.lstrip("-").replace("-", "_")
        hint = next((f"--set {key}=VALUE" for key in _recipe_keys() if key.rpartition(".")[2] == leaf), "")
    return UsageError(f"no option '{option}'", where=path, hint=hint or usage)


def _recipe_keys() -> Iterable[str]:
    from perpend.config import Recipe, keys

    return keys(Recipe)


def _options(command: Any) -> list[str]:
    return ["--help", *(o for p in command.params for o in (*p.opts, *p.secondary_opts) if o[0] == "-")]


def _commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the commands below a group, those of its groups too, each with its full name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last} do" if others else f"{last} does"


def _system(error: BaseException) -> PerpendError:
    code, where = getattr(error, "errno", None), str(getattr(error, "filename", None) or "")
    if code == errno.ENOSPC:
        return RunFailed("no space left on the disk", where=where)
    if isinstance(error, PermissionError):
        return UsageError("permission denied", where=where)
    if code is None:
        return RunFailed(f"unexpected {type(error).__name__}: {_first_line(error)}", where=where, hint=DEBUG_HINT)
    return RunFailed(f"{getattr(error, 'strerror', None) or error}", where=where, hint=DEBUG_HINT)


_TABLE: tuple[tuple[type[BaseException], Callable[[Any], PerpendError]], ...] = (
    (KeyboardInterrupt, _interrupted),
    (ParseError, _parse),
    (typer.Abort, _interrupted),
    (OSError, _system),
)
