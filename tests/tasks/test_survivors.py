"""Which trials reply: along the front by its length, then beside what replied best."""

from __future__ import annotations

from perpend.searching.study import Outcome, Trial, View
from perpend.tasks.survivors import beside, first, second


def trial(slot: int, refusal: float, drift: float) -> Trial:
    return Trial(slot, slot, slot, "complete", {}, "scan", 0, None, Outcome(refusal, drift), None)


FRONT = [trial(k, 10.0 - 0.1 * k, 0.001 * 1.01**k) for k in range(20)] + [
    trial(20 + k, 7.0 - 2.5 * k, drift) for k, drift in enumerate((0.01, 0.03, 0.1, 0.3))
]
BEHIND = [trial(30 + k, 10.5 - 2 * k, 0.02 * 2**k) for k in range(4)]


def slots(trials: list[Trial]) -> list[int]:
    return [t.slot for t in trials]


def test_those_that_reply_are_spread_by_the_length_of_the_front_and_some_are_of_the_second():
    view = View(40, 8, {t.slot: t for t in [*FRONT, *BEHIND]})
    found = slots(first(view, FRONT, 6))
    assert found[:6] == [0, 19, 20, 21, 22, 23]
    assert found[6:] == slots(BEHIND)
    assert second(view, {*range(24), 30, 31}, 9) == BEHIND[2:]


def test_others_are_asked_beside_the_best_and_none_twice():
    replied = [FRONT[k] for k in (10, 0, 21, 23)]  # the best first
    found = slots(beside(FRONT, replied, 9))
    assert found == [19, 5]  # on either side of 10, by length; beside 0 is what is beside 10, and below it nothing
    assert slots(beside(FRONT, replied, 1)) == found[:1]
    assert slots(beside(FRONT, [FRONT[23], FRONT[21]], 9)) == [22, 19]
    assert beside(FRONT, FRONT, 4) == []
