"""What a search may try, what it tries next, and which point of a front it takes."""

from __future__ import annotations

from collections import Counter

import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from perpend.config import Recipe
from perpend.core.schedule import Constant, NormalKernel
from perpend.errors import UsageError
from perpend.searching.front import FLOOR, Rule, along, decades, flat, front, hypervolume, spread_out, worth
from perpend.searching.space import Seen, Space, _frozen


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
        toy.SPACE.ask(7, 3, 16, before[2:]),
    ):
        assert other != first
    assert len({str(p.params) for p in first}) == 16


def test_the_first_candidate_is_the_public_kernel_and_the_scan_goes_over_the_depth():
    found = [toy.SPACE.candidate(p.params) for p in toy.SPACE.ask(0, 0, 16, [])]
    first = found[0].attention
    assert (first.peak_weight, first.peak_layer, first.spread) == (0.55, 6.36, 1.8)
    assert len({c.layer for c in found if c.layer is not None}) >= 4
    origins = Counter(p.origin for p in toy.SPACE.ask(0, 1, 16, seen(16)))
    assert origins == {"warm start": 8, "TPESampler": 8}


def test_every_second_candidate_takes_each_layers_own_direction_however_the_others_fare():
    before = seen(16)
    for generation in (0, 1, 2, 5):
        asked = toy.SPACE.ask(7, generation, 16, before)
        assert [p.params["direction"] for p in asked] == ["one", "each"] * 8
        assert all(("layer" in p.params) == (p.params["direction"] == "one") for p in asked)
        before += [Seen(p.params, (1.0, 0.1) if p.params["direction"] == "one" else (9.0, 0.4)) for p in asked]


def test_the_scan_has_kernels_of_each_layers_own_direction_with_a_hard_edge_near_a_third_of_the_depth():
    space = Space.of(Recipe(), 30, post_norms=False)
    found = [space.candidate(p.params) for p in space.ask(0, 0, 16, [])]
    edged = [c.weights(30) for c in found if c.layer is None and c.attention.first in (9, 10, 11)]
    assert len(edged) >= 4
    assert all(not any(w["attention"][:9]) and w["attention"][15] > 0.4 for w in edged)
    assert any(c.method == "projected" for c in found)
    assert len({str(c.to_json()) for c in found}) == 16


def test_edges_outside_the_model_stand_for_none():
    params = dict(toy.SPACE.ask(0, 0, 1, [])[0].params)
    params |= {"attention.first": -0.5, "attention.last": 11.2, "mlp.first": 3.2, "mlp.last": 8.9}
    made = toy.SPACE.candidate(params)
    assert (made.attention.first, made.attention.last) == (None, None)
    assert (made.mlp.first, made.mlp.last) == (4, 8)
    assert {k for k, weight in enumerate(made.weights(12)["mlp"]) if weight} <= set(range(4, 9))
    assert "in layers 4 to 8" in made.words(12)


def test_a_variant_is_no_trial_that_was_run():
    before = [Seen(p.params, (1.0, 0.1)) for p in toy.SPACE.ask(0, 0, 16, [])]
    params = dict(before[0].params, mode="row", method="projected", rank=2)
    before[0] = Seen(params, (-5.0, 0.01))  # the best: three variants would be the same again
    asked = [p.params for p in toy.SPACE.ask(0, 1, 32, before)]
    assert all(p not in [s.params for s in before] for p in asked)
    assert len({str(p) for p in asked}) == 32


