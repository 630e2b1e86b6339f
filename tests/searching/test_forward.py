"""A candidate is scored by forward passes; one that fails or ruins the model never looks good."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import perpend.searching.forward as forward
from perpend.config import Machine, Recipe
from perpend.core.directions import Directions
from perpend.core.linear import orthonormalise
from perpend.core.schedule import Constant
from perpend.data import Prompt, PromptPair, PromptSet
from perpend.fitting.behaviour import Behaviour
from perpend.judges.labels import Label
from perpend.models.load import load_model
from perpend.models.session import Reply, Session
from perpend.searching.candidate import Candidate
from perpend.searching.forward import Scorer


def behaviour(n: int = 6) -> Behaviour:
    both = PromptPair(
        *(PromptSet(k, tuple(Prompt(f"{k} {i} ?") for i in range(n)), f"{k}.txt") for k in ("target", "baseline"))
    )
    replies = ((Reply("no", (77, 12, 5), True), Label.REFUSE), (Reply("yes", (40, 41, 42), True), Label.COMPLY))
    return Behaviour(both, *((reply,) * n for reply in replies))


def directions(session: Session) -> dict[int, Directions]:
    generator = torch.Generator().manual_seed(0)
    layers, size = session.n_layers, session.hidden_size
    found = {}
    for rank in (1, 2):
        vectors = orthonormalise(torch.randn(layers, rank, size, generator=generator)).float()
        means = torch.randn(2, layers, size, generator=generator)
        found[rank] = Directions(vectors, torch.ones(layers), means[0], means[1], {}, {})
    return found


@pytest.fixture(scope="module")
def scorer(pico_dir) -> Scorer:
    session = Session(load_model(pico_dir("llama")), Machine(device="cpu", batch_size=4))
    return Scorer(session, directions(session), Recipe(), behaviour())


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
        assert (one.refusal, one.drift) == pytest.approx((other.refusal, other.drift), abs=1e-6)


def test_a_ruined_model_is_given_nothing_for_finding_refusals_unlikely(scorer, monkeypatch):
    monkeypatch.setattr(forward, "RUIN", 1e-6)
    (found,) = scorer.score([candidate(1.0)])
    assert found.refusal == scorer.untouched.refusal
    assert "ruined" in found.dropped


def test_a_candidate_that_fails_says_why_and_the_others_go_on(scorer):
    bad = replace(candidate(1.0), layer=1.0, rank=3)
    endless = candidate(1e38)
    first, second, third = scorer.score([bad, endless, candidate(0.1)])
    assert first.failed
    assert second.failed
    assert third.failed is None
    assert third.drift > 0


def test_out_of_memory_halves_the_batch_and_the_score_stays(scorer, monkeypatch):
    (whole,) = scorer.score([candidate(0.1)])
    measure, calls = forward.drift.measure, []

    def short(*given):
        calls.append(1)
        if len(calls) < 3:
            raise torch.OutOfMemoryError("out of memory")
        return measure(*given)

    before = scorer.session.budget
    monkeypatch.setattr(forward.drift, "measure", short)
    (again,) = scorer.score([candidate(0.1)])
    assert (again.refusal, again.drift) == pytest.approx((whole.refusal, whole.drift), abs=1e-6)
    assert scorer.session.budget.forward == before.forward // 4
    scorer.session.budget = before
