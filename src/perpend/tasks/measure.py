"""Replies, labels and drift of a model on the report split, with and without an edit."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from perpend import drift
from perpend.config import Recipe
from perpend.core.edits import Edit
from perpend.data import Prompt, PromptPair
from perpend.judges.judgement import Judgement
from perpend.judges.labels import Record
from perpend.judges.panel import Panel
from perpend.models.memory import reclaim
from perpend.models.recall import Recalled
from perpend.models.session import Reply, Session
from perpend.tasks.setup import sampling

DRIFT_PROMPTS = 96
"""Baseline prompts on which drift is measured, at most."""


@dataclass(frozen=True)
class Side:
    """What a model replied to one class of prompts, and how the replies were judged."""

    prompts: tuple[Prompt, ...]
    replies: tuple[Reply, ...]
    judged: Judgement

    def first(self, n: int) -> Side:
        """Return the first n prompts, or all where there are fewer."""
        judged = replace(self.judged, replies=self.judged.replies[:n])
        return Side(self.prompts[:n], self.replies[:n], judged)

    def repetition(self, before: Side | None = None) -> drift.Repetition:
        """Return length and repetition of the replies; the length also beside that of other replies to the prompts."""
        texts = None if before is None else [r.text for r in before.replies]
        return drift.repetition([r.text for r in self.replies], [r.finished for r in self.replies], texts)

    def to_json(self, before: Side | None = None) -> dict[str, Any]:
        """Return plain JSON values; with the side before, how much longer the replies are."""
        return {**self.judged.to_json(), "repetition": self.repetition(before).to_json()}


@dataclass(frozen=True)
class Measured:
    """One model, or one edit of it, on both classes."""

    target: Side
    """How many replies do what was asked is the acceptance rate."""
    baseline: Side
    """Replies that refuse are over-refusals."""

    def to_json(self, before: Measured | None = None) -> dict[str, Any]:
        """Return plain JSON values; with what was before, how much longer the replies are."""
        target, baseline = (before.target, before.baseline) if before else (None, None)
        return {"target": self.target.to_json(target), "baseline": self.baseline.to_json(baseline)}


def judge(prompts: Sequence[Prompt], replies: Sequence[Reply], panel: Panel) -> Side:
    """Judge replies to prompts of one class."""
    return Side(tuple(prompts), tuple(replies), panel.judge(records(prompts, replies)))


def records(prompts: Sequence[Prompt], replies: Sequence[Reply]) -> list[Record]:
    """Return what a judge reads."""
    return [Record(p.text, r.text, r.finished, p.id) for p, r in zip(prompts, replies, strict=True)]


def ask(
    session: Session, prompts: Sequence[Prompt], recipe: Recipe, store: MutableMapping[str, Reply] | None = None
) -> list[Reply]:
    """Let the model reply as the recipe says, under the edit in place; memory of its caches is given back."""
    drawn, tokens = sampling(session, recipe), recipe.eval.max_new_tokens
    replies = session.generate(prompts, max_new_tokens=tokens, sampling=drawn, store=store)
    reclaim()
    return replies


def measure(
    session: Session, pair: PromptPair, recipe: Recipe, panel: Panel, *, store: MutableMapping[str, Reply] | None = None
) -> Measured:
    """Let the model reply to both classes, under the edit that is in place, and judge the replies.

    Args:
        session: The model.
        pair: Target and baseline prompts.
        recipe: Length and sampling of the replies.
        panel: The judges.
        store: Replies already made, by prompt id.
    """
    replies = ask(session, [*pair.target, *pair.baseline], recipe, store)
    cut = len(pair.target)
    return Measured(judge(pair.target, replies[:cut], panel), judge(pair.baseline, replies[cut:], panel))


def cost(
    session: Session,
    edit: Edit | None,
    asked: Side,
    tokens: int,
    *,
    reference: Recalled | None = None,
    limit: int = DRIFT_PROMPTS,
) -> drift.Drift:
    """Return the drift from a reference over the reference's own replies.

    Args:
        session: Makes the candidate.
        edit: In place for the candidate.
        asked: Prompts with the replies of the reference; the first of them are used.
        tokens: Of each reply, only so many.
        reference: Gave the replies, a model of the same tokenizer; `session` without the edit by default.
        limit: Prompts that are used, at most.
    """
    prompts, replies = asked.prompts[:limit], asked.replies[:limit]
    batches = session.batches(prompts, [r.tokens for r in replies], max_tokens=tokens)
    return drift.measure(reference or session.under(None), session.under(edit), batches)


def pairs(before: Measured, after: Measured | None = None) -> list[dict[str, Any]]:
    """Return every prompt with its reply and label, before and after where there is an after.

    Targets come first, and of each class those whose label changed.
    """
    found: list[dict[str, Any]] = []
    for name in ("target", "baseline"):
        one, other = getattr(before, name), getattr(after, name) if after else None
        rows = [
            {"class": name, "id": p.id, "prompt": p.text, **_said("before", one, k), **_said("after", other, k)}
            for k, p in enumerate(one.prompts)
        ]
        found += sorted(rows, key=lambda row: row["label_before"] == row.get("label_after", row["label_before"]))
    return found


def _said(when: str, side: Side | None, k: int) -> dict[str, Any]:
    """Return the reply and the label of prompt k of a side."""
    if side is None:
        return {}
    return {when: side.replies[k].text, f"label_{when}": str(side.judged.replies[k].label)}
