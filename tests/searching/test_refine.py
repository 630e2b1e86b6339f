"""Refinement: the objective falls, the leash holds, and what comes out is what was scored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scorer_cases import behaviour, directions

from perpend.config import Machine, Recipe
from perpend.core.edits import edit_weight
from perpend.core.schedule import Constant, NormalKernel
from perpend.errors import RunFailed, UsageError
from perpend.models.load import load_model
from perpend.models.session import Session
from perpend.searching import refine as descent
from perpend.searching import sheets
from perpend.searching.candidate import Candidate
from perpend.searching.forward import Scorer
from perpend.searching.objectives import Question
from perpend.searching.refine import _Descent, refine

LEASH = 0.3


def made(folder) -> Scorer:
    session = Session(load_model(folder), Machine(device="cpu"))
    return Scorer(session, directions(session), Recipe(), behaviour(session))


@pytest.fixture(scope="module")
def scorer(pico_dir) -> Scorer:
    return made(pico_dir("llama"))


START = Candidate(1.0, 1, "plain", False, Constant(weight=0.1), Constant(weight=0.1))


@pytest.mark.parametrize("mode", ["plain", "column"])
def test_the_objective_falls_and_the_leash_and_the_bound_hold(scorer, mode):
    start = replace(START, mode=mode)
    found = refine(scorer.session, scorer, start, steps=20, max_drift=LEASH, bound=0.8)
    assert found.outcome.refusal < found.start.refusal - 0.1
    assert found.outcome.drift <= LEASH
    values = [*found.candidate.attention.values, *found.candidate.mlp.values]
    assert min(values) >= 0
    assert max(values) <= 0.8
    assert len(found.history) == 4
    assert found.candidate == refine(scorer.session, scorer, start, steps=20, max_drift=LEASH, bound=0.8).candidate


def test_a_leash_shorter_than_the_drift_of_the_start_pulls_it_back(scorer):
    found = refine(scorer.session, scorer, START, steps=10, max_drift=1e-3)
    assert found.start.drift > 1e-3 >= found.outcome.drift


def test_a_start_at_the_end_of_the_leash_is_returned_unless_refusal_falls(scorer):
    (start,) = scorer.score([START])
    for leash in (round(start.drift, 5), start.drift - 5e-6):
        found = refine(scorer.session, scorer, START, steps=5, max_drift=leash)
        assert found.outcome.refusal <= start.refusal


def test_the_start_is_what_the_candidate_is_whatever_the_bound(scorer):
    strong = replace(START, attention=Constant(weight=1.45), mlp=Constant(weight=0.3))
    work = _Descent(scorer.session, scorer, strong, 1.2, False, ())
    assert work.result(False)[0].weights(scorer.session.n_layers) == strong.weights(scorer.session.n_layers)
    found = refine(scorer.session, scorer, strong, steps=3, max_drift=9.0)
    assert max(found.candidate.weights(scorer.session.n_layers)["attention"]) <= 1.45


def test_what_is_held_out_changes_no_step_and_no_choice(scorer, monkeypatch):
    options = {"steps": 5, "max_drift": LEASH, "held_out": (1, 4)}
    found = refine(scorer.session, scorer, START, **options)
    assert found.candidate != refine(scorer.session, scorer, START, steps=5, max_drift=LEASH).candidate
    own = Question.log_odds
    hidden = {scorer.found.questions[k].prompt.id for k in options["held_out"]}
    monkeypatch.setattr(Question, "log_odds", lambda q, x: own(q, x) * (100.0 if q.prompt.id in hidden else 1.0))
    assert scorer.score([START])[0].refusal != pytest.approx(found.start.refusal, rel=0.1)
    assert refine(scorer.session, scorer, START, **options).candidate == found.candidate
    with pytest.raises(UsageError, match="held out"):
        refine(scorer.session, scorer, START, held_out=range(6))


def test_the_gradient_is_that_of_the_objective(scorer):
    work = _Descent(scorer.session, scorer, START, 1.2, False, ())
    work.descend([0], [0], 0.01, 0.5)
    gradient = work.factors.grad.clone()
    for part, layer in ((0, 0), (1, 2)):
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                work.factors[part, layer] += step
            ends.append(work.descend([0], [0], 0.01, 0.5))
            with torch.no_grad():
                work.factors[part, layer] -= step
        assert float(gradient[part, layer]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.02, abs=0.02)


def short_of_memory(patch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Let memory hold the activations of trees of so many tokens; gives the sizes of those that went through."""
    gone = []

    def together(planted, *given):
        if torch.is_grad_enabled() and len(planted.tree) > tokens:
            raise torch.OutOfMemoryError("out of memory")
        gone.append(len(planted.tree))
        return sheets.together(planted, *given)

    patch.setattr(descent, "together", together)
    return gone


