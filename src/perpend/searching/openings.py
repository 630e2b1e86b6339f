"""What a model may say to a target: its own refusals, and compliant openings that the search finds by itself.

Refusals are what the untouched model said. How the same model begins when it complies is not known beforehand: a
direction is taken out of every layer, as strongly as leaves the language intact, and what the model then says to the
targets is read. A reply counts when the word list finds no refusal in it and it does not begin as a refusal of the
untouched model does. Beginnings of the model's answers to baselines are added. From all of these the same few are
taken for every target, those that are together most likely; so a target whose own reply is still a refusal has openings
too.

With `search.delayed` a reply that was heard is also read to the end of a line, as a place where a model that began to
comply may turn and refuse: the target's own refusal there is weighed against how the reply goes on.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from perpend.config import Recipe
from perpend.core.directions import Directions
from perpend.core.edits import Edit
from perpend.core.kinds import Basis
from perpend.core.schedule import Constant
from perpend.data import Prompt
from perpend.errors import RunFailed
from perpend.fitting.behaviour import Behaviour, labels
from perpend.fitting.layers import RUIN, Probe
from perpend.judges.labels import Label
from perpend.models.session import Session
from perpend.searching.candidate import Candidate
from perpend.searching.objectives import Question, Tokens, divergence, likelihoods
from perpend.searching.sheets import Room, Sheet, read

LENGTH = 10
"""Tokens of a refusal and of an opening."""
REFUSALS, OPENINGS = 2, 4
"""Of each, for every target."""
SHARED = 3
"""An opening that shares so many first tokens with a refusal is none."""
DEPTHS = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the depth at which a direction is read in order to hear the model comply."""
FEW = 12
"""Prompts on which these are tried, and on which openings are compared."""
POOL = 24
"""Openings that are compared."""
REPLY, LONGER = 24, 48
"""New tokens of a reply that is read for its opening, and where it is read for a later refusal too."""
TURN = 4
"""Fewest tokens of a delayed refusal and of what goes on instead."""


KINDS = ("refusals", "compliant", "delayed")
"""Of what a model may say to a target."""


@dataclass(frozen=True)
class Found:
    """The questions of a search, and how their openings were found.

    Attributes:
        questions: One per target.
        layer: Whose direction was taken out in order to hear the model comply.
        complied: Targets that it then answered.
        openings: The openings that all targets share.
    """

    questions: tuple[Question, ...]
    layer: int
    complied: int
    openings: tuple[str, ...]

    def to_text(self) -> str:
        """Return everything but the prompts, so that others ask the same."""
        asked = [{"id": q.prompt.id, **{kind: getattr(q, kind) for kind in KINDS}} for q in self.questions]
        return json.dumps({**vars(self), "questions": asked})

    @classmethod
    def from_text(cls, text: str, prompts: Sequence[Prompt]) -> Found:
        """Read what `to_text` gave.

        Args:
            text: What it gave.
            prompts: The targets, in the same order.

        Raises:
            RunFailed: other targets.
        """
        kept = json.loads(text)
        asked = kept.pop("questions")
        if [q["id"] for q in asked] != [p.id for p in prompts]:
            raise RunFailed("the questions that were kept are about other targets")
        questions = [
            Question(p, *(tuple(tuple(r) for r in q[kind]) for kind in KINDS))
            for p, q in zip(prompts, asked, strict=True)
        ]
        return cls(**{**kept, "questions": tuple(questions), "openings": tuple(kept["openings"])})

    def to_json(self) -> dict[str, Any]:
        """Return how the openings were found."""
        own = {"targets": len(self.questions), "layer": self.layer, "complied": self.complied}
        delayed = sum(bool(q.delayed) for q in self.questions)
        return {**own, "delayed": delayed, "openings": list(self.openings)}


