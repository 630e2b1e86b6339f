"""From the trials of a search to one edit: the score is checked against replies, and replies decide.

Candidates along the front reply shortly to the targets that the score was made of, so that each run says how well its
score ranks them, then some beside the best of those; the best by rule are judged at full length by the whole panel, on
all targets of the select split, and the rule takes one. The report split is not looked at.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from perpend.core.stats import spearman
from perpend.errors import PerpendError, RunFailed
from perpend.fitting.behaviour import Behaviour
from perpend.judges.labels import Label
from perpend.judges.panel import Comparison, Panel, compare
from perpend.models.batching import out_of_memory
from perpend.models.memory import reclaim
from perpend.progress import note
from perpend.searching.base import Stores
from perpend.searching.front import CEILING, Pair, Rule
from perpend.searching.refine import refine, turns
from perpend.searching.study import Outcome, Trial, View
from perpend.tasks.broken import Bar
from perpend.tasks.points import Point, Replies, too_short
from perpend.tasks.survivors import beside, first, second
from perpend.tasks.trials import Site, Tell, edge, failures, rounded

POOR = 0.6
"""Spearman correlation of score and replies below which the score is not relied on."""
FEWEST = 4
"""Candidates below which no correlation is told."""


@dataclass(frozen=True)
class Correlation:
    """How well the score ranks candidates by how often they refuse."""

    spearman: float | None
    """None where there are too few."""
    n: int
    """Candidates."""
    prompts: int

    @property
    def poor(self) -> bool:
        """Whether the score is not to be relied on."""
        return self.spearman is None or self.spearman < POOR

    def __str__(self) -> str:
        if self.spearman is None:
            return f"{self.n} candidates are too few to tell how well the score ranks them"
        told = f"score against replies: Spearman {self.spearman:.2f} over {self.n} candidates, {self.prompts} targets"
        return f"{told}; poor, so more candidates reply" if self.poor else told


@dataclass(frozen=True)
class Refinement:
    """What gradient steps made of a candidate, told on targets that they have not read."""

    start: Point
    refined: Point
    accepted: Comparison | None
    """Paired; None where the steps have read all targets of the select split, or no judge can tell of the others."""
    bar: Bar
    why: str = ""
    """Why there is no comparison."""

    @property
    def confirmed(self) -> bool:
        """Whether it keeps to the bar and accepts no fewer of the targets that no step has read, where some are."""
        return _excess(self.refined, self.bar) <= 0 and (self.accepted is None or self.accepted.difference >= 0)

    def __str__(self) -> str:
        spent = f"drift {self.start.outcome.drift:.4f} → {self.refined.outcome.drift:.4f}"
        scored = f"refusal {self.start.outcome.refusal:.3f} → {self.refined.outcome.refusal:.3f}"
        held_out = f"held-out targets: {self.accepted}" if self.accepted else self.why
        broken = self.bar.told(self.refined.broken) if self.refined.broken else "not judged"
        taken = "" if self.confirmed else "; not taken"
        return f"{self.refined.name}: {scored}, {spent}; {held_out}; {broken}{taken}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        accepted = self.accepted.to_json() if self.accepted else None
        names = {"start": self.start.name, "refined": self.refined.name}
        return {**names, "accepted": accepted, "confirmed": self.confirmed, "text": str(self)}


@dataclass(frozen=True)
class Found:
    """What a search found, and how it was chosen."""

    points: tuple[Point, ...]
    """By drift: those of the front, and those that replied."""
    chosen: Point
    rule: Rule
    best: float
    """Most acceptance of a short reply: all there is to have, where the rule is the knee."""
    correlation: Correlation
    trials: Mapping[str, int]
    why: str
    """Why no further trial was run."""
    untouched: Mapping[str, float]
    """Refusal score of the untouched model, and its acceptance on the select split at full length."""
    study: Mapping[str, Any]
    """Its name, sampler, arguments and version, and how the openings of the score were found."""
    n_layers: int
    bar: Bar
    """How many replies may be broken."""
    refinements: tuple[Refinement, ...] = ()
    """One for each finalist of which gradient steps made another candidate."""

    @property
    def met(self) -> bool:
        """Whether the chosen candidate is within the bounds of the rule, on the select split."""
        return self.rule.met(self.chosen.acceptance, self.chosen.outcome.drift)

    @property
    def broken(self) -> str:
        """How many replies are broken before and after the chosen edit, and whether that is more than is allowed."""
        told = self.bar.told(self.chosen.broken) if self.chosen.broken else "no reply was judged"
        return told + ("; no finalist keeps to that" if _excess(self.chosen, self.bar) > 0 else "")

    @cached_property
    def front(self) -> list[dict[str, Any]]:
        """The points, for `front.json`."""
        return [{**p.to_json(self.n_layers), "chosen": p.name == self.chosen.name} for p in self.points]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; the points are those of `front.json`."""
        return {
            "why": self.why,
            "trials": dict(self.trials),
            "rule": str(self.rule),
            "best_accepted_shortly": self.best,
            "met": self.met,
            "correlation": {
                "spearman": self.correlation.spearman,
                "n": self.correlation.n,
                "prompts": self.correlation.prompts,
                "poor": self.correlation.poor,
                "text": str(self.correlation),
            },
            "untouched": dict(self.untouched),
            "chosen": self.chosen.to_json(self.n_layers),
            "broken": {**self.bar.to_json(), "kept": _excess(self.chosen, self.bar) <= 0, "text": self.broken},
            "refinements": [refinement.to_json() for refinement in self.refinements],
            "study": dict(self.study),
            "points": self.front,
        }


