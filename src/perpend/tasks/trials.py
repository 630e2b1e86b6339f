"""The trials of a search: the study that a process makes or joins, and its share of the work."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from perpend.config import BUDGET, EvalSection, ExportSection, Machine, ModelSection, PromptsSection, Recipe
from perpend.core.kinds import Basis
from perpend.data import Splits
from perpend.errors import RunFailed, UsageError
from perpend.export.checkpoint import files
from perpend.models.session import Session
from perpend.progress import meter, note, standing
from perpend.refs import ModelRef, Resolved
from perpend.searching.base import Base
from perpend.searching.forward import Scorer
from perpend.searching.front import Pair, Rule, along, front
from perpend.searching.space import Space
from perpend.searching.storage import masked
from perpend.searching.study import ROUND, Ledger, Outcome, Trial, View
from perpend.searching.workers import Plan, Watch, describe, pair, place, scored, volume, work
from perpend.tasks.setup import template_hash
from perpend.units import seconds

Tell = Callable[[str, dict[str, Any]], None]
"""Is told each part of the result as soon as it is known: `tell(name, data)`."""

WAIT = 900.0
"""Seconds that a worker waits for the process that leads the search."""
WEIGHTS, PIECES, PIECE = (".safetensors", ".gguf", ".bin"), 64, 4096
"""Files of weights, how many pieces of each are read for a fingerprint, and their bytes."""
PLAN, QUESTIONS = "plan", "questions"
SHOWN = 6
"""Points of the front that are shown while the search goes on."""
INTERRUPTED = "interrupted"


def without_budget(recipe: Recipe) -> dict[str, Any]:
    """Return what the search section says of a trial, and not of how many there are or which is taken."""
    return recipe.search.model_dump(mode="json", exclude=set(BUDGET))


def study_name(recipe: Recipe, machine: Machine, splits: Splits) -> str:
    """Return a name that two searches share only when a trial means the same in both.

    Local paths are not part of it, so that machines which keep the same files elsewhere can share a study; what the
    files hold is.
    """
    ref = ModelRef.parse(recipe.model.id)
    title = ref.title
    prompts = PromptsSection(system=recipe.prompts.system)
    plain = recipe.for_model(title).model_copy(
        update={"prompts": prompts, "eval": EvalSection(), "export": ExportSection(), "model": ModelSection(id=title)}
    )
    key = {
        "recipe": {**plain.model_dump(mode="json"), "search": without_budget(recipe)},
        "weights": weights_fingerprint(ref.resolve()),
        "prompts": [prompts.fingerprint for prompts in splits.sets()[:4]],
        "chat_template": template_hash(recipe),
        "dtype": machine.dtype,
        "quantization": machine.quantization,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return f"{title.rstrip('/').rpartition('/')[2]}-{digest}"


def weights_fingerprint(source: Resolved) -> str:
    """Return a hash of the configuration and of samples from the weights, wherever the files lie.

    Read are the size, the beginning, the end and pieces in between of every file of weights, so that models of the same
    shapes differ and large ones take no time.
    """
    digest = hashlib.sha256()
    found = [source.path / source.gguf_file] if source.gguf_file else list(files(source.path))
    for path in found:
        if path.suffix not in WEIGHTS and path.name != "config.json":
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for k in range(PIECES):
                file.seek(max(0, size - PIECE) * k // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Site:
    """One process at a study."""

    ledger: Ledger
    session: Session
    splits: Splits
    recipe: Recipe
    base: Base

    @cached_property
    def scorer(self) -> Scorer:
        """Scores candidates; the untouched model is measured when it is first asked for."""
        behaviour = self.base.behaviour(self.session, self.splits)
        questions = (self.ledger.base() or {}).get(QUESTIONS)  # found by the model, on the machine that leads
        return Scorer(self.session, self.base.directions, self.recipe, behaviour, questions)

    @cached_property
    def plan(self) -> Plan:
        """What the study is: as it was stored, so that all workers go by the same numbers.

        Raises:
            UsageError: it was made by another version of the sampler, or of a model of other layers.
        """
        search = self.recipe.search
        norms = any(writer.post_norm is not None for writer in self.session.anatomy.writers)
        packed = any(not w.weight(self.session.model).is_floating_point() for w in self.session.anatomy.writers)
        space = Space.of(self.recipe, self.session.n_layers, post_norms=norms, packed=packed)
        stored = self.ledger.settings().get(PLAN)
        untouched = stored["untouched"] if stored else (round(self.scorer.untouched.refusal, ROUND), 0.0)
        made = Plan(space, self.recipe.seed, search.generation, search.batch, (untouched[0], untouched[1]))
        own = json.loads(json.dumps(describe(made)))
        if stored and stored != own:
            keys = ", ".join(k for k in own if own[k] != stored.get(k))
            where = masked(self.ledger.where)
            raise UsageError(f"the study was begun with another {keys}", where=where, hint="another -o/--output")
        return made

    def keep(self) -> None:
        """Store plan and base, so that others can begin."""
        self.ledger.keep(PLAN, describe(self.plan))
        self.ledger.keep_base({**self.base.to_texts(), QUESTIONS: self.scorer.found.to_text()})

    def view(self) -> View:
        """Return the trials as they are now."""
        return self.ledger.view(self.plan.size, self.plan.batch)

    def work(self, stop: Callable[[], str | None], watch: Watch | None = None) -> str:
        """Run trials until the search ends or `stop` says so; returns why."""
        search = self.recipe.search
        with self.ledger.alive():
            return work(
                self.ledger,
                self.plan,
                lambda candidates, rivals: [rounded(o) for o in self.scorer.score(candidates, rivals=rivals)],
                limit=search.trials,
                patience=search.patience,
                stop=stop,
                watch=watch,
            )


def lead(
    ledger: Ledger, session: Session, splits: Splits, recipe: Recipe, measure: Callable[[tuple[Basis, ...]], Base]
) -> Site:
    """Make a study or go on with one; what all workers begin with is measured only where it is not there.

    Args:
        ledger: Where the study is, or will be.
        session: The untouched model.
        splits: Prompts.
        recipe: What is searched.
        measure: Makes the base, with the directions of each method and k.
    """
    if not ledger.found():
        ledger.create()
    texts = ledger.base()
    if texts is not None:
        return Site(ledger, session, splits, recipe, Base.from_texts(texts))
    bases = Space.of(recipe, session.n_layers, post_norms=False).bases
    site = Site(ledger, session, splits, recipe, measure(bases))
    site.keep()
    return site


def join(ledger: Ledger, session: Session, splits: Splits, recipe: Recipe, stop: Callable[[], str | None]) -> Site:
    """Join a study that another process leads, and wait for it where it has not begun.

    Raises:
        RunFailed: it did not begin.
    """
    until, told = time.monotonic() + WAIT, False
    while not ledger.found() or ledger.base() is None:
        if (why := stop()) or time.monotonic() > until:
            reason = why or f"no process has begun it in {WAIT:.0f} s"
            raise RunFailed(f"the study {ledger.name} is not there: {reason}", where=masked(ledger.where))
        if not told:
            note(f"waiting for the process that leads the search {ledger.name}")
            told = True
        time.sleep(1.0)
    texts = ledger.base()
    assert texts is not None
    return Site(ledger, session, splits, recipe, Base.from_texts(texts))


def rounded(outcome: Outcome) -> Outcome:
    """Return an outcome without the decimal places that depend on the processor."""

    def short(value: Any) -> Any:
        return tuple(round(v, ROUND) for v in value) if isinstance(value, tuple) else round(value, ROUND)

    names = ("refusal", "drift", "refusal_interval", "drift_interval")
    return replace(outcome, **{n: short(v) for n in names if (v := getattr(outcome, n)) is not None})


@contextmanager
def patient() -> Iterator[list[int]]:
    """Take the first Ctrl-C inside the block as a wish to end after the current batch: the list is no longer empty.

    A second one interrupts at once. Signals reach the main thread alone; in another nothing is changed.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        note("ends after the current batch; Ctrl-C again ends at once")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def row(trial: Trial, plan: Plan) -> dict[str, Any]:
    """Return a trial as plain JSON values, readable without Optuna."""
    told = vars(trial.outcome) if trial.outcome else {}
    outcome = {k: v for k, v in told.items() if v is not None and not k.startswith("per_")}
    return {
        "slot": trial.slot,
        "generation": trial.slot // plan.size,
        "state": trial.state,
        "origin": trial.origin,
        "attempt": trial.attempt,
        "worker": trial.owner,
        "seconds": trial.seconds,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in outcome.items()},
        "params": trial.params,
        "candidate": plan.space.candidate(trial.params).to_json(),
    }


