"""Small forms of an edit: an adapter beside the base model, and a control vector for unedited weights."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from task_cases import MACHINE, a_recipe, names

sys.path.insert(0, str(Path(__file__).parent.parent / "report"))

from beside import sound

import perpend
from perpend.cli.main import main
from perpend.core.directions import Directions
from perpend.core.edits import Edit
from perpend.errors import UsageError
from perpend.models.load import load_model

Dirs = Callable[[str], Path]


@pytest.fixture(scope="module")
def fitted(pico_dir: Dirs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    recipe = a_recipe(folder, edit={"mode": "plain"})
    perpend.fit(str(pico_dir("llama")), output=folder / "fit", recipe=recipe, machine=MACHINE)
    return folder / "fit"


# ------------------------------------------------------------------------------------------------------ adapter


def test_an_adapter_says_what_it_is_and_is_the_edit(pico_dir: Dirs, fitted: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from huggingface_hub import ModelCard

    model, out = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(pico_dir("llama"), model)
    (model / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    made = perpend.adapter(str(model), edit=fitted, output=out, machine=MACHINE)
    assert made.adapter.exact
    expected = {"adapter_config.json", "adapter_model.safetensors", "edit.safetensors", "recipe.toml", "README.md"}
    expected |= {"report.json", "report.html"}
    assert names(out) == expected
    page = (out / "report.html").read_text()
    assert "the edit itself, to the rounding of float32" in page
    assert "Schedule" in page
    assert Edit.load(out / "edit.safetensors").sha256 == Edit.load(fitted / "edit.safetensors").sha256
    card = ModelCard.load(out / "README.md")
    assert (card.data.library_name, card.data.license, card.data.base_model) == ("peft", "mit", None)
    assert "to the rounding of float32" in card.text
    perpend.apply(str(model), edit=fitted, output=tmp_path / "out", machine=MACHINE)
    edited = load_model(tmp_path / "out").model.state_dict()
    merged = peft.PeftModel.from_pretrained(load_model(model).model, str(out)).merge_and_unload().state_dict()
    for name, value in edited.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)


def test_the_command_says_what_a_column_wise_adapter_leaves_out(
    pico_dir: Dirs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = a_recipe(tmp_path, edit={"mode": "column"})
    perpend.fit(str(pico_dir("llama")), output=tmp_path / "fit", recipe=recipe, machine=MACHINE)
    line = ["adapter", str(tmp_path / "fit" / "recipe.toml"), "-o", str(tmp_path / "adapter"), "--rank", "4"]
    assert main([*line, "--dry-run"]) == 0
    assert "would write" in capsys.readouterr().out
    assert names(tmp_path) == {"fit", "target.txt", "baseline.txt"}
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "left out of a module's change" in said
    assert "% at most" in said
    for name in ("README.md", "report.html"):
        assert "is left out" in (tmp_path / "adapter" / name).read_text(encoding="utf-8")
    assert main(line) == 2


# ----------------------------------------------------------------------------------------------- control vector


def test_a_control_vector_moves_targets_to_where_baselines_lie(fitted: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    planned = perpend.vector(fitted, output=tmp_path / "v.gguf", dry_run=True)
    assert names(tmp_path) == set()
    made = perpend.vector(fitted, output=tmp_path / "v.gguf")
    assert (planned.layers, planned.norms) == (made.layers, made.norms)
    directions = Directions.load(fitted / "directions.safetensors")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert [tensor.name for tensor in reader.tensors] == ["direction.1"]
    assert reader.tensors[0].tensor_type == gguf.GGMLQuantizationType.F32
    shift, v = torch.tensor(reader.tensors[0].data), directions.vectors[1]
    moved = (directions.target_mean[1] + shift) @ v.T
    torch.testing.assert_close(moved, directions.baseline_mean[1] @ v.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shift - v.T @ (v @ shift), torch.zeros_like(shift), rtol=0, atol=1e-5)
    assert made.layers == (1,)
    assert names(tmp_path) == {"v.gguf", "v.gguf.report.json", "v.gguf.report.html"}


def test_the_report_of_a_control_vector_says_what_it_adds_and_how_the_classes_lie(fitted: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    made = perpend.vector(fitted, output=tmp_path / "v.gguf", layers="1-2")
    assert made.pages == tuple(str(tmp_path / f"v.gguf.report.{kind}") for kind in ("json", "html"))
    data, page = sound(tmp_path / "v.gguf")
    directions = Directions.load(fitted / "directions.safetensors")
    before = json.loads((fitted / "report.json").read_text())
    assert [(x["layer"], x["apart"]) for x in data["vector"]["shifts"]] == [
        (layer, pytest.approx(float(directions.raw_norm[layer]))) for layer in made.layers
    ]
    for norm in made.norms:
        assert f"<td>{norm:.4g}</td>" in page
    assert data["fit"]["diagnostics"]["auc"] == directions.diagnostics["auc"]
    assert data["fit"]["cosines"] == before["fit"]["cosines"]
    assert data["fit"]["counts"] == before["fit"]["counts"]
    assert data["about"]["model"] == before["about"]["model"]
    assert data["about"]["command"] == "perpend vector fit -o v.gguf --layers 1-2"
    for part in ("Separation by layer", "Directions of every two layers", "--control-vector-scaled v.gguf:1.0"):
        assert part in page
    assert "Every module takes" not in page
    assert 'id="edit"' not in page


def test_a_control_vector_of_directions_alone_is_reported_too(fitted: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    shutil.copy(fitted / "directions.safetensors", tmp_path / "mine.safetensors")
    (tmp_path / "report.json").write_text(
        (fitted / "report.json").read_text().replace('"raw_norm": [', '"raw_norm": [1,')
    )
    perpend.vector(tmp_path / "mine.safetensors", output=tmp_path / "v.gguf", layers="1")
    data, page = sound(tmp_path / "v.gguf")
    assert "counts" not in data["fit"]  # the report in that folder is of other directions
    assert "model" not in data["about"]
    assert data["fit"]["layer"] == 1
    assert "Fitted on" not in page


@pytest.mark.parametrize("taken", ["v.gguf.report.json", "v.gguf.report.html"])
def test_a_report_that_is_there_already_is_not_overwritten(fitted: Path, tmp_path: Path, taken: str) -> None:
    pytest.importorskip("gguf")
    (tmp_path / taken).write_text("mine")
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=f"{taken}: already exists"):
            perpend.vector(fitted, output=tmp_path / "v.gguf", dry_run=dry_run)
    assert names(tmp_path) == {taken}
    assert (tmp_path / taken).read_text() == "mine"


def test_several_layers_share_what_is_added(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf")
    assert main(["vector", str(fitted), "-o", str(tmp_path / "v.gguf"), "--layers", "1-2"]) == 0
    said = capsys.readouterr().out
    assert "after layer 1 by" in said
    assert [line for line in said.splitlines() if line.startswith("wrote ")][1:] == [
        f"wrote {tmp_path / name}" for name in ("v.gguf.report.json", "v.gguf.report.html")
    ]
    one = perpend.vector(fitted / "directions.safetensors", output=tmp_path / "one.gguf", layers="2")
    shared = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "v.gguf").tensors}
    alone = gguf.GGUFReader(tmp_path / "one.gguf").tensors[0]
    assert set(shared) == {"direction.1", "direction.2"}
    torch.testing.assert_close(torch.tensor(shared["direction.2"] * 2), torch.tensor(alone.data))
    assert one.layers == (2,)


@pytest.mark.parametrize(("name", "hint"), [("v.txt", "v.gguf"), ("v", "v.gguf"), ("v.gguf.bin", "v.gguf.gguf")])
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_control_vector_is_a_file_of_that_name(
    fitted: Path, tmp_path: Path, name: str, hint: str, dry_run: bool
) -> None:
    message = f"{name}: not the name of a GGUF file; valid: NAME.gguf; try: -o {tmp_path / hint}"
    with pytest.raises(UsageError, match=re.escape(message)):
        perpend.vector(fitted, output=tmp_path / name, dry_run=dry_run)
    with pytest.raises(UsageError, match=re.escape(message)):
        perpend.export_gguf(fitted, output=tmp_path / name, dry_run=dry_run)
    assert names(tmp_path) == set()


def test_an_adapter_is_no_gguf_file(fitted: Path, tmp_path: Path) -> None:
    message = f"a.GGUF: the name of a GGUF file, and a folder is made; try: -o {tmp_path / 'a'}"
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=re.escape(message)):
            perpend.adapter(fitted / "recipe.toml", output=tmp_path / "a.GGUF", machine=MACHINE, dry_run=dry_run)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("layers", "message"),
    [("0", "layers 0 to 0; valid: 1 to 2"), ("1-3", "layers 1 to 3"), ("2-1", "layers 2 to 1"), ("x", "--layers")],
)
def test_layers_that_cannot_add_are_refused(fitted: Path, tmp_path: Path, layers: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        perpend.vector(fitted, output=tmp_path / "v.gguf", layers=layers)
    assert names(tmp_path) == set()


def test_a_vector_needs_a_fit_and_a_layer(fitted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no directions.safetensors; try: perpend fit"):
        perpend.vector(tmp_path, output=tmp_path / "v.gguf")
    directions = tmp_path / "directions.safetensors"
    directions.write_bytes((fitted / "directions.safetensors").read_bytes())
    with pytest.raises(UsageError, match="chose no single layer"):
        perpend.vector(tmp_path, output=tmp_path / "v.gguf")
