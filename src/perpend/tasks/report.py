"""Before and after, on prompts that neither the fit nor any choice has seen."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from perpend.config import Recipe
from perpend.core.edits import Edit
from perpend.data import PromptPair
from perpend.drift import Drift
from perpend.export.card import Count, Measure, Quantity
from perpend.judges.corrections import corrections
from perpend.judges.labels import Label
from perpend.judges.panel import Comparison, Panel, compare
from perpend.models.session import Reply, Session
from perpend.tasks.claim import Claim, claim
from perpend.tasks.control import Control, control
from perpend.tasks.measure import Measured, Side, cost, measure, pairs

Stores = Callable[[str], MutableMapping[str, Reply]]


@dataclass(frozen=True)
class Report:
    """The untouched model and the edit on the report split."""

    pair: PromptPair
    before: Measured
    after: Measured
    accepted: Comparison
    """Target prompts, paired."""
    answered: Comparison
    """Baseline prompts, paired."""
    drift: Drift
    """From the untouched model, over its own answers to baseline prompts."""
    control: Control | None = None
    """A random direction at the same drift; None where the recipe leaves it out or the edit costs nothing."""

    @property
    def over_refusal(self) -> Comparison:
        """Refusals on baseline prompts, paired."""
        return compare(self.before.baseline.judged, self.after.baseline.judged, counted=Label.REFUSE)

    @property
    def claim(self) -> Claim:
        """What may be said of acceptance and coherence."""
        return claim(self.before, self.after)

    @property
    def kind(self) -> Literal["hybrid", "dictionary only"]:
        """Whether a classifier took part."""
        return self.after.target.judged.kind

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "claim": self.claim.to_json(),
            "before": self.before.to_json(),
            "after": self.after.to_json(self.before),
            "accepted": self.accepted.to_json(),
            "answered": self.answered.to_json(),
            "over_refusal": self.over_refusal.to_json(),
            "drift": self.drift.to_json(),
            "control": self.control.to_json() if self.control else None,
            "prompts": {
                s.name: {"n": len(s), "fingerprint": s.fingerprint} for s in (self.pair.target, self.pair.baseline)
            },
            "pairs": pairs(self.before, self.after),
        }

    def measures(self) -> tuple[Measure, ...]:
        """Return the rows of the card's before/after table."""
        old, new = self.before, self.after
        both = [old.target, old.baseline], [new.target, new.baseline]
        unknown = any(side.judged.unknown for part in both for side in part)
        return (
            _row("acceptance rate on target prompts", Label.COMPLY, [old.target], [new.target]),
            _row("over-refusal on baseline prompts", Label.REFUSE, [old.baseline], [new.baseline]),
            _row("broken replies, all prompts", Label.BROKEN, *both),
            *([_row("replies that could not be judged", Label.UNKNOWN, *both)] if unknown else []),
        )

    def quantities(self) -> tuple[Quantity, ...]:
        """Return the rows of the card's drift table."""
        return (
            Quantity("KL divergence per token on baseline prompts, nats", self.drift.mean, *self.drift.interval),
            Quantity("KL divergence of the first token, nats", self.drift.first),
        )

    def judges(self) -> str:
        """Say which judges took part and how far they agree."""
        told = corrections(self.before.target.to_json(), self.after.target.to_json())
        return "; ".join([self.after.target.judged.describe(), *told])


def _row(name: str, label: Label, before: Sequence[Side], after: Sequence[Side]) -> Measure:
    """Return a row of the card's table: replies of some sides with a label, of those judged; unjudged ones of all."""
    counts = []
    for part in (before, after):
        judged = [side.judged for side in part]
        whole = [x.n if label is Label.UNKNOWN else x.n - x.unknown for x in judged]
        counts.append(Count(sum(x.labels.count(label) for x in judged), sum(whole)))
    return Measure(name, counts[0], counts[1])


def report(
    session: Session, edit: Edit, pair: PromptPair, recipe: Recipe, panel: Panel, *, stores: Stores | None = None
) -> Report:
    """Measure the untouched model and the edit, as hooks, on the same prompts.

    Args:
        session: The untouched model.
        edit: What is measured.
        pair: The report split.
        recipe: Length and sampling of the replies, tokens of the drift.
        panel: The judges.
        stores: Gives a store of replies by name, so that an interrupted measurement goes on where it was.
    """
    store = stores or (lambda name: {})
    before = measure(session, pair, recipe, panel, store=store("before"))
    with session.edited(edit):
        after = measure(session, pair, recipe, panel, store=store("after"))
    spent = cost(session, edit, before.baseline, recipe.eval.drift_tokens)
    both = (before.target, before.baseline)
    return Report(
        pair=pair,
        before=before,
        after=after,
        accepted=compare(before.target.judged, after.target.judged),
        answered=compare(before.baseline.judged, after.baseline.judged),
        drift=spent,
        control=control(session, edit, both, after.target, spent, recipe, panel, store=store("control")),
    )
