"""The main job: fit, edit, measure, bake, prove."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from perpend.config import Machine, Recipe
from perpend.data import Splits
from perpend.export.card import CardFacts
from perpend.export.shards import ExportResult
from perpend.fitting.fit import Fitted, fit_edit
from perpend.judges.panel import Panel
from perpend.launched import require_single
from perpend.models.session import Session
from perpend.options.asked import asked, require_no_search
from perpend.options.commands import RunOptions
from perpend.refs import ModelRef
from perpend.tasks.about import Task, about, edit_facts, peak_memory
from perpend.tasks.apply import bake_and_prove, require_source
from perpend.tasks.card import card_facts
from perpend.tasks.checks import Wanted, require_possible
from perpend.tasks.finalists import Found
from perpend.tasks.forecast import Forecast, forecast
from perpend.tasks.gate import Gate
from perpend.tasks.gguf import require_roundable
from perpend.tasks.journal import journal
from perpend.tasks.outcome import outcome_json
from perpend.tasks.output import require_free, require_no_partial
from perpend.tasks.pages import put
from perpend.tasks.report import Report, Stores, report
from perpend.tasks.setup import journal_key, open_panel, open_session, open_splits
from perpend.tasks.space import require_room
from perpend.tasks.trials import Tell


@dataclass(frozen=True)
class Run:
    """An edited model, measured before and after, proven on the saved file."""

    output: str
    model: str
    architecture: str
    coverage: tuple[dict[str, Any], ...]
    prompts: dict[str, int]
    fitted: Fitted | None
    """None for a dry run, as everything below."""
    report: Report | None
    export: ExportResult | None
    gate: Gate | None
    seconds: dict[str, float]
    dry_run: bool = False
    forecast: Forecast | None = None
    """What would be done, of a dry run."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from."""
    edit: Mapping[str, Any] = field(default_factory=dict)
    """Weight factors of the edit."""
    found: Found | None = None
    """How it was found, of a search."""

    @property
    def task(self) -> Task:
        """Whether the edit was searched for."""
        return "run" if self.found is None else "search"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        facts = {"architecture": self.architecture, "coverage": list(self.coverage), "prompts": self.prompts}
        parts = {"fit": self.fitted, "report": self.report, "export": self.export, "gate": self.gate}
        return outcome_json(self.task, self, facts, {"search": self.found, **parts})


class Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.monotonic()
        self.stages[stage] = round(now - self._last, 1)
        self._last = now


def run(
    model: str | None = None,
    *,
    output: str | Path,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    dry_run: bool = False,
    tell: Tell | None = None,
    search: bool = False,
    storage: str | Path | None = None,
    workers: int = 1,
    **options: Unpack[RunOptions],
) -> Run:
    """Fit, edit, measure before and after, bake, and prove it on the saved file.

    An interrupted run keeps what it has in `OUT.resume`; the same call goes on from there.

    Args:
        model: Hub id with `@revision`, directory or GGUF file; None takes the recipe's.
        output: Folder to make: the edited model, `edit.safetensors`, `recipe.toml`, `report.html` and
            `report.json`, card.
        recipe: What to do; the defaults use the shipped prompts.
        machine: How to run it.
        dry_run: Only say what would be read and written.
        tell: Is told each part of the result as soon as it is known.
        search: Search for the edit, as `perpend.search` does.
        storage: Of a search.
        workers: Of a search.
        **options: What `perpend run` takes, by name: over the recipe and the machine.

    Raises:
        UsageError: the model or prompts cannot be read, or the output is not empty.
        RunFailed: the model does not do what the classes say.
        GateFailed: the saved file is not the edit; it stays as `OUT.partial`.
        Interrupted: Ctrl-C.
    """
    require_single("run", "--device-map or --workers")
    recipe, machine = asked(run, RunOptions, options, model, recipe, machine)
    output, model = Path(output), recipe.model.id
    if search:
        return _searched(output, recipe, machine, storage, workers, dry_run, tell)
    require_no_search({**options, "storage": storage, "workers": None if workers == 1 else workers})
    said, clock = tell or (lambda name, data: None), Clock()
    require_free(output)
    require_no_partial(output)
    require_roundable(recipe)
    ModelRef.parse(model)
    splits = open_splits(recipe)
    require_source(model, fetch=not dry_run)
    sizes = {s.name: len(s) for s in splits.sets()}
    wanted = Wanted(fits=True, judged=True)
    if dry_run:
        cost = forecast(model, recipe, machine, wanted, splits=splits, output=output, measures=2, bakes=True)
        return Run(str(output), model, "", (), sizes, None, None, None, None, {}, True, cost)
    require_possible(model, recipe, machine, wanted)
    require_room(model, output, machine)
    with journal(output, journal_key("run", model, recipe, machine, splits), "the same command again") as kept:
        panel, session = open_panel(recipe, machine), open_session(model, recipe, machine)
        coverage = tuple(asdict(row) for row in session.anatomy.coverage())
        said("model", {"model": model, "architecture": session.anatomy.architecture, "coverage": list(coverage)})
        clock.lap("load")
        fitted = fit_edit(session, splits, recipe, replies=kept.replies, checkpoint=kept.checkpoint)
        said("fit", fitted.to_json())
        clock.lap("fit")
        base = Run(str(output), model, session.anatomy.architecture, coverage, sizes, fitted, None, None, None, {})
        return finished(base, session, splits, recipe, machine, panel, kept.replies, said, clock)


def _searched(
    output: Path,
    recipe: Recipe,
    machine: Machine,
    storage: str | Path | None,
    workers: int,
    dry_run: bool,
    tell: Tell | None,
) -> Run:
    from perpend.tasks.search import search  # which is made of this module

    made = search(
        output=output, recipe=recipe, machine=machine, storage=storage, workers=workers, dry_run=dry_run, tell=tell
    )
    assert isinstance(made, Run)
    return made


def finished(
    base: Run,
    session: Session,
    splits: Splits,
    recipe: Recipe,
    machine: Machine,
    panel: Panel,
    stores: Stores,
    said: Tell,
    clock: Clock,
    write: Callable[[Path], None] | None = None,
) -> Run:
    """Measure an edit that is decided on the report split, bake it, prove it on the saved file.

    Args:
        base: With the edit in `fitted`.
        session: The untouched model; of no use afterwards.
        splits: Prompts.
        recipe: Of the edit.
        machine: How to run it.
        panel: The judges.
        stores: Gives a store of replies by name.
        said: Is told each part of the result.
        clock: Seconds per stage.
        write: Adds files to the folder before the report is made.

    Raises:
        GateFailed: the saved file is not the edit; it stays as `OUT.partial`.
    """
    fitted = base.fitted
    assert fitted is not None
    edit, output, made = fitted.edit, Path(base.output), list[Run]()
    measured = report(session, edit, splits.report, recipe, panel, stores=stores)
    said("report", measured.to_json())
    clock.lap("measure")
    base = replace(base, report=measured, edit=edit_facts(edit, session.anatomy))
    facts = about(base.task, session, recipe, machine)

    def finish(folder: Path, gate: Gate, export: ExportResult) -> CardFacts:
        said("gate", gate.to_json())
        clock.lap("export and gate")
        known = facts | {"peak_memory": peak_memory()}
        made.append(replace(base, export=export, gate=gate, seconds=clock.stages, about=known))
        if write is not None:
            write(folder)
        put(folder, made[0].to_json())
        return card_facts(session, edit, recipe, gate, export, output, layer=fitted.layer, report=measured)

    bake_and_prove(session, edit, output, recipe, machine, splits, panel, finish)
    return made[0]
