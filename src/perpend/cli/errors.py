"""The table from exceptions to the one line a user reads, and to the exit code."""

from __future__ import annotations

import errno
from collections.abc import Callable
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
        known = [o for p in context.command.get_params(context) for o in (*p.opts, *p.secondary_opts) if o[0] == "-"]
        hint = nearest(option, known) or usage
        return UsageError(f"no option '{option}'", where=path, hint=hint)
    if message.startswith("No such command"):
        word, commands = message.split("'")[1], context.command.list_commands(context)
        return UsageError(f"no command '{word}'", where=path, valid=", ".join(commands), hint=nearest(word, commands))
    text = f"{message[0].lower()}{message[1:]}".rstrip(".")
    return UsageError(text, where=path, hint=usage)


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
