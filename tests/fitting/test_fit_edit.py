"""From prompts to an edit in the order of a recipe."""

from __future__ import annotations

import json

import pytest
import torch
from fitting_cases import Labels, mean_difference, session_on, splits

from perpend.config import EditSection, FitSection, Recipe
from perpend.core.schedule import Constant, PerLayer
from perpend.data import PromptPair
from perpend.errors import UsageError
from perpend.fitting import behaviour
from perpend.fitting.fit import fit_edit

EVERYWHERE = EditSection(attention=Constant(weight=1.0), mlp=Constant(weight=1.0))


@pytest.fixture
def session(pico_dir, monkeypatch):
    monkeypatch.setattr(behaviour, "Dictionary", Labels)
    monkeypatch.setattr(behaviour, "TOKENS", 4)
    return session_on(pico_dir("llama"))


@pytest.mark.parametrize("layer", ["0%", "50%", 1.5, "1"])
def test_a_named_layer_gives_every_module_its_direction(session, layer):
    recipe = Recipe(fit=FitSection(layer=layer, filter=False), edit=EVERYWHERE)
    found = fit_edit(session, splits(), recipe)
    assert found.layer == {"0%": 0.0, "50%": 1.5, 1.5: 1.5, "1": 1.0}[layer]
    for part in found.edit.modules.values():
        assert torch.equal(part.directions, found.directions.at(found.layer))
    assert found.choice is None
    assert found.counts == {"targets": 10, "baselines": 10}
    json.dumps(found.to_json())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(fit=FitSection(layer=3)), "fit.layer: layer 3; valid: 0 to 2"),
        (Recipe(fit=FitSection(layer="100%")), "fit.layer: layer 3; valid: 0 to 2"),
        (Recipe(fit=FitSection(layer=-1)), "fit.layer: layer -1; valid: 0 to 2"),
        (Recipe(edit=EditSection(attention=PerLayer(values=(1.0,)))), "edit.attention: the list has 1"),
    ],
)
def test_what_cannot_fit_the_model_is_said_before_it_runs(session, monkeypatch, recipe, message):
    monkeypatch.setattr(session, "generate", None)
    monkeypatch.setattr(session, "capture", None)
    with pytest.raises(UsageError) as caught:
        fit_edit(session, splits(), recipe)
    assert message in str(caught.value)


def test_only_consistent_prompts_make_the_direction(session, monkeypatch):
    parts = splits()
    odd = [p.text for p in (parts.fit.target[0], parts.fit.target[7], parts.fit.baseline[3])]
    monkeypatch.setattr(Labels, "odd", tuple(odd))
    found = fit_edit(session, parts, Recipe(fit=FitSection(layer="each"), edit=EVERYWHERE))
    pair = PromptPair(*(s.subset([p for p in s if p.text not in odd]) for s in (parts.fit.target, parts.fit.baseline)))
    assert torch.allclose(found.directions.vectors[:, 0].double(), mean_difference(session, pair), atol=1e-5)
    assert found.counts["targets refused"] == 8
    assert found.counts["baselines answered"] == 9
    assert found.edit.provenance["fit"]["target"] == pair.target.fingerprint


def test_the_layer_is_chosen_on_the_select_split(session):
    parts, stores = splits(), {}
    found = fit_edit(session, parts, Recipe(edit=EVERYWHERE), replies=lambda name: stores.setdefault(name, {}))
    assert found.layer == found.choice.layer
    assert found.layer in {c.layer for c in found.choice.candidates}
    assert set(stores["select"]) == {p.id for s in (parts.select.target, parts.select.baseline) for p in s}
    assert set(stores["fit"]) == {p.id for s in (parts.fit.target, parts.fit.baseline) for p in s}
    asked = {key for store in stores.values() for key in store}
    assert not asked & {p.id for s in (parts.report.target, parts.report.baseline) for p in s}


def test_the_iterative_strategy_says_its_steps_and_keeps_its_origin(session):
    recipe = Recipe(fit=FitSection(strategy="iterative", layer=1, filter=False, modules_per_batch=3), edit=EVERYWHERE)
    found = fit_edit(session, splits(), recipe)
    assert [len(step.modules) for step in found.steps] == [3, 3]
    assert found.edit.provenance["recipe"] == recipe.hash()
    assert len(found.edit) == 6
    json.dumps(found.to_json())
