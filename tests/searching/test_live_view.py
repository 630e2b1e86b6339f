"""What is shown of a search while it goes on: pace, time left, the front, the best by rule, what replied."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
import toy
from rich.console import Console

import perpend.tasks.trials as trials
from perpend.cli import search_views
from perpend.config import Recipe
from perpend.progress import reporting
from perpend.searching.front import Rule
from perpend.searching.study import Ledger, Outcome
from perpend.searching.workers import work


class Screen:
    """Keeps what a person would have seen."""

    def __init__(self) -> None:
        self.stood: list[str] = []
        self.noted: list[str] = []

    def standing(self, message: str) -> None:
        self.stood.append(message)

    def note(self, message: str) -> None:
        self.noted.append(message)


def shown(tmp_path, monkeypatch, left: float, **search):
    """Run a search of 24 trials in batches of 4, of which each takes 10 s; returns the screen, events and the study."""
    ledger, clock = Ledger(tmp_path / "study.log", "alone"), SimpleNamespace(now=100.0)
    ledger.create()
    monkeypatch.setattr(trials, "time", SimpleNamespace(monotonic=lambda: clock.now))
    recipe = Recipe.model_validate({"search": {"trials": 24, **search}})
    site = SimpleNamespace(recipe=recipe, plan=toy.PLAN, view=lambda: ledger.view(8, 4))
    told, reached, screen = [], [], Screen()

    def evaluate(candidates, rivals):
        clock.now += 10
        return [toy.score(c) for c in candidates]

    with reporting(screen):
        watch = trials.Progress(site, lambda name, data: told.append((name, data)), reached.append, lambda: left)
        work(ledger, toy.PLAN, evaluate, limit=24, patience=0, stop=lambda: None, watch=watch)
    assert reached[-1] == 24
    return screen, told, site.view()


def test_after_every_batch_the_front_the_best_the_pace_and_the_time_left_are_told(tmp_path, monkeypatch):
    screen, told, view = shown(tmp_path, monkeypatch, left=25.0)
    fronts = [data for name, data in told if name == "front"]
    assert [data["trials"] for data in fronts] == [4, 8, 12, 16, 20, 24]
    assert len(screen.stood) == 6
    assert {data["per_minute"] for data in fronts} == {24.0}  # 4 in 10 s
    assert [data["seconds_left"] for data in fronts] == [25.0, 25.0, 25.0, 20.0, 10.0, 0.0]  # the nearer of two ends
    volumes = [data["hypervolume"] for data in fronts]
    assert volumes == sorted(volumes)
    assert volumes[-1] == pytest.approx(toy.PLAN.volumes(view, 24)[-1], abs=1e-4)
    edge = trials.edge(view, toy.PLAN.untouched)
    assert [point["slot"] for point in fronts[-1]["front"]] == [t.slot for t in edge]
    assert fronts[-1]["best"] == trials.best_by(Rule(), edge, toy.PLAN.untouched).slot
    first = screen.stood[3].splitlines()[0]
    assert first == "16 of 24 trials, 24.0 a minute, at most 20.0 s left"
    assert f"front of {len(edge)}, from refusal 4.00 untouched; * the knee" in screen.stood[-1].splitlines()[1]


@pytest.mark.parametrize("bound", [0.05, 0.2])
def test_up_to_six_points_of_the_front_are_shown_and_the_best_by_rule_is_one_of_them(tmp_path, monkeypatch, bound):
    made = iter([Outcome(3.9 - 0.1 * k, 0.004 * 1.2**k) for k in sorted(range(24), key=lambda k: 7 * k % 24)])
    monkeypatch.setattr(toy, "score", lambda candidate: next(made))  # every trial lies on the front
    screen, told, view = shown(tmp_path, monkeypatch, left=1e9, max_drift=bound)
    edge = {t.slot: t for t in trials.edge(view, toy.PLAN.untouched)}
    lines = screen.stood[-1].splitlines()[2:]
    assert (len(edge), len(lines)) == (24, 6)
    found = [re.fullmatch(r"([* ]) trial (\d+) +refusal +(-?[\d.]+) +drift ([\d.]+)", line) for line in lines]
    slots = [int(match[2]) for match in found]
    assert [slots[k] for k, match in enumerate(found) if match[1] == "*"] == [told[-1][1]["best"]]
    assert edge[told[-1][1]["best"]].outcome.drift <= bound
    for match in found:
        outcome = edge[int(match[2])].outcome
        assert (float(match[3]), float(match[4])) == pytest.approx((outcome.refusal, outcome.drift), abs=6e-3)
    assert [t.outcome.drift for t in map(edge.get, slots)] == sorted(t.outcome.drift for t in map(edge.get, slots))


def test_a_failed_trial_is_noted_once(tmp_path, monkeypatch):
    calls = []

    def failing(candidate):
        calls.append(candidate)
        return Outcome(failed="a test") if len(calls) in (2, 3, 9) else Outcome(1.0, 0.1)

    monkeypatch.setattr(toy, "score", failing)
    screen, _, _ = shown(tmp_path, monkeypatch, left=1e9)
    assert screen.noted == [f"trial {slot} failed: a test" for slot in (1, 2, 8)]


def test_where_nothing_refuses_less_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "score", lambda candidate: Outcome(5.0, 0.1))
    screen, told, _ = shown(tmp_path, monkeypatch, left=1e9)
    assert screen.stood[-1].endswith("; none refuses less than the untouched model")
    assert not [name for name, _ in told if name == "front"]


def read(view) -> str:
    console = Console(file=io.StringIO(), width=200)
    for part in view:
        console.print(part)
    return console.file.getvalue().strip()


def test_each_survivor_and_each_finalist_is_a_line():
    def rate(k: int, n: int = 8) -> dict:
        return {"k": k, "n": n, "share": k / n, "interval": [0.1, 0.9]}

    point = {"name": "trial 3", "refusal": 3.8612, "drift": 0.05123}
    short = {**point, "accepted_shortly": rate(5), "refused_shortly": rate(2)}
    full = {**point, "acceptance": rate(4), "refused": rate(3), "broken": rate(1), "broken_baselines": rate(0)}
    assert set(search_views.PARTS) >= {"survivor", "finalist"}
    assert read(search_views.PARTS["survivor"](short)) == (
        "trial 3: short replies: 5/8 [10% – 90%] accepted, 2/8 refused; refusal 3.86 by score, drift 0.0512"
    )
    assert read(search_views.PARTS["finalist"](full)) == (
        "trial 3: judged at full length: 4/8 [10% – 90%] accepted, 3/8 refused, broken 1/8 of targets, "
        "0/8 of baselines; refusal 3.86 by score, drift 0.0512"
    )