def find(
    session: Session,
    directions: Mapping[Basis, Directions],
    recipe: Recipe,
    behaviour: Behaviour,
    probe: Probe,
    room: Room | None,
) -> Found:
    """Find refusals and openings for every target of a probe.

    Args:
        session: The untouched model.
        directions: The directions of each method and k.
        recipe: What is not searched.
        behaviour: What the untouched model does by itself; the whole of its refusals tells openings from refusals.
        probe: The targets that candidates are scored on, with the model's own refusals.
        room: How edits go together through this model.
    """
    layer, edit = _bent(session, directions, recipe, probe, room)
    refusals = {reply.tokens[:SHARED] for _, reply in behaviour.refused}
    own = _complying(session, edit, probe.targets, refusals, LONGER if recipe.search.delayed else REPLY)
    heard = [reply[:LENGTH] for reply in own if reply]
    answers = [reply.tokens[:LENGTH] for _, reply in behaviour.answered]
    sound = [tokens for tokens in answers if tokens[:SHARED] not in refusals] or answers
    pool = list(dict.fromkeys([*_evenly(heard, POOL), *_evenly(sound, max(POOL // 3, POOL - len(heard)))]))[:POOL]
    chosen = _likely(session, edit, probe.targets[:FEW], pool, room)
    common = [tokens for tokens, _ in Counter(refusal[:LENGTH] for refusal in probe.refusals).most_common()]
    questions = tuple(
        _question(prompt, refusal[:LENGTH], common, reply and reply[:LENGTH], chosen)
        for prompt, refusal, reply in zip(probe.targets, probe.refusals, own, strict=True)
    )
    if recipe.search.delayed:
        pairs = [
            delayed(session, q.refusals[0], reply) if reply else () for q, reply in zip(questions, own, strict=True)
        ]
        questions = tuple(replace(q, delayed=pair) for q, pair in zip(questions, pairs, strict=True))
    return Found(questions, layer, len(heard), tuple(session.chat.decode(tokens) for tokens in chosen))


def _question(
    prompt: Prompt, refusal: Tokens, refusals: Sequence[Tokens], reply: Tokens | None, openings: Sequence[Tokens]
) -> Question:
    """Put a target's own replies first, and cut all to the length of its refusal, or of the longest opening."""
    said = [*([reply] if reply else []), *openings]
    size = min(len(refusal), max(map(len, said)))

    def first(replies: Sequence[Tokens], n: int) -> tuple[Tokens, ...]:
        return tuple(dict.fromkeys(r[:size] for r in replies if len(r) >= size))[:n]

    compliant = first(said, OPENINGS)
    return Question(prompt, first([refusal, *refusals], REFUSALS), compliant)


def delayed(session: Session, refusal: Tokens, reply: Tokens) -> tuple[Tokens, ...]:
    """Return a reply to the end of a line with a refusal after it, and with what goes on; nothing without such a line.

    Args:
        session: Whose tokens these are.
        refusal: What the model says where it refuses at once.
        reply: One that complies.
    """
    text = session.chat.tokenizer.decode
    ends = [k for k in range(1, len(reply) - TURN + 1) if str(text(list(reply[:k]))).endswith("\n")]
    if not ends or len(refusal) < TURN:
        return ()
    long = [k for k in ends if k + len(refusal) <= len(reply)]
    end = max(long) if long else min(ends)  # as late as leaves enough, or as much as there is
    size = min(len(refusal), len(reply) - end)
    return reply[:end] + refusal[:size], reply[: end + size]


def _bent(
    session: Session, directions: Mapping[Basis, Directions], recipe: Recipe, probe: Probe, room: Room | None
) -> tuple[int, Edit]:
    """Return the edit that takes most refusal away, of those that do not ruin the model, and its layer."""
    method, rank = min(directions, key=lambda basis: basis[1])
    everywhere = Constant(weight=1.0)
    layers = list(dict.fromkeys(round(depth * (session.n_layers - 1)) for depth in DEPTHS))
    edits = [
        Candidate(float(layer), rank, "plain", False, everywhere, everywhere, method).edit(session, directions, recipe)
        for layer in layers
    ]
    asked = Sheet(session, probe.targets[:FEW], [[r[:LENGTH]] for r in probe.refusals[:FEW]])
    told = Sheet(session, probe.baselines[:FEW], [[a] for a in probe.answers[:FEW]])
    costs = read(told, edits, divergence, room, base=True).mean(1).tolist()
    left = read(asked, edits, likelihoods, room).mean(1).tolist()
    judged = [
        (cost > RUIN, cost if cost > RUIN else refusal, layer, edit)
        for cost, refusal, layer, edit in zip(costs, left, layers, edits, strict=True)
        if math.isfinite(cost + refusal)
    ]
    if not judged:
        raise RunFailed("the model has no finite logits without its direction in any layer")
    return min(judged, key=lambda x: x[:3])[2:]


def _complying(
    session: Session, edit: Edit, targets: Sequence[Prompt], refusals: set[Tokens], tokens: int
) -> list[Tokens | None]:
    """Return how the edited model begins its reply to each target; None where it still refuses."""
    with session.edited(edit):
        replies = session.generate(targets, max_new_tokens=tokens)
    found: list[Tokens | None] = []
    for reply, label in zip(replies, labels(targets, replies), strict=True):
        sound = label is Label.COMPLY and reply.tokens[:SHARED] not in refusals
        found.append(reply.tokens if sound else None)
    return found


def _likely(
    session: Session, edit: Edit, prompts: Sequence[Prompt], pool: Sequence[Tokens], room: Room | None
) -> list[Tokens]:
    """Return those of a pool that are together most likely: the best for each prompt counts, summed over prompts."""
    sheet = Sheet(session, prompts, [list(pool)] * len(prompts))
    table = read(sheet, [edit], likelihoods, room)[0].view(len(prompts), len(pool))
    chosen: list[int] = []
    reached = torch.full((len(prompts),), -torch.inf)
    while len(chosen) < min(OPENINGS, len(pool)):
        gains = torch.maximum(table, reached[:, None]).sum(0)
        gains[chosen] = -torch.inf
        chosen.append(int(gains.argmax()))
        reached = torch.maximum(reached, table[:, chosen[-1]])
    return [pool[k] for k in chosen]


def _evenly(items: Sequence[Tokens], n: int) -> list[Tokens]:
    return list(items) if len(items) <= n else [items[k * len(items) // n] for k in range(n)]
