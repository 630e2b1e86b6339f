"""Racing: bounds that hold, at the confidence that is stated."""

from __future__ import annotations

import random
import statistics

import pytest

from perpend.searching.racing import LOOK, Race, hopeless, least_mean
from perpend.searching.study import Outcome

RIVAL = Outcome(1.0, 0.05, per_target=(1.0,) * 20)


def test_the_bound_is_below_the_mean_over_all_and_that_itself_at_the_end():
    rng = random.Random(0)
    missed = 0
    for _ in range(2000):
        whole = [rng.gauss(0.3, 2.0) for _ in range(48)]
        missed += least_mean(whole[:12], 48) > statistics.fmean(whole)
        assert least_mean(whole, 48) == statistics.fmean(whole)
    assert missed <= 16  # 0.1 % would be 2, for a standard deviation that is known
    assert least_mean([5.0] * 7, 48) == float("-inf")


def test_only_what_is_worse_in_both_numbers_is_dropped():
    worse, better = [3.0 + 0.01 * k for k in range(10)], [0.5] * 10
    found = hopeless(worse, [0.2] * 10, 20, 20, [RIVAL])
    assert "10 of 20 targets" in found.dropped
    assert RIVAL.refusal < found.refusal < statistics.fmean(worse)
    assert found.drift == pytest.approx(0.1)
    assert hopeless(better, [0.2] * 10, 20, 20, [RIVAL]) is None
    assert hopeless(worse, [0.09] * 10, 20, 20, [RIVAL]) is None  # with no more drift it would be below the rival's
    assert hopeless(worse[:5], [0.5] * 10, 20, 20, [RIVAL]) is None
    assert hopeless(worse, [0.2] * 10, 20, 20, [Outcome(1.0, 0.05)]) is None


def test_ruin_is_known_as_soon_as_the_sum_is_large_enough():
    assert "ruined" in hopeless([], [6.0, 5.0], 20, 20, []).dropped
    assert hopeless([], [6.0, 3.0], 20, 20, []) is None


def test_what_is_not_finite_leaves_and_has_failed():
    for bad in (float("nan"), float("inf")):
        assert "not finite" in hopeless([bad] * 10, [0.1] * 10, 20, 20, [RIVAL]).failed
        assert "not finite" in hopeless([1.0] * 10, [bad] * 10, 20, 20, [RIVAL]).failed


def test_looks_come_at_fixed_numbers_of_prompts_whatever_came_together():
    odds, drift = [3.0 + 0.01 * k for k in range(48)], [0.2] * 48
    found = []
    for step in (1, 5, 13, 48):
        race = Race(2, 48, 48, [Outcome(1.0, 0.04, per_target=(1.0,) * 48)])
        for first in range(0, 48, step):
            part = odds[first : first + step]
            race.add(race.odds, [[0.0] * len(part), part][: len(race.left)])
            race.add(race.drift, [drift[first : first + step]] * len(race.left))
            race.look()
        found.append((race.left, race.dropped))
    assert all(f == found[0] for f in found)
    assert found[0][0] == (0,)
    assert f"after {LOOK} of 48" in found[0][1][1].dropped


def test_what_is_dropped_is_told_as_bounds_that_its_rival_beats_though_easy_prompts_come_first():
    whole = [-5.0] * 12 + [9.0] * 36
    beaten = tuple(x - 2.0 + 0.01 * (k % 3) for k, x in enumerate(whole))
    rival = Outcome(statistics.fmean(beaten), 0.04, per_target=beaten)
    race = Race(1, 48, 48, [rival])
    race.add(race.odds, [whole[:12]])
    race.add(race.drift, [[0.3] * 12])
    race.look()
    bounds = race.dropped[0]
    assert statistics.fmean(whole[:12]) < rival.refusal < bounds.refusal <= statistics.fmean(whole)
    assert rival.drift < bounds.drift <= 0.3
