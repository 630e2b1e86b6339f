"""A refusal that comes late: where it is put, and what it is weighed against."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
from scorer_cases import behaviour, directions

from perpend.config import Machine, Recipe
from perpend.core.schedule import Constant
from perpend.judges.labels import Label
from perpend.models.load import load_model
from perpend.models.session import Reply, Session
from perpend.searching import openings
from perpend.searching.candidate import Candidate
from perpend.searching.forward import Scorer
from perpend.searching.openings import LENGTH, LONGER, REPLY, Found, delayed

ANSWER = "Take these:\n1. a list of words\n2. more words and some others"


def made(folder) -> Session:
    return Session(load_model(folder), Machine(device="cpu", batch_size=4))


def ids(session: Session, text: str) -> tuple[int, ...]:
    return tuple(session.chat.tokenizer(text, add_special_tokens=False).input_ids)


def test_a_refusal_is_put_at_the_end_of_a_line_as_late_as_leaves_room(pico_dir):
    session = made(pico_dir("llama"))
    first, second, rest = "Take these:\n", "1. a list of words\n", "2. more words and some others"
    reply, refusal = ids(session, first + second + rest), ids(session, "I will not do that")
    later, goes_on = delayed(session, refusal, reply)
    text = session.chat.tokenizer.decode
    size = len(later) - len(ids(session, first + second))
    assert text(list(later)) == first + second + text(list(refusal[:size]))
    assert text(list(goes_on)) == first + second + text(list(ids(session, rest)[:size]))
    assert size == min(len(refusal), len(ids(session, rest)))
    short = reply[: len(ids(session, first + second)) + 2]  # too little goes on after the second line
    assert text(list(delayed(session, refusal, short)[0])).startswith(first + "I will")


def test_without_a_line_or_a_refusal_of_some_length_there_is_none(pico_dir):
    session = made(pico_dir("llama"))
    refusal = ids(session, "I will not do that")
    assert delayed(session, refusal, ids(session, "all of it in one line, and no other after")) == ()
    assert delayed(session, refusal[:2], ids(session, ANSWER)) == ()
    assert delayed(session, refusal, ids(session, "Take these:\n")) == ()


@pytest.fixture
def heard(pico_dir, monkeypatch):
    """Makes a scorer of a model that complies, when it is bent, in several lines."""
    session, asked = made(pico_dir("llama")), []
    seen, reply = behaviour(session), ids(session, ANSWER)

    def generate(self, prompts, *, max_new_tokens=128, **more):
        asked.append(max_new_tokens)
        return [Reply(ANSWER, reply[:max_new_tokens], False) for _ in prompts]

    monkeypatch.setattr(Session, "generate", generate)
    monkeypatch.setattr(openings, "labels", lambda prompts, replies: [Label.COMPLY] * len(replies))

    def scorer(questions=None, **search) -> tuple[Scorer, list[int]]:
        recipe = Recipe.model_validate({"search": search})
        return Scorer(session, directions(session), recipe, seen, questions), asked

    return scorer


def test_it_is_part_of_the_score_beside_others_as_alone(heard):
    scorer, asked = heard(delayed=True)
    assert asked == [LONGER]
    assert scorer.room is not None
    assert scorer.found.to_json()["delayed"] == 6
    one = Candidate(1.0, 1, "plain", False, Constant(weight=0.2), Constant(weight=0.2))
    (found,) = scorer.score([one])
    edit, session, odds = one.edit(scorer.session, scorer.directions, Recipe()), scorer.session, []
    with session.edited(edit):
        for q in scorer.found.questions:
            p = [math.exp(float(x.sum())) for x in session.log_likelihood([q.prompt] * len(q.replies), q.replies)]
            cut = len(q.refusals)
            now, later = fmean(p[:cut]) / fmean(p[cut:-2]), p[-2] / p[-1]
            odds.append(math.log((1 + now) * (1 + later) - 1))
    assert found.refusal == pytest.approx(fmean(odds), abs=1e-3)
    assert found.refusal == pytest.approx(scorer._alone(edit).refusal, abs=1e-4)
    again, _ = heard(scorer.found.to_text(), delayed=True)
    assert (
        again.found
        == scorer.found
        == Found.from_text(scorer.found.to_text(), [q.prompt for q in again.found.questions])
    )


def test_it_is_not_asked_for_by_default(heard):
    scorer, asked = heard()
    assert asked == [REPLY]
    assert scorer.found.to_json()["delayed"] == 0
    assert all(len(reply) <= LENGTH for q in scorer.found.questions for reply in q.replies)
