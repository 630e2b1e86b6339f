"""`apply --undo` gives the original of an output, and says where it cannot or not to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from task_cases import MACHINE, a_recipe, contents, names

import perpend
from perpend.cli.main import main
from perpend.errors import UsageError
from perpend.export.undo import UNDO

Dirs = Callable[[str], Path]


@pytest.fixture
def source(pico_dir: Dirs, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(pico_dir("llama"), tmp_path / "source"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A base card\n", encoding="utf-8")
    return folder


def applied(source: Path, folder: Path, weight: float = 1.0, mode: str = "plain", **export) -> Path:
    """Fit and apply; returns the output."""
    once = {"kind": "constant", "weight": weight}
    recipe = a_recipe(folder, edit={"attention": once, "mlp": once, "mode": mode}, export={"gate_prompts": 0, **export})
    perpend.fit(str(source), output=folder / "fit", recipe=recipe, machine=MACHINE)
    perpend.apply(str(source), edit=folder / "fit", output=folder / "out", recipe=recipe, machine=MACHINE)
    return folder / "out"


@pytest.mark.parametrize("mode", ["plain", "row"])
def test_a_reversible_output_becomes_its_original_bit_for_bit(source: Path, tmp_path: Path, mode: str) -> None:
    out = applied(source, tmp_path, mode=mode, reversible=True)
    assert UNDO in names(out)
    undone = perpend.apply(str(out), undo=True, output=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(source)
    assert (undone.exact, undone.growth, undone.missing) == (True, None, {})


@pytest.mark.parametrize("reversible", [True, False])
def test_the_report_of_a_source_is_not_taken_for_that_of_the_output(source: Path, tmp_path: Path, reversible) -> None:
    for name in ("report.json", "report.html", "a.gguf.report.json"):
        (source / name).write_text("of the source", encoding="utf-8")
    out = applied(source, tmp_path, 0.6, reversible=reversible)
    assert "of the source" not in (out / "report.json").read_text(encoding="utf-8")
    assert not (out / "a.gguf.report.json").exists()
    undone = perpend.apply(str(out), undo=True, output=tmp_path / "again", machine=MACHINE)
    assert not [name for name in names(tmp_path / "again") if "report" in name]
    said = "the report of the unedited model"
    told = dict.fromkeys(("a.gguf.report.json", "report.html", "report.json"), said)
    assert undone.missing == (told if reversible else {"README.md": "written anew by the edit"})


def test_without_what_was_kept_an_edit_is_inverted_and_that_is_said(source: Path, tmp_path: Path) -> None:
    out = applied(source, tmp_path, 0.6, "column")
    assert UNDO not in names(out)
    undone = perpend.apply(str(out), undo=True, output=tmp_path / "again", machine=MACHINE)
    assert (undone.exact, undone.growth) == (False, pytest.approx(2.5))
    assert undone.missing == {"README.md": "written anew by the edit"}
    assert names(tmp_path / "again") == names(source) - {"README.md"}
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "again"))
    edited = load_file(out / "model.safetensors")
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor, rtol=1e-5, atol=1e-6)
    assert sum(not torch.equal(edited[name], old[name]) for name in old) == undone.tensors


def test_what_cannot_be_undone_is_refused_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    out = applied(source, tmp_path)
    before = names(tmp_path)
    for folder, what in ((out, "nothing of the direction is left"), (source, "neither original.undo nor")):
        with pytest.raises(UsageError, match=what):
            perpend.apply(str(folder), undo=True, output=tmp_path / "again", machine=MACHINE)
    with pytest.raises(UsageError, match="--undo takes an output and nothing else"):
        perpend.apply(str(out), undo=True, edit=out, output=tmp_path / "again")
    assert names(tmp_path) == before


def test_the_command_says_what_was_restored(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = applied(source, tmp_path, reversible=True)
    assert main(["apply", str(out), "--undo", "-o", str(tmp_path / "again")]) == 0
    assert "6 tensors restored; every file is the original's" in capsys.readouterr().out
    assert contents(tmp_path / "again") == contents(source)
