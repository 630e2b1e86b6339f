"""The errors a user can meet: one line each, with what to do next.

Every error says what is wrong, where it came from, what would have been valid, and what to type next. The command
line prints that one line and exits with `exit_code`; the traceback appears only with `--debug`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PerpendError(Exception):
    """Base of all errors that Perpend raises on purpose.

    Attributes:
        what: What is wrong, a clause without a full stop.
        where: Where it came from: a file, a key, a flag, a module name.
        valid: What would have been accepted.
        hint: What to type next.
        exit_code: Exit status of the command line.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", valid: str = "", hint: str = "") -> None:
        self.what, self.where, self.valid, self.hint = what, where, valid, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        line += f"; valid: {self.valid}" if self.valid else ""
        if self.hint:
            line += f"; {self.hint}" if self.hint.startswith("did you mean") else f"; try: {self.hint}"
        return " ".join(line.split())


class UsageError(PerpendError):
    """The request cannot be carried out as typed: flags, configuration, prompts, model reference, output folder."""

    exit_code = 2

    def within(self, where: str) -> UsageError:
        """Return the same error with the option or the key in front that it came by."""
        what = f"{self.where}: {self.what}" if self.where else self.what
        return UsageError(what, where=where, valid=self.valid, hint=self.hint)


class RunFailed(PerpendError):
    """The request was fine and the work failed: numbers not finite, out of memory, a broken file met half-way."""


class GateFailed(RunFailed):
    """The exported file is not the edit that was asked for; the output stays as `.partial` for inspection."""


class MissingExtra(UsageError):
    """An optional package is needed: says what it is for and the line that installs it.

    pip takes the extra from the package that is installed, wherever that came from: no index needs to know Perpend.
    """

    def __init__(self, package: str, extra: str, purpose: str, *, also: str = "") -> None:
        line = f'pip install "perpend[{extra}]"' + (f" && {also}" if also else "")
        super().__init__(f"{purpose} needs the package {package}", hint=line)


class Interrupted(PerpendError):
    """Ctrl-C: says what was kept and how to go on."""

    exit_code = 130


NEAR = 0.7
"""Likeness, of 1, from which a name is taken for a mistyped one."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return `did you mean 'x'?` for the closest of `valid`, or an empty string when nothing is close."""
    likeness, match = max(((_likeness(word, name), name) for name in valid), default=(0.0, ""), key=lambda row: row[0])
    return f"did you mean '{match}'?" if likeness >= NEAR else ""


def _likeness(word: str, name: str) -> float:
    """Say from 0 to 1 how likely a name was meant: what all options share, dashes and case, does not count."""
    a, b = (text.lstrip("-/").lower().replace("_", "-")[:LONGEST] for text in (word, name))
    ratio = difflib.SequenceMatcher(None, b, a, autojunk=False).ratio()
    short, long = sorted((a, b), key=len)
    part = len(short) >= SHORTEST and (long.startswith(short) or long.endswith(f".{short}"))
    swapped = len(a) >= SHORTEST and a != b and a[0] == b[0] and sorted(a) == sorted(b)
    return max(ratio, NEAR + ratio / 100) if part or swapped else ratio


SHORTEST = 3
"""Characters of a word that may stand for one that it begins, or for one of the same letters."""
LONGEST = 200
"""Characters that are compared."""