def edge(view: View, untouched: Pair) -> list[Trial]:
    """Return the front of the trials so far that refuse less than the untouched model, by drift."""
    return front([t for t in scored(view) if pair(t)[0] < untouched[0]], pair)


class Progress:
    """Shows a search while it goes on: trials done, the front so far, the best by rule, and what is left."""

    def __init__(self, site: Site, tell: Tell, reach: Callable[[int], None], left: Callable[[], float]) -> None:
        """Begin with the trials that are there.

        Args:
            site: The search.
            tell: Is told of every trial, and of the front whenever a batch has ended.
            reach: Is told how many more trials there are.
            left: Seconds until no trial begins any more.
        """
        search = site.recipe.search
        self._plan, self._tell, self._reach, self._limit = site.plan, tell, reach, search.trials
        self._left = left
        self._rule = Rule(search.max_drift, search.min_acceptance)
        self._seen = {trial.slot for trial in site.view().finished()}
        self._start, self._began = len(self._seen), time.monotonic()

    def __call__(self, view: View, notes: Sequence[str]) -> None:
        """Look at the trials as they are now."""
        for line in notes:
            note(line)
        finished = view.finished()
        new = [trial for trial in finished if trial.slot not in self._seen]
        for trial in new:
            self._seen.add(trial.slot)
            self._tell("trial", row(trial, self._plan))
            if trial.outcome and trial.outcome.failed:
                note(f"trial {trial.slot} failed: {trial.outcome.failed}")
        self._reach(len(finished) - self._start)
        if new:
            self._say(view, len(finished))

    def _say(self, view: View, finished: int) -> None:
        rate = 60 * (finished - self._start) / max(1e-6, time.monotonic() - self._began)
        left = min(self._left(), 60 * (self._limit - finished) / max(rate, 1e-6))
        pace = f"{finished} of {self._limit} trials, {rate:.1f} a minute, at most {seconds(left)} left"
        found = edge(view, self._plan.untouched)
        if not found:
            standing(f"{pace}; none refuses less than the untouched model")
            return
        best = best_by(self._rule, found, self._plan.untouched)
        headed = f"front of {len(found)}, from refusal {self._plan.untouched[0]:.2f} untouched; * {self._rule}"
        standing("\n".join([pace, headed, *(_line(t, t is best) for t in _some(found, best))]))
        points = [{"slot": t.slot, "refusal": pair(t)[0], "drift": pair(t)[1]} for t in found]
        told: dict[str, Any] = {"trials": finished, "per_minute": round(rate, 2), "seconds_left": round(left, 1)}
        told |= {"hypervolume": round(volume(map(pair, found), self._plan.untouched), ROUND)}
        self._tell("front", {**told, "front": points, "best": best.slot})


