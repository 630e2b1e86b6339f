"""Take an edit back: the original of an output, bit for bit where it was kept."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perpend.config import Machine, Recipe
from perpend.errors import UsageError
from perpend.export.beside import is_report
from perpend.export.checkpoint import Checkpoint, files
from perpend.export.shards import plan
from perpend.export.undo import REPLACED, UNDO, invert_files, require_invertible, restore
from perpend.models.anatomy import Anatomy
from perpend.models.gguf import metadata
from perpend.models.load import load_model
from perpend.refs import ModelRef
from perpend.tasks.gguf import is_gguf
from perpend.tasks.output import appearing, require_free, require_no_partial
from perpend.tasks.recipes import DIRECTIONS, EDIT, RECIPE, beside, find_edit
from perpend.tasks.space import require_room

ADDED = (EDIT, DIRECTIONS, RECIPE, UNDO)
"""Files that an output has beside what it copied, and its report."""


@dataclass(frozen=True)
class Undone:
    """The original of an output."""

    output: str
    source: str
    exact: bool
    """Bit for bit, proven by the hash of every file."""
    tensors: int
    """Tensors that were restored."""
    growth: float | None
    """Without kept numbers: by how much rounding grew along the directions, 1 / |1 - λ| at most."""
    missing: dict[str, str]
    """Files of the original that the output never had, or that cannot be told from it, with the reason."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"task": "undo", **asdict(self)}


def take_back(source: str | Path, *, output: Path, machine: Machine | None = None) -> Undone:
    """Write the original of an edited folder.

    With `original.undo` in it (`--reversible`), every file comes out as it was, which its hash proves; no model is
    loaded. Without, the edit beside the weights is inverted: entries come out within about a rounding step, and what
    lies along the directions within 1 / |1 - λ| steps; a weight factor of 1 and row mode cannot be inverted.

    Args:
        source: What `apply` or `run` made.
        output: Folder to make.
        machine: Device and dtype in which the edited model is loaded, where it has to be.

    Raises:
        UsageError: not an output, or an edit that cannot be inverted; says why and what to type.
        RunFailed: the files are not those that were kept.
    """
    started, folder, output = time.monotonic(), Path(source), Path(output)
    if folder.is_file() and is_gguf(folder):
        raise UsageError(
            "a GGUF file keeps nothing of its original: edited tensors were rounded to the codes of their type",
            where=str(source),
            valid="a folder that apply or run made",
            hint=f"the file that it was made from, {base}" if (base := _base(folder)) else "",
        )
    if is_gguf(output):
        raise UsageError("an original is written as a folder", where=str(output), valid="the name of a folder")
    if not folder.is_dir():
        raise UsageError("no such folder", where=str(source), valid="what apply or run made")
    require_free(output)
    require_no_partial(output)
    require_room(str(folder), output, machine or Machine())
    if (folder / UNDO).is_file():
        with appearing(output) as partial:
            tensors, missing = restore(folder, partial)
        return Undone(str(output), str(folder), True, tensors, None, missing, _since(started))
    if not (folder / EDIT).is_file():
        raise UsageError(f"neither {UNDO} nor {EDIT} in it", where=str(folder), valid="what apply or run made")
    edit = find_edit(folder)
    growth = require_invertible({name: part for name, part in edit.modules.items() if part.weight})
    made = beside(folder, edit) or Recipe()
    loaded = load_model(ModelRef("dir", str(folder)), machine or Machine())
    anatomy = Anatomy.of(loaded.model, made.edit.overrides or None)
    patches = plan(Checkpoint(folder), edit, anatomy, loaded.model)
    here = [str(path.relative_to(folder)) for path in files(folder)]
    missing = {name: "written anew by the edit" for name in REPLACED if name in here}
    with appearing(output) as partial:
        invert_files(folder, patches, partial, [n for n in here if n not in (*ADDED, *missing) and not is_report(n)])
    tensors = len({patch.piece.entry.name for patch in patches})
    return Undone(str(output), str(folder), False, tensors, growth, missing, _since(started))


def _base(path: Path) -> str:
    """Return what an edited GGUF file says that it was made from; empty where it says nothing."""
    return str(metadata(path).get("perpend.base", ""))


def _since(started: float) -> float:
    return round(time.monotonic() - started, 1)
