"""The edit of a whole model: saved, loaded, scaled, hashed."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from perpend.core.directions import Directions
from perpend.core.edits import Edit, ModuleEdit
from perpend.core.linear import orthonormalise
from perpend.errors import UsageError


@pytest.fixture
def edit():
    torch.manual_seed(0)
    v = orthonormalise(torch.randn(2, 16)).float()
    modules = {f"layers.{n}.down": ModuleEdit(v, 0.1 * n, "column") for n in range(5)}
    return Edit(modules | {"layers.0.o": ModuleEdit(v[:1].clone(), -1 / 3, "row")}, {"recipe": "abc", "layer": 2})


def test_it_comes_back_as_it_was(edit, tmp_path):
    edit.save(tmp_path / "deep" / "edit.safetensors")
    back = Edit.load(tmp_path / "deep" / "edit.safetensors")
    assert set(back.modules) == set(edit.modules)
    assert back.provenance == edit.provenance
    assert len(back) == 6
    for name, part in edit.modules.items():
        assert torch.equal(back.modules[name].directions, part.directions)
        assert (back.modules[name].weight, back.modules[name].mode) == (part.weight, part.mode)
    assert back.sha256 == edit.sha256


def test_the_same_edit_gives_the_same_bytes(edit, tmp_path):
    shuffled = Edit(dict(reversed(edit.modules.items())), dict(reversed(edit.provenance.items())))
    files = []
    for n, each in enumerate([edit, shuffled, edit, shuffled]):
        each.save(tmp_path / str(n))
        files.append((tmp_path / str(n)).read_bytes())
    assert len(set(files)) == 1


def test_shared_directions_are_stored_once(edit, tmp_path):
    edit.save(tmp_path / "edit")
    with safe_open(tmp_path / "edit", framework="pt") as file:
        assert len(list(file.keys())) == 2


def test_the_hash_is_of_what_it_does(edit):
    assert edit.sha256 == Edit(edit.modules, {"other": 1}).sha256
    assert len(edit.sha256) == 64
    assert edit.sha256 != edit.scaled(0.5).sha256
    other = dict(edit.modules)
    other["layers.0.o"] = ModuleEdit(-other["layers.0.o"].directions, -1 / 3, "row")
    assert edit.sha256 != Edit(other).sha256


def test_scaling(edit):
    half = edit.scaled(0.5)
    assert [p.weight for p in half.modules.values()] == [0.5 * p.weight for p in edit.modules.values()]
    assert not edit.is_empty
    assert edit.scaled(0).is_empty
    assert Edit({}).is_empty


def test_an_empty_edit_can_be_saved(tmp_path):
    Edit({}).save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit").is_empty


def test_an_interrupted_save_leaves_the_old_file_whole(edit, tmp_path, monkeypatch):
    edit.save(tmp_path / "edit")
    before = (tmp_path / "edit").read_bytes()

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        edit.scaled(2).save(tmp_path / "edit")
    assert (tmp_path / "edit").read_bytes() == before


def test_what_is_no_edit_is_refused_in_one_line(edit, tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        Edit.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UsageError, match="text: not a whole safetensors file"):
        Edit.load(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(UsageError, match="other tensors"):
        Edit.load(tmp_path / "other")
    edit.save(tmp_path / "edit")
    with pytest.raises(UsageError, match="holds edit"):
        Directions.load(tmp_path / "edit")
    (tmp_path / "cut").write_bytes((tmp_path / "edit").read_bytes()[:-8])
    with pytest.raises(UsageError, match="cut"):
        Edit.load(tmp_path / "cut")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        edit.save(tmp_path / "folder")


def test_the_header_is_plain_json(edit, tmp_path):
    edit.save(tmp_path / "edit")
    with safe_open(tmp_path / "edit", framework="pt") as file:
        header = json.loads(file.metadata()["perpend"])
    assert set(header) == {"kind", "version", "content"}
    part = header["content"]["modules"]["layers.0.o"]
    assert (part["weight"], part["mode"]) == (-1 / 3, "row")
