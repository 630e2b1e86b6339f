"""What the writers of one model write along a direction."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import perpend
from perpend.core.directions import Directions
from perpend.core.edits import Edit, ModuleEdit, edit_weight
from perpend.errors import UsageError
from perpend.forensics.audit import written

WRITERS = tuple(f"model.layers.{layer}.{name}" for layer in range(3) for name in ("self_attn.o_proj", "mlp.down_proj"))


def an_edit(weight: float, mode: str = "plain") -> Edit:
    v = torch.nn.functional.normalize(torch.randn(1, 32, generator=torch.Generator().manual_seed(3)), dim=1)
    return Edit({name: ModuleEdit(v, weight, mode) for name in WRITERS})


@pytest.fixture
def edited(pico_dir, tmp_path):
    """`edited(edit)` is the folder of an edited checkpoint."""

    def go(edit: Edit):
        folder = tmp_path / "edited"
        shutil.copytree(pico_dir("llama"), folder)
        tensors = load_file(folder / "model.safetensors")
        for name, part in edit.modules.items():
            tensors[f"{name}.weight"] = edit_weight(tensors[f"{name}.weight"], part)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        edit.save(tmp_path / "edit.safetensors")
        return folder

    return go


@pytest.mark.parametrize(("weight", "mode"), [(1.0, "plain"), (1.0, "column"), (0.6, "plain")])
def test_what_is_left_is_one_minus_the_weight_factor(edited, pico_dir, tmp_path, weight, mode):
    folder = edited(an_edit(weight, mode))
    found = perpend.audit(str(folder), directions=tmp_path / "edit.safetensors", base=str(pico_dir("llama")))
    assert [row.module for row in found.rows] == list(WRITERS)
    assert [row.left for row in found.rows] == pytest.approx([1 - weight] * 6, abs=1e-5)
    assert found.missing == (6 if weight == 1 else found.missing)
    assert f"{found.missing} of 6" in found.verdict or not found.missing


def test_the_unedited_model_misses_nothing(pico_dir, tmp_path):
    an_edit(1.0).save(tmp_path / "edit.safetensors")
    found = perpend.audit(str(pico_dir("llama")), directions=tmp_path / "edit.safetensors")
    assert found.missing == 0
    assert "all 6 writers" in found.verdict


def test_written_is_the_share_of_the_norm_that_a_random_direction_has_on_average():
    w = torch.randn(40, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    frames = torch.eye(40, dtype=torch.float64)[:, None]
    values = written(w, frames)
    assert float(values.square().mean()) == pytest.approx(1)
    assert values[3] == pytest.approx(float(w[3].norm() / w.norm() * 40**0.5))


def test_directions_of_a_fit_are_taken_layer_by_layer_or_from_one(pico_dir, tmp_path):
    vectors = torch.eye(32)[:3, None]
    mean = torch.zeros(3, 32)
    Directions(vectors, torch.ones(3), mean, mean.clone()).save(tmp_path / "directions.safetensors")
    model = str(pico_dir("llama"))
    own, one = (perpend.audit(model, directions=tmp_path, layer=layer) for layer in (None, 2))
    w = load_file(pico_dir("llama") / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].double()
    for found, at in ((own, 0), (one, 2)):
        assert found.rows[1].written == pytest.approx(float(w[at].norm() / w.norm() * 32**0.5), rel=1e-5)
    json.dumps(own.to_json())
    with pytest.raises(UsageError, match="--directions"):
        perpend.audit(model, layer=2)


def test_experts_in_one_tensor_are_asked_one_by_one(pico_dir, tmp_path):
    found = perpend.audit(str(pico_dir("mixtral")))
    assert found.search
    names = [w.name for w in _anatomy(pico_dir("mixtral")).writers]
    Edit({name: ModuleEdit(torch.eye(1, 32), 1.0) for name in names}).save(tmp_path / "edit.safetensors")
    rows = perpend.audit(str(pico_dir("mixtral")), directions=tmp_path / "edit.safetensors").rows
    assert {row.expert is None for row in rows} == {True, False}


def _anatomy(folder):
    from perpend.models.anatomy import Anatomy
    from perpend.models.load import skeleton
    from perpend.refs import ModelRef

    return Anatomy.of(skeleton(ModelRef.parse(str(folder)).resolve(), "pico"))
