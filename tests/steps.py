"""A reporter that keeps what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Told:
    """One step.

    Attributes:
        label: Its label.
        total: Units in all.
        unit: What they are.
        moves: By how many units it was moved on, each time.
        finished: It was closed.
    """

    label: str
    total: int | None
    unit: str
    moves: list[int] = field(default_factory=list)
    finished: bool = False


@dataclass
class Steps:
    """Steps and notes, in the order in which they began."""

    steps: list[Told] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def start(self, label: str, total: int | None, unit: str = "") -> int:
        self.steps.append(Told(label, total, unit))
        return len(self.steps) - 1

    def advance(self, task: int, amount: int = 1) -> None:
        assert not self.steps[task].finished
        self.steps[task].moves.append(amount)

    def finish(self, task: int) -> None:
        self.steps[task].finished = True

    def note(self, message: str) -> None:
        self.notes.append(message)

    def standing(self, message: str) -> None: ...

    def named(self, label: str) -> list[Told]:
        """Return the steps of a label, all of which must have ended where they said that they would."""
        found = [step for step in self.steps if step.label == label]
        assert all(step.finished for step in found)
        assert all(step.total is None or sum(step.moves) == step.total for step in found), found
        return found