def choose(site: Site, why: str, panel: Panel, stores: Stores, tell: Tell) -> Found:
    """Let candidates reply, and take one by the rule of the recipe.

    Args:
        site: The search.
        why: Why no further trial was run.
        panel: The judges.
        stores: Gives a store of replies by name.
        tell: Is told what replies say of each candidate.

    Raises:
        RunFailed: no trial refuses less than the untouched model.
    """
    search, view = site.recipe.search, site.view()
    rule, replies = Rule(search.max_drift, search.min_acceptance), Replies(site, panel, stores)
    on_front = edge(view, site.plan.untouched)
    if not on_front:
        raise _nothing(view, why)
    untouched = _untouched(site, replies.behaviour)
    points, correlation = _replied(site, view, on_front, rule, replies, tell)
    best = _best(points)
    accepted, broken = replies.untouched()
    untouched["acceptance"], bar = accepted.share, Bar(broken, search.max_broken)
    if short := too_short(site.recipe.eval.max_new_tokens):
        note(short)

    def fully(point: Point) -> Point:
        found = replies.fully(point)
        tell("finalist", found.to_json(site.session.n_layers))
        return found

    finalists = _judged(rule, points, search.finalists * (2 if correlation.poor else 1), best, bar, fully)
    refinements = []
    for start in _starts(rule, finalists, best, bar)[: search.refine_from]:
        for point in _refined(site, start, replies):
            refinements.append(_refinement(start, fully(point), bar, replies))
            note(str(refinements[-1]))
    chosen = _taken(rule, [*finalists, *(r.refined for r in refinements if r.confirmed)], best, bar)
    finalists += [r.refined for r in refinements]
    known = {p.name: p for p in [*(_point(t, True, site) for t in on_front), *points, *finalists]}
    found = Found(
        points=tuple(sorted(known.values(), key=lambda p: p.outcome.drift)),
        chosen=chosen,
        rule=rule,
        best=best,
        correlation=correlation,
        trials=failures(view),
        why=why,
        untouched=untouched,
        study=_study(site),
        n_layers=site.session.n_layers,
        bar=bar,
        refinements=tuple(refinements),
    )
    note(found.broken)
    if not found.met:
        note(f"no finalist has {rule}: the nearest is taken")
    return found


