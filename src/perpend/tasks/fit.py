"""Measure the directions of a model and plan the edit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from perpend.config import Machine, Recipe
from perpend.fitting.fit import Fitted, fit_edit
from perpend.models.parallel import shared
from perpend.options.asked import asked
from perpend.options.commands import FitOptions
from perpend.refs import ModelRef
from perpend.tasks.about import about, edit_facts, peak_memory
from perpend.tasks.checks import Wanted, require_possible
from perpend.tasks.forecast import Forecast, forecast
from perpend.tasks.journal import journal
from perpend.tasks.outcome import outcome_json
from perpend.tasks.output import appearing, require_free, require_no_partial
from perpend.tasks.pages import put
from perpend.tasks.recipes import DIRECTIONS, EDIT, pinned, write_recipe
from perpend.tasks.setup import journal_key, open_session, open_splits


@dataclass(frozen=True)
class Fit:
    """Directions and edit on disk, with what the fit found."""

    output: str
    model: str
    fitted: Fitted | None
    """None for a dry run."""
    prompts: dict[str, int]
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
        return outcome_json("fit", self, {"prompts": self.prompts}, {"fit": self.fitted})


def fit(
    model: str | None = None,
    *,
    output: str | Path,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    dry_run: bool = False,
    **options: Unpack[FitOptions],
) -> Fit:
    """Measure the directions of a model and plan the edit; nothing is edited.

    An interrupted fit keeps its sums and replies in `OUT.resume`; the same call goes on from there and gives the same
    directions.

    Args:
        model: Hub id with `@revision`, directory or GGUF file; None takes the recipe's.
        output: Folder to make: `directions.safetensors`, `edit.safetensors`, `recipe.toml`, `report.html`,
            `report.json`.
        recipe: What to do; the defaults use the shipped prompts.
        machine: How to run it.
        dry_run: Only say what would be read and written.
        **options: What `perpend fit` takes, by name: over the recipe and the machine.

    Raises:
        UsageError: the model or prompts cannot be read, or the output is not empty.
        RunFailed: the model does not do what the classes say, or its residuals are not finite.
        Interrupted: Ctrl-C.
    """
    started, output = time.monotonic(), Path(output)
    recipe, machine = asked(fit, FitOptions, options, model, recipe, machine)
    model = recipe.model.id
    require_free(output)
    require_no_partial(output)
    ModelRef.parse(model)
    splits = open_splits(recipe)
    made = Fit(str(output), model, None, {s.name: len(s) for s in splits.sets()}, 0.0, dry_run)
    wanted = Wanted(fits=True)
    if dry_run:
        return replace(made, forecast=forecast(model, recipe, machine, wanted, splits=splits, output=output))
    require_possible(model, recipe, machine, wanted)
    key = journal_key("fit", model, recipe, machine, splits)
    with shared(output) as place, journal(place, key, "the same command again") as kept:
        session = open_session(model, recipe, machine)
        fitted = fit_edit(session, splits, recipe, replies=kept.replies, checkpoint=kept.checkpoint)
        facts = about("fit", session, recipe, machine) | {"peak_memory": peak_memory()}
        took = round(time.monotonic() - started, 1)
        made = replace(made, fitted=fitted, about=facts, edit=edit_facts(fitted.edit, session.anatomy), seconds=took)
        with appearing(place) as folder:
            fitted.directions.save(folder / DIRECTIONS)
            fitted.edit.save(folder / EDIT)
            write_recipe(folder, pinned(recipe, session.loaded), fitted.edit)
            put(folder, made.to_json())
    return made
