"""A candidate is scored by forward passes, beside others as it is alone; one that fails or ruins never looks good."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from scorer_cases import behaviour, directions

import pico
from perpend import drift
from perpend.config import Machine, Recipe
from perpend.core.schedule import Band, Constant
from perpend.errors import RunFailed, UsageError
from perpend.fitting.layers import Probe
from perpend.models.load import load_model
from perpend.models.recall import Recalled
from perpend.models.session import Session
from perpend.searching import forward, sheets
from perpend.searching.candidate import Candidate
from perpend.searching.forward import Scorer, likelihoods


@pytest.fixture(scope="module")
def scorer(pico_dir) -> Scorer:
    return made(pico_dir("llama"))


def made(folder, **search) -> Scorer:
    session = Session(load_model(folder), Machine(device="cpu", batch_size=4))
    recipe = Recipe.model_validate({"search": search})
    return Scorer(session, directions(session), recipe, behaviour(session))


def candidate(weight: float, rank: int = 1) -> Candidate:
    return Candidate(1.0, rank, "plain", False, Constant(weight=weight), Constant(weight=weight))


def test_the_untouched_model_has_no_drift_and_an_edit_of_nothing_is_the_same(scorer):
    nothing, some = scorer.score([candidate(0.0), candidate(0.1)])
    assert nothing.refusal == pytest.approx(scorer.untouched.refusal)
    assert nothing.drift == pytest.approx(0.0, abs=1e-9)
    assert some.drift > 0
    assert some.drift_interval[0] <= some.drift <= some.drift_interval[1]
    assert some.refusal_interval[0] <= some.refusal <= some.refusal_interval[1]
    assert (some.failed, some.dropped) == (None, None)


def test_a_score_does_not_depend_on_what_is_scored_beside_it(scorer):
    both = [candidate(0.1), candidate(0.2, 2)]
    alone = [scorer.score([c])[0] for c in both]
    for one, other in zip(scorer.score(both[::-1])[::-1], alone, strict=True):
        assert (one.refusal, one.drift) == pytest.approx((other.refusal, other.drift), abs=2e-5)


def test_a_ruined_model_is_given_nothing_for_finding_refusals_unlikely(scorer, monkeypatch):
    monkeypatch.setattr(forward, "RUIN", 1e-6)
    (found,) = scorer.score([candidate(1.0)])
    assert found.refusal == scorer.untouched.refusal
    assert "ruined" in found.dropped


def test_a_candidate_that_fails_says_why_and_the_others_go_on(scorer):
    bad = replace(candidate(1.0), layer=1.0, rank=3)
    endless = candidate(1e39)
    first, second, third = scorer.score([bad, endless, candidate(0.1)])
    assert first.failed
    assert second.failed
    assert third.failed is None
    assert third.drift > 0


def alone(scorer: Scorer, one: Candidate) -> tuple[float, float]:
    """What a candidate is worth, without the code under test: its edit is put in place and every reply read alone."""
    session, questions = scorer.session, scorer.found.questions
    edit = one.edit(session, scorer.directions, Recipe())
    odds = []
    with session.edited(edit):
        for q in questions:
            p = [math.exp(float(x.sum())) for x in session.log_likelihood([q.prompt] * len(q.replies), q.replies)]
            refused, complied = p[: len(q.refusals)], p[len(q.refusals) :]
            odds.append(math.log(fmean(refused) / fmean(complied)))
    probe = Probe.of(behaviour(session), 48)
    cost = drift.measure(session.under(None), session.under(edit), session.batches(probe.baselines, probe.answers))
    return fmean(odds), cost.mean


def various() -> list[Candidate]:
    """Candidates of every mode and rank, whose first edited layers differ, and one that edits nothing."""
    bands = [Band(peak_weight=0.2, peak_layer=place, spread=0.5) for place in (0, 1, 2)]
    plain = [Candidate(1.0, 1, "plain", False, Constant(weight=0.0), band) for band in bands]
    return [
        plain[2],
        Candidate(1.5, 2, "column", False, bands[1], Constant(weight=0.0)),
        plain[0],
        Candidate(None, 1, "row", False, Constant(weight=0.1), bands[2]),
        candidate(0.0),
        Candidate(0.3, 2, "plain", True, bands[0], bands[1]),
        plain[1],
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "phi3", "cohere2"])
def test_candidates_that_go_together_are_worth_what_each_is_alone(pico_dir, family):
    one = made(pico_dir(family), batch=5)
    assert one.room is not None
    assert one.room.rows == 5
    assert len(one.room.at) == pico.LAYERS
    for found, each in zip(one.score(various()), various(), strict=True):
        true = alone(one, each)
        assert found.failed is None
        assert found.drift == pytest.approx(true[1], abs=1e-4)
        if not found.dropped:
            assert found.refusal == pytest.approx(true[0], abs=1e-4)
            assert found.refusal_interval[0] <= found.refusal <= found.refusal_interval[1]


@pytest.mark.parametrize(("family", "together"), [("mixtral", True), ("lfm2", False), ("llama4_text", False)])
def test_what_cannot_be_a_row_of_many_goes_alone_and_is_worth_the_same(pico_dir, family, together, monkeypatch):
    one = made(pico_dir(family))
    assert (one.room is not None) == together
    went, before = [], Scorer._alone
    monkeypatch.setattr(Scorer, "_alone", lambda self, edit, rivals: (went.append(1), before(self, edit))[1])
    some = [candidate(0.1), replace(candidate(0.1), mode="column")]
    for found, each in zip(one.score(some), some, strict=True):
        assert (found.refusal, found.drift) == pytest.approx(alone(one, each), abs=1e-4)
    assert len(went) == (1 if together else 2)


def test_out_of_memory_halves_the_rows_and_then_the_batches_and_the_score_stays(scorer, monkeypatch):
    some = [candidate(0.1), candidate(0.2), candidate(0.3)]
    whole = scorer.score(some)
    together, sizes, calls = Scorer._together, [], []

    def short(self, edits, rivals):
        sizes.append(len(edits))
        if len(edits) > 1 or len(sizes) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return together(self, edits, rivals)

    def once(*given):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return likelihoods(*given)

    before = scorer.session.budget
    monkeypatch.setattr(Scorer, "_together", short)
    again = scorer.score(some)
    assert sizes == [3, 1, 1, 1]
    monkeypatch.setattr(Scorer, "_together", lambda self, edits, rivals: short(self, [*edits, *edits], rivals))
    monkeypatch.setattr(forward, "likelihoods", once)
    last = scorer.score(some[:1])
    for found, true in zip([*again, *last], [*whole, whole[0]], strict=True):
        assert (found.refusal, found.drift) == pytest.approx((true.refusal, true.drift), abs=1e-5)
    assert scorer.session.budget.forward == before.forward // 2
    scorer.session.budget = before


def small(folder, tokens: int) -> Scorer:
    """A scorer on 24 prompts whose trees hold so many tokens."""
    session = Session(load_model(folder), Machine(device="cpu"))
    session.budget = replace(session.budget, forward=tokens * 8)
    return Scorer(session, directions(session), Recipe(), behaviour(session, 24))


def test_a_candidate_that_cannot_reach_the_front_leaves_the_batch_whatever_the_batches_are(pico_dir):
    one, other = small(pico_dir("llama"), 64), small(pico_dir("llama"), 200)
    assert len(one.sheets["target"].trees) >= 2 * len(other.sheets["target"].trees)
    some = [candidate(w) for w in (0.0, 0.3, 0.02, 0.4, 0.1)]
    whole = one.score(some)
    target = max(whole, key=lambda o: -1 if o.dropped else o.drift)
    lower = tuple(x - 9 for x in target.per_target)
    rival = replace(whole[0], drift=0.0, refusal=target.refusal - 9, per_target=lower)
    raced, again = (s.score(some, rivals=[rival]) for s in (one, other))
    assert any(o.dropped and "after 12 of 24" in o.dropped for o in raced)
    for found, twin, true in zip(raced, again, whole, strict=True):
        assert found.dropped == twin.dropped
        assert (found.refusal, found.drift) == pytest.approx((twin.refusal, twin.drift), abs=2e-5)
        if found.dropped and "cannot reach" in found.dropped:
            assert true.refusal >= found.refusal >= rival.refusal
            assert true.drift >= found.drift >= rival.drift
            assert found.per_target is None
        else:
            assert (found.refusal, found.drift) == pytest.approx((true.refusal, true.drift), abs=2e-5)
    assert one.score(some, rivals=[replace(rival, drift=9.0)]) == whole


def test_what_goes_alone_is_raced_as_in_a_batch_and_the_untouched_model_is_read_once(pico_dir, monkeypatch):
    one = small(pico_dir("llama"), 200)
    some = [candidate(w) for w in (0.0, 0.3, 0.02, 0.4, 0.1)]
    whole = one.score(some)
    target = max(whole, key=lambda o: -1 if o.dropped else o.drift)
    lower = tuple(x - 9 for x in target.per_target)
    rival = replace(whole[0], drift=0.0, refusal=target.refusal - 9, per_target=lower)
    raced, logits, passes, untouched = one.score(some, rivals=[rival]), Session.logits, [], []
    one.room = None

    class Counted(Recalled):
        def __init__(self, session):
            super().__init__(session)
            inner = self._logits
            self._logits = lambda batch: (untouched.append(tuple(batch.index)), inner(batch))[1]

    monkeypatch.setattr(sheets, "Recalled", Counted)
    monkeypatch.setattr(Session, "logits", lambda self, batch: (passes.append(batch.index), logits(self, batch))[1])
    found = one.score(some, rivals=[rival])
    dropped = [o.dropped for o in found]
    assert dropped == [o.dropped for o in raced]
    assert any(told and "after 12 of 24" in told for told in dropped)
    for own, true in zip(found, raced, strict=True):
        assert (own.refusal, own.drift) == pytest.approx((true.refusal, true.drift), abs=1e-4)
    assert sorted(k for index in untouched for k in index) == list(range(12))
    one.score([some[0]])
    assert sorted(k for index in untouched for k in index) == list(range(24))
    passes.clear()
    untouched.clear()
    assert one.score([some[3]], rivals=[rival])[0].dropped
    assert max(k for index in passes for k in index) < sum(one.sheets["target"].sizes[:12])
    assert not untouched


def test_what_fails_in_a_batch_fails_alone(scorer, monkeypatch):
    some = [candidate(0.1), candidate(0.2)]
    whole, before = scorer.score(some), Scorer._alone

    def failing(self, edits, rivals):
        raise UsageError("column mode needs plain weights")

    def alone_but_first(self, edit, rivals):
        first = next(iter(edit.modules.values())).weight == 0.1
        return forward.Outcome(failed="this one") if first else before(self, edit)

    monkeypatch.setattr(Scorer, "_together", failing)
    monkeypatch.setattr(Scorer, "_alone", alone_but_first)
    first, second = scorer.score(some)
    assert first.failed == "this one"
    assert (second.refusal, second.drift) == pytest.approx((whole[1].refusal, whole[1].drift), abs=1e-4)


def test_a_scorer_that_is_told_what_is_asked_asks_the_same_and_finds_nothing_itself(scorer, monkeypatch):
    monkeypatch.setattr(forward, "find", None)
    said = behaviour(scorer.session)
    other = Scorer(scorer.session, scorer.directions, Recipe(), said, scorer.found.to_text())
    assert other.found == scorer.found
    assert other.untouched == scorer.untouched
    with pytest.raises(RunFailed, match="other targets"):
        Scorer(scorer.session, scorer.directions, Recipe(), behaviour(scorer.session, 3), scorer.found.to_text())
