"""`perpend apply MODEL.gguf -o OUT.gguf`: the file passes the gate by its weights, its bytes and what it does."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from task_cases import MACHINE, a_recipe

pytest.importorskip("gguf")
sys.path.extend(str(Path(__file__).parent.parent / name) for name in ("export", "report"))

import gguf
from beside import sound
from export_cases import an_edit, load
from gguf_cases import save_wide, write_gguf

import perpend.tasks.gguf
from perpend.cli.main import main
from perpend.errors import GateFailed, UsageError
from perpend.models.anatomy import Anatomy
from perpend.models.load import load_model
from perpend.tasks.apply import apply
from perpend.tasks.output import to_text
from perpend.tasks.pages import write_report


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


def test_the_report_beside_the_file_says_what_the_command_returned(case, tmp_path, capsys):
    source, file, recipe, edit = case
    asked = recipe.model_copy(update={"export": recipe.export.model_copy(update={"rounding": "nearest"})})
    given = {"edit": file, "output": tmp_path / "out.gguf", "recipe": asked, "machine": MACHINE}
    pages = tuple(str(tmp_path / f"out.gguf.report.{kind}") for kind in ("json", "html"))
    assert apply(source, **given, dry_run=True).pages == pages
    assert not list(tmp_path.glob("out*"))
    made = apply(source, **given)
    told = json.loads(to_text(made.to_json()))
    data, page = sound(tmp_path / "out.gguf")
    assert data == {"schema_version": 1, **told}
    assert data["pages"] == list(pages)
    assert data["file"]["names"] == ["out.gguf"]
    assert data["file"]["bytes"] == (tmp_path / "out.gguf").stat().st_size
    types = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors)
    assert data["file"]["types"] == types
    assert {m["module"] for m in data["edit"]["modules"]} == set(edit.modules)
    command = "perpend apply model.gguf --edit edit.safetensors -o out.gguf"
    assert data["about"]["command"] == (
        f"{command} --set export.gate_prompts=2 --set export.rounding=nearest --device cpu --batch-size 2"
    )
    assert page.count("<tr><td><code>model.layers.") == len(edit)
    assert f"{len(edit)} modules edited" in page
    assert f"{made.gate.same_labels} of {made.gate.prompts} replies labelled alike" in page
    assert f"difference between an asked and a realised weight factor {made.gate.worst:.3f}" in page
    assert f"{types['Q8_0']} Q8_0, {types['F32']} F32" in page
    assert main(["report", str(tmp_path / "out.gguf"), "-o", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.startswith("wrote")
    assert (tmp_path / "page.html").read_text() == page
    (tmp_path / "out.gguf").unlink()
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=r"out\.gguf\.report\.json: already exists"):
            apply(source, **given, dry_run=dry_run)


def test_a_file_that_is_not_the_edit_stays_partial(case, tmp_path, monkeypatch):
    source, file, recipe, _ = case
    bake = perpend.tasks.gguf.bake_gguf

    def half(*args, **kwargs):
        return bake(*args, **kwargs, wanted=lambda change, before, expert: before.double())

    monkeypatch.setattr(perpend.tasks.gguf, "bake_gguf", half)
    with pytest.raises(GateFailed, match="modules miss their weight factor"):
        apply(source, edit=file, output=tmp_path / "out.gguf", recipe=recipe, machine=MACHINE)
    assert (tmp_path / "out.gguf.partial").is_file()
    assert {p.name for p in tmp_path.glob("out*")} == {"out.gguf.partial"}
    with pytest.raises(UsageError, match="an earlier export stopped here"):
        apply(source, edit=file, output=tmp_path / "out.gguf", recipe=recipe, machine=MACHINE)


def test_a_model_in_parts_is_proven_by_its_weights(case, tmp_path):
    _, file, recipe, _ = case
    source = write_gguf("llama", load(tmp_path / "hf"), tmp_path / "many.gguf", "Q4_0", parts=2)
    made = apply(str(source), edit=file, output=tmp_path / "out.gguf", recipe=recipe, machine=MACHINE)
    assert made.gate.worst < 0.01
    assert made.gate.prompts == 0
    assert made.output.endswith("out.gguf")
    files = {"out-00001-of-00002.gguf", "out-00002-of-00002.gguf"}
    assert {p.name for p in tmp_path.glob("out*")} == {*files, "out.gguf.report.json", "out.gguf.report.html"}
    data, page = sound(tmp_path / "out.gguf")
    assert set(data["file"]["names"]) == files
    assert data["file"]["bytes"] == sum((tmp_path / name).stat().st_size for name in files)
    assert "Proven by its weights alone" in page
    assert write_report(tmp_path / "out-00002-of-00002.gguf").output == str(tmp_path / "out.gguf.report.html")


def test_a_model_larger_than_memory_is_proven_by_its_weights(case, tmp_path, monkeypatch):
    source, file, recipe, edit = case
    told = []
    monkeypatch.setattr(perpend.tasks.gguf, "note", told.append)
    made = apply(source, edit=file, output=tmp_path / "whole.gguf", recipe=recipe, machine=MACHINE)
    assert (made.gate.prompts, told) == (4, [])
    size = 2 * sum(t.n_elements for t in gguf.GGUFReader(source).tensors)
    enough, short = (MACHINE.model_copy(update={"memory": str(bytes_)}) for bytes_ in (size + (1 << 31), size // 2))
    monkeypatch.setattr(perpend.tasks.gguf, "free_memory", lambda device, memory: int(memory))
    monkeypatch.setattr(perpend.tasks.gguf, "open_session", lambda *given: pytest.fail("loaded"))
    made = apply(source, edit=file, output=tmp_path / "out.gguf", recipe=recipe, machine=short)
    assert made.gate.prompts == 0
    assert 0 < len(made.gate.leak) == len(edit)
    assert made.gate.worst < 0.01
    assert len(told) == 1
    assert told[0].startswith("dequantised, the model takes ")
    assert told[0].endswith("are free on cpu: the gate reads its weights alone")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        apply(source, edit=file, output=tmp_path / "more.gguf", recipe=recipe, machine=enough)


def test_a_gguf_model_that_does_not_fit_is_not_told_to_be_offloaded(case, monkeypatch):
    monkeypatch.setattr("perpend.models.places.free_memory", lambda device, memory: 1000)
    with pytest.raises(UsageError, match="a safetensors checkpoint of the model, whose layers can be read") as told:
        load_model(case[0], MACHINE)
    assert "--offload" not in str(told.value)


def test_a_gguf_output_is_not_promised_to_be_reversible(case, tmp_path):
    source, file, recipe, _ = case
    asked = recipe.model_copy(update={"export": recipe.export.model_copy(update={"reversible": True})})
    for dry_run in (False, True):
        with pytest.raises(UsageError, match=r"export\.reversible: a GGUF output cannot be taken back bit for bit"):
            apply(source, edit=file, output=tmp_path / "out.gguf", recipe=asked, machine=MACHINE, dry_run=dry_run)
    assert not list(tmp_path.glob("out*"))


def test_an_edited_gguf_file_is_not_taken_back_and_names_its_original(case, tmp_path):
    source, file, recipe, _ = case
    quick = recipe.model_copy(update={"export": recipe.export.model_copy(update={"gate_prompts": 0})})
    apply(source, edit=file, output=tmp_path / "out.gguf", recipe=quick, machine=MACHINE)
    with pytest.raises(UsageError, match=r"keeps nothing of its original.*the file that it was made from, model\.gguf"):
        apply(str(tmp_path / "out.gguf"), output=tmp_path / "back", undo=True)
    with pytest.raises(UsageError, match="keeps nothing of its original") as told:
        apply(source, output=tmp_path / "back", undo=True)
    assert "made from," not in str(told.value)
    with pytest.raises(UsageError, match="an original is written as a folder"):
        apply(str(tmp_path / "hf"), output=tmp_path / "back.gguf", undo=True)
    assert not list(tmp_path.glob("back*"))


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
