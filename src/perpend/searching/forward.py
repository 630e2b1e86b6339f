"""What a candidate is worth, by forward passes alone: nothing is generated.

Two numbers, both to be small, see `perpend.searching.objectives`: *refusal*, the log-odds of the model's own refusals
against compliant openings on targets, and *drift*, the KL divergence per token from the untouched model over its own
answers to baselines. What drifts further than `RUIN` is ruined: it is given the refusal of the untouched model, so that
no sampler is drawn to it.

Candidates go through the model together wherever their edits allow it (`perpend.searching.sheets`), else one by one;
the score is the same, to rounding. What cannot reach the front any more leaves the batch
(`perpend.searching.racing`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, zip_longest

import torch
from torch import Tensor

from perpend.config import Recipe
from perpend.core.directions import Directions
from perpend.core.edits import Edit
from perpend.core.kinds import Basis
from perpend.core.stats import bootstrap_mean
from perpend.errors import PerpendError, RunFailed
from perpend.fitting.behaviour import Behaviour
from perpend.fitting.layers import RUIN, Probe
from perpend.models.batching import out_of_memory
from perpend.models.rows import Rows, per_row
from perpend.models.session import Session
from perpend.searching.candidate import Candidate
from perpend.searching.objectives import Question, divergence, likelihoods
from perpend.searching.openings import Found, find
from perpend.searching.racing import LOOK, NOT_FINITE, Race
from perpend.searching.sheets import Sheet, as_many_as_fit, find_room, together
from perpend.searching.study import ROUND, Outcome

RESAMPLES = 2000
"""Of the prompts, for the intervals of a score: every trial has two."""


class Scorer:
    """Scores candidates on the prompts of the select split on which the model does what their class says.

    Attributes:
        session: The untouched model.
        directions: The directions of each method and k.
        recipe: What is not searched.
        found: The questions, and how their openings were found.
        untouched: The score of the model without an edit: its refusal, and drift 0.
        room: How candidates go through the model together; None when they do not.
    """

    def __init__(
        self,
        session: Session,
        directions: Mapping[Basis, Directions],
        recipe: Recipe,
        behaviour: Behaviour,
        questions: str | None = None,
    ) -> None:
        """Find out what the model may say, and measure the untouched model.

        Args:
            session: The untouched model.
            directions: The directions of each method and k.
            recipe: What is not searched, and how many prompts of each class are used.
            behaviour: What the model does by itself on the select split.
            questions: What `found.to_text()` gave another scorer, so that both ask the same; found here by default.

        Raises:
            RunFailed: no prompt is left on which the model does what its class says, or the questions are not theirs.
        """
        self.session, self.directions, self.recipe = session, directions, recipe
        probe = Probe.of(behaviour, recipe.search.prompts)
        told = Sheet(session, probe.baselines, [[answer] for answer in probe.answers])
        self.room = find_room(told, recipe.search.batch)
        if questions is None:
            self.found = find(session, directions, recipe, behaviour, probe, self.room)
        else:
            self.found = Found.from_text(questions, probe.targets)
        asked = self.found.questions
        self.sheets = {
            "target": Sheet(session, [q.prompt for q in asked], [q.replies for q in asked]),
            "baseline": told,
        }
        if self.room is not None and not all(sheet.plant(self.room) for sheet in self.sheets.values()):
            self.room = None
        (self.untouched,) = self._scored([Edit({})])
        if self.untouched.failed:
            raise RunFailed(self.untouched.failed)

    @property
    def prompts(self) -> dict[str, int]:
        """Prompts of each class that a candidate is scored on."""
        return {name: len(sheet.sizes) for name, sheet in self.sheets.items()}

    def asked(self, of: range) -> list[int]:
        """Return which questions have these sequences of the sheet of targets as replies, counted over all."""
        ends = accumulate(len(q.replies) for q in self.found.questions)
        return [k for k, end in enumerate(ends) if of.start < end <= of.stop]

    def questions(self, of: range) -> list[Question]:
        """Return the questions whose replies are these sequences of the sheet of targets, counted over all."""
        return [self.found.questions[k] for k in self.asked(of)]

    def score(
        self,
        candidates: Sequence[Candidate],
        *,
        rivals: Sequence[Outcome] = (),
        directions: Mapping[Basis, Directions] | None = None,
    ) -> list[Outcome]:
        """Return what each candidate is worth; one that fails says why, and the others go on.

        Args:
            candidates: Any number; as many go together as the recipe says.
            rivals: What lies on the front: what cannot reach it any more is dropped on the way.
            directions: Other directions than the scorer's own.
        """
        edits: dict[int, Edit] = {}
        outcomes: dict[int, Outcome] = {}
        for k, candidate in enumerate(candidates):
            try:
                edits[k] = candidate.edit(self.session, directions or self.directions, self.recipe)
            except Exception as error:
                outcomes[k] = Outcome(failed=reason(error))
        quick = [k for k, edit in edits.items() if self.room is not None and per_row(self.session.anatomy, edit)]
        outcomes |= zip(quick, self._scored([edits[k] for k in quick], rivals), strict=True)
        outcomes |= ((k, self._alone(edit, rivals)) for k, edit in edits.items() if k not in quick)
        return [self._judged(outcomes[k]) for k in range(len(candidates))]

    def _judged(self, outcome: Outcome) -> Outcome:
        """Give a ruined model nothing for finding refusals unlikely."""
        if outcome.failed or outcome.drift <= RUIN:
            return outcome
        told = f"drift {outcome.drift:.2f} nats per token, beyond {RUIN:g}: ruined"
        return Outcome(self.untouched.refusal, outcome.drift, drift_interval=outcome.drift_interval, dropped=told)

    # ------------------------------------------------------------------------------------------------ many edits

    def _scored(self, edits: Sequence[Edit], rivals: Sequence[Outcome] = ()) -> list[Outcome]:
        """Score edits, as many together as memory allows."""
        if self.room is None:
            return [self._alone(edit, rivals) for edit in edits]

        def several(some: Sequence[Edit]) -> list[Outcome]:
            try:
                return self._together(some, rivals)
            except Exception as error:
                if out_of_memory(error):
                    raise
            return [self._alone(edit, rivals) for edit in some]  # one of them, or the batch: each shows by itself

        return as_many_as_fit(edits, self.room.rows, several, lambda edit: self._alone(edit, rivals))

    def _together(self, edits: Sequence[Edit], rivals: Sequence[Outcome]) -> list[Outcome]:
        """Score edits in the rows of a batch; those that are dropped leave it."""
        if self.room is None:
            raise RunFailed("the edits of this model do not go together")
        race = Race(len(edits), self.prompts["target"], self.prompts["baseline"], rivals)
        rows = Rows.of(self.session, edits, self.room.at)
        for asked, told in zip_longest(self.sheets["target"].trees, self.sheets["baseline"].trees):
            with torch.no_grad():
                if asked is not None:
                    found = log_odds(self.questions(asked[0]), together(asked[1], rows, likelihoods, False))
                    race.add(race.odds, found.tolist())
                if told is not None:
                    race.add(race.drift, together(told[1], rows, divergence, True).tolist())
            before = race.left
            if race.look() != before:
                if not race.left:
                    break
                rows = rows.keep([before.index(k) for k in race.left])
        return [race.dropped.get(k) or outcome(race.odds[k], race.drift[k]) for k in range(len(edits))]

    # -------------------------------------------------------------------------------------------------- one edit

    def _alone(self, edit: Edit, rivals: Sequence[Outcome] = ()) -> Outcome:
        """Score one edit in plain batches, a few prompts at a time; what is dropped is not read to the end."""
        race = Race(1, self.prompts["target"], self.prompts["baseline"], rivals)
        try:
            own = self.session.under(edit)
            for first in range(0, max(self.prompts.values()), LOOK):
                asked, told = (range(n)[first : first + LOOK] for n in self.prompts.values())
                if asked:
                    found = self.sheets["target"].part(own, likelihoods, asked)
                    questions = self.found.questions[asked.start : asked.stop]
                    race.add(race.odds, log_odds(questions, found[None]).tolist())
                if told:
                    spent = self.sheets["baseline"].part(own, divergence, told, base=True)
                    race.add(race.drift, [spent.tolist()])
                if not race.look():
                    break
        except Exception as error:
            return Outcome(failed=reason(error))
        return race.dropped.get(0) or outcome(race.odds[0], race.drift[0])


def log_odds(questions: Sequence[Question], found: Tensor) -> Tensor:
    """Return the log-odds of refusing each target.

    Args:
        questions: N targets.
        found: `[R, n]` log-likelihoods of all their replies, in order.

    Returns:
        `[R, N]` nats. Differentiable.
    """
    each = torch.split(found, [len(question.replies) for question in questions], dim=1)
    return torch.stack([q.log_odds(part) for q, part in zip(questions, each, strict=True)], dim=1)


def outcome(odds: Sequence[float], drift: Sequence[float]) -> Outcome:
    """Return means and intervals of log-odds and drift over all prompts; not finite ones have failed."""
    if not all(map(math.isfinite, [*odds, *drift])):
        return Outcome(failed=NOT_FINITE)
    costs = [max(0.0, x) for x in drift]
    (refusal, *reach), (cost, *spread) = (bootstrap_mean(x, RESAMPLES) for x in (odds, costs))
    found = Outcome(refusal, cost, (reach[0], reach[1]), (spread[0], spread[1]))
    return replace(found, per_target=_short(odds), per_baseline=_short(costs))


def _short(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(x, ROUND) for x in numbers)


def reason(error: Exception) -> str:
    """Return in one line why a candidate has no score."""
    told = str(error) if isinstance(error, PerpendError) else f"{type(error).__name__}: {error}"
    return " ".join(told.split())[:300] or type(error).__name__