def test_the_sampler_sees_low_drift_on_a_scale_where_it_counts():
    params = toy.SPACE.ask(0, 0, 1, [])[0].params
    ranges = {name: range_ for name, range_ in toy.SPACE.ranges("one").items() if name != "direction"}
    seen = [_frozen(Seen(params, (1.0, drift)), ranges).values for drift in (0.0, 0.01, 0.1, 9.0)]
    assert [values[1] for values in seen] == pytest.approx([0.0, 1.0, 2.0, 3.30103])
    assert decades(FLOOR / 2) == decades(FLOOR) == 0


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
    kernel = {f"attention.{name}" for name in ("peak_weight", "peak_layer", "spread", "first", "last")}
    assert set(space.distributions) == {"rank", "method"} | kernel
    assert space.strata == ("one",)
    made = space.candidate(space.ask(0, 0, 4, [])[1].params)
    assert (made.layer, made.mode, made.mlp) == (6.0, "column", Constant(weight=0.3))
    assert set(Space.of(Recipe(), 12, post_norms=True).distributions["mode"].choices) == {
        "plain",
        "column",
        "row",
        "post-norm",
    }
    own = Space.of(Recipe.model_validate({"fit": {"layer": "each", "method": "biprojected"}}), 12, post_norms=False)
    assert {space_.candidate(p.params).method for space_ in [own] for p in own.ask(0, 0, 4, [])} == {"biprojected"}
    assert own.bases == (("biprojected", 1), ("biprojected", 2))
    edged = Recipe.model_validate({"edit": {"mlp": {"kind": "normal", "first": 4}}})
    assert Space.of(edged, 12, post_norms=False).fixed["mlp"] == NormalKernel(first=4)
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


shares, drifts = st.floats(0, 1), st.floats(0, 2)
points = st.lists(st.tuples(shares, drifts), min_size=1, max_size=12)


@settings(deadline=None)
@given(points=points, data=st.data())
def test_a_point_that_another_dominates_is_never_the_knee(points, data):
    acceptance, drift = data.draw(st.sampled_from(points))
    worse = (acceptance - data.draw(st.floats(0.01, 0.5)), drift + data.draw(st.floats(0, 1)))
    assert Rule().order([worse, *points], lambda p: p)[0] != worse


@settings(deadline=None)
@given(points=points, other=st.tuples(shares, drifts), best=st.floats(0.05, 1))
def test_the_knee_is_the_same_whatever_is_worth_less(points, other, best):
    knee = Rule().order(points, lambda p: p, best)[0]
    if worth(*other, best) < worth(*knee, best):
        assert Rule().order([*points, other], lambda p: p, best)[0] == knee
        assert Rule().order([other, *reversed(points)], lambda p: p, best)[0] == knee


def test_the_most_accepting_point_is_the_knee_where_it_costs_little_more():
    points = [(0.08, 0.011), (0.44, 0.063), (0.58, 0.077)]
    assert Rule().order(points, lambda p: p)[0] == (0.58, 0.077)
    assert Rule().order([*points, (0.6, 0.4)], lambda p: p)[0] == (0.58, 0.077)


def test_points_along_a_front_are_as_far_apart_as_they_can_be_and_keep_both_ends():
    dense = [(10 - 0.01 * k, 1 + 0.001 * k) for k in range(20)]
    items = [*dense, (6.0, 1.5), (3.0, 2.0), (0.0, 2.5)]
    assert along(items, 4, lambda p: p) == [dense[0], (6.0, 1.5), (3.0, 2.0), (0.0, 2.5)]
    assert along(items[:1] * 5, 2, lambda p: p) == items[:1] * 2
    assert along(items, 99, lambda p: p) == items


def test_points_spread_out_keep_both_ends():
    assert spread_out([1, 2, 3, 4, 5], 3) == [1, 3, 5]
    assert spread_out([1, 2], 5) == [1, 2]


def test_weights_that_are_quantised_are_edited_in_plain_mode_alone():
    space = Space.of(Recipe(), 12, post_norms=False, packed=True)
    assert space.distributions["mode"].choices == ("plain",)
    asked = [p for g in range(3) for p in space.ask(0, g, 16, [])]
    assert {space.candidate(p.params).mode for p in asked} == {"plain"}
    seen = [Seen(p.params, (1.0 - k / 100, 0.1)) for k, p in enumerate(asked[:16])]
    assert {space.candidate(p.params).mode for p in space.ask(0, 1, 16, seen)} == {"plain"}
