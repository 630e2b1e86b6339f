"""Bake an edit into a copy of the original checkpoint, and prove it on the saved file."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from perpend.config import ExportSection, Machine, Recipe
from perpend.core.edits import Edit
from perpend.data import Splits
from perpend.errors import UsageError
from perpend.export.beside import pages_of
from perpend.export.card import CardFacts, write_card
from perpend.export.gguf_file import require_absent
from perpend.export.shards import ExportResult, Patch, bake
from perpend.export.undo import keep
from perpend.export.widen import widen
from perpend.judges.panel import Panel
from perpend.launched import require_single
from perpend.models.load import load_model
from perpend.models.materialise import save_gguf
from perpend.models.memory import release
from perpend.models.quantised import WIDENED, require_exportable
from perpend.models.session import Session
from perpend.options.asked import asked_of_source
from perpend.options.commands import ApplyOptions
from perpend.progress import note
from perpend.refs import ModelRef
from perpend.tasks.about import about, by_machine, edit_facts, peak_memory, typed
from perpend.tasks.card import card_facts
from perpend.tasks.checks import Wanted, local, require_possible
from perpend.tasks.earlier import beside_edit
from perpend.tasks.forecast import Forecast, forecast
from perpend.tasks.gate import Asked, Gate, pass_gate, reference
from perpend.tasks.gguf import Baked, is_gguf, require_gguf_source, require_roundable, write_gguf
from perpend.tasks.outcome import outcome_json
from perpend.tasks.output import require_free, require_no_partial
from perpend.tasks.pages import names_beside, put, put_beside
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
from perpend.tasks.setup import as_asked, as_stored, open_panel, open_session, open_splits, require_fitting
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
    pages: tuple[str, ...] = ()
    """The report beside a GGUF file; in a folder it is one of the files there."""
    file: Mapping[str, Any] = field(default_factory=dict)
    """Parts, types and rounding of a GGUF file."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        parts = {"pages": list(self.pages), "export": self.export, "gate": self.gate, "file": dict(self.file)}
        return outcome_json("apply", self, {"modules": self.modules}, parts)


@dataclass(frozen=True)
class Original:
    """What an export is made from.

    Attributes:
        session: The untouched model as these files hold it.
        machine: How it is run.
        path: Folder of a plain safetensors checkpoint.
        left_out: Files of the model that it lacks, with the reason.
    """

    session: Session
    machine: Machine
    path: Path
    left_out: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def original(session: Session, out: Path, recipe: Recipe, machine: Machine) -> Iterator[Original]:
    """Give the original safetensors checkpoint and a session on it.

    A GGUF file, and FP8 or MXFP4 weights, are written out in bfloat16 for the time being. The latter are read again
    from there, so that the gate compares with the numbers of these files, whatever they were measured in before.
    """
    session, machine = as_stored(session, recipe, machine)
    loaded = session.loaded
    source = loaded.source
    packed = None if source.gguf_file else require_exportable(source.path, str(loaded.ref))
    if source.gguf_file is None and packed is None:
        yield Original(session, machine, source.path)
        return
    above = out.absolute().parent
    above.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.{packed or 'gguf'}-", dir=above) as folder:
        if packed is None:
            yield Original(session, machine, save_gguf(loaded, Path(folder) / "model"))
            return
        note(f"the export is made and proven on its {WIDENED[packed]} weights in bfloat16: the model is read again")
        release(session.model)
        wide = widen(source.path, Path(folder) / "model", packed)
        again = load_model(ModelRef("dir", str(wide.path)), machine, copy_of=loaded.ref)
        session = as_asked(replace(again, ref=loaded.ref), recipe, machine)
        yield Original(session, machine, wide.path, wide.left_out)


