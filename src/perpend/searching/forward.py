"""What a candidate is worth, by forward passes alone: nothing is generated.

Two numbers, both to be small, see `perpend.searching.objectives`: *refusal*, the log-odds of the model's own refusals
against compliant openings on targets, and *drift*, the KL divergence per token from the untouched model over its own
answers to baselines. What drifts further than `RUIN` is ruined: it is given the refusal of the untouched model, so that
no sampler is drawn to it.

Candidates go through the model together wherever their edits allow it (`perpend.searching.sheets`), else one by one;
the score is the same, to rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from perpend.config import Recipe
from perpend.core.directions import Directions
from perpend.core.edits import Edit
from perpend.errors import PerpendError, RunFailed
from perpend.fitting.behaviour import Behaviour
from perpend.fitting.layers import RUIN, Probe
from perpend.models.batching import out_of_memory
from perpend.models.rows import Rows, per_row
from perpend.models.session import Session
from perpend.progress import note
from perpend.searching.candidate import Candidate
from perpend.searching.objectives import Question, divergence, likelihoods, mean_interval
from perpend.searching.openings import find
from perpend.searching.sheets import Sheet, find_room, together
from perpend.searching.study import Outcome

LEAST = 256
"""Padded tokens of a forward pass below which a batch is not halved again."""


class Scorer:
    """Scores candidates on the prompts of the select split on which the model does what their class says.

    Attributes:
        session: The untouched model.
        directions: The directions of each k.
        recipe: What is not searched.
        found: The questions, and how their openings were found.
        untouched: The score of the model without an edit: its refusal, and drift 0.
        room: How candidates go through the model together; None when they do not.
    """

    def __init__(
        self, session: Session, directions: Mapping[int, Directions], recipe: Recipe, behaviour: Behaviour
    ) -> None:
        """Find out what the model may say, and measure the untouched model.

        Args:
            session: The untouched model.
            directions: The directions of each k.
            recipe: What is not searched, and how many prompts of each class are used.
            behaviour: What the model does by itself on the select split.

        Raises:
            RunFailed: no prompt is left on which the model does what its class says.
        """
        self.session, self.directions, self.recipe = session, directions, recipe
        probe = Probe.of(behaviour, recipe.search.prompts)
        told = Sheet(session, probe.baselines, [[answer] for answer in probe.answers])
        self.room = find_room(told, recipe.search.batch)
        self.found = find(session, directions, recipe, behaviour, probe, self.room)
        questions = self.found.questions
        self.sheets = {
            "target": Sheet(session, [q.prompt for q in questions], [q.replies for q in questions]),
            "baseline": told,
        }
        if self.room is not None:
            for sheet in self.sheets.values():
                sheet.plant(self.room)
        (self.untouched,) = self._scored([Edit({})])
        if self.untouched.failed:
            raise RunFailed(self.untouched.failed)

    @property
    def prompts(self) -> dict[str, int]:
        """Prompts of each class that a candidate is scored on."""
        return {name: len(sheet.sizes) for name, sheet in self.sheets.items()}

    def questions(self, of: range) -> list[Question]:
        """Return the questions whose replies are these sequences of the sheet of targets, counted over all."""
        ends = list(accumulate(len(q.replies) for q in self.found.questions))
        return [q for q, end in zip(self.found.questions, ends, strict=True) if of.start < end <= of.stop]

    def score(
        self, candidates: Sequence[Candidate], *, directions: Mapping[int, Directions] | None = None
    ) -> list[Outcome]:
        """Return what each candidate is worth; one that fails says why, and the others go on.

        Args:
            candidates: Any number; as many go together as the recipe says.
            directions: Other directions of each k than the scorer's own.
        """
        edits: dict[int, Edit] = {}
        outcomes: dict[int, Outcome] = {}
        for k, candidate in enumerate(candidates):
            try:
                edits[k] = candidate.edit(self.session, directions or self.directions, self.recipe)
            except Exception as error:
                outcomes[k] = Outcome(failed=reason(error))
        quick = [k for k, edit in edits.items() if self.room is not None and per_row(self.session.anatomy, edit)]
        rest = [k for k in edits if k not in quick]
        outcomes |= zip(quick, self._scored([edits[k] for k in quick]), strict=True)
        outcomes |= ((k, self._alone(edits[k])) for k in rest)
        return [self._judged(outcomes[k]) for k in range(len(candidates))]

    def _judged(self, outcome: Outcome) -> Outcome:
        """Give a ruined model nothing for finding refusals unlikely."""
        if outcome.failed or outcome.drift <= RUIN:
            return outcome
        told = f"drift {outcome.drift:.2f} nats per token, beyond {RUIN:g}: ruined"
        return Outcome(self.untouched.refusal, outcome.drift, drift_interval=outcome.drift_interval, dropped=told)

    # ------------------------------------------------------------------------------------------------ many edits

    def _scored(self, edits: Sequence[Edit]) -> list[Outcome]:
        """Score edits, as many together as memory allows."""
        if self.room is None:
            return [self._alone(edit) for edit in edits]
        done, rows = list[Outcome](), self.room.rows
        while len(done) < len(edits):
            some = edits[len(done) : len(done) + rows]
            try:
                done += self._together(some)
            except Exception as error:
                if not out_of_memory(error):
                    done += [Outcome(failed=reason(error))] * len(some)
                elif len(some) > 1:
                    rows = len(some) // 2
                    note(f"out of memory with {len(some)} candidates: going on with {rows}")
                    _collect()
                else:
                    done.append(self._alone(some[0]))
        return done

    def _together(self, edits: Sequence[Edit]) -> list[Outcome]:
        if self.room is None:
            raise RunFailed("the edits of this model do not go together")
        rows = Rows.of(self.session, edits, self.room.at)
        with torch.no_grad():
            asked = [together(p, rows, likelihoods, False) for _, p in self.sheets["target"].trees]
            told = [together(p, rows, divergence, True) for _, p in self.sheets["baseline"].trees]
        odds, drift = log_odds(self.found.questions, torch.cat(asked, dim=1)), torch.cat(told, dim=1)
        return [outcome(a, b) for a, b in zip(odds, drift, strict=True)]

    # -------------------------------------------------------------------------------------------------- one edit

    def _alone(self, edit: Edit) -> Outcome:
        """Score one edit in plain batches, halved as long as memory does not hold them."""
        while True:
            try:
                told = self.sheets["baseline"].one_by_one(edit, divergence, base=True)
                asked = self.sheets["target"].one_by_one(edit, likelihoods)
                return outcome(log_odds(self.found.questions, asked[None])[0], told)
            except Exception as error:
                if not (out_of_memory(error) and self._halved()):
                    return Outcome(failed=reason(error))

    def _halved(self) -> bool:
        """Halve the batches of the session; False when they are as small as they get."""
        budget = self.session.budget
        if budget.forward <= LEAST:
            return False
        self.session.budget = replace(budget, forward=budget.forward // 2, logits=max(1, budget.logits // 2))
        note(f"out of memory: going on with batches of {budget.forward // 2} tokens")
        _collect()
        return True


def log_odds(questions: Sequence[Question], found: Tensor) -> Tensor:
    """Return the log-odds of refusing each target.

    Args:
        questions: N targets.
        found: `[R, n]` log-likelihoods of all their replies, in order.

    Returns:
        `[R, N]` nats. Differentiable.
    """
    each = found.split([len(question.replies) for question in questions], dim=1)
    return torch.stack([q.log_odds(part) for q, part in zip(questions, each, strict=True)], dim=1)


def outcome(odds: Tensor, drift: Tensor) -> Outcome:
    """Return means and intervals of log-odds `[N]` and drift `[M]`; not finite ones have failed."""
    if not bool(odds.isfinite().all() and drift.isfinite().all()):
        return Outcome(failed="the logits are not finite")
    (refusal, reach), (cost, spread) = mean_interval(odds), mean_interval(drift.clamp_min(0))
    return Outcome(refusal, cost, reach, spread)


def reason(error: Exception) -> str:
    """Return in one line why a candidate has no score."""
    told = str(error) if isinstance(error, PerpendError) else f"{type(error).__name__}: {error}"
    return " ".join(told.split())[:300] or type(error).__name__


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
