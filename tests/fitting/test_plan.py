"""The edit is what directions and schedules ask for."""

from __future__ import annotations

import math

import pytest
import torch
from fitting_cases import directions, pair, session_on

from perpend.config import EditSection
from perpend.core.schedule import Band, Constant, NormalKernel, PerLayer
from perpend.errors import UsageError
from perpend.fitting.plan import from_layer, plan_edit, weight_factors
from perpend.models.anatomy import Anatomy

EVERYWHERE = {"attention": Constant(weight=1.0), "mlp": Constant(weight=1.0)}


def test_each_component_follows_its_own_schedule(pico_model):
    model = pico_model("llama", num_hidden_layers=5)
    anatomy, found = Anatomy.of(model), directions(5, 32)
    section = EditSection(
        attention=NormalKernel(peak_weight=0.8, peak_layer=2, spread=1.5),
        mlp=Band(peak_weight=0.4, peak_layer=3, spread=1),
    )
    edit = plan_edit(model, anatomy, section, from_layer(found, 2))
    asked = {}
    for layer in range(5):
        asked[f"model.layers.{layer}.self_attn.o_proj"] = 0.8 * math.exp(-(((layer - 2) / 1.5) ** 2) / 2)
    for layer in (2, 3, 4):  # the others have weight factor 0 and are left out
        asked[f"model.layers.{layer}.mlp.down_proj"] = 0.4
    assert {name: part.weight for name, part in edit.modules.items()} == pytest.approx(asked)


def test_the_mode_and_the_provenance_are_passed_on(pico_model):
    model = pico_model("llama")
    section = EditSection(mode="column", **EVERYWHERE)
    edit = plan_edit(model, Anatomy.of(model), section, from_layer(directions(3, 32), 1), provenance={"a": 1})
    assert {part.mode for part in edit.modules.values()} == {"column"}
    assert edit.provenance == {"a": 1}


def test_a_list_of_another_length_names_its_key(pico_model):
    section = EditSection(mlp=PerLayer(values=(1.0, 1.0)))
    with pytest.raises(UsageError, match=r"edit\.mlp: .*2 weight factors .* 3 layers"):
        weight_factors(Anatomy.of(pico_model("llama")), section)


def test_one_layer_for_all_or_each_its_own(pico_model):
    model = pico_model("llama")
    anatomy, found = Anatomy.of(model), directions(3, 32)
    one = plan_edit(model, anatomy, EditSection(**EVERYWHERE), from_layer(found, 1))
    each = plan_edit(model, anatomy, EditSection(**EVERYWHERE), from_layer(found, None))
    for writer in anatomy.writers:
        assert torch.equal(one.modules[writer.name].directions, found.vectors[1])
        assert torch.equal(each.modules[writer.name].directions, found.vectors[writer.layer])


def test_between_two_layers_the_direction_is_between(pico_model):
    found = directions(3, 32)
    writer = Anatomy.of(pico_model("llama")).writers[0]
    between = from_layer(found, 1.5)(writer)[0]
    a, b = found.vectors[1, 0], found.vectors[2, 0]
    b = b * torch.sign(a @ b)
    assert torch.allclose(between, (a + b) / (a + b).norm(), atol=1e-6)


def test_biprojected_directions_leave_out_the_baseline_mean_of_the_layer_they_are_written_to(pico_model):
    found = directions(3, 32, method="biprojected")
    for writer in Anatomy.of(pico_model("llama")).writers:
        row = from_layer(found, 1)(writer)[0]
        mean = found.baseline_mean[writer.layer]
        assert abs(float(row @ mean / mean.norm())) < 1e-6


def test_through_the_post_norm_nothing_of_the_direction_reaches_the_residual_stream(pico_dir):
    session = session_on(pico_dir("gemma3"))
    v = directions(3, 32).vectors[1, 0]
    seen: dict[bool, float] = {}
    for through in (False, True):
        section = EditSection(through_post_norm=through, **EVERYWHERE)
        edit = plan_edit(session.model, session.anatomy, section, lambda writer: v[None])
        outputs: list[torch.Tensor] = []
        handles = [
            session.model.get_submodule(w.post_norm).register_forward_hook(lambda m, x, y, to=outputs: to.append(y))
            for w in session.anatomy.writers
        ]
        with session.edited(edit):
            list(session.capture(pair(2).target.prompts))
        for handle in handles:
            handle.remove()
        seen[through] = max(float((y @ v.to(y)).abs().max() / y.norm(dim=-1).max()) for y in outputs)
    assert seen[True] < 1e-5
    assert seen[False] > 0.01


def test_without_post_norms_the_option_changes_nothing(pico_model):
    model = pico_model("llama")
    anatomy, source = Anatomy.of(model), from_layer(directions(3, 32), 1)
    plain, through = (
        plan_edit(model, anatomy, EditSection(through_post_norm=on, **EVERYWHERE), source) for on in (False, True)
    )
    assert plain.sha256 == through.sha256
