"""Ask a model how much of a direction its writers still write; no second model is needed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from perpend.config import Machine, Recipe
from perpend.core.directions import Directions
from perpend.core.edits import Edit
from perpend.errors import UsageError
from perpend.forensics.audit import Writers, Written, audit_writers
from perpend.forensics.avoided import Avoided, avoided, most
from perpend.models.anatomy import Anatomy
from perpend.models.load import skeleton
from perpend.options.asked import asked
from perpend.options.commands import AuditOptions
from perpend.tasks.checkpoints import checkpoint_of, reading
from perpend.tasks.forecast import Planned
from perpend.tasks.recipes import DIRECTIONS, EDIT


@dataclass(frozen=True, eq=False)
class Audit:
    """How much of a direction the writers write."""

    model: str
    base: str | None
    source: str | None
    """Where the directions came from; None when they were looked for."""
    rows: tuple[Written, ...]
    """What every writer writes along the directions asked for, or along those found: of its own layer's windows,
    or the most telling."""
    search: tuple[Avoided, ...]
    """What was found when directions were looked for."""
    seconds: float

    @property
    def missing(self) -> int:
        """Writers that the direction is missing from."""
        return sum(row.missing for row in self.rows)

    @property
    def verdict(self) -> str:
        """What it comes to, in a sentence."""
        best = most(self.search)
        if best is not None:
            return self._found(best) if best.found else "no direction is avoided by neighbouring writers together"
        n = len(self.rows)
        if not self.missing:
            return f"all {n} writers write along the direction as along others"
        layers = sorted({row.layer for row in self.rows if row.missing})
        return f"{self.missing} of {n} writers, in layers {layers[0]} to {layers[-1]}, hardly write along the direction"

    def _found(self, best: Avoided) -> str:
        first, last = best.layers
        kind = "" if best.component is None else f"{best.component} "
        where = f"layers {first} to {last}" if last > first else f"layer {first}"
        what = "one direction" if best.rank == 1 else f"{best.rank} directions"
        layers, n = sorted({row.layer for row in self.rows if row.missing}), len(self.rows)
        count = f"all {n} writers write a good part of what they write along others"
        if layers:
            among = f"in layers {layers[0]} to {layers[-1]}"
            count = f"{self.missing} of {n} writers, {among}, hardly write along what was found"
        return f"the {kind}writers of {where} avoid {what}: an edit, or made so; {count}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "task": "audit",
            "model": self.model,
            "base": self.base,
            "directions": self.source,
            "verdict": self.verdict,
            "missing": self.missing,
            "writers": [row.to_json() for row in self.rows],
            "search": [window.to_json() for window in self.search],
            "seconds": self.seconds,
        }


def audit(
    model: str | None = None,
    *,
    directions: str | Path | None = None,
    base: str | None = None,
    layer: int | None = None,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    dry_run: bool = False,
    **options: Unpack[AuditOptions],
) -> Audit | Planned:
    """Measure how much of a direction the writers of a model still write, from the weights alone.

    Args:
        model: Hub id with `@revision`, or directory; None takes the recipe's.
        directions: `directions.safetensors`, `edit.safetensors`, or the folder that `fit` made. From an edit every
            writer is asked for its own directions, and writers it does not edit for those of the nearest layer that it
            does. None looks for up to four that neighbouring writers avoid together, and asks every writer for them.
        base: The unedited model, to say how much is left of what it wrote.
        layer: Of `directions.safetensors`, the layer whose direction is asked for everywhere; None takes each layer's
            own.
        recipe: Overrides of the anatomy.
        machine: Whether the model's own Python code may run.
        dry_run: Only say what would be read.
        **options: What `perpend audit` takes, by name: over the recipe and the machine.

    Raises:
        UsageError: the model or the directions cannot be read, or do not fit each other.
    """
    started = time.monotonic()
    recipe, machine = asked(audit, AuditOptions, options, model, recipe, machine)
    model = recipe.model.id
    if directions is None and (base is not None or layer is not None):
        raise UsageError("--base and --layer need a direction to ask for", hint="--directions FILE")
    if dry_run:
        return reading("audit", [model, *([base] if base else [])], machine)
    source = checkpoint_of(model)
    bare = skeleton(source, model, machine)
    anatomy = Anatomy.of(bare, recipe.edit.overrides or None)
    writers = Writers(source.path, bare, anatomy)
    rows: list[Written] = []
    search: list[Avoided] = []
    if directions is None:
        search = avoided(writers)
        best = most(search)
        if best is not None and best.found:
            own = {w.layer: most(x for x in search if x.found and x.covers(w.layer)) or best for w in anatomy.writers}
            rows = audit_writers(writers, {w.name: own[w.layer].directions for w in anatomy.writers})
    else:
        wanted = _asked(Path(directions), anatomy, layer)
        rows = audit_writers(writers, wanted, checkpoint_of(base).path if base is not None else None)
    told = None if directions is None else str(directions)
    return Audit(model, base, told, tuple(rows), tuple(search), round(time.monotonic() - started, 1))


def _asked(path: Path, anatomy: Anatomy, layer: int | None) -> Mapping[str, Tensor]:
    """Return the directions that every writer is asked for."""
    if path.is_dir():
        path = path / (DIRECTIONS if layer is not None or not (path / EDIT).exists() else EDIT)
    try:
        found = Directions.load(path)
    except UsageError:
        return _of_edit(Edit.load(path), anatomy, path)
    if found.n_layers != anatomy.n_layers:
        raise UsageError(f"directions of {found.n_layers} layers", where=str(path), valid=f"{anatomy.n_layers}")
    return {w.name: found.at(w.layer if layer is None else layer) for w in anatomy.writers}


def _of_edit(edit: Edit, anatomy: Anatomy, path: Path) -> Mapping[str, Tensor]:
    """Return each writer's own directions, or those of the nearest edited layer."""
    known = {w.layer: edit.modules[w.name].directions for w in anatomy.writers if w.name in edit.modules}
    if not known:
        raise UsageError("edits no writer of this model", where=str(path))
    return {
        w.name: edit.modules[w.name].directions
        if w.name in edit.modules
        else known[min(known, key=lambda layer: abs(layer - w.layer))]
        for w in anatomy.writers
    }
