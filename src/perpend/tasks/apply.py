"""Bake an edit into a copy of the original checkpoint, and prove it on the saved file."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from perpend.config import Machine, Recipe
from perpend.core.edits import Edit
from perpend.data import Splits
from perpend.errors import UsageError
from perpend.export.card import CardFacts, write_card
from perpend.export.shards import ExportResult, Patch, bake
from perpend.export.undo import keep
from perpend.judges.panel import Panel
from perpend.models.materialise import save_gguf
from perpend.models.parallel import require_single
from perpend.models.session import Session
from perpend.options.asked import asked_of_source
from perpend.options.commands import ApplyOptions
from perpend.refs import ModelRef
from perpend.tasks.about import about, edit_facts, peak_memory
from perpend.tasks.card import card_facts
from perpend.tasks.forecast import Forecast, forecast
from perpend.tasks.gate import Asked, Gate, pass_gate, reference
from perpend.tasks.gguf import is_gguf, require_roundable, write_gguf
from perpend.tasks.outcome import outcome_json
from perpend.tasks.output import require_free, require_no_partial
from perpend.tasks.pages import put
from perpend.tasks.recipes import (
    EDIT,
    RECIPE,
    beside,
    find_edit,
    laid_over,
    pinned,
    read_recipe,
    require_written,
    write_recipe,
)
from perpend.tasks.setup import as_stored, open_panel, open_session, open_splits, require_fitting
from perpend.tasks.space import require_room
from perpend.tasks.undo import Undone, take_back


@dataclass(frozen=True)
class Applied:
    """An edited checkpoint that passed its gate."""

    output: str
    model: str
    modules: int
    export: ExportResult | None
    """None for a dry run."""
    gate: Gate | None
    seconds: float
    dry_run: bool = False
    forecast: Forecast | None = None
    """What would be done, of a dry run."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from."""
    edit: Mapping[str, Any] = field(default_factory=dict)
    """Weight factors of the edit."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return outcome_json("apply", self, {"modules": self.modules}, {"export": self.export, "gate": self.gate})


@contextmanager
def original(session: Session, out: Path) -> Iterator[Path]:
    """Give the folder of the original safetensors checkpoint; a GGUF file is written out as one for the time being."""
    source = session.loaded.source
    if source.gguf_file is None:
        yield source.path
        return
    above = out.absolute().parent
    above.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.gguf-", dir=above) as folder:
        yield save_gguf(session.loaded, Path(folder) / "model")


def bake_and_prove(
    session: Session,
    edit: Edit,
    output: Path,
    recipe: Recipe,
    machine: Machine,
    splits: Splits,
    panel: Panel,
    finish: Callable[[Path, Gate, ExportResult], CardFacts],
) -> tuple[ExportResult, Gate]:
    """Write the edited checkpoint with recipe and card; it gets its name only when it has passed the gate.

    Args:
        session: The untouched model; of no use afterwards. Of a quantised one the stored weights are read instead.
        edit: What to bake.
        output: Folder to make.
        recipe: What was asked.
        machine: Device and dtype.
        splits: The gate measures on a fixed subset of the select split.
        panel: Labels the replies.
        finish: Is given the folder when it has passed, may add files, and says what goes in the card.

    Raises:
        GateFailed: the saved file is not the edit; it stays as `OUT.partial`.
    """
    passed: list[Gate] = []
    session, machine = as_stored(session, recipe, machine)
    asked = Asked(session, edit, recipe, machine, panel)
    seen = reference(asked, splits.select)
    with original(session, output) as source:

        def check(folder: Path, export: ExportResult, patches: list[Patch]) -> None:
            gate = pass_gate(asked, seen, source, folder, export)
            edit.save(folder / EDIT)
            write_recipe(folder, pinned(recipe, session.loaded), edit)
            write_card(folder, source, finish(folder, gate, export))
            if recipe.export.reversible:
                keep(source, folder, patches, export)
            passed.append(gate)

        rounding = recipe.export.rounding
        result = bake(source, edit, session.anatomy, output, session.model, rounding=rounding, check=check)
    return result, passed[0]


def apply(
    source: str | Path,
    *,
    output: str | Path,
    edit: str | Path | None = None,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    dry_run: bool = False,
    undo: bool = False,
    **options: Unpack[ApplyOptions],
) -> Applied | Undone:
    """Bake an edit into a copy of the original checkpoint.

    Args:
        source: A model with `edit`, or the `recipe.toml` that lies beside an edit: the same weights again,
            byte for byte.
        output: Folder to make; a name that ends in .gguf edits a GGUF file directly.
        edit: `edit.safetensors`, or the folder that `fit` or `run` made.
        recipe: Gate, replies and prompts; by default those of the recipe beside the edit. How the edit was made is
            always taken from there, where there is one; with `edit` the prompts and the seed are too.
        machine: Device and dtype in which the gate runs; the weights do not depend on it.
        dry_run: Only say what would be written.
        undo: Take the edit back instead: `source` is an output, and the original of it is written; see
            `perpend.tasks.undo.take_back`, which says where that is bit for bit.
        **options: What `perpend apply` takes, by name: over the recipe and the machine.

    Raises:
        UsageError: no model, no edit, an output that is not empty, or a recipe that asks for another edit than the one
            that is there.
        GateFailed: the saved file is not the edit; it stays as `OUT.partial`.
    """
    require_single("apply")
    source, recipe, machine = asked_of_source(apply, ApplyOptions, options, source, recipe, machine)
    if undo:
        if edit is not None or dry_run:
            raise UsageError("--undo takes an output and nothing else", where="--edit" if edit else "--dry-run")
        return take_back(source, output=Path(output), machine=machine)
    started, output = time.monotonic(), Path(output)
    require_free(output)
    require_no_partial(output)
    model, chosen, found = asked_for(source, edit, recipe)
    ModelRef.parse(model)
    made = Applied(str(output), model, len(chosen), None, None, 0.0, dry_run)
    splits = open_splits(found)
    if dry_run:
        asked = forecast(model, found, machine, splits=splits, output=output, bakes=True, edit=chosen)
        return replace(made, forecast=asked)
    require_room(model, output, machine)
    if is_gguf(output):
        result, gate, said = write_gguf(model, chosen, output, found, machine, splits)
        took = round(time.monotonic() - started, 1)
        return replace(made, export=result, gate=gate, edit=said, seconds=took)
    require_roundable(found)
    session = open_session(model, found, machine)
    require_fitting(session, chosen)
    panel = open_panel(found, machine)
    facts = about("apply", session, found, machine)
    base = replace(made, edit=edit_facts(chosen, session.anatomy))
    proven: list[Applied] = []

    def finish(folder: Path, gate: Gate, export: ExportResult) -> CardFacts:
        took = round(time.monotonic() - started, 1)
        known = facts | {"peak_memory": peak_memory()}
        proven.append(replace(base, export=export, gate=gate, seconds=took, about=known))
        put(folder, proven[0].to_json())
        return card_facts(session, chosen, found, gate, export, output)

    bake_and_prove(session, chosen, output, found, machine, splits, panel, finish)
    return proven[0]


def asked_for(source: str, edit: str | Path | None, recipe: Recipe | None) -> tuple[str, Edit, Recipe]:
    """Return the model, the edit and the recipe that the arguments stand for."""
    path = Path(source)
    if path.suffix == ".toml":
        written = read_recipe(path)
        if edit is not None:
            raise UsageError(
                "two edits: the recipe names one, and --edit another", where=str(path), hint="leave out --edit"
            )
        if not written.recipe.model.id:
            raise UsageError("names no model", where=str(path), valid='[model] id = "..."')
        if recipe is not None:
            require_written(recipe, written.recipe, path)
        return written.recipe.model.id, written.edit, recipe or written.recipe
    if edit is None:
        raise UsageError("no edit given", valid=f"--edit {EDIT}, or {RECIPE} instead of the model", hint="perpend fit")
    chosen, asked = find_edit(Path(edit)), (recipe or Recipe()).for_model(source)
    made = beside(Path(edit), chosen)
    return source, chosen, laid_over(asked, made, Path(edit)) if made else asked
