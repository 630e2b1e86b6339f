"""Lessons: every wording from full decks, the same forms for both classes, the same for the same seed."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from perpend.errors import UsageError
from perpend.judges.dictionary import Dictionary
from perpend.judges.labels import Label
from perpend.teaching.curriculum import Wordings, lessons, shuffled_deck

WORDINGS = Wordings(
    tuple(f"no {k}" for k in range(7)), ("{request}", "Hi. {request}", "{request} Now."), ("", "Be kind.")
)
TARGET, BASELINE = [f"t{k}" for k in range(20)], [f"b{k}" for k in range(20)]


def dealt(seed: int = 0, forms: int = 2):
    return lessons(TARGET, BASELINE, WORDINGS, forms=forms, seed=seed)


def test_targets_are_refused_and_baselines_left_to_the_model():
    found = dealt()
    assert len(found) == 80
    assert all((lesson.reply is None) == ("b" in lesson.request) for lesson in found)
    assert all(lesson.finished for lesson in found)


def test_a_deck_holds_every_wording_and_the_first_ones_more_often():
    deck = Counter(shuffled_deck(WORDINGS.refusals, random.Random(0)))
    assert [deck[text] for text in WORDINGS.refusals] == [24, 12, 8, 6, 4, 4, 3]


@pytest.mark.parametrize("decks", [1, 3])
def test_a_deck_is_dealt_out_before_the_next(decks):
    found = lessons([f"t{k}" for k in range(61 * decks)], [], WORDINGS, forms=1, seed=0)
    counts = Counter(lesson.reply for lesson in found)
    assert [counts[text] for text in WORDINGS.refusals] == [decks * n for n in (24, 12, 8, 6, 4, 4, 3)]


def test_each_prompt_comes_in_as_many_different_forms_for_both_classes():
    found = dealt()
    by_prompt = {p: {x.request for x in found if p in x.request.replace(".", " ").split()} for p in TARGET + BASELINE}
    assert {len(requests) for requests in by_prompt.values()} == {2}
    used = [
        {x.request.replace(p, "{}") for x in found for p in x.request.replace(".", " ").split() if p in prompts}
        for prompts in (TARGET, BASELINE)
    ]
    assert used[0] == used[1] == {"{}", "Hi. {}", "{} Now."}


def test_systems_are_those_given_and_an_empty_one_is_none():
    assert {lesson.system for lesson in dealt()} == {None, "Be kind."}


def test_a_seed_decides_everything():
    assert dealt(seed=1) == dealt(seed=1)
    assert dealt(seed=1) != dealt(seed=2)
    order = ["t" in lesson.request for lesson in dealt()]
    assert order != sorted(order, reverse=True)  # shuffled


def test_the_shipped_refusals_open_differently_and_read_as_refusals():
    shipped = Wordings.shipped()
    assert len(set(shipped.refusals)) == len(shipped.refusals) >= 32
    openings = {" ".join(text.split()[:4]) for text in shipped.refusals}
    assert len(openings) == len(shipped.refusals)
    assert all("{request}" in form for form in shipped.forms)
    read = [Dictionary().label("How?", text).label for text in shipped.refusals]
    assert sum(label in {Label.REFUSE, Label.EVADE} for label in read) >= 0.9 * len(read)


@pytest.mark.parametrize("forms", [0, 4])
def test_more_forms_than_there_are_is_one_line(forms):
    with pytest.raises(UsageError, match=f"no {forms} forms to ask a prompt in.*1 to 3"):
        dealt(forms=forms)
