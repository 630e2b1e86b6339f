"""A model and its edit, answering from the same weights: without the edit, with it, and with more or less of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from perpend.core.edits import Edit
from perpend.errors import UsageError, nearest
from perpend.judges.labels import Record
from perpend.judges.panel import Panel
from perpend.models.session import Session

MOST = 100.0
"""Largest size of a scale: far beyond any that leaves words, and far below one that leaves no finite number."""


def read_scale(text: str) -> float:
    """Return what every weight factor is to be multiplied by.

    Raises:
        UsageError: not a number, or too large a one.
    """
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not abs(scale) <= MOST:
        raise UsageError(
            f"'{text}' is no scale", valid=f"a number from -{MOST:g} to {MOST:g}, 0 for the model as it is"
        )
    return scale


@dataclass(frozen=True)
class Duet:
    """A loaded model, the edit that can be put in place, and who labels the answers.

    Attributes:
        session: The model, without an edit.
        edit: At scale 1; None for a model alone.
        judges: Loads the judges; asked once, when something is first labelled or `panel` is first looked at.
    """

    session: Session
    edit: Edit | None
    judges: Callable[[], Panel]

    @cached_property
    def panel(self) -> Panel:
        """The judges."""
        return self.judges()

    @property
    def names(self) -> tuple[str, ...]:
        """What a client can ask for; `edited@X` takes any scale X."""
        return ("base",) if self.edit is None else ("base", "edited", "edited@0.5")

    def scale_of(self, name: str) -> float:
        """Return the scale of the edit that a name stands for, 0 for the model as it is.

        Raises:
            UsageError: no such name.
        """
        if name == "base":
            return 0.0
        side, at, scale = name.partition("@")
        if self.edit is None or side != "edited":
            valid = ", ".join(self.names) + (", edited@X" if self.edit is not None else "")
            raise UsageError(f"no model '{name}'", valid=valid, hint=nearest(name, self.names))
        return read_scale(scale) if at else 1.0

    def at(self, scale: float) -> Edit | None:
        """Return the edit with every weight factor multiplied by `scale`; None where that changes nothing."""
        return self.edit.scaled(scale) if self.edit is not None and scale else None

    @property
    def sees(self) -> bool:
        """Whether the model takes images."""
        return self.session.chat.processor is not None

    def labels(self, request: str, replies: Sequence[tuple[str, bool]]) -> list[dict[str, Any]]:
        """Label answers to one request.

        Args:
            request: What the user said last.
            replies: Each answer, and whether it ended by itself.

        Returns:
            For each, in order: `label`, `kind` (`hybrid` or `dictionary only`), what the `dictionary` says and, where
            there is one, the `classifier`.
        """
        judgement = self.panel.judge([Record(request, reply, finished) for reply, finished in replies])
        found = judgement.to_json()["replies"]
        return [{"kind": judgement.kind, **{k: v for k, v in one.items() if k != "id"}} for one in found]
