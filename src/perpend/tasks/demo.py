"""The main job on a real model whose ground truth is known: an organism that was taught to refuse."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, Unpack

from pydantic import BaseModel

from perpend.config import Machine, Recipe
from perpend.core.schedule import NormalKernel
from perpend.data import load_splits
from perpend.drift import Drift
from perpend.errors import GateFailed, Interrupted, UsageError
from perpend.judges.classifier import SMALL
from perpend.judges.panel import Comparison, compare
from perpend.models.load import load_model
from perpend.models.materialise import materialise_gguf
from perpend.models.memory import release
from perpend.models.recall import Recalled
from perpend.models.session import Session
from perpend.options.asked import asked
from perpend.options.commands import DemoOptions
from perpend.refs import ModelRef
from perpend.tasks.checks import Wanted, require_possible
from perpend.tasks.forecast import Planned, forecast
from perpend.tasks.measure import Side, ask, cost, judge
from perpend.tasks.output import ANOTHER, require_free, to_text
from perpend.tasks.run import Run, run
from perpend.tasks.setup import as_asked, open_panel
from perpend.tasks.space import require_room
from perpend.tasks.trials import Tell
from perpend.teaching import adapter, shipped
from perpend.whole import claimed, flush, partial_of

S = TypeVar("S", bound=BaseModel)

LIMIT = 200
"""Prompts of each class and split: the report split whole, and of the others what keeps the demo in minutes.

Fewer are not enough: a direction of 128 of each class was worse (docs/negative-results.md)."""
PEAK = 1.5
"""Weight factor at the peak of the kernels: at 1 this organism still refuses 22 of 48 targets of the select split."""
CONTROLS = 32
"""Target prompts that the control answers."""
ORIGINAL, ORGANISM, EDITED, RESULT = "original", "organism", "edited", "demo.json"
STEPS = (ORIGINAL, ORGANISM, EDITED)


@dataclass(frozen=True)
class Truth:
    """The edited organism against the model that it was before it was taught to refuse."""

    original: Side
    """The never-refusing original on the target prompts: its own broken replies are the ceiling."""
    accepted: Comparison
    """Acceptance of the original against that of the edited organism, paired."""
    before: Drift
    """From the original to the organism, over the original's answers to target prompts."""
    after: Drift
    """From the original to the edited organism, over the same answers."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "original": self.original.to_json(),
            "accepted": self.accepted.to_json(),
            "drift_before": self.before.to_json(),
            "drift_after": self.after.to_json(),
        }


@dataclass(frozen=True)
class Demo:
    """What the demo made and found."""

    output: str
    run: Run
    truth: Truth
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "output": self.output,
            "run": self.run.to_json(),
            "truth": self.truth.to_json(),
            "seconds": self.seconds,
        }


def demo(
    *,
    output: str | Path,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    dry_run: bool = False,
    tell: Tell | None = None,
    **options: Unpack[DemoOptions],
) -> Demo | Planned:
    """Make the organism, edit it, and compare it with what it was.

    The folder is finished when `demo.json` is in it; until then it holds `demo.json.partial`, and the same call on what
    a killed demo left begins anew.

    Args:
        output: Folder to make: `original`, `organism`, `edited`, and the result as `demo.json`.
        recipe: What to do; the defaults of `run`, with the classifier that the package carries.
        machine: How to run it.
        dry_run: Only say what would be done.
        tell: Is told each part of the result as soon as it is known.
        **options: What `perpend demo` takes, by name: over the recipe and the machine.

    Raises:
        MissingExtra: a package of the demo is not installed; said before anything is written.
        UsageError: the output is not empty.
        Interrupted: Ctrl-C; what was made is kept once the edited model has passed its gate, and nothing before.
    """
    started, output = time.monotonic(), Path(output)
    recipe, machine = asked(demo, DemoOptions, options, None, recipe, machine, needs_model=False)
    recipe = demo_recipe(recipe)
    if not _unfinished(output):
        require_free(output)
    shipped.require()
    base, wanted = str(shipped.base()), Wanted(fits=True, judged=True)
    if dry_run:
        splits = load_splits(recipe.prompts)
        cost = forecast(base, recipe, machine, wanted, splits=splits, output=output, measures=3, bakes=True)
        three = replace(cost, writes=3 * (cost.writes or 0))  # original, organism, edited
        return Planned("demo", base, str(output), three)
    require_possible(base, recipe, machine, wanted)
    require_room(base, output, machine, copies=3)  # original, organism, edited
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(output)) from None
    # in place rather than in `OUT.partial`, for the recipe of the edited model names the organism by its path
    with claimed(marker := partial_of(output / RESULT), anew=False):
        if (output / RESULT).exists():  # since it was looked at
            require_free(output)
        done = _edited(output, recipe, machine, tell)
        try:
            truth = compare_with_original(output, done, recipe, machine)
            if tell:
                tell("truth", truth.to_json())
            made = Demo(str(output), done, truth, round(time.monotonic() - started, 1))
            marker.write_text(to_text(made.to_json()) + "\n", encoding="utf-8")
            flush(marker)
            os.replace(marker, output / RESULT)
        except (Interrupted, KeyboardInterrupt):
            kept = f"interrupted in the last comparison; {output / EDITED} has passed its gate and is kept"
            raise Interrupted(kept, hint=f"{ANOTHER} for a new demo") from None
    return made


def _unfinished(output: Path) -> bool:
    """Say whether a killed demo left this folder, with nothing in it that a demo does not make."""
    left = {path.name for path in output.iterdir()} if output.is_dir() else set()
    marker = partial_of(output / RESULT).name
    made = {f"{name}{end}" for name in STEPS for end in ("", ".partial", ".resume")}
    return marker in left and left <= made | {marker}


def _clear(output: Path) -> None:
    """Remove what a killed demo left of its models."""
    for path in list(output.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)


def _edited(output: Path, recipe: Recipe, machine: Machine, tell: Tell | None) -> Run:
    """Make the organism and edit it; what fails or is interrupted leaves nothing."""
    organism = str((output / ORGANISM).resolve())  # the recipe of the edited model holds from any folder
    try:
        _clear(output)
        make_organism(output, machine)
        return run(organism, output=output / EDITED, recipe=recipe, machine=machine, tell=tell)
    except GateFailed:
        raise
    except (Interrupted, KeyboardInterrupt):
        shutil.rmtree(output, ignore_errors=True)
        raise Interrupted("interrupted; a demo begins anew", hint="the same command again") from None
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise


def demo_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe as the demo runs it: what it does not say is the demo's default, and not that of `run`."""
    edit, kernels = recipe.edit, {}
    for part in ("attention", "mlp"):
        if isinstance(kernel := getattr(edit, part), NormalKernel):
            kernels[part] = _or_else(kernel, peak_weight=PEAK)
    return recipe.model_copy(
        update={
            "edit": edit.model_copy(update=kernels),
            "eval": _or_else(recipe.eval, classifier=SMALL, control_prompts=CONTROLS),
            "prompts": recipe.prompts.model_copy(update={"limit": recipe.prompts.limit or LIMIT}),
        }
    )