def test_where_memory_is_short_trees_are_halved_and_a_step_is_the_same(scorer, monkeypatch):
    work = _Descent(scorer.session, scorer, START, 1.2, True, (2,))
    trees = {kind: [k for k, _ in enumerate(sheet.trees)] for kind, sheet in scorer.sheets.items()}
    given = (trees["target"], trees["baseline"], 1e-3, 0.5)
    loss, gradients = work.descend(*given), [x.grad.clone() for x in work._parameters]
    single = max(len(half[1].tree) for sheet in scorer.sheets.values() for half in single_prompts(sheet))
    whole = max(len(tree.tree) for sheet in scorer.sheets.values() for _, tree in sheet.trees)
    assert single < whole
    gone = short_of_memory(monkeypatch, single)
    assert work.descend(*given) == pytest.approx(loss, rel=1e-5)
    assert max(gone) <= single
    for parameter, gradient in zip(work._parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)
    gone.clear()
    work.descend(*given)
    assert max(gone) <= single  # the halves stay


def single_prompts(sheet):
    parts = [tree for tree in sheet.trees]
    while any(sheet.halves(of) for of, _ in parts):
        parts = [half for part in parts for half in sheet.halves(part[0]) or [part]]
    return parts


def test_a_prompt_that_memory_does_not_hold_ends_the_refinement_in_one_line(scorer, monkeypatch):
    short_of_memory(monkeypatch, 8)
    with pytest.raises(RunFailed, match="out of memory on a single prompt"):
        refine(scorer.session, scorer, START, steps=2, max_drift=LEASH)


@pytest.mark.parametrize("mode", ["plain", "column"])
def test_what_comes_out_is_worth_the_same_with_its_exported_weights(pico_dir, mode):
    scorer = made(pico_dir("llama"))
    session = scorer.session
    found = refine(session, scorer, replace(START, mode=mode), steps=5, max_drift=LEASH)
    edit = found.candidate.edit(session, scorer.directions, scorer.recipe)
    for name, part in edit.modules.items():
        weight = session.model.get_submodule(name).weight
        weight.data = edit_weight(weight.data, part)
    questions = scorer.found.questions
    likely = [
        torch.stack([s.sum() for s in session.log_likelihood([q.prompt] * len(q.replies), q.replies)])
        for q in questions
    ]
    odds = [float(q.log_odds(x[None])[0]) for q, x in zip(questions, likely, strict=True)]
    assert sum(odds) / len(odds) == pytest.approx(found.outcome.refusal, abs=1e-3)
    assert edit.modules


def test_a_result_can_be_projected_to_kernels_and_is_scored_as_such(scorer):
    found = refine(scorer.session, scorer, START, steps=5, max_drift=LEASH, kernel=True)
    again = scorer.score([found.candidate])[0]
    assert (again.refusal, again.drift) == pytest.approx((found.outcome.refusal, found.outcome.drift), abs=1e-4)
    assert {type(found.candidate.attention), type(found.candidate.mlp)} <= {NormalKernel, Constant}


def test_a_refined_direction_is_unit_and_does_better_than_the_weight_factors_alone(scorer):
    options = {"steps": 30, "max_drift": LEASH}
    turned = refine(scorer.session, scorer, START, direction=True, **options)
    assert turned.outcome.refusal < turned.start.refusal
    assert turned.outcome.drift <= LEASH
    again = scorer.score([turned.candidate], directions=turned.directions)[0]
    assert again.refusal == pytest.approx(turned.outcome.refusal, abs=1e-4)
    vectors = turned.directions["mean", 1].vectors
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:2]))
    moved = (vectors - scorer.directions["mean", 1].vectors).norm(dim=-1).flatten() > 1e-4
    assert moved.nonzero().flatten().tolist() == [1]


def test_what_cannot_be_refined_is_said(scorer):
    with pytest.raises(UsageError, match="one direction that all layers share"):
        refine(scorer.session, scorer, replace(START, layer=None), direction=True)
    with pytest.raises(UsageError, match="bound"):
        refine(scorer.session, scorer, START, bound=0.0)
