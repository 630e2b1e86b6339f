"""The loop of one worker: take a batch, score it, store it, and plan the next generation when one has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from perpend.errors import RunFailed
from perpend.searching.front import CEILING, Pair, decades, flat, front, hypervolume
from perpend.searching.space import Seen, Space
from perpend.searching.study import Batch, Ledger, Outcome, Trial, View

if TYPE_CHECKING:
    from perpend.searching.candidate import Candidate

POLL = 0.5
"""Seconds between two looks at a study in which others are at work."""

Evaluate = Callable[[Sequence["Candidate"], Sequence[Outcome]], Sequence[Outcome]]
"""Scores candidates together, given what lies on the front of the generations before theirs."""


@dataclass(frozen=True)
class Plan:
    """What a study is, the same for each of its workers."""

    space: Space
    seed: int
    size: int
    """Candidates of a generation."""
    batch: int
    untouched: Pair
    """Refusal of the untouched model, and its drift: 0."""

    def seen(self, view: View, generation: int) -> list[Seen]:
        """Return every trial of the generations before `generation`, in the order of their slots."""
        return [
            Seen(t.params, (t.outcome.refusal, t.outcome.drift) if t.outcome and not t.outcome.failed else None)
            for t in view.finished()
            if t.slot < generation * self.size
        ]

    def front(self, view: View, generation: int) -> list[Pair]:
        """Return the front of the generations before `generation`."""
        return front([self.untouched, *(pair(t) for t in scored(view) if t.slot < generation * self.size)], lambda p: p)

    def rivals(self, view: View, generation: int) -> list[Outcome]:
        """Return what lies on the front of the generations before `generation`."""
        before = [t.outcome for t in scored(view) if t.slot < generation * self.size and t.outcome is not None]
        return front(before, lambda o: (o.refusal, o.drift))

    def volumes(self, view: View, limit: int) -> list[float]:
        """Return the hypervolume after each generation that has ended: nats of refusal times decades of drift."""
        found: list[float] = []
        while len(found) * self.size < limit and view.complete(len(found), limit):
            found.append(volume(self.front(view, len(found) + 1), self.untouched))
        return found


def scored(view: View) -> list[Trial]:
    """Return the trials that have numbers over all prompts."""
    return [trial for trial in view.finished() if trial.scored]


def pair(trial: Trial) -> Pair:
    """Return refusal and drift of a trial that was scored."""
    if trial.outcome is None:
        raise RunFailed(f"trial {trial.slot} has no score")
    return trial.outcome.refusal, trial.outcome.drift


def place(trial: Trial) -> Pair:
    """Return refusal, and decades of drift, of a trial that was scored: where it lies along a front."""
    refusal, drift = pair(trial)
    return refusal, decades(drift)


def volume(pairs: Iterable[Pair], untouched: Pair) -> float:
    """Return the hypervolume of refusal and drift, in nats of refusal times decades of drift."""
    return hypervolume([(refusal, decades(drift)) for refusal, drift in pairs], (untouched[0], decades(CEILING)))


class Watch(Protocol):
    """Is shown the study while a worker is at it."""

    def __call__(self, view: View, notes: Sequence[str]) -> None:
        """Look at the slots as they are now, and at lines that the user should see."""


class Stop(Protocol):
    """Says whether to go on."""

    def __call__(self) -> str | None:
        """Return why no further batch is begun; None to go on."""


def work(
    ledger: Ledger,
    plan: Plan,
    evaluate: Evaluate,
    *,
    limit: int,
    patience: int,
    stop: Stop,
    watch: Watch | None = None,
) -> str:
    """Run trials until the front is flat, `limit` slots have ended, or `stop` says so.

    Args:
        ledger: The study; its settings and base are there.
        plan: What the study is.
        evaluate: Scores a batch.
        limit: Slots in all.
        patience: Generations in which the front must have grown; 0 goes on to the limit.
        stop: Asked before every batch.
        watch: Shown the study after every batch and while waiting for others.

    Returns:
        Why it ended.
    """
    shown = watch or (lambda view, notes: None)
    while True:
        view = ledger.view(plan.size, plan.batch)
        notes = ledger.requeue(view, plan.space)
        if notes:
            view = ledger.view(plan.size, plan.batch)
        shown(view, notes)
        volumes = plan.volumes(view, limit)
        if flat(volumes, patience):
            return f"the front has not grown by 1 % in {patience} generations"
        if len(volumes) * plan.size >= limit:
            return f"{limit} trials have been run"
        if reason := stop():
            return reason
        if (batch := _take(ledger, view, limit)) is not None:
            _run(ledger, plan, view, batch, evaluate)
        elif not _planned(ledger, plan, view, len(volumes), limit):
            time.sleep(POLL)


def _take(ledger: Ledger, view: View, limit: int) -> Batch | None:
    return next((batch for batch in view.batches(limit) if ledger.take(batch)), None)


def _run(ledger: Ledger, plan: Plan, view: View, batch: Batch, evaluate: Evaluate) -> None:
    began = time.monotonic()
    candidates = [plan.space.candidate(trial.params) for trial in batch.trials]
    outcomes = evaluate(candidates, plan.rivals(view, batch.trials[0].slot // plan.size))
    ledger.end(batch, outcomes, time.monotonic() - began)


def _planned(ledger: Ledger, plan: Plan, view: View, generation: int, limit: int) -> bool:
    """Make the trials of the first generation that has not ended, where they are missing; returns whether any were."""
    slots = list(view.generation(generation, limit))
    if all(slot in view.slots for slot in slots):
        return False
    proposals = plan.space.ask(plan.seed, generation, plan.size, plan.seen(view, generation))
    ledger.plan(slots, proposals[: len(slots)], view, plan.space)
    return True


def describe(plan: Plan) -> dict[str, Any]:
    """Return what a study remembers of its plan."""
    return {
        **plan.space.describe(plan.seed),
        "generation": plan.size,
        "batch": plan.batch,
        "untouched": list(plan.untouched),
    }