def _replied(
    site: Site, view: View, on_front: Sequence[Trial], rule: Rule, replies: Replies, tell: Tell
) -> tuple[list[Point], Correlation]:
    """Let candidates reply shortly, more where the score is poor, then those beside the best; and check the score."""
    asked, n = dict[str, Trial](), site.recipe.search.survivors

    def shortly(trials: Sequence[Trial]) -> list[Point]:
        found = []
        for trial in trials:
            found.append(replies.shortly(_point(trial, trial in on_front, site)))
            asked[found[-1].name] = trial
            tell("survivor", found[-1].to_json(site.session.n_layers))
        return found

    points = shortly(first(view, on_front, n))
    correlation = _correlation(points)
    note(str(correlation))
    if correlation.poor:
        points += shortly(second(view, {trial.slot for trial in asked.values()}, n))
    leaders = [asked[point.name] for point in _ordered(rule, points, _best(points))]
    return points + shortly(beside(on_front, leaders, n // 2)), correlation


def _nothing(view: View, why: str) -> RunFailed:
    """Return why there is nothing to choose from."""
    finished = view.finished()
    if not finished:
        return RunFailed(f"no trial was run: {why}", hint="more --minutes or --trials")
    told = "; ".join(sorted({t.outcome.failed for t in finished if t.outcome and t.outcome.failed})[:2])
    none = f"no trial of {len(finished)} refuses less than the untouched model"
    return RunFailed(none + (f": {told}" if told else ""), hint="more --trials")


def _starts(rule: Rule, finalists: Sequence[Point], best: float, bar: Bar) -> list[Point]:
    """Return the finalists from the one that would be taken: those that keep to the bar, then the least broken."""
    order = _ordered(rule, finalists, best)
    return sorted(order, key=lambda point: _excess(point, bar))


def _refined(site: Site, start: Point, replies: Replies) -> list[Point]:
    """Return the refined candidate, if the recipe asks for one, the model allows it and it is another."""
    search = site.recipe.search
    if not search.refine:
        return []
    leash, direction = max(search.max_drift or 0.0, start.outcome.drift), search.refine_direction
    if direction and not turns(start.candidate):
        note(f"{start.name}: weight factors alone are refined, its modules do not share one direction")
        direction = False
    try:
        found = refine(
            site.session,
            site.scorer,
            start.candidate,
            steps=search.refine,
            max_drift=leash,
            kernel=search.refine_kernel,
            direction=direction,
            held_out=replies.held_out,
            seed=site.recipe.seed,
        )
    except Exception as error:
        full = out_of_memory(error)
        if not full and not isinstance(error, PerpendError):
            raise
        note(f"{start.name} is not refined: {'out of memory' if full else error}")
        found = None
    if found is None:
        reclaim()  # out of the handler, whose traceback holds what memory was full of
        return []
    if found.candidate == start.candidate:
        note(f"{search.refine} gradient steps found nothing better than {start.name}")
        return []
    made = Point(f"{start.name}, refined", found.candidate, rounded(found.outcome), "gradient", start.on_front)
    return [replies.shortly(replace(made, directions=found.directions) if direction else made)]


def _judged(
    rule: Rule, points: Sequence[Point], n: int, best: float, bar: Bar, fully: Callable[[Point], Point]
) -> list[Point]:
    """Judge the first `n` points by the rule at full length, and where none of them will do, as many again at most.

    Fewer replies are accepted at full length than shortly: by how much is known of those that were judged, and the
    others are ordered as if they lost the same.
    """
    found, left = list[Point](), list(points)
    while left and len(found) < 2 * n:
        if len(found) >= n and any(_will_do(p, rule, bar) for p in found):
            break
        order = rule.order(left, _expected(found), best)
        left.remove(order[0])
        found.append(fully(order[0]))
    return found


def _expected(judged: Sequence[Point]) -> Callable[[Point], Pair]:
    """Return what says which acceptance at full length, and which drift, a point that replied shortly will have."""
    told = [(p.accepted_shortly.share, p.acceptance) for p in judged if p.accepted_shortly and p.judged]
    lost = statistics.fmean(short - full for short, full in told) if told else 0.0
    return lambda point: (point.acceptance - lost, point.outcome.drift)


def _will_do(point: Point, rule: Rule, bar: Bar) -> bool:
    enough = rule.min_acceptance is None or point.acceptance >= rule.min_acceptance
    return enough and _excess(point, bar) <= 0


def _best(points: Sequence[Point]) -> float:
    """Return the most acceptance of points that are worth anything, 1 where none is accepted."""
    return max((p.acceptance for p in points if p.outcome.drift < CEILING), default=0.0) or 1.0


def _excess(point: Point, bar: Bar) -> float:
    return bar.excess(point.broken) if point.broken else 0.0


def _taken(rule: Rule, points: Sequence[Point], best: float, bar: Bar) -> Point:
    """Return the point that the rule takes of those that keep to the bar, or of those that exceed it least."""
    least = min(_excess(point, bar) for point in points)
    return _ordered(rule, [point for point in points if _excess(point, bar) <= least], best)[0]


def _refinement(start: Point, refined: Point, bar: Bar, replies: Replies) -> Refinement:
    """Compare a candidate with what became of it on targets that no gradient step has read."""
    seen = {prompt.id for k, prompt in enumerate(replies.scored) if k not in replies.held_out}
    sides = [
        replace(p.judged, replies=tuple(r for r in p.judged.replies if r.id not in seen))
        for p in (start, refined)
        if p.judged
    ]
    if not sides[0].replies:
        return Refinement(start, refined, None, bar, "no target is held out")
    accepted = compare(*sides)
    if accepted.left_out == len(sides[0].replies):
        return Refinement(start, refined, None, bar, f"held-out targets: {accepted}")
    return Refinement(start, refined, accepted, bar)


def _point(trial: Trial, on_front: bool, site: Site) -> Point:
    candidate = site.plan.space.candidate(trial.params)
    return Point(f"trial {trial.slot}", candidate, trial.outcome or Outcome(), trial.origin, on_front)


def _untouched(site: Site, behaviour: Behaviour) -> dict[str, float]:
    targets = len(behaviour.target)
    answered = sum(label is Label.COMPLY for _, label in behaviour.target)
    return {"refusal": site.plan.untouched[0], "acceptance": answered / targets if targets else 0.0}


def _ordered(rule: Rule, points: Sequence[Point], best: float) -> list[Point]:
    """Return points from the one that is taken."""
    return rule.order(points, lambda p: (p.acceptance, p.outcome.drift), best)


def _correlation(points: Sequence[Point]) -> Correlation:
    told = [(p.outcome.refusal, p.refused_shortly) for p in points]
    pairs = [(score, rate.share) for score, rate in told if rate is not None and rate.n]
    prompts = max((rate.n for _, rate in told if rate), default=0)
    if len(pairs) < FEWEST:
        return Correlation(None, len(pairs), prompts)
    return Correlation(spearman(*zip(*pairs, strict=True)), len(pairs), prompts)


def _study(site: Site) -> dict[str, Any]:
    told = site.ledger.settings().get("plan") or {}
    sampler = {k: told.get(k) for k in ("sampler", "arguments", "optuna", "seed")}
    return {"name": site.ledger.name, **sampler, "openings": site.scorer.found.to_json()}
