"""How long trials may go on, so that a search ends about when it was asked to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import perpend.tasks.budget as budgets
from perpend.config import Recipe
from perpend.models.session import Reply
from perpend.progress import reporting
from perpend.tasks.budget import Budget, Pace, after_trials, measured_pace

SEARCH = {"prompts": 10, "survivors": 8, "finalists": 4, "refine": 20}
EVAL = {"max_new_tokens": 128, "control_prompts": 6}


@pytest.fixture
def clock(monkeypatch):
    made = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(budgets, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def pair(n: int) -> SimpleNamespace:
    prompts = [[SimpleNamespace(id=f"{kind}{k}") for k in range(n)] for kind in ("t", "b")]
    return SimpleNamespace(target=prompts[0], baseline=prompts[1])


def site(minutes: float | None, **search) -> SimpleNamespace:
    data = {"search": {**SEARCH, "minutes": minutes, **search}, "eval": EVAL, "export": {"gate_prompts": 2}}
    splits, kept = SimpleNamespace(fit=pair(30), select=pair(20), report=pair(25)), {}
    ledger = SimpleNamespace(settings=lambda: kept, keep=kept.__setitem__)
    return SimpleNamespace(recipe=Recipe.model_validate(data), splits=splits, ledger=ledger)


SHORT = (8 + 4 + 4) * 10
"""Survivors, those of the second front and those beside the best, on the targets of the score."""
FULL = 5 * (20 + 10) + 2 * 50 + 6 + 4 * 2
"""Finalists and the refined one; before and after on the report split; the control; the gate."""


def test_what_comes_after_the_trials_is_counted_reply_by_reply():
    one = site(10)
    assert after_trials(one.recipe, one.splits, Pace(0.01, 100.0)) == pytest.approx(0.01 * (SHORT * 32 + FULL * 100))
    assert after_trials(one.recipe, one.splits, Pace(0.01, 20.0)) == pytest.approx(0.01 * (SHORT + FULL) * 20)


def view(*taken: float) -> SimpleNamespace:
    return SimpleNamespace(finished=lambda: [SimpleNamespace(seconds=s) for s in taken])


def test_trials_leave_the_time_that_the_rest_takes(clock):
    one, pace = site(10), Pace(0.005, 100.0)
    clock.now += 60  # loading and directions
    budget = Budget(one, 1000.0, pace, loading=7.0)
    after = 7 + after_trials(one.recipe, one.splits, pace)
    assert budget.kept == pytest.approx(after)
    assert budget.left() == pytest.approx(540 - after)
    budget.saw(view(1.0, 3.0))
    assert budget.kept == pytest.approx(after + 20 * budgets.STEP * 2.0)  # refinement, as long as its trials take
    clock.now = 1000 + 600 - budget.kept - 1e-3
    assert budget.over() is None
    clock.now += 2e-3
    assert budget.over() == "10 minutes have passed, less 3 min 34 s for replies, choice and proof"


def test_trials_have_a_quarter_of_what_is_left_and_it_is_said_what_the_rest_takes(clock):
    clock.now += 200
    budget, noted = Budget(site(10), 1000.0, Pace(1.0, 100.0), loading=0.0), []
    assert budget.left() == pytest.approx(100)
    with reporting(SimpleNamespace(note=noted.append)):
        budget.tell()
    (line,) = noted
    assert line.startswith("of 10 minutes, 5 min 00 s are kept for replies, choice and proof, which take about 8 h 45")
    assert "--limit" in line


def test_half_is_kept_where_nothing_was_measured_and_nothing_where_no_minutes_were_asked_for(clock):
    assert Budget(site(10), 1000.0, None, loading=0.0).left() == pytest.approx(300)
    free = Budget(site(None), 1000.0, None, loading=0.0)
    clock.now += 1e9
    assert free.over() is None
    with reporting(SimpleNamespace(note=pytest.fail)):
        free.tell()


def test_the_pace_is_measured_on_replies_that_the_choice_finds_again(clock):
    one, store = site(10), {}

    def stores(name: str) -> dict[str, Reply]:
        assert name == "full-untouched"
        return store

    class Said:
        """Two replies are there; the others take 0.02 s a token. Targets get 10 tokens, baselines 60."""

        def untouched(self) -> None:
            asked = [(p.id, 10) for p in one.splits.select.target]
            asked += [(p.id, 60) for p in one.splits.select.baseline[:10]]
            for name, tokens in asked:
                if name not in store:
                    clock.now += 0.02 * tokens
                    store[name] = Reply("", (0,) * tokens, True)

    store |= {"t0": Reply("", (0,) * 10, True), "b0": Reply("", (0,) * 60, True)}
    assert measured_pace(one, Said(), stores) == Pace(pytest.approx(0.02), 60.0)
    again = measured_pace(one, Said(), stores)  # nothing is left to measure: what was measured then
    assert again == Pace(pytest.approx(0.02), 60.0)
    assert measured_pace(site(10), Said(), stores) is None