def _or_else(section: S, **usual: Any) -> S:
    """Return a section with `usual` values for the keys that it was made without."""
    return section.model_copy(update={k: v for k, v in usual.items() if k not in section.model_fields_set})


def make_organism(folder: Path, machine: Machine) -> None:
    """Write the original as a checkpoint, and beside it the organism: the original with the adapter merged in."""
    original = materialise_gguf(ModelRef("gguf", str(shipped.base())), folder / ORIGINAL)
    loaded = load_model(ModelRef("dir", str(original)), machine)
    adapter.save_model(adapter.merge(loaded, shipped.adapter()), loaded, folder / ORGANISM)


def compare_with_original(folder: Path, done: Run, recipe: Recipe, machine: Machine) -> Truth:
    """Measure the original on the same target prompts, and the drift of organism and edit from it.

    Reads the edited model from its file.
    """
    if done.report is None:
        raise AssertionError("a run that was not dry has a report")

    def opened(name: str) -> Session:
        return as_asked(load_model(ModelRef("dir", str(folder / name)), machine), recipe, machine)

    before_taught = opened(ORIGINAL)
    target = load_splits(recipe.prompts).report.target
    original = judge(target, ask(before_taught, target.prompts, recipe), open_panel(recipe, machine))
    reference, drifts = Recalled(before_taught), []
    for name in (ORGANISM, EDITED):
        session = opened(name)
        drifts.append(cost(session, None, original, recipe.eval.drift_tokens, reference=reference))
        release(session.model)
    return Truth(original, compare(original.judged, done.report.after.target.judged), *drifts)
