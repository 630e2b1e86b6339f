"""What a plain quantisation would do to a model, and to an edit of it, before anything is written."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from perpend.config import Machine, Recipe
from perpend.core.edits import Edit
from perpend.core.quant import LEVELS, RANGES, on_lattice
from perpend.data import load_splits
from perpend.errors import UsageError, nearest
from perpend.export.checkpoint import Checkpoint
from perpend.export.survey import Survey, Surveyed
from perpend.export.verify import TOLERANCE
from perpend.models.anatomy import Anatomy
from perpend.models.load import skeleton
from perpend.options.asked import asked, listed
from perpend.options.commands import QuantOptions
from perpend.tasks.checkpoints import checkpoint_of, reading
from perpend.tasks.checks import Wanted, require_possible
from perpend.tasks.forecast import Planned, forecast
from perpend.tasks.quant_replies import Replies, replies
from perpend.tasks.recipes import beside, find_edit, laid_over

TYPES = ("q4_0", "q8_0", "bf16")
KNOWN = (*RANGES, *LEVELS, "bf16")


@dataclass(frozen=True)
class Pass:
    """A plain pass of one type over all writers.

    Attributes:
        type: Such as q4_0.
        held: Writers whose rows the type can hold; the others stay in 16 bits.
        lattice: Of these, how many lie on its lattice already.
        moved: Median of ‖Q(W) - W‖ / ‖W‖ over the untouched writers.
        most: The largest.
        missed: Edited writers whose weight factor is missed by more than 0.05 afterwards.
        kept: λ after the pass per λ asked, by least squares over the edited writers; None without an edit.
        worst: The writer that misses by most, None without an edit.
    """

    type: str
    held: int
    lattice: int
    moved: float
    most: float
    missed: int = 0
    kept: float | None = None
    worst: str | None = None

    @classmethod
    def of(cls, kind: str, rows: Sequence[Surveyed]) -> Pass:
        """Sum up the rows of all writers."""
        shares = [share for row in rows if (share := row.moved[kind]) is not None]
        found = [(row, row.asked, row.quantised[kind]) for row in rows if row.asked is not None]
        pairs = [(row.module, asked, got) for row, asked, got in found if got is not None]
        square = sum(asked * asked for _, asked, _ in pairs)
        return cls(
            kind,
            len(shares),
            sum(on_lattice(share, kind) for share in shares),
            statistics.median(shares) if shares else 0.0,
            max(shares, default=0.0),
            sum(abs(asked - got) > TOLERANCE for _, asked, got in pairs),
            sum(asked * got for _, asked, got in pairs) / square if square else None,
            max(pairs, key=lambda pair: abs(pair[1] - pair[2]))[0] if pairs else None,
        )

    def __str__(self) -> str:
        if self.kept is not None:
            share = f"{self.type}: {self.kept:.0%} of the asked weight factors are left after a plain pass"
            return f"{share}, {self.missed} modules miss theirs"
        if self.type == "bf16":
            return f"bf16: a plain pass moves the writers by {self.moved:.2%}"
        if self.lattice > self.held / 2:
            rest = f"a plain pass moves them by {self.moved:.2%}, and would round small edits back: --for {self.type}"
            return f"{self.type}: {self.lattice} of {self.held} writers lie on its lattice; {rest}"
        return f"{self.type}: ordinary weights, a plain pass moves them by {self.moved:.2%} and keeps edits on average"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "text": str(self)}


@dataclass(frozen=True)
class QuantCheck:
    """What plain passes do to a model and to an edit of it."""

    model: str
    edit: str | None
    passes: tuple[Pass, ...]
    rows: tuple[Surveyed, ...]
    replies: Replies | None = None
    """Acceptance before and after; None where it was not asked for."""
    seconds: float = 0.0
    rounding: str = "auto"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "task": "quant",
            "model": self.model,
            "edit": self.edit,
            "rounding": self.rounding,
            "passes": [found.to_json() for found in self.passes],
            "writers": [row.to_json() for row in self.rows],
            "replies": self.replies.to_json() if self.replies else None,
            "seconds": self.seconds,
        }


def quant_check(
    model: str | None = None,
    *,
    edit: str | Path | None = None,
    types: str | Sequence[str] = TYPES,
    acceptance: bool = False,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    dry_run: bool = False,
    **options: Unpack[QuantOptions],
) -> QuantCheck | Planned:
    """Simulate plain passes of llama.cpp over the writers of a model, untouched and edited.

    Weights alone, each matrix read once, unless acceptance is asked for.

    Args:
        model: The untouched model: hub id with `@revision`, or directory of a safetensors checkpoint; None takes the
            recipe's.
        edit: `edit.safetensors`, `recipe.toml`, or the folder that `fit` or `run` made.
        types: q4_0, q4_1, q5_0, q5_1, q8_0, bf16; a list, or text with commas.
        acceptance: Also let the model reply to the targets of the report split: untouched and edited, each as it is and
            with the matrices of all its layers quantised, by type. Tells a lost edit from a quantisation that changes
            the model by itself.
        recipe: Rounding of the edit (`export.rounding`), prompts and judges, by default those beside the edit.
        machine: Device and dtype of the replies.
        dry_run: Only say what would be read and answered.
        **options: What `perpend quant check` takes, by name: over the recipe and the machine.

    Raises:
        UsageError: the model or the edit cannot be read, or an unknown type.
    """
    started = time.monotonic()
    recipe, machine = asked(quant_check, QuantOptions, options, model, recipe, machine)
    model, types = recipe.model.id, listed(types)
    for kind in types:
        if kind not in KNOWN:
            raise UsageError(
                f"unknown type '{kind}'", where="--types", valid=", ".join(KNOWN), hint=nearest(kind, KNOWN)
            )
    chosen: Edit | None = None
    if edit is not None:
        chosen = find_edit(Path(edit))
        made = beside(Path(edit), chosen)
        recipe = laid_over(recipe, made, Path(edit)) if made else recipe
    lattices = [kind for kind in types if kind != "bf16"]
    if dry_run:
        return _planned(model, recipe, machine, chosen, lattices if acceptance else None)
    require_possible(model, recipe, machine, Wanted(edit=chosen, judged=acceptance))
    source = checkpoint_of(model)
    bare = skeleton(source, model, machine)
    anatomy = Anatomy.of(bare, recipe.edit.overrides or None)
    rounding = recipe.export.rounding
    rows = tuple(Survey(Checkpoint(source.path), bare, anatomy, chosen).rows(types, rounding))
    said = None
    if acceptance:
        said = replies(model, chosen, lattices, recipe, machine)
    passes = tuple(Pass.of(kind, rows) for kind in types)
    name = None if edit is None else str(edit)
    return QuantCheck(model, name, passes, rows, said, round(time.monotonic() - started, 1), rounding)


def _planned(
    model: str, recipe: Recipe, machine: Machine, edit: Edit | None, lattices: Sequence[str] | None
) -> Planned:
    """Say what a check would read and answer; without replies no model is built."""
    wanted = Wanted(edit=edit, judged=lattices is not None)
    if lattices is None:
        require_possible(model, recipe, machine, wanted)
        return reading("quant check", [model], machine)
    states = (1 + len(lattices)) * (1 if edit is None else 2)
    splits = load_splits(recipe.prompts)
    targets = replace(splits.report, baseline=splits.report.baseline.subset([]))
    alone = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"control_prompts": 0})})
    asked = forecast(model, alone, machine, wanted, splits=replace(splits, report=targets), measures=states)
    return Planned("quant check", model, None, replace(asked, edited_modules=len(edit) if edit else None))
