"""What the results of the tasks that load a model have in common, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from perpend.tasks.about import Task
from perpend.tasks.forecast import Forecast
from perpend.tasks.setup import versions


class Outcome(Protocol):
    """The result of a task that can be forecast."""

    @property
    def output(self) -> str | None:
        """Where it lies."""

    @property
    def model(self) -> str:
        """Of which model it is."""

    @property
    def seconds(self) -> Any:
        """How long it took, altogether or by stage."""

    @property
    def dry_run(self) -> bool:
        """Whether nothing was done."""

    @property
    def forecast(self) -> Forecast | None:
        """What would be done, of a dry run."""

    @property
    def about(self) -> Mapping[str, Any]:
        """Where it came from."""

    @property
    def edit(self) -> Mapping[str, Any]:
        """Weight factors of the edit."""


def outcome_json(task: Task, made: Outcome, facts: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result as plain JSON values.

    Args:
        task: Which task it is of.
        made: The result.
        facts: What it says besides, always.
        parts: What it says where there is something: JSON values, or what has a `to_json`; empty ones are left out.
    """
    found = {"forecast": made.forecast, "about": dict(made.about), "edit": dict(made.edit), **parts}
    return {
        "task": task,
        "output": made.output,
        "model": made.model,
        **facts,
        "seconds": made.seconds,
        "dry_run": made.dry_run,
        "versions": versions(),
        **{name: part.to_json() if hasattr(part, "to_json") else part for name, part in found.items() if part},
    }
