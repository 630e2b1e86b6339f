"""What would be loaded to talk to a model, from file headers and a model without weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perpend.config import Machine, Recipe
from perpend.models.anatomy import Anatomy
from perpend.models.memory import free_memory, pick_device
from perpend.refs import ModelRef
from perpend.tasks.checks import Wanted, require_of, require_sound
from perpend.tasks.forecast import bare_model
from perpend.tasks.recipes import find_edit


@dataclass(frozen=True)
class Rehearsal:
    """What would be loaded; sizes in bytes, None where the model is not on this machine yet."""

    task: str
    model: str
    reads: int | None
    memory_free: int
    edited_modules: int | None
    """None without an edit."""
    url: str | None = None
    """Where a server would listen."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "dry_run": True}


def rehearse(
    task: str, model: str, recipe: Recipe, machine: Machine, edit: Path | None, url: str | None = None
) -> Rehearsal:
    """Check what can be checked without loading weights or fetching anything.

    Raises:
        UsageError: the model's configuration or the edit cannot be read, the classifier or the chat template
            neither, or the edit is not one of this model.
    """
    chosen = find_edit(Path(edit)) if edit is not None else None
    wanted = Wanted(edit=chosen, judged=True)
    require_sound(recipe, wanted)
    bare, size = bare_model(ModelRef.parse(model), machine)
    if bare is not None and chosen is not None:
        require_of(Anatomy.of(bare, recipe.edit.overrides or None), recipe, wanted)
    free = free_memory(pick_device(machine.device), machine.memory)
    return Rehearsal(task, model, size, free, None if chosen is None else len(chosen), url)
