"""`perpend apply MODEL.gguf -o OUT.gguf`: the file passes the gate by its weights, its bytes and what it does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from task_cases import MACHINE, a_recipe

pytest.importorskip("gguf")
sys.path.insert(0, str(Path(__file__).parent.parent / "export"))

import gguf
from export_cases import an_edit, load
from gguf_cases import save_wide, write_gguf

import perpend.tasks.gguf
from perpend.errors import GateFailed, UsageError
from perpend.models.anatomy import Anatomy
from perpend.tasks.apply import apply


@pytest.fixture
def case(tmp_path):
    """A model as a Q8_0 file, an edit of it beside, and a recipe."""
    model = load(save_wide("llama", tmp_path / "hf"))
    source = write_gguf("llama", model, tmp_path / "model.gguf", "Q8_0")
    edit = an_edit(Anatomy.of(model), 0.7)
    edit.save(tmp_path / "edit.safetensors")
    return str(source), tmp_path / "edit.safetensors", a_recipe(tmp_path), edit


def test_the_file_passes_its_gate_and_says_where_it_came_from(case, tmp_path):
    source, file, recipe, edit = case
    made = apply(source, edit=file, output=tmp_path / "out.gguf", recipe=recipe, machine=MACHINE)
    assert made.gate.worst < 0.01
    assert made.gate.prompts == made.gate.same_labels == 4
    assert abs(made.gate.likelihood[0] - made.gate.likelihood[1]) < 0.05
    assert not made.gate.untouched.differing
    assert made.export.rounding["type"] == "q8_0"
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["perpend.edit.sha256"].contents() == edit.sha256
    assert fields["perpend.base"].contents() == "model.gguf"
    assert str(tmp_path) not in fields["perpend.recipe"].contents()
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".gguf") == ["model.gguf", "out.gguf"]
    again = apply(source, edit=file, output=tmp_path / "again.gguf", recipe=recipe, machine=MACHINE)
    assert again.to_json()["export"]["edited"] == made.to_json()["export"]["edited"]
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_a_file_that_is_not_the_edit_stays_partial(case, tmp_path, monkeypatch):
    source, file, recipe, _ = case
    bake = perpend.tasks.gguf.bake_gguf

    def half(*args, **kwargs):
        return bake(*args, **kwargs, wanted=lambda change, before, expert: before.double())

    monkeypatch.setattr(perpend.tasks.gguf, "bake_gguf", half)
    with pytest.raises(GateFailed, match="modules miss their weight factor"):
        apply(source, edit=file, output=tmp_path / "out.gguf", recipe=recipe, machine=MACHINE)
    assert (tmp_path / "out.gguf.partial").is_file()
    assert not (tmp_path / "out.gguf").exists()
    with pytest.raises(UsageError, match="an earlier export stopped here"):
        apply(source, edit=file, output=tmp_path / "out.gguf", recipe=recipe, machine=MACHINE)


def test_a_model_in_parts_is_proven_by_its_weights(case, tmp_path):
    _, file, recipe, _ = case
    source = write_gguf("llama", load(tmp_path / "hf"), tmp_path / "many.gguf", "Q4_0", parts=2)
    made = apply(str(source), edit=file, output=tmp_path / "out.gguf", recipe=recipe, machine=MACHINE)
    assert made.gate.worst < 0.01
    assert made.gate.prompts == 0
    assert made.output.endswith("out.gguf")
    assert {p.name for p in tmp_path.glob("out*")} == {"out-00001-of-00002.gguf", "out-00002-of-00002.gguf"}


def test_a_folder_is_not_written_as_a_gguf_file(case, tmp_path):
    _, file, recipe, _ = case
    with pytest.raises(UsageError, match="directly only from a GGUF file"):
        apply(str(tmp_path / "hf"), edit=file, output=tmp_path / "out.gguf", recipe=recipe, machine=MACHINE)


def test_what_cannot_be_taken_back_is_not_promised(case, tmp_path):
    source, file, recipe, _ = case
    asked = recipe.model_copy(
        update={"export": recipe.export.model_copy(update={"rounding": "q4_0", "reversible": True})}
    )
    with pytest.raises(UsageError, match="cannot be taken back"):
        apply(source, edit=file, output=tmp_path / "out", recipe=asked, machine=MACHINE)