def _some(found: Sequence[Trial], best: Trial) -> list[Trial]:
    """Return up to `SHOWN` trials along a front, the best among them, by drift."""
    spread = along(found, SHOWN, place)
    if best not in spread:
        spread = along(found, SHOWN - 1, place)
    return sorted({t.slot: t for t in [*spread, best]}.values(), key=lambda t: pair(t)[1])


def _line(trial: Trial, best: bool) -> str:
    refusal, drift = pair(trial)
    return f"{'*' if best else ' '} trial {trial.slot:<5} refusal {refusal:7.2f}  drift {drift:.4f}"


def best_by(rule: Rule, trials: Sequence[Trial], untouched: Pair) -> Trial:
    """Return the trial that a rule takes, as far as scores tell: acceptance is the share of refusal taken away.

    An acceptance rate that is asked for is not known before replies are generated, and is left out here.
    """
    most = max(max(untouched[0] - pair(t)[0] for t in trials), 1e-9)
    bound = Rule(max_drift=rule.max_drift)
    return bound.order(list(trials), lambda t: ((untouched[0] - pair(t)[0]) / most, pair(t)[1]))[0]


@contextmanager
def shown(site: Site, tell: Tell, left: Callable[[], float]) -> Iterator[Watch]:
    """Yield a watch that shows the trials inside the block.

    Args:
        site: The search.
        tell: Is told of every trial.
        left: Seconds until no trial begins any more.
    """
    trials = site.recipe.search.trials - len(site.view().finished())
    with meter("trials", max(0, trials)) as reach:
        yield Progress(site, tell, reach, left)


def deadline(minutes: float | None, began: float, asked: Sequence[int]) -> Callable[[], str | None]:
    """Return what says whether to go on: until `minutes` after `began` on the monotonic clock, or until `asked`."""

    def stop() -> str | None:
        if asked:
            return INTERRUPTED
        if minutes is not None and time.monotonic() - began >= 60 * minutes:
            return f"{minutes:g} minutes have passed"
        return None

    return stop


def failures(view: View) -> Mapping[str, int]:
    """Return how many trials ended which way."""
    found = view.finished()
    return {
        "finished": len(found),
        "scored": len(scored(view)),
        "dropped": sum(1 for t in found if t.outcome and t.outcome.dropped),
        "failed": sum(1 for t in found if t.outcome and t.outcome.failed),
    }
