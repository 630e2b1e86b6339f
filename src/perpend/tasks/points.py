"""Candidates of a search with what their replies on the select split say, and how they are made to reply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from perpend.config import Recipe
from perpend.core.directions import Directions
from perpend.core.edits import Edit
from perpend.core.kinds import Basis
from perpend.data import Prompt, PromptPair
from perpend.fitting.behaviour import TOKENS, Behaviour, labels
from perpend.judges.judgement import Judgement, Rate
from perpend.judges.labels import Label
from perpend.judges.panel import Panel
from perpend.searching.base import Stores
from perpend.searching.candidate import Candidate
from perpend.searching.study import Outcome
from perpend.tasks.broken import Broken
from perpend.tasks.measure import Measured, measure
from perpend.tasks.trials import Site

HELD_OUT = 4
"""One in so many targets of the select split is read by no gradient step."""
UNTOUCHED = "full-untouched"
"""Store of the untouched model's replies to the select split at full length."""
LENGTH = 128
"""New tokens of a reply below which late refusals and loops are missed."""


def too_short(tokens: int) -> str | None:
    """Return what to say where finalists reply with so few new tokens that their labels are not to be relied on."""
    if tokens >= LENGTH:
        return None
    missed = f"late refusals and loops are missed below {LENGTH}"
    return f"finalists are judged on replies of at most {tokens} new tokens; {missed} (--max-new-tokens {LENGTH})"


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
    directions: Mapping[Basis, Directions] | None = None
    """Those of the candidate, where its direction was refined; None for those that were measured."""

    @property
    def acceptance(self) -> float:
        """Share of replies that are accepted, at full length where that is known."""
        known = self.judged.acceptance if self.judged else self.accepted_shortly
        return known.share if known else 0.0

    def recipe(self, base: Recipe) -> Recipe:
        """Return `base` with the fit and the edit of the candidate; a refined direction is called so."""
        made = self.candidate.recipe(base)
        if self.directions is None:
            return made
        return made.model_copy(update={"fit": made.fit.model_copy(update={"refined": True})})

    def edit(self, site: Site) -> Edit:
        """Return the edit of the candidate."""
        return self.candidate.edit(site.session, self.directions or site.base.directions, site.recipe)

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
            "words": self.candidate.words(n_layers) + ("; its direction refined" if self.directions else ""),
            "direction_refined": self.directions is not None,
            "candidate": self.candidate.to_json(),
            "weights": self.candidate.weights(n_layers),
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

    @property
    def scored(self) -> list[Prompt]:
        """The targets of the score, in its order."""
        return [prompt for prompt, _ in self.behaviour.refused[: self._site.recipe.search.prompts]]

    @property
    def held_out(self) -> tuple[int, ...]:
        """The targets of the score, by their place, that refinement leaves alone: every so many-th.

        With those that no score reads either they are at least one in `HELD_OUT` of the select split.
        """
        total, n = len(self._site.splits.select.target), len(self.scored)
        missing = max(0, -(-total // HELD_OUT) - (total - n))
        return tuple(n * k // missing for k in range(missing))

    def shortly(self, point: Point) -> Point:
        """Let a candidate reply shortly to the targets of the score; the dictionary labels."""
        prompts = self.scored
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
        said = self._measured(UNTOUCHED)
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
        return point.edit(self._site)
