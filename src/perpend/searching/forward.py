"""What a candidate is worth, by forward passes alone: nothing is generated.

Two numbers, both to be small. *Refusal* is the mean log-likelihood per token of the model's own refusals on targets;
*drift* is the KL divergence per token from the untouched model over its own answers to baselines. A ruined model finds
refusals unlikely too, so what drifts further than `RUIN` is given the refusal of the untouched model and is dropped.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from perpend import drift
from perpend.config import Recipe
from perpend.core.directions import Directions
from perpend.core.edits import Edit
from perpend.core.stats import bootstrap_mean
from perpend.errors import PerpendError
from perpend.fitting.behaviour import Behaviour
from perpend.fitting.layers import RUIN, Probe
from perpend.models.batching import Batch, out_of_memory
from perpend.models.session import Session
from perpend.progress import note
from perpend.searching.candidate import Candidate
from perpend.searching.study import Outcome

LEAST = 256
"""Padded tokens of a forward pass below which a batch is not halved again."""


class Scorer:
    """Scores candidates on the prompts of the select split on which the model does what their class says.

    Attributes:
        session: The untouched model.
        untouched: The score of the model without an edit: its refusal, and drift 0.
    """

    def __init__(
        self, session: Session, directions: Mapping[int, Directions], recipe: Recipe, behaviour: Behaviour
    ) -> None:
        """Measure the untouched model.

        Args:
            session: The untouched model.
            directions: The directions of each k.
            recipe: What is not searched, and how many prompts of each class are used.
            behaviour: What the model does by itself on the select split.

        Raises:
            RunFailed: no prompt is left on which the model does what its class says.
        """
        self.session, self._directions, self._recipe = session, directions, recipe
        self._probe = Probe.of(behaviour, recipe.search.prompts)
        refusal, low, high = self._refusal(None)
        self.untouched = Outcome(refusal, 0.0, (low, high), (0.0, 0.0))

    @property
    def prompts(self) -> dict[str, int]:
        """Prompts of each class that a candidate is scored on."""
        return {"target": len(self._probe.targets), "baseline": len(self._probe.baselines)}

    def score(self, candidates: Sequence[Candidate]) -> list[Outcome]:
        """Return what each candidate is worth; one that fails says why, and the others go on."""
        return [self._safely(candidate) for candidate in candidates]

    def _safely(self, candidate: Candidate) -> Outcome:
        while True:
            try:
                return self._score(candidate.edit(self.session, self._directions, self._recipe))
            except Exception as error:
                if out_of_memory(error) and self._halved():
                    continue
                return Outcome(failed=reason(error))

    def _score(self, edit: Edit) -> Outcome:
        spent = drift.measure(self.session.under(None), self.session.under(edit), self._answers())
        if spent.mean > RUIN:
            told = f"drift {spent.mean:.2f} nats per token, beyond {RUIN:g}: ruined"
            return Outcome(self.untouched.refusal, spent.mean, drift_interval=spent.interval, dropped=told)
        refusal, low, high = self._refusal(edit)
        return Outcome(refusal, spent.mean, (low, high), spent.interval)

    def _refusal(self, edit: Edit | None) -> tuple[float, float, float]:
        """Return the mean log-likelihood per token of the model's own refusals, with its interval over prompts."""
        with self.session.edited(edit):
            scores = self.session.log_likelihood(self._probe.targets, self._probe.refusals)
        return bootstrap_mean([float(s.mean()) for s in scores])

    def _answers(self) -> list[Batch]:
        return list(self.session.batches(self._probe.baselines, self._probe.answers))

    def _halved(self) -> bool:
        """Halve the batches of the session; False when they are as small as they get."""
        budget = self.session.budget
        if budget.forward <= LEAST:
            return False
        self.session.budget = replace(budget, forward=budget.forward // 2, logits=max(1, budget.logits // 2))
        note(f"out of memory: going on with batches of {budget.forward // 2} tokens")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True


def reason(error: Exception) -> str:
    """Return in one line why a candidate has no score."""
    told = str(error) if isinstance(error, PerpendError) else f"{type(error).__name__}: {error}"
    return " ".join(told.split())[:300] or type(error).__name__
