"""What a search may try, what it tries next, and which point of a front it takes."""

from __future__ import annotations

import pytest
import toy

from perpend.config import Recipe
from perpend.core.schedule import Constant
from perpend.errors import UsageError
from perpend.searching.front import Rule, flat, front, hypervolume, spread_out
from perpend.searching.space import Seen, Space


def seen(n: int) -> list[Seen]:
    found = []
    for k, proposal in enumerate(toy.SPACE.ask(1, 0, n, [])):
        made = toy.score(toy.SPACE.candidate(proposal.params))
        found.append(Seen(proposal.params, None if k == 2 else (made.refusal, made.drift)))
    return found


def test_candidates_are_a_function_of_seed_generation_and_results_alone():
    before = seen(16)
    first = toy.SPACE.ask(7, 3, 16, before)
    assert toy.SPACE.ask(7, 3, 16, before) == first
    assert toy.SPACE.ask(7, 3, 5, before) == first[:5]
    for other in (
        toy.SPACE.ask(8, 3, 16, before),
        toy.SPACE.ask(7, 4, 16, before),
        toy.SPACE.ask(7, 3, 16, before[1:]),
    ):
        assert other != first
    assert len({str(p.params) for p in first}) == 16


def test_the_first_candidate_is_the_public_kernel_and_the_scan_goes_over_the_depth():
    found = [toy.SPACE.candidate(p.params) for p in toy.SPACE.ask(0, 0, 16, [])]
    first = found[0].attention
    assert (first.peak_weight, first.peak_layer, first.spread) == (0.55, 6.36, 1.8)
    assert len({c.layer for c in found}) >= 6
    origins = [p.origin for p in toy.SPACE.ask(0, 1, 16, seen(16))]
    assert origins == ["warm start"] * 8 + ["TPESampler"] * 8


def test_a_peak_weight_below_zero_leaves_the_component_alone():
    params = dict(toy.SPACE.ask(0, 0, 1, [])[0].params, **{"mlp.peak_weight": -0.1})
    made = toy.SPACE.candidate(params)
    assert made.weights(12)["mlp"] == [0.0] * 12
    assert any(made.weights(12)["attention"])
    assert "mlp left alone" in made.words(12)


def test_a_recipe_of_a_candidate_says_all_of_it():
    for proposal in toy.SPACE.ask(0, 0, 16, []):
        made = toy.SPACE.candidate(proposal.params)
        recipe = Recipe.model_validate(made.recipe(Recipe()).model_dump(mode="json"))
        assert (recipe.edit.attention, recipe.edit.mlp, recipe.edit.mode) == (made.attention, made.mlp, made.mode)
        assert recipe.fit.layer == ("each" if made.layer is None else made.layer)
        assert recipe.fit.rank == made.rank


def test_what_a_recipe_says_is_not_searched():
    recipe = Recipe.model_validate(
        {"fit": {"layer": "50%"}, "edit": {"mode": "column", "mlp": {"kind": "constant", "weight": 0.3}}}
    )
    space = Space.of(recipe, 12, post_norms=True)
    assert set(space.distributions) == {"rank", "attention.peak_weight", "attention.peak_layer", "attention.spread"}
    made = space.candidate(space.ask(0, 0, 4, [])[1].params)
    assert (made.layer, made.mode, made.mlp) == (6.0, "column", Constant(weight=0.3))
    assert set(Space.of(Recipe(), 12, post_norms=True).distributions["mode"].choices) == {
        "plain",
        "column",
        "post-norm",
    }
    with pytest.raises(UsageError, match="once"):
        Space.of(Recipe.model_validate({"fit": {"strategy": "iterative"}}), 12, post_norms=False)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_models_of_few_layers_have_a_space(n_layers):
    space = Space.of(Recipe(), n_layers, post_norms=False)
    for proposal in space.ask(0, 0, 8, []):
        layer = space.candidate(proposal.params).layer
        assert layer is None or 0 <= layer <= n_layers - 1


def test_the_front_has_no_point_that_another_beats():
    points = [(1.0, 0.3), (2.0, 0.1), (1.0, 0.2), (3.0, 0.1), (0.5, 0.9), (0.6, 1.0), (float("nan"), 0.0)]
    assert front(points, lambda p: p) == [(2.0, 0.1), (1.0, 0.2), (0.5, 0.9)]
    assert front([], lambda p: p) == []


def test_the_hypervolume_is_the_area_of_a_staircase():
    assert hypervolume([(2.0, 0.1), (1.0, 0.2)], (4.0, 0.5)) == pytest.approx(2 * 0.4 + 1 * 0.3)
    assert hypervolume([(5.0, 0.1), (1.0, 0.6)], (4.0, 0.5)) == 0
    assert flat([1.0, 2.0, 2.005, 2.01], 2)
    assert not flat([1.0, 2.0, 2.1], 2)
    assert not flat([1.0] * 9, 0)


def test_the_choice_follows_the_rule_and_is_never_the_fewest_refusals_whatever_they_cost():
    points = [(0.05, 0.0), (0.80, 0.05), (0.90, 0.12), (0.92, 0.60)]

    def take(**bounds):
        return Rule(**bounds).order(points, lambda p: p)[0]

    assert take() == (0.80, 0.05)
    assert take(max_drift=0.2) == (0.90, 0.12)
    assert take(min_acceptance=0.85) == (0.90, 0.12)
    assert take(max_drift=0.1, min_acceptance=0.7) == (0.80, 0.05)
    assert take(min_acceptance=0.99) == (0.92, 0.60)  # the nearest; the search says that it is not met
    assert not Rule(min_acceptance=0.99).met(0.92, 0.6)


def test_points_spread_out_keep_both_ends():
    assert spread_out([1, 2, 3, 4, 5], 3) == [1, 3, 5]
    assert spread_out([1, 2], 5) == [1, 2]


def test_weights_that_are_quantised_are_edited_in_plain_mode_alone():
    space = Space.of(Recipe(), 12, post_norms=False, packed=True)
    asked = [p for g in range(3) for p in space.ask(0, g, 16, [])]
    assert {space.candidate(p.params).mode for p in asked} == {"plain"}
    seen = [Seen(p.params, (1.0 - k / 100, 0.1)) for k, p in enumerate(asked[:16])]
    assert {space.candidate(p.params).mode for p in space.ask(0, 1, 16, seen)} == {"plain"}
