"""Find the edit with the most acceptance for the least drift, then measure and prove it as `run` does."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from perpend.config import Machine, Recipe, to_toml
from perpend.core.kinds import Basis
from perpend.data import Splits
from perpend.errors import Interrupted, UsageError
from perpend.fitting.accumulate import fixed_position
from perpend.fitting.fit import Fitted
from perpend.judges.panel import Panel
from perpend.launched import require_single
from perpend.options.asked import asked
from perpend.options.commands import SearchOptions
from perpend.refs import ModelRef
from perpend.searching.base import Base, measure_base
from perpend.searching.storage import masked
from perpend.searching.study import Ledger, View
from perpend.tasks.apply import require_source
from perpend.tasks.budget import Budget, measured_pace
from perpend.tasks.checks import Wanted, require_possible
from perpend.tasks.crew import STORAGE, crew, machines, share_cores, take_part
from perpend.tasks.finalists import Found, choose
from perpend.tasks.findings import STUDY, TRIALS, put_findings, write_trials
from perpend.tasks.forecast import forecast
from perpend.tasks.gguf import require_roundable
from perpend.tasks.journal import Journal, journal
from perpend.tasks.output import require_free, require_no_partial
from perpend.tasks.points import Replies
from perpend.tasks.recipes import DIRECTIONS, RECIPE
from perpend.tasks.run import Clock, Run, finished
from perpend.tasks.setup import journal_key, open_panel, open_session, open_splits
from perpend.tasks.space import require_room
from perpend.tasks.trials import INTERRUPTED, Site, Tell, deadline, lead, patient, shown, study_name, without_budget


@dataclass(frozen=True)
class Joined:
    """What was done here for a search that another process leads."""

    model: str
    storage: str
    study: str
    trials: int
    """That were run here, by all workers."""
    why: str
    """Why it ended."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"task": "search", **asdict(self)}


@dataclass(frozen=True)
class Asked:
    """What a search was asked for."""

    model: str
    output: Path
    recipe: Recipe
    machine: Machine
    storage: str | None
    workers: int

    def command(self, folder: Path) -> str:
        """Return what to type to go on, by the recipe that is kept in `folder`.

        A storage with a password is left to the environment, and to whoever types where it is not there yet.
        """
        words = ["perpend", "search", "--config", str(folder / RECIPE), "-o", str(self.output)]
        if self.storage and self.storage != os.environ.get(STORAGE):
            secret = masked(self.storage) != self.storage
            words = [f"{STORAGE}=...", *words] if secret else [*words, "--storage", self.storage]
        words += ["--workers", str(self.workers)] if self.workers > 1 else []
        for name, field in Machine.model_fields.items():
            value = getattr(self.machine, name)
            given = [] if value == field.default else value if isinstance(value, tuple) else [value]
            for one in given:
                words += [f"--{name.replace('_', '-')}", str(one)]
        return shlex.join(words)


def search(
    model: str | None = None,
    *,
    output: str | Path | None = None,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    storage: str | Path | None = None,
    workers: int = 1,
    dry_run: bool = False,
    tell: Tell | None = None,
    **options: Unpack[SearchOptions],
) -> Run | Joined:
    """Search for the edit with the most acceptance for the least drift; measure, bake and prove it.

    Trials are forward passes on the select split. Candidates of the front reply on that split, and the recipe's rule
    takes one: that alone is measured on the report split, once. An interrupted search keeps its trials in
    `OUT.resume`, or in `storage`; the same call goes on from there, also with another budget or another rule.

    Args:
        model: Hub id with `@revision`, directory or GGUF file; None takes the recipe's.
        output: Folder to make, as `run` makes it, with `trials.jsonl`, `front.json`, `front.svg`, `schedules.svg` and
            `study.log`. None joins a search that another process leads on `storage`, with all `workers`.
        recipe: What to search and how long; what it says of direction and edit other than by default is kept.
        machine: How to run it.
        storage: Journal file or database URL where the trials are kept, for machines that share them; by default what
            the environment variable PERPEND_STORAGE holds, where a URL with a password is out of sight.
        workers: Processes on this machine, each on a device of its own.
        dry_run: Only say what would be read and written.
        tell: Is told each part of the result as soon as it is known.
        **options: What `perpend search` takes, by name: over the recipe and the machine.

    Raises:
        UsageError: the model or prompts cannot be read, the output is not empty, or another search lies there.
        RunFailed: the model does not do what the classes say, or no trial refuses less.
        GateFailed: the saved file is not the edit; it stays as `OUT.partial`.
        Interrupted: Ctrl-C; says what to type to go on.
    """
    require_single("search", "--device-map or --workers")
    recipe, machine = asked(search, SearchOptions, options, model, recipe, machine)
    model = recipe.model.id
    require_roundable(recipe)
    if workers < 1:
        raise UsageError(f"{workers} workers", where="--workers", valid="1 or more")
    place = str(storage) if storage is not None else os.environ.get(STORAGE) or None
    if output is None:
        return _joined(model, recipe, machine, place, workers)
    job = Asked(model, Path(output), recipe, machine, place, workers)
    _require_place(job)
    ModelRef.parse(model)
    splits = open_splits(recipe)
    require_source(model, fetch=not dry_run)
    sizes = {s.name: len(s) for s in splits.sets()}
    base = Run(str(output), model, "", (), sizes, None, None, None, None, {})
    wanted = Wanted(fits=True, searches=True, judged=True)
    if dry_run:
        cost = forecast(model, recipe, machine, wanted, splits=splits, output=job.output, measures=2, bakes=True)
        return replace(base, dry_run=True, forecast=cost)
    require_possible(model, recipe, machine, wanted)
    require_room(model, job.output, machine)
    key = journal_key("search", model, recipe, machine, splits) | {"search": without_budget(recipe)}
    folder = job.output.with_name(job.output.name + ".resume")
    with journal(job.output, key, job.command(folder)) as kept:
        (kept.folder / RECIPE).write_text(to_toml(recipe.model_dump(mode="json")), encoding="utf-8")
        return _search(job, base, splits, kept, tell or (lambda name, data: None))


