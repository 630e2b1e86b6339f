"""A direction is fitted on prompts on which the model does what their class says."""

from __future__ import annotations

import pytest
from fitting_cases import Labels, pair, session_on

from perpend.errors import RunFailed
from perpend.fitting import behaviour
from perpend.fitting.behaviour import Behaviour, consistent, observe
from perpend.judges.labels import Label
from perpend.models.session import Reply


def seen(*labels: Label) -> tuple[tuple[Reply, Label], ...]:
    return tuple((Reply(f"reply {k}", (k,), True), label) for k, label in enumerate(labels))


def test_only_consistent_prompts_are_kept():
    both = pair(12)
    odd = {1: Label.COMPLY, 4: Label.BROKEN, 6: Label.UNKNOWN}
    target = seen(*(odd.get(k, Label.REFUSE if k % 2 else Label.EVADE) for k in range(12)))
    baseline = seen(*(Label.REFUSE if k in {0, 3} else Label.EVADE if k == 5 else Label.COMPLY for k in range(12)))
    found = Behaviour(both, target, baseline)
    kept = consistent(found)
    assert kept.target.prompts == tuple(p for k, p in enumerate(both.target) if k not in odd)
    assert kept.baseline.prompts == tuple(p for k, p in enumerate(both.baseline) if k not in {0, 3, 5})
    assert found.counts() == {"targets": 12, "targets refused": 9, "baselines": 12, "baselines answered": 9}
    assert [reply.text for _, reply in found.refused][:2] == ["reply 0", "reply 2"]


@pytest.mark.parametrize("short", ["targets refused", "baselines answered"])
def test_too_few_is_one_line_that_says_what_to_do(short):
    good = seen(*[Label.REFUSE] * 10), seen(*[Label.COMPLY] * 10)
    bad = seen(*[Label.REFUSE] * 7, *[Label.COMPLY] * 3), seen(*[Label.COMPLY] * 7, *[Label.REFUSE] * 3)
    target, baseline = (bad[0], good[1]) if short.startswith("targets") else (good[0], bad[1])
    with pytest.raises(RunFailed) as caught:
        consistent(Behaviour(pair(10), target, baseline))
    line = str(caught.value)
    assert f"{short}: only 7 of 10" in line
    assert ("target.txt" if short.startswith("targets") else "baseline.txt") in line
    assert "at least 8" in line
    assert "--no-filter" in line
    assert "\n" not in line


def test_replies_are_labelled_in_the_order_of_the_prompts_and_kept(pico_dir, monkeypatch):
    class Odd(Labels):
        odd = (pair(3).target[1].text,)

    monkeypatch.setattr(behaviour, "Dictionary", Odd)
    session, store = session_on(pico_dir("llama")), {}
    found = observe(session, pair(3), tokens=3, store=store)
    assert [label for _, label in found.target] == [Label.REFUSE, Label.COMPLY, Label.REFUSE]
    assert [label for _, label in found.baseline] == [Label.COMPLY] * 3
    assert {p.id for side in (found.pair.target, found.pair.baseline) for p in side} == set(store)
    monkeypatch.setattr(session, "_replies", None)  # nothing is generated a second time
    assert observe(session, pair(3), tokens=3, store=store) == found
