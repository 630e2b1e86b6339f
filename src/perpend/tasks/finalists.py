"""From the trials of a search to one edit: the score is checked against replies, and replies decide.

Candidates along the front reply shortly to the targets that the score was made of, so that each run says how well its
score ranks them; the best of those by rule are judged at full length by the whole panel, on all targets of the select
split, and the rule takes one. The report split is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from perpend.core.edits import Edit
from perpend.core.stats import spearman
from perpend.data import PromptPair
from perpend.errors import PerpendError, RunFailed, UsageError
from perpend.fitting.behaviour import TOKENS, Behaviour, labels
from perpend.judges.judgement import Judgement, Rate
from perpend.judges.labels import Label
from perpend.judges.panel import Comparison, Panel, compare
from perpend.progress import note
from perpend.searching.base import Stores
from perpend.searching.candidate import Candidate
from perpend.searching.front import CEILING, Rule, front, spread_out
from perpend.searching.refine import refine
from perpend.searching.study import Outcome, Trial, View
from perpend.searching.workers import pair, scored
from perpend.tasks.broken import Bar, Broken
from perpend.tasks.measure import Measured, measure
from perpend.tasks.trials import Site, Tell, edge, failures, rounded

OTHERS = 4
"""Candidates away from the front that reply too, so that ranks have a range."""
POOR = 0.6
"""Spearman correlation of score and replies below which the score is not relied on."""
FEWEST = 4
"""Candidates below which no correlation is told."""


@dataclass(frozen=True)
class Point:
    """A candidate with its score and what its replies say."""

    name: str
    candidate: Candidate
    outcome: Outcome
    origin: str
    on_front: bool
    accepted_shortly: Rate | None = None
    refused_shortly: Rate | None = None
    judged: Judgement | None = None
    """Of all targets of the select split, at full length."""
    broken: Broken | None = None
    """Replies at full length that cannot be read, of both classes."""

    @property
    def acceptance(self) -> float:
        """Share of replies that are accepted, at full length where that is known."""
        known = self.judged.acceptance if self.judged else self.accepted_shortly
        return known.share if known else 0.0

    def to_json(self, n_layers: int) -> dict[str, Any]:
        """Return plain JSON values."""
        short, refused, judged = self.accepted_shortly, self.refused_shortly, self.judged
        interval = self.outcome.refusal_interval, self.outcome.drift_interval
        return {
            "name": self.name,
            "origin": self.origin,
            "on_front": self.on_front,
            "refusal": self.outcome.refusal,
            "refusal_interval": list(interval[0]) if interval[0] else None,
            "drift": self.outcome.drift,
            "drift_interval": list(interval[1]) if interval[1] else None,
            "accepted_shortly": short.to_json() if short else None,
            "refused_shortly": refused.to_json() if refused else None,
            "acceptance": judged.acceptance.to_json() if judged else None,
            "refused": judged.rate(Label.REFUSE).to_json() if judged else None,
            "broken": self.broken.target.to_json() if self.broken else None,
            "broken_baselines": self.broken.baseline.to_json() if self.broken else None,
            "words": self.candidate.words(n_layers),
            "candidate": self.candidate.to_json(),
            "weights": self.candidate.weights(n_layers),
        }


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
    """What gradient steps made of a candidate, told on targets that neither they nor any score has read."""

    start: Point
    refined: Point
    accepted: Comparison | None
    """Paired; None where the score has read all targets of the select split, or no judge can tell of the others."""
    bar: Bar
    why: str = ""
    """Why there is no comparison."""

    @property
    def confirmed(self) -> bool:
        """Whether it keeps to the bar and accepts no fewer of the targets that nothing has read, where some are."""
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
    refinement: Refinement | None = None
    """None where there was none."""

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
            "refinement": self.refinement.to_json() if self.refinement else None,
            "study": dict(self.study),
            "points": self.front,
        }


class Replies:
    """Lets candidates reply on the select split."""

    def __init__(self, site: Site, panel: Panel, stores: Stores) -> None:
        """Keep replies in stores by name, so that an interrupted choice goes on where it was."""
        self._site, self._panel, self._stores = site, panel, stores

    @cached_property
    def behaviour(self) -> Behaviour:
        """What the untouched model does on the select split."""
        return self._site.base.behaviour(self._site.session, self._site.splits)

    def shortly(self, point: Point) -> Point:
        """Let a candidate reply shortly to the targets of the score; the dictionary labels."""
        prompts = [prompt for prompt, _ in self.behaviour.refused[: self._site.recipe.search.prompts]]
        edit = self.edit(point)
        with self._site.session.edited(edit):
            store = self._stores(f"short-{edit.sha256[:12]}")
            replies = self._site.session.generate(prompts, max_new_tokens=TOKENS, store=store)
        said = labels(prompts, replies)
        refused = sum(label in (Label.REFUSE, Label.EVADE) for label in said)
        accepted = Rate(said.count(Label.COMPLY), len(said))
        return replace(point, accepted_shortly=accepted, refused_shortly=Rate(refused, len(said)))

    def fully(self, point: Point) -> Point:
        """Let a candidate reply at full length; the whole panel labels."""
        edit = self.edit(point)
        with self._site.session.edited(edit):
            said = self._measured(f"full-{edit.sha256[:12]}")
        judged = said.target.judged
        return replace(point, judged=judged, broken=Broken.of(judged, said.baseline.judged))

    def untouched(self) -> tuple[Rate, Broken]:
        """Return how much the untouched model accepts, judged as `fully` judges a candidate, and what is broken."""
        said = self._measured("full-untouched")
        return said.target.judged.acceptance, Broken.of(said.target.judged, said.baseline.judged)

    def _measured(self, store: str) -> Measured:
        """Judge replies to all targets of the select split, and to as many baselines as a candidate is scored on."""
        select, recipe = self._site.splits.select, self._site.recipe
        baseline = select.baseline.subset(select.baseline.prompts[: recipe.search.prompts])
        return measure(
            self._site.session, PromptPair(select.target, baseline), recipe, self._panel, store=self._stores(store)
        )

    def edit(self, point: Point) -> Edit:
        """Return the edit of a candidate."""
        return point.candidate.edit(self._site.session, self._site.base.directions, self._site.recipe)


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

    def shortly(trials: Sequence[Trial]) -> list[Point]:
        found = [replies.shortly(_point(trial, trial in on_front, site)) for trial in trials]
        for point in found:
            tell("survivor", point.to_json(site.session.n_layers))
        return found

    points = shortly(_first(view, on_front, search.survivors))
    correlation = _correlation(points)
    note(str(correlation))
    if correlation.poor:
        points += shortly(_more(view, points, search.survivors))
    ranked = _ordered(rule, points, untouched)
    accepted, broken = replies.untouched()
    untouched["acceptance"], bar = accepted.share, Bar(broken, search.max_broken)

    def fully(point: Point) -> Point:
        found = replies.fully(point)
        tell("finalist", found.to_json(site.session.n_layers))
        return found

    finalists = _judged(ranked, search.finalists * (2 if correlation.poor else 1), bar, fully)
    start = _taken(rule, finalists, untouched, bar)
    refined = [fully(point) for point in _refined(site, start, replies)]
    finalists += refined
    refinement = None
    if refined:
        refinement = _refinement(start, refined[0], bar, replies, search.prompts)
        note(str(refinement))
    fit = finalists[:-1] if refinement is not None and not refinement.confirmed else finalists
    chosen = _taken(rule, fit, untouched, bar)
    known = {p.name: p for p in [*(_point(t, True, site) for t in on_front), *points, *finalists]}
    found = Found(
        points=tuple(sorted(known.values(), key=lambda p: p.outcome.drift)),
        chosen=chosen,
        rule=rule,
        correlation=correlation,
        trials=failures(view),
        why=why,
        untouched=untouched,
        study=_study(site),
        n_layers=site.session.n_layers,
        bar=bar,
        refinement=refinement,
    )
    note(found.broken)
    if not found.met:
        note(f"no finalist has {rule}: the nearest is taken")
    return found


def _nothing(view: View, why: str) -> RunFailed:
    """Return why there is nothing to choose from."""
    finished = view.finished()
    if not finished:
        return RunFailed(f"no trial was run: {why}", hint="more --minutes or --trials")
    told = "; ".join(sorted({t.outcome.failed for t in finished if t.outcome and t.outcome.failed})[:2])
    none = f"no trial of {len(finished)} refuses less than the untouched model"
    return RunFailed(none + (f": {told}" if told else ""), hint="more --trials")


def _refined(site: Site, start: Point, replies: Replies) -> list[Point]:
    """Return the refined candidate, if the recipe asks for one, the model allows it and it is another."""
    search = site.recipe.search
    if not search.refine:
        return []
    leash = max(search.max_drift or 0.0, start.outcome.drift)
    try:
        found = refine(
            site.session, site.scorer, start.candidate, steps=search.refine, max_drift=leash, seed=site.recipe.seed
        )
    except PerpendError as error:
        note(f"not refined: {error}")
        return []
    if found.candidate == start.candidate:
        note(f"{search.refine} gradient steps found nothing better than {start.name}")
        return []
    made = Point(f"{start.name}, refined", found.candidate, rounded(found.outcome), "gradient", start.on_front)
    return [replies.shortly(made)]


def _judged(ranked: Sequence[Point], n: int, bar: Bar, fully: Callable[[Point], Point]) -> list[Point]:
    """Judge the first `n` points at full length, and where none of them keeps to the bar, as many again at most."""
    found: list[Point] = []
    for point in ranked[: 2 * n]:
        if len(found) >= n and any(_excess(p, bar) <= 0 for p in found):
            break
        found.append(fully(point))
    return found


def _excess(point: Point, bar: Bar) -> float:
    return bar.excess(point.broken) if point.broken else 0.0


def _taken(rule: Rule, points: Sequence[Point], untouched: Mapping[str, float], bar: Bar) -> Point:
    """Return the point that the rule takes of those that keep to the bar, or of those that exceed it least."""
    least = min(_excess(point, bar) for point in points)
    return _ordered(rule, [point for point in points if _excess(point, bar) <= least], untouched)[0]


def _refinement(start: Point, refined: Point, bar: Bar, replies: Replies, read: int) -> Refinement:
    """Compare a candidate with what became of it on targets that are held out from the score."""
    seen = {prompt.id for prompt, _ in replies.behaviour.refused[:read]}
    sides = [
        replace(p.judged, replies=tuple(r for r in p.judged.replies if r.id not in seen))
        for p in (start, refined)
        if p.judged
    ]
    if not sides[0].replies:
        return Refinement(start, refined, None, bar, "no target is held out from the score")
    try:
        return Refinement(start, refined, compare(*sides), bar)
    except UsageError as error:
        return Refinement(start, refined, None, bar, f"held-out targets: {error.what}")


def _point(trial: Trial, on_front: bool, site: Site) -> Point:
    candidate = site.plan.space.candidate(trial.params)
    return Point(f"trial {trial.slot}", candidate, trial.outcome or Outcome(), trial.origin, on_front)


def _first(view: View, on_front: Sequence[Trial], n: int) -> list[Trial]:
    """Return trials along the front, and a few others from the most to the least refusal."""
    chosen = spread_out(on_front, n)
    rest = [t for t in scored(view) if t not in on_front and pair(t)[1] <= CEILING]
    return chosen + spread_out(sorted(rest, key=pair), min(OTHERS, len(rest)))


def _more(view: View, points: Sequence[Point], n: int) -> list[Trial]:
    """Return trials along the front of those that have not replied yet."""
    names = {point.name for point in points}
    return spread_out(front([t for t in scored(view) if f"trial {t.slot}" not in names], pair), n)


def _untouched(site: Site, behaviour: Behaviour) -> dict[str, float]:
    targets = len(behaviour.target)
    answered = sum(label is Label.COMPLY for _, label in behaviour.target)
    return {"refusal": site.plan.untouched[0], "acceptance": answered / targets if targets else 0.0}


def _ordered(rule: Rule, points: Sequence[Point], untouched: Mapping[str, float]) -> list[Point]:
    """Return points from the one that is taken; the untouched model is the foot of a front's knee."""
    foot = untouched["acceptance"], 0.0
    order = rule.order([None, *points], lambda p: (p.acceptance, p.outcome.drift) if p else foot)
    return [point for point in order if point is not None]


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