def _require_place(asked: Asked) -> None:
    """Refuse an output that is there; of a finished search it says how to go on with its trials."""
    if (asked.output / STUDY).is_file():
        hint = f"perpend search {asked.model} -o ANOTHER --storage {asked.output / STUDY}"
        raise UsageError("a search has ended here; its trials can be gone on with", where=str(asked.output), hint=hint)
    require_free(asked.output)
    require_no_partial(asked.output)


def _joined(model: str, recipe: Recipe, machine: Machine, storage: str | None, workers: int) -> Joined:
    if storage is None:
        hint = "-o out, or --storage URL to join a search that another process leads"
        raise UsageError("no place for the result was given", where="--output", hint=hint)
    began = time.monotonic()
    with patient() as signs:
        stop = deadline(recipe.search.minutes, began, signs)
        study, why, ran = take_part(recipe, machines(machine, workers), storage, stop=stop)
    if why == INTERRUPTED:
        told = f"interrupted after {ran} trials, which are kept in {masked(storage)}"
        raise Interrupted(told, hint="the same command again")
    return Joined(model, masked(storage), study, ran, why, round(time.monotonic() - began, 1))


def _search(asked: Asked, base: Run, splits: Splits, kept: Journal, said: Tell) -> Run:
    recipe, machine, clock, began = asked.recipe, asked.machine, Clock(), time.monotonic()
    own, *beside = machines(machine, asked.workers)
    panel, session = open_panel(recipe, machine), open_session(asked.model, recipe, own)
    coverage = tuple(asdict(row) for row in session.anatomy.coverage())
    said("model", {"model": asked.model, "architecture": session.anatomy.architecture, "coverage": list(coverage)})
    clock.lap("load")
    ledger = Ledger(asked.storage or kept.folder / STUDY, study_name(recipe, machine, splits))

    def measure(bases: tuple[Basis, ...]) -> Base:
        return measure_base(session, splits, recipe, bases, kept.replies, kept.checkpoint)

    site = lead(ledger, session, splits, recipe, measure)
    said("openings", site.scorer.found.to_json())
    clock.lap("fit")
    pace = None
    if recipe.search.minutes is not None:
        pace = measured_pace(site, Replies(site, panel, kept.replies), kept.replies)
        clock.lap("pace")
    why = _trials(asked, site, kept, beside, Budget(site, began, pace, clock.stages["load"]), said)
    clock.lap("trials")
    found = choose(site, why, panel, kept.replies, said)
    said("search", found.to_json())
    clock.lap("choose")
    fitted = _fitted(site, found)
    base = replace(base, architecture=session.anatomy.architecture, coverage=coverage, fitted=fitted, found=found)
    return _proven(asked, base, site, found, panel, kept, said, clock)


def _proven(
    asked: Asked, base: Run, site: Site, found: Found, panel: Panel, kept: Journal, said: Tell, clock: Clock
) -> Run:
    """Measure the chosen edit on the report split, bake it and prove it."""
    recipe = found.chosen.recipe(asked.recipe)
    edit = base.fitted.edit.sha256[:12] if base.fitted else ""

    def stores(name: str) -> Any:  # another budget may choose another edit; the untouched model stays
        return kept.replies(name if name == "before" else f"{name}-{edit}")

    def write(folder: Path) -> None:
        put_findings(folder, found, site)
        if found.chosen.directions and base.fitted:
            base.fitted.directions.save(folder / DIRECTIONS)
        if asked.storage is None:
            shutil.copyfile(kept.folder / STUDY, folder / STUDY)

    return finished(base, site.session, site.splits, recipe, asked.machine, panel, stores, said, clock, write)


def _trials(asked: Asked, site: Site, kept: Journal, beside: list[Machine], budget: Budget, said: Tell) -> str:
    """Run trials until the search ends; returns why.

    Raises:
        Interrupted: Ctrl-C; a second one does not wait for the end of the batch.
    """
    where = asked.storage or kept.folder / STUDY
    try:
        with ExitStack() as stack:
            signs = stack.enter_context(patient())
            if asked.workers > 1:
                stack.enter_context(share_cores(site.session, asked.workers))
                stack.enter_context(crew(kept.folder, asked.recipe, beside, where))
            watch = stack.enter_context(shown(site, said, budget.left))
            budget.tell()

            def look(view: View, notes: Sequence[str]) -> None:
                budget.saw(view)
                watch(view, notes)

            why = site.work(lambda: INTERRUPTED if signs else budget.over(), look)
    finally:
        write_trials(kept.folder / TRIALS, site)
    if signs:  # also one during the last batch: what comes after it takes longer than all of them
        done = len(site.view().finished())
        told = f"interrupted after {done} trials; what was done is kept in {kept.folder}"
        raise Interrupted(told, hint=asked.command(kept.folder))
    return why


def _fitted(site: Site, found: Found) -> Fitted:
    """Return the chosen edit as a fit would, which the report and the card read."""
    candidate, position = found.chosen.candidate, fixed_position(site.recipe.fit)
    directions = (found.chosen.directions or site.base.directions)[candidate.basis]
    return Fitted(directions, found.chosen.edit(site), candidate.layer, position, None, dict(site.base.counts))
