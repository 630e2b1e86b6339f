"""Judge the replies of a model, with or without an edit, on the report split."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from perpend.config import Machine, Recipe
from perpend.drift import Drift
from perpend.errors import UsageError
from perpend.judges.panel import Comparison
from perpend.models.parallel import shared
from perpend.models.vllm import require_vllm
from perpend.options.asked import asked, path_of
from perpend.options.commands import EvalOptions
from perpend.refs import ModelRef
from perpend.tasks.about import about, again, edit_facts, given, peak_memory
from perpend.tasks.checks import Wanted, require_possible
from perpend.tasks.forecast import Forecast, forecast
from perpend.tasks.journal import journal
from perpend.tasks.measure import Measured, measure, pairs
from perpend.tasks.outcome import outcome_json
from perpend.tasks.output import appearing, require_free, require_no_partial
from perpend.tasks.pages import put
from perpend.tasks.recipes import find_edit
from perpend.tasks.report import Report, report
from perpend.tasks.setup import journal_key, open_engine, open_panel, open_splits, require_fitting


@dataclass(frozen=True)
class Evaluation:
    """Acceptance of a model, and with an edit also of that edit."""

    output: str | None
    model: str
    prompts: dict[str, int]
    before: Measured | None
    """The untouched model; None for a dry run."""
    report: Report | None = None
    """Before and after; None without an edit."""
    seconds: float = 0.0
    dry_run: bool = False
    forecast: Forecast | None = None
    """What would be done, of a dry run."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from."""
    edit: Mapping[str, Any] = field(default_factory=dict)
    """Weight factors of the edit."""

    @property
    def after(self) -> Measured | None:
        """The edit; None without one."""
        return self.report.after if self.report else None

    @property
    def accepted(self) -> Comparison | None:
        """Target prompts, paired; None without an edit."""
        return self.report.accepted if self.report else None

    @property
    def drift(self) -> Drift | None:
        """What the edit cost; None without one."""
        return self.report.drift if self.report else None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        alone = None
        if self.before and not self.report:
            alone = {"before": self.before.to_json(), "pairs": pairs(self.before)}
        return outcome_json("eval", self, {"prompts": self.prompts}, {"report": self.report or alone})


def listed(measured: Measured) -> str:
    """Return a line of JSON per prompt: its class, the prompt, the reply and its label."""
    rows = [
        {"class": name, "prompt": p.text, "reply": r.text, "finished": r.finished, "label": str(label)}
        for name, side in (("target", measured.target), ("baseline", measured.baseline))
        for p, r, label in zip(side.prompts, side.replies, side.judged.labels, strict=True)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _require_engine(machine: Machine, edit: Path | None, adapter: Path | None) -> None:
    """Refuse what an engine cannot do.

    Raises:
        UsageError: an edit with vLLM, whose modules no hook reaches, or an adapter without it.
        MissingExtra: vLLM is not installed.
    """
    if machine.engine != "vllm":
        if adapter is not None:
            raise UsageError("is for vLLM", where="--adapter", valid="--edit EDIT", hint="--engine vllm")
        return
    if edit is not None:
        hint = "perpend adapter MODEL --edit EDIT -o adapter, then --adapter adapter"
        raise UsageError("no hook reaches vLLM", where="--edit", valid="an exported directory, --adapter", hint=hint)
    require_vllm()


def eval(
    model: str | None = None,
    *,
    output: str | Path | None = None,
    edit: str | Path | None = None,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    adapter: str | Path | None = None,
    dry_run: bool = False,
    **options: Unpack[EvalOptions],
) -> Evaluation:
    """Judge the replies of a model on the report split; with an edit, before and after on the same prompts.

    Args:
        model: Hub id with `@revision`, directory or GGUF file; None takes the recipe's.
        output: Folder to make: `report.html`, `report.json` and the replies, `before.jsonl`, `after.jsonl`; with it,
            an interrupted evaluation can go on.
        edit: `edit.safetensors`, or the folder that `fit` or `run` made.
        recipe: Prompts, length of replies, judges.
        machine: How to run it; with `engine="vllm"`, vLLM answers the prompts, of the model or with `adapter`.
        adapter: Folder of a PEFT adapter that vLLM answers with.
        dry_run: Only say what would be read.
        **options: What `perpend eval` takes, by name: over the recipe and the machine.

    Raises:
        UsageError: the model, the prompts or the edit cannot be read, or the output is not empty.
        Interrupted: Ctrl-C.
    """
    started = time.monotonic()
    recipe, machine = asked(eval, EvalOptions, options, model, recipe, machine)
    model, out, edit, adapter = recipe.model.id, path_of(output), path_of(edit), path_of(adapter)
    if out is not None:
        require_free(out)
        require_no_partial(out)
    ModelRef.parse(model)
    _require_engine(machine, edit, adapter)
    chosen = find_edit(edit) if edit is not None else None
    wanted, splits = Wanted(edit=chosen, judged=True), open_splits(recipe)
    pair = splits.report
    sizes = {s.name: len(s) for s in (pair.target, pair.baseline)}
    empty = Evaluation(str(out) if out else None, model, sizes, None, dry_run=dry_run)
    if dry_run:
        times = 1 if chosen is None else 2
        cost = forecast(model, recipe, machine, wanted, splits=splits, output=out, measures=times)
        return replace(empty, forecast=cost)
    require_possible(model, recipe, machine, wanted)

    def work(stores: Any) -> Evaluation:
        panel, session = open_panel(recipe, machine), open_engine(model, recipe, machine, adapter)
        if chosen is not None:
            require_fitting(session, chosen)
        if chosen is None:
            made = replace(empty, before=measure(session, pair, recipe, panel, store=stores("before")))
        else:
            seen = report(session, chosen, pair, recipe, panel, stores=stores)
            made = replace(empty, before=seen.before, report=seen, edit=edit_facts(chosen, session.anatomy))
        command = again("eval", recipe, machine, *given(edit=edit, adapter=adapter))
        facts = about("eval", session, recipe, machine, command) | {"peak_memory": peak_memory()}
        return replace(made, about=facts, seconds=round(time.monotonic() - started, 1))

    if out is None:
        return work(lambda name: {})
    key = journal_key("eval", model, recipe, machine, splits) | {"edit": chosen.sha256 if chosen else None}
    key |= {"engine": machine.engine, "adapter": str(adapter)} if machine.engine != "transformers" else {}
    with shared(out) as place, journal(place, key, "the same command again") as kept:
        made = work(kept.replies)
        with appearing(place) as folder:
            _write(folder, made)
    return made


def _write(folder: Path, made: Evaluation) -> None:
    """Write replies and report."""
    for name, measured in (("before", made.before), ("after", made.after)):
        if measured is not None:
            (folder / f"{name}.jsonl").write_text(listed(measured), encoding="utf-8")
    put(folder, made.to_json())
