"""The control: what an edit of the same modules and weight factors does along a random direction at equal drift."""

from __future__ import annotations

import statistics
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from perpend.config import Recipe
from perpend.core.edits import Edit
from perpend.drift import Drift, Found, equal_drift, rotated
from perpend.errors import RunFailed
from perpend.judges.panel import Comparison, Panel, compare
from perpend.models.recall import Recalled
from perpend.models.session import Reply, Session
from perpend.progress import note
from perpend.tasks.measure import Side, ask, cost, judge

SEARCHED = 24
"""Baseline prompts on which the size of the random edit is looked for; its drift is then measured on all."""
EQUAL = 0.1
"""Relative difference up to which two drifts are called equal."""
AGAIN = 2
"""How often the size is looked for once more where the few prompts are not like the rest."""


@dataclass(frozen=True)
class Control:
    """A random direction in place of the measured one.

    Attributes:
        seed: Seed of the direction; one draw.
        factor: On every weight factor of the edit, found by forward passes.
        drift: Of the random edit, over the same answers as that of the edit.
        aim: Mean drift of the edit.
        before: The untouched model on the first target prompts.
        edited: The edit on them.
        random: The random edit on them.
        against: Acceptance of the random edit against that of the edit, paired.
    """

    seed: int
    factor: float
    drift: Drift
    aim: float
    before: Side
    edited: Side
    random: Side
    against: Comparison

    @property
    def equal(self) -> bool:
        """Whether its drift is the edit's; else it is the nearest that was reached."""
        return abs(self.drift.mean / self.aim - 1) <= EQUAL

    def __str__(self) -> str:
        sides = (("untouched", self.before), ("random direction", self.random), ("measured direction", self.edited))
        told = ", ".join(f"{name} {side.judged.acceptance}" for name, side in sides)
        reached = f"drift {self.drift.mean:.3g} against {self.aim:.3g} nats"
        return f"{reached}{'' if self.equal else ', the nearest that was reached'}; accepted: {told}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "seed": self.seed,
            "factor": self.factor,
            "equal": self.equal,
            "aim": self.aim,
            "drift": self.drift.to_json(),
            "before": self.before.judged.acceptance.to_json(),
            "edited": self.edited.judged.acceptance.to_json(),
            "random": self.random.to_json(self.before),
            "against": self.against.to_json(),
        }


def control(
    session: Session,
    edit: Edit,
    before: tuple[Side, Side],
    edited: Side,
    spent: Drift,
    recipe: Recipe,
    panel: Panel,
    *,
    store: MutableMapping[str, Reply] | None = None,
) -> Control | None:
    """Measure a random direction at the drift of the edit; None for an edit that costs nothing.

    Its size is found by forward passes alone; only then are the prompts answered.

    Args:
        session: The untouched model.
        edit: What is controlled for.
        before: Targets and baselines of the untouched model.
        edited: Targets under the edit.
        spent: Drift of the edit, on the baselines.
        recipe: `eval.control_prompts`, length of the replies, tokens of the drift, seed.
        panel: The judges.
        store: Replies already made, by prompt id.
    """
    targets, baselines = before[0].first(recipe.eval.control_prompts), before[1]
    if not targets.prompts or not spent.mean > 0:
        return None
    random = rotated(edit, recipe.seed)
    try:
        found, drift = _same_cost(session, random, baselines, spent, recipe.eval.drift_tokens)
    except RunFailed as error:
        note(f"no control: {error}")
        return None
    with session.edited(random.scaled(found.factor)):
        side = judge(targets.prompts, ask(session, targets.prompts, recipe, store), panel)
    seen = edited.first(len(targets.prompts))
    against = compare(side.judged, seen.judged)
    return Control(recipe.seed, found.factor, drift, spent.mean, targets, seen, side, against)


def _same_cost(session: Session, random: Edit, baselines: Side, spent: Drift, tokens: int) -> tuple[Found, Drift]:
    """Return the factor at which a random edit costs what was spent, and its drift on all prompts.

    Looked for on a few prompts and measured on all; where the few are not like the rest, looked for again on the few at
    the drift that stands for the one on all.
    """
    untouched = Recalled(session)

    def few(factor: float) -> float:
        return cost(session, random.scaled(factor), baselines, tokens, reference=untouched, limit=SEARCHED).mean

    def whole(factor: float) -> Drift:
        return cost(session, random.scaled(factor), baselines, tokens, reference=untouched)

    known = [p.kl for p in spent.prompts if p.index < SEARCHED]
    found = equal_drift(few, statistics.fmean(known) if sum(known) > 0 else spent.mean)
    drift = whole(found.factor)
    for _ in range(AGAIN):
        if not found.matched or 1 / (1 + EQUAL) < drift.mean / spent.mean < 1 + EQUAL:
            break
        found = equal_drift(few, found.drift * spent.mean / drift.mean, start=found.factor)
        drift = whole(found.factor)
    return found, drift
