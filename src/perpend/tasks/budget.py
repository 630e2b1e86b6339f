"""How long the trials of a search may go on, so that the whole search takes about the minutes that were asked for.

What comes after the trials is replies above all. How long those take is measured on replies that the choice needs
anyway: those of the untouched model to the select split, at full length, judged.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

from perpend.config import Recipe
from perpend.data import Splits
from perpend.fitting.behaviour import TOKENS
from perpend.progress import note
from perpend.searching.base import Stores
from perpend.searching.study import View
from perpend.tasks.forecast import candidate_replies, replies_and_tokens
from perpend.tasks.points import UNTOUCHED, Replies
from perpend.tasks.trials import Site
from perpend.units import seconds

PACE = "pace"
MOST = 0.75
"""Share, of the time that is left when trials begin, that is kept for what comes after them, at most."""
UNKNOWN = 0.5
"""Share of it that is kept where nothing was measured."""
STEP = 1.25
"""Trials that a step of refinement takes as long as."""


@dataclass(frozen=True)
class Pace:
    """How fast replies are made and judged."""

    token: float
    """Seconds per token of a reply."""
    answer: float
    """Tokens of an answer to a baseline at full length."""


def measured_pace(site: Site, replies: Replies, stores: Stores) -> Pace | None:
    """Let the untouched model reply as the choice will ask it to, and return how fast that went.

    The replies stay in their store, so that the choice finds them there. Where they were there already the pace is
    that which was measured then; None where there is none.
    """
    known = set(stores(UNTOUCHED))
    began = time.monotonic()
    replies.untouched()
    spent, said = time.monotonic() - began, stores(UNTOUCHED)
    new = sum(len(reply.tokens) for name, reply in said.items() if name not in known)
    if not new:
        kept = site.ledger.settings().get(PACE)
        return Pace(**kept) if kept else None
    answers = [len(said[p.id].tokens) for p in site.splits.select.baseline if p.id in said]
    found = Pace(spent / new, sum(answers) / len(answers) if answers else float(site.recipe.eval.max_new_tokens))
    site.ledger.keep(PACE, asdict(found))
    return found


class Budget:
    """Says whether a further trial may begin: any may where no minutes were asked for."""

    def __init__(self, site: Site, began: float, pace: Pace | None, loading: float) -> None:
        """Begin with what is known when trials begin.

        Args:
            site: The search.
            began: When it began, on the monotonic clock.
            pace: Of replies; None where it is not known.
            loading: Seconds that it took to load the model: the saved file is loaded again.
        """
        self._minutes = site.recipe.search.minutes
        self._ends = math.inf if self._minutes is None else began + 60 * self._minutes
        self._open = max(0.0, self._ends - time.monotonic())
        self._after = None if pace is None else loading + after_trials(site.recipe, site.splits, pace)
        search = site.recipe.search
        self._steps, self._trial = search.refine * min(search.refine_from, search.finalists), 0.0

    def saw(self, view: View) -> None:
        """Learn from the trials how long a step of refinement takes."""
        taken = [trial.seconds for trial in view.finished() if trial.seconds]
        self._trial = sum(taken) / len(taken) if taken else 0.0

    @property
    def kept(self) -> float:
        """Seconds of the minutes that are left for what comes after the trials."""
        if self._after is None:
            return UNKNOWN * self._open
        return min(MOST * self._open, self._after + STEP * self._steps * self._trial)

    def left(self) -> float:
        """Seconds until no trial begins any more."""
        if self._minutes is None:
            return math.inf
        return max(0.0, self._ends - self.kept - time.monotonic())

    def over(self) -> str | None:
        """Return why no further batch is begun; None to go on."""
        if self.left() > 0:
            return None
        return f"{self._minutes:g} minutes have passed, less {seconds(self.kept)} for replies, choice and proof"

    def tell(self) -> None:
        """Say how much is kept, and where that is less than is needed."""
        if self._minutes is None:
            return
        told = f"of {self._minutes:g} minutes, {seconds(self.kept)} are kept for replies, choice and proof"
        if self._after is not None and self._after > self.kept:
            told += f", which take about {seconds(self._after)}: fewer prompts (--limit) take less"
        note(told)


def after_trials(recipe: Recipe, splits: Splits, pace: Pace) -> float:
    """Return the seconds that replies take after the trials, of candidates and on the report split.

    Edited models are taken to reply to any prompt at the length of the untouched one's answers.
    """
    shortly, fully = candidate_replies(recipe, splits)
    proof, _ = replies_and_tokens(recipe, splits, measures=2, bakes=True)
    return pace.token * (shortly * min(TOKENS, pace.answer) + (fully + proof) * pace.answer)
