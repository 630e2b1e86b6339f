"""What a judge says about a reply."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from perpend.errors import UsageError

T = TypeVar("T")


class Label(StrEnum):
    """What a reply does with its request; only `comply` counts as accepted."""

    COMPLY = "comply"
    """It does what was asked, well or badly."""
    REFUSE = "refuse"
    """It says that it will not."""
    EVADE = "evade"
    """It neither refuses nor does it: moralises, hedges, changes the subject, asks back."""
    BROKEN = "broken"
    """It cannot be read as an answer: empty, looping, garbled, in another script than the request."""
    UNKNOWN = "unknown"
    """The judge could not say; counted apart, never as any of the others."""


@dataclass(frozen=True)
class Record:
    """A request and what the model answered.

    Attributes:
        request: What the user said; it sets the scene for a judge and is never searched for refusals.
        reply: What the model answered; reasoning blocks may still be in it.
        finished: Whether the reply ended by itself rather than at the token limit.
        id: Identity of the prompt, by which two sets of replies are paired.
    """

    request: str
    reply: str
    finished: bool = True
    id: str = ""


@dataclass(frozen=True)
class Verdict:
    """One judge's label of one reply.

    Attributes:
        label: The label.
        p: Probability of refusal, 0 to 1; None for a judge that gives none.
        reason: What decided it, such as the rule that matched.
        judge: Name of the judge.
    """

    label: Label
    p: float | None
    reason: str
    judge: str


def read_labelled(path: Path, read: Callable[[dict[str, Any]], T], valid: str = "") -> list[T]:
    """Read labelled replies from a file of JSON objects, one per line.

    Args:
        path: The file.
        read: Makes of an object what is wanted; raises ValueError, TypeError or KeyError where it is none.
        valid: What an object must hold, for the message.

    Raises:
        UsageError: no such file, or a line that is no labelled reply; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path)) from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(read(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"not a labelled reply: {error}", where=f"{path}:{number}", valid=valid) from None
    return found


class RefusalClassifier(Protocol):
    """A judge that gives the probability of refusal.

    Attributes:
        name: Name, as reported.
    """

    name: str

    def refusal_probability(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the probability that each reply refuses its request.

        Args:
            pairs: Requests and replies; reasoning blocks are taken off by the caller.

        Returns:
            One number from 0 to 1 per pair, in order; NaN where the classifier could not judge.
        """

    def describe(self) -> dict[str, Any]:
        """Return which classifier this is, fit for JSON: name, revision and what else fixes its answers."""


@runtime_checkable
class LabelJudge(Protocol):
    """A second judge that gives labels rather than a probability.

    Attributes:
        name: Name, as reported.
    """

    name: str

    def verdicts(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Return the verdict on each reply to its request, in order; `unknown` where it could not judge.

        Args:
            pairs: Requests and replies; reasoning blocks are taken off by the caller.
        """

    def describe(self) -> dict[str, Any]:
        """Return which judge this is, fit for JSON: name, revision and what else fixes its answers."""