def require_source(model: str, *, fetch: bool, output: Path | None = None) -> None:
    """Refuse a model that no export can be made from, before it is loaded.

    Args:
        model: As it was asked for.
        fetch: Download what is missing; else a model that is not here is not looked at.
        output: What is made; None for a folder.

    Raises:
        UsageError: its weights are stored in the numbers of bitsandbytes, or no GGUF file for an output that is one.
    """
    ref = ModelRef.parse(model)
    if output is not None and is_gguf(output):
        require_gguf_source(model, output)
    source = local(ref) or (ref.resolve() if fetch else None)
    if source is not None and source.gguf_file is None and (source.path / "config.json").is_file():
        require_exportable(source.path, model)


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
    named = pinned(recipe, session.loaded)
    with original(session, output, recipe, machine) as found:
        session, source = found.session, found.path
        asked = Asked(session, edit, recipe, found.machine, panel)
        seen = reference(asked, splits.select)

        def check(folder: Path, export: ExportResult, patches: list[Patch]) -> None:
            gate = pass_gate(asked, seen, source, folder, export)
            export = replace(export, left_out={**export.left_out, **found.left_out})
            edit.save(folder / EDIT)
            write_recipe(folder, named, edit)
            write_card(folder, source, finish(folder, gate, export))
            if recipe.export.reversible:
                keep(source, folder, patches, export)
            passed.append(gate)

        how: dict[str, Any] = {"rounding": recipe.export.rounding, "memory": machine.memory}
        result = bake(source, edit, session.anatomy, output, session.model, **how, check=check)
    return replace(result, left_out={**result.left_out, **found.left_out}), passed[0]


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
    require_single("apply", "--device-map")
    source, recipe, machine = asked_of_source(apply, ApplyOptions, options, source, recipe, machine)
    if undo:
        if edit is not None or dry_run:
            raise UsageError("--undo takes an output and nothing else", where="--edit" if edit else "--dry-run")
        return take_back(source, output=Path(output), machine=machine)
    started, output = time.monotonic(), Path(output)
    require_free(output)
    require_no_partial(output)
    model, chosen, found = asked_for(source, edit, recipe)
    require_roundable(found, output)
    made = Applied(str(output), model, len(chosen), None, None, 0.0, dry_run, pages=_pages(output))
    wanted, splits = Wanted(edit=chosen, judged=True), open_splits(found)
    require_source(model, fetch=not dry_run, output=output)
    if dry_run:
        asked = forecast(model, found, machine, wanted, splits=splits, output=output, bakes=True)
        return replace(made, forecast=asked)
    require_possible(model, found, machine, wanted)
    require_room(model, output, machine)
    known = beside_edit(Path(edit or source), chosen.sha256)
    if is_gguf(output):
        again = _command(source, edit, found, machine, output)
        return _edited_gguf(made, chosen, found, machine, splits, known=known, command=again, started=started)
    session = open_session(model, found, machine)
    require_fitting(session, chosen)
    panel = open_panel(found, machine)
    facts = about("apply", session, found, machine)
    base = replace(made, edit=edit_facts(chosen, session.anatomy))
    proven: list[Applied] = []

    def finish(folder: Path, gate: Gate, export: ExportResult) -> CardFacts:
        took = round(time.monotonic() - started, 1)
        told = facts | {"peak_memory": peak_memory()}
        proven.append(replace(base, export=export, gate=gate, seconds=took, about=told))
        put(folder, proven[0].to_json() | known)
        return card_facts(session, chosen, found, gate, export, output)

    bake_and_prove(session, chosen, output, found, machine, splits, panel, finish)
    return proven[0]


def _pages(output: Path) -> tuple[str, ...]:
    """Return the report beside an output, which is one of the files of a folder.

    Raises:
        UsageError: it is there already.
    """
    if not is_gguf(output):
        return ()
    require_absent([output], pages_of(output))
    return names_beside(output)


def _edited_gguf(
    made: Applied,
    edit: Edit,
    recipe: Recipe,
    machine: Machine,
    splits: Splits,
    *,
    known: dict[str, Any],
    command: str,
    started: float,
) -> Applied:
    """Edit a GGUF file and write its report; see `perpend.tasks.gguf.write_gguf`."""
    output, proven = Path(made.output), list[Applied]()

    def finish(baked: Baked) -> None:
        took = round(time.monotonic() - started, 1)
        proven.append(replace(made, **vars(baked), seconds=took))
        put_beside(output, proven[0].to_json() | known)

    write_gguf(made.model, edit, output, recipe, machine, splits, command=command, finish=finish)
    return proven[0]


def _command(source: str, edit: str | Path | None, recipe: Recipe, machine: Machine, output: Path) -> str:
    """Return what to type for the same GGUF file, which has no recipe beside it."""
    usual = ExportSection()
    given = {key: value for key, value in recipe.export if value != getattr(usual, key)}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
    sets = [word for key, text in texts.items() for word in ("--set", f"export.{key}={text}")]
    named = ["--edit", edit] if edit is not None else []
    return typed("apply", source, *named, "-o", output.name, *sets, *by_machine(machine))


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
