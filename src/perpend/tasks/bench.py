"""Benchmark tasks by lm-eval, before and after an edit, on the same questions and settings."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

from perpend.config import Machine, Recipe
from perpend.core.edits import Edit
from perpend.core.stats import Z95, mcnemar_exact, paired_bootstrap, paired_counts, paired_wilson
from perpend.errors import MissingExtra, UsageError, nearest
from perpend.models.session import Session
from perpend.options.asked import asked, listed, path_of
from perpend.options.commands import BenchOptions
from perpend.tasks.about import about, again, edit_facts, given, peak_memory
from perpend.tasks.checks import Wanted, require_possible
from perpend.tasks.forecast import Planned, forecast
from perpend.tasks.harness import followed
from perpend.tasks.output import appearing, require_free, to_text
from perpend.tasks.pages import BESIDE, put
from perpend.tasks.recipes import find_edit
from perpend.tasks.setup import open_session, require_fitting, versions

POWER = 0.8416212335729143
"""Quantile of the normal distribution for 80 % power."""
LEAST_CHANGES = 6
"""One-sided changes below which an exact two-sided McNemar test never reaches 5 %."""
SHOWN = 8
"""Tasks of a folder that an error lists."""
Values = dict[tuple[str, str], dict[str, float]]
"""Value of every question, by task and metric."""


@dataclass(frozen=True)
class Score:
    """One metric of one task; see `perpend.report.document.Score` for what each figure means."""

    task: str
    metric: str
    n: int
    before: float
    after: float | None = None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    p: float | None = None
    gained: int | None = None
    lost: int | None = None
    detectable: float | None = None


@dataclass(frozen=True)
class Bench:
    """What lm-eval found."""

    output: str | None
    model: str
    scores: tuple[Score, ...]
    settings: Mapping[str, Any]
    seconds: float
    about: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from."""
    edit: Mapping[str, Any] = field(default_factory=dict)
    """Weight factors of the edit."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "task": "bench",
            "output": self.output,
            "model": self.model,
            "seconds": self.seconds,
            "versions": versions(),
            "about": dict(self.about),
            **({"edit": dict(self.edit)} if self.edit else {}),
            "bench": {"scores": [asdict(score) for score in self.scores], "settings": dict(self.settings)},
        }


def bench(
    model: str | None = None,
    *,
    tasks: str | Sequence[str],
    edit: str | Path | None = None,
    include: str | Path | None = None,
    questions: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    output: str | Path | None = None,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    dry_run: bool = False,
    **options: Unpack[BenchOptions],
) -> Bench | Planned:
    """Run lm-eval on a model, with an edit also on that edit, and compare question by question.

    Args:
        model: Hub id with `@revision`, directory or GGUF file; None takes the recipe's.
        tasks: Names of lm-eval tasks, or of those in `include`; a list, or text with commas.
        edit: `edit.safetensors`, or the folder that holds it; put in place as hooks.
        include: Folder with task files of your own; with data files on this machine nothing is fetched.
        questions: At most so many per task, the first ones; all by default.
        fewshot: Worked examples before each question; the task's own number by default.
        chat: Put questions in the model's chat template.
        output: Folder to make: `bench.json`, `report.json`, `report.html`.
        recipe: The model, how it is loaded, the seed.
        machine: Device, dtype, batch size.
        dry_run: Only check the tasks and say what would be loaded; how many questions they have is not known.
        **options: What `perpend bench` takes, by name: over the recipe and the machine.

    Raises:
        MissingExtra: lm-eval is not installed; said before a model is loaded.
        UsageError: no such task, model or edit, or an output that is not empty.
    """
    started = time.monotonic()
    recipe, machine = asked(bench, BenchOptions, options, model, recipe, machine)
    model, tasks, output = recipe.model.id, listed(tasks), path_of(output)
    _require(tasks, output)
    chosen = find_edit(Path(edit)) if edit is not None else None
    manager, wanted = _manager(tasks, path_of(include)), Wanted(edit=chosen)
    if dry_run:
        cost = forecast(model, recipe, machine, wanted, output=output)
        return Planned("bench", model, str(output) if output else None, cost)
    require_possible(model, recipe, machine, wanted)
    session = open_session(model, recipe, machine)
    if chosen is not None:
        require_fitting(session, chosen)
    asked_for = {"tasks": list(tasks), "limit": questions, "num_fewshot": fewshot, "apply_chat_template": chat}
    settings = {**asked_for, "seed": recipe.seed, "batch_size": _batch(machine)}
    own = {"include": include, "questions": questions, "fewshot": fewshot, "chat": chat}
    command = again("bench", recipe, machine, *given(edit=edit, tasks=",".join(tasks), **own))
    before = _measured(session, None, manager, settings, "before" if chosen else "")
    after = _measured(session, chosen, manager, settings, "after") if chosen is not None else None
    made = Bench(
        output=str(output) if output else None,
        model=model,
        scores=tuple(_scores(before, after)),
        settings=settings | {"lm_eval": _version()},
        seconds=round(time.monotonic() - started, 1),
        about=about("bench", session, recipe, machine, command) | {"peak_memory": peak_memory()},
        edit=edit_facts(chosen, session.anatomy) if chosen is not None else {},
    )
    if output is not None:
        _write(Path(output), made.to_json())
    return made


def _require(tasks: Sequence[str], output: Path | None) -> None:
    """Refuse what cannot work whatever the model.

    Raises:
        MissingExtra: lm-eval is not installed.
        UsageError: no tasks, or an output that is not empty.
    """
    if find_spec("lm_eval") is None:
        raise MissingExtra("lm-eval", "bench", "perpend bench")
    if output is not None:
        require_free(output)
    if not tasks:
        raise UsageError("no tasks given", where="--tasks", hint="--tasks arc_easy,hellaswag")


def _write(output: Path, data: dict[str, Any]) -> None:
    with appearing(output) as folder:
        (folder / BESIDE["bench"]).write_text(to_text(data["bench"]) + "\n", encoding="utf-8")
        put(folder, data)


def _batch(machine: Machine) -> int:
    return 8 if machine.batch_size == "auto" else machine.batch_size


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _manager(tasks: Sequence[str], include: Path | None) -> Any:
    """Return lm-eval's register of tasks.

    Raises:
        UsageError: no such folder, or a task that is in none.
    """
    from lm_eval.tasks import TaskManager

    if include is not None and not Path(include).is_dir():
        valid = "a folder with lm-eval task files (YAML)"
        raise UsageError(f"{include}: no such folder", where="--include", valid=valid)
    found = TaskManager(include_path=str(include) if include is not None else None)
    missing = [task for task in tasks if not found.match_tasks([task])]
    if missing:
        own = _own(include) if include is not None else []
        known = "what `lm-eval ls tasks` lists" + "".join(f", {name}" for name in own[:SHOWN])
        hint = nearest(missing[0], own) or nearest(missing[0], found.all_tasks)
        hint = hint or "--include FOLDER for tasks of your own"
        raise UsageError(f"no task '{missing[0]}'", where="--tasks", valid=known, hint=hint)
    return found


def _own(include: Path) -> list[str]:
    """Return the tasks of a folder."""
    from lm_eval.tasks import TaskManager

    return list(TaskManager(include_path=str(include), include_defaults=False).all_tasks)


def _measured(session: Session, edit: Edit | None, manager: Any, settings: Mapping[str, Any], when: str) -> Values:
    """Run the tasks under an edit; returns the value of every question for every metric that has one."""
    from lm_eval import simple_evaluate

    seed = settings["seed"]
    with session.edited(edit), followed(when) as kind:
        wrapped = kind(
            pretrained=session.model,
            tokenizer=session.chat.tokenizer,
            backend="causal",
            batch_size=settings["batch_size"],
            max_length=session.budget.context,
        )
        found = simple_evaluate(
            model=wrapped,
            tasks=list(settings["tasks"]),
            num_fewshot=settings["num_fewshot"],
            limit=settings["limit"],
            apply_chat_template=settings["apply_chat_template"],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return values(found["samples"])


def values(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Values:
    """Return the value of every question by task and metric; metrics that are no number per question are left out."""
    found: Values = {}
    for task, rows in samples.items():
        for row in rows:
            for metric in row.get("metrics", ()):
                value = row.get(metric)
                if isinstance(value, int | float) and math.isfinite(value):
                    one = "" if row.get("filter", "none") == "none" else f" ({row['filter']})"
                    found.setdefault((task, f"{metric}{one}"), {})[str(row["doc_id"])] = float(value)
    return found


def _scores(before: Values, after: Values | None) -> Iterator[Score]:
    for (task, metric), old in before.items():
        new = after.get((task, metric)) if after else None
        if new is None:
            yield Score(task, metric, len(old), statistics.fmean(old.values()))
            continue
        shared = [key for key in old if key in new]
        yield paired(task, metric, [old[key] for key in shared], [new[key] for key in shared])


def paired(task: str, metric: str, old: Sequence[float], new: Sequence[float]) -> Score:
    """Compare a metric question by question.

    Values of 0 and 1 get Newcombe's interval and the exact McNemar test, others a paired bootstrap. The detectable
    effect is (1.96 + 0.84) standard errors of the paired difference, and for 0 and 1 never less than six questions in
    n: fewer changes cannot reach 5 % in the exact test.

    Args:
        task: Name of the task.
        metric: Name of the metric.
        old: One value per question, before.
        new: The same after, in the same order; at least one.
    """
    n, moved = len(old), [b - a for a, b in zip(old, new, strict=True)]
    error = statistics.stdev(moved) / math.sqrt(n) if n > 1 else math.inf
    detectable, p, gained, lost = (Z95 + POWER) * error, None, None, None
    if {*old, *new} <= {0.0, 1.0}:
        gained, lost, *same = paired_counts([bool(x) for x in old], [bool(x) for x in new])
        difference, *bounds = paired_wilson(gained, lost, *same)
        p, detectable = mcnemar_exact(gained, lost), max(detectable, LEAST_CHANGES / n)
    else:
        difference, *bounds = paired_bootstrap(old, new)
    low, high = bounds
    reachable = detectable if math.isfinite(detectable) else None
    interval = (low, high)
    means = (statistics.fmean(old), statistics.fmean(new))
    return Score(task, metric, n, *means, difference, interval, p, gained, lost, reachable)
