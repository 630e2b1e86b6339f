"""Tell from two checkpoints what was done to the one to make the other."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from perpend.config import Machine
from perpend.core.edits import Edit, ModuleEdit
from perpend.core.kinds import Mode
from perpend.export.beside import pages_of
from perpend.export.gguf_file import appearing, require_absent
from perpend.forensics.change import Change
from perpend.forensics.examine import Examination, examine
from perpend.options.asked import path_of
from perpend.tasks.about import origin, peak_memory, typed
from perpend.tasks.checkpoints import checkpoint_of, reading
from perpend.tasks.forecast import Planned
from perpend.tasks.output import require_free
from perpend.tasks.pages import names_beside, put_beside
from perpend.tasks.portable import named
from perpend.tasks.setup import versions


@dataclass(frozen=True, eq=False)
class Diff:
    """What two checkpoints say of each other."""

    base: str
    other: str
    third: str | None
    found: Examination
    output: str | None
    """Where the recovered edit was written."""
    seconds: float
    pages: tuple[str, ...] = ()
    """Its report, beside it; none where nothing was recovered."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "task": "diff",
            "base": self.base,
            "other": self.other,
            "third": self.third,
            "output": self.output,
            "pages": list(self.pages),
            "seconds": self.seconds,
            **self.found.to_json(),
        }


def diff(
    base: str, other: str, *, third: str | None = None, output: str | Path | None = None, dry_run: bool = False
) -> Diff | Planned:
    """Tell what was done to `base` to make `other`, from the weights alone.

    Both are read tensor by tensor, and no model is built: at most two tensors (three with `third`) are in memory.

    Args:
        base: Hub id with `@revision`, or directory.
        other: The same, of the same architecture.
        third: A model that `other` may be a merge with.
        output: File to write a recovered ablation to, as `edit.safetensors` of `perpend fit`, with a report beside it;
            where none is recovered, neither is written.
        dry_run: Only say what would be read and written.

    Raises:
        UsageError: a checkpoint cannot be read, they have no tensor in common, or `output` is there already.
        RunFailed: a file changed while it was read.
    """
    started, path = time.monotonic(), path_of(output)
    if path is not None:
        require_free(path)
        require_absent([path], pages_of(path), anew=False)
    if dry_run:
        asked = reading("diff", [base, other, *([third] if third else [])], Machine(), output=path)
        return replace(asked, pages=names_beside(path)) if path else asked
    found = examine(
        checkpoint_of(base).path, checkpoint_of(other).path, checkpoint_of(third).path if third is not None else None
    )
    edit = recovered(found, base, other) if path is not None else None
    made = Diff(base, other, third, found, None, round(time.monotonic() - started, 1))
    if path is None or edit is None:
        return made
    made = replace(made, output=str(path), pages=names_beside(path))
    with appearing([path], pages_of(path), anew=False) as (partial,):
        partial.write_bytes(edit.to_bytes())
        put_beside(path, _report(made, edit, path))
    return made


def _report(made: Diff, edit: Edit, output: Path) -> dict[str, Any]:
    """Return what the report says: the verdict with its grounds, every matrix, and the edit that was recovered."""
    told = made.to_json()
    third = ["--third", made.third] if made.third else []
    command = typed("diff", made.base, made.other, *third, "-o", output.name)
    parts = {"other": named(made.other), "third": named(made.third) if made.third else None}
    return {
        "task": "diff",
        "model": named(made.base),
        "seconds": made.seconds,
        "versions": versions(),
        "about": origin("diff", command) | {"peak_memory": peak_memory()},
        "edit": {
            "sha256": edit.sha256,
            "modes": sorted({part.mode for part in edit.modules.values()}),
            "rank": max(len(part.directions) for part in edit.modules.values()),
            "layers": max(made.found.n_layers.values(), default=0),
            "modules": [_module(change, edit) for change in made.found.changes if _recovers(change, edit)],
        },
        "diff": parts | {name: told[name] for name in ("verdict", "tensors", "ablation", "kernels", "changes")},
    }


def _recovers(change: Change, edit: Edit) -> bool:
    return change.place.layer is not None and change.tensor.removesuffix(".weight") in edit.modules


def _module(change: Change, edit: Edit) -> dict[str, Any]:
    name = change.tensor.removesuffix(".weight")
    weight = edit.modules[name].weight
    return {"module": name, "layer": change.place.layer, "component": change.place.kind, "weight": weight}


def recovered(found: Examination, base: str, other: str) -> Edit | None:
    """Return the ablation that was found as an edit, with the directions and λ of every matrix; None without one.

    Modules are named as in the checkpoint. Experts of one fused tensor and ablations of what is read are left out.
    """
    modules: dict[str, ModuleEdit] = {}
    for change in found.changes:
        made = change.ablation
        fits = made is not None and made.side == "output" and made.mode in get_args(Mode)
        if made is None or not fits or made.explained <= 0 or change.part is not None:
            continue
        modules[change.tensor.removesuffix(".weight")] = ModuleEdit(made.directions, made.weight, made.mode)  # type: ignore[arg-type]
    if found.shared is None or not modules:
        return None
    return Edit(modules, {"recovered": {"base": Path(base).name, "other": Path(other).name}})
