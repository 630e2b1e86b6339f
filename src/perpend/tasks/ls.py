"""What there is to choose from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from perpend.config import METHODS, MODES, RULES, EvalSection, PromptsSection
from perpend.core.schedule import KINDS
from perpend.errors import UsageError, nearest


@dataclass(frozen=True)
class Entry:
    """One choice.

    Attributes:
        name: As written in a recipe or after a flag.
        summary: What it is, one line.
    """

    name: str
    summary: str


@dataclass(frozen=True)
class Listing:
    """Choices by what they are choices of.

    Attributes:
        kinds: From `methods`, `modes`, `rules`, `schedules`, `judges`, `prompts` to their entries.
    """

    kinds: dict[str, tuple[Entry, ...]]

    def to_json(self) -> dict[str, Any]:
        """Return lists of names and summaries."""
        return {
            kind: [{"name": entry.name, "summary": entry.summary} for entry in entries]
            for kind, entries in self.kinds.items()
        }


def ls(kind: str | None = None) -> Listing:
    """List the methods, modes, rules, schedules, judges and prompt sets that come with Perpend.

    Args:
        kind: One of `LISTS`; None lists all.

    Raises:
        UsageError: no such kind.
    """
    if kind is not None and kind not in LISTS:
        raise UsageError(f"nothing called '{kind}'", where="ls", valid=", ".join(LISTS), hint=nearest(kind, LISTS))
    return Listing({name: tuple(make()) for name, make in LISTS.items() if kind in (None, name)})


def _methods() -> list[Entry]:
    return [Entry(name, what) for name, what in METHODS.items()]


def _modes() -> list[Entry]:
    return [Entry(name, what) for name, what in MODES.items()]


def _rules() -> list[Entry]:
    return [Entry(name, what) for name, what in RULES.items()]


def _schedules() -> list[Entry]:
    found = []
    for name, schedule in KINDS.items():
        own = ", ".join(key for key in schedule.model_fields if key != "kind")
        about = inspect.cleandoc(schedule.__doc__ or "").splitlines()[0].rstrip(".")
        found.append(Entry(name, f"{about} ({own})"))
    return found


def _judges() -> list[Entry]:
    return [
        Entry("dictionary", "phrases by language and position; always asked, never alone in a headline"),
        Entry(EvalSection().classifier, "sequence classifier on the hub; the default second judge"),
        Entry("perpend:small", "small classifier that comes with Perpend; works without a network"),
        Entry(
            "endpoint:URL#model=NAME", "a model behind any OpenAI-style server; answers are kept, failures are unknown"
        ),
        Entry("none", "no classifier: the result is marked `dictionary only`"),
    ]


def _prompts() -> list[Entry]:
    from perpend.data import load_splits

    splits = load_splits(PromptsSection())
    found = []
    for kind in ("target", "baseline"):
        counts = {name: len(getattr(getattr(splits, name), kind)) for name in ("fit", "select", "report")}
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        found.append(Entry(f"perpend:{kind}", f"prompts that models {_DO[kind]} ({listed})"))
    return found


_DO = {"target": "refuse", "baseline": "answer"}

LISTS: dict[str, Callable[[], list[Entry]]] = {
    "methods": _methods,
    "modes": _modes,
    "rules": _rules,
    "schedules": _schedules,
    "judges": _judges,
    "prompts": _prompts,
}
"""What can be listed."""
