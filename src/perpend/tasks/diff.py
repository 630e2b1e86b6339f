"""Tell from two checkpoints what was done to the one to make the other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from perpend.config import Machine
from perpend.core.edits import Edit, ModuleEdit
from perpend.core.kinds import Mode
from perpend.forensics.examine import Examination, examine
from perpend.options.asked import path_of
from perpend.tasks.checkpoints import checkpoint_of, reading
from perpend.tasks.forecast import Planned
from perpend.tasks.output import require_free


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

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "task": "diff",
            "base": self.base,
            "other": self.other,
            "third": self.third,
            "output": self.output,
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
        output: File to write a recovered ablation to, as `edit.safetensors` of `perpend fit`.
        dry_run: Only say what would be read and written.

    Raises:
        UsageError: a checkpoint cannot be read, they have no tensor in common, or `output` is there already.
        RunFailed: a file changed while it was read.
    """
    started = time.monotonic()
    if output is not None:
        require_free(Path(output))
    if dry_run:
        return reading("diff", [base, other, *([third] if third else [])], Machine(), output=path_of(output))
    found = examine(
        checkpoint_of(base).path, checkpoint_of(other).path, checkpoint_of(third).path if third is not None else None
    )
    wrote = None
    if output is not None and (edit := recovered(found, base, other)) is not None:
        edit.save(output, replace=False)
        wrote = str(output)
    return Diff(base, other, third, found, wrote, round(time.monotonic() - started, 1))


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
