"""Fit: the same directions with and without interruption, and nothing half-made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from task_cases import MACHINE, Labels, a_recipe, contents, counting, names, stopping

import perpend.tasks.setup as setup
from perpend.core.directions import Directions
from perpend.core.edits import Edit
from perpend.core.residuals import ResidualFitter
from perpend.errors import Interrupted, RunFailed, UsageError
from perpend.fitting import behaviour
from perpend.models import session as sessions
from perpend.models.session import Session
from perpend.tasks.fit import fit
from perpend.tasks.recipes import find_edit, read_recipe

MADE = {"directions.safetensors", "edit.safetensors", "recipe.toml", "report.json", "report.html"}
BYTES = ("directions.safetensors", "edit.safetensors")


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(sessions, "WINDOW", 2)


def same(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in BYTES)


def test_what_is_written_can_be_read_back(pico_dir, tmp_path):
    recipe, model = a_recipe(tmp_path), str(pico_dir("llama"))
    made = fit(model, output=tmp_path / "out", recipe=recipe, machine=MACHINE)
    out = tmp_path / "out"
    assert names(out) == MADE
    assert Directions.load(out / "directions.safetensors").provenance["model"] == Path(model).name
    assert not [p.name for p in out.glob("*.safetensors") if str(Path(model).parent).encode() in p.read_bytes()]
    written = read_recipe(out / "recipe.toml")
    assert written.recipe == recipe.for_model(model)
    assert written.edit.sha256 == made.fitted.edit.sha256 == Edit.load(out / "edit.safetensors").sha256
    data = json.loads((out / "report.json").read_text())
    assert data["fit"]["layer"] == 1.0
    assert data["prompts"]["target.fit"] == 4
    for path in (out, out / "edit.safetensors", out / "recipe.toml"):
        assert find_edit(path).sha256 == written.edit.sha256


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_pass_gives_the_same_bytes(pico_dir, tmp_path, windows, after):
    given = {"output": tmp_path / "out", "recipe": a_recipe(tmp_path), "machine": MACHINE}
    model = str(pico_dir("llama"))
    fit(model, **{**given, "output": tmp_path / "whole"})
    with stopping(ResidualFitter, "update", after), pytest.raises(Interrupted, match=r"out\.resume"):
        fit(model, **given)
    assert not (tmp_path / "out").exists()
    with counting(ResidualFitter, "update") as calls:
        fit(model, **given)
    assert len(calls) == 4 - after  # four windows of two prompts, less those that were kept
    assert same(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out.resume").exists()


def test_interrupted_generation_gives_the_same_bytes(pico_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(behaviour, "Dictionary", Labels)
    monkeypatch.setattr(behaviour, "TOKENS", 4)
    monkeypatch.setattr(behaviour, "ENOUGH", 2)
    given = {"output": tmp_path / "out", "recipe": a_recipe(tmp_path, fit={"filter": True}), "machine": MACHINE}
    model = str(pico_dir("llama"))
    fit(model, **{**given, "output": tmp_path / "whole"})
    with stopping(Session, "_replies", 2), pytest.raises(Interrupted):
        fit(model, **given)
    assert names(tmp_path / "out.resume") == {"key.json", "fit.jsonl"}
    with counting(Session, "_replies") as calls:
        fit(model, **given)
    assert len(calls) == 2  # four batches of two
    assert same(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out.resume").exists()


def test_partial_results_go_to_no_other_recipe_model_or_prompts(pico_dir, tmp_path, windows):
    recipe, out = a_recipe(tmp_path), tmp_path / "out"
    model = str(pico_dir("llama"))
    with stopping(ResidualFitter, "update", 1), pytest.raises(Interrupted):
        fit(model, output=out, recipe=recipe, machine=MACHINE)
    kept = contents(tmp_path / "out.resume")
    with pytest.raises(UsageError, match="another recipe"):
        fit(model, output=out, recipe=a_recipe(tmp_path, fit={"layer": 2}), machine=MACHINE)
    with pytest.raises(UsageError, match="another recipe"):
        fit(str(pico_dir("qwen2")), output=out, recipe=recipe, machine=MACHINE)
    (tmp_path / "target.txt").write_text("".join(f"How do I harm {k} others?\n" for k in range(30)))
    with pytest.raises(UsageError, match="another recipe"):
        fit(model, output=out, recipe=recipe, machine=MACHINE)
    assert contents(tmp_path / "out.resume") == kept
    assert not out.exists()


def test_a_failure_leaves_no_output(pico_dir, tmp_path):
    with stopping(Edit, "save", 0, RunFailed), pytest.raises(RunFailed):
        fit(str(pico_dir("llama")), output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=MACHINE)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_dry_run_reads_prompts_and_writes_nothing(pico_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load_model", None)
    recipe = a_recipe(tmp_path)
    before = contents(tmp_path)
    made = fit(str(pico_dir("llama")), output=tmp_path / "out", recipe=recipe, machine=MACHINE, dry_run=True)
    assert made.to_json()["prompts"]["baseline.report"] == 4
    assert made.dry_run
    assert contents(tmp_path) == before


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_cannot_work_is_said_before_anything_is_loaded(pico_dir, tmp_path, monkeypatch, dry_run):
    monkeypatch.setattr(setup, "load_model", None)
    recipe, model = a_recipe(tmp_path), str(pico_dir("llama"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for ref, out, changed, message in (
        (model, "full", recipe, "not empty"),
        ("./nowhere", "out", recipe, "no such file or directory"),
        (model, "out", a_recipe(tmp_path, prompts={"target": str(tmp_path / "none.txt")}), "no such file"),
        (model, "out", a_recipe(tmp_path, prompts={"target": recipe.prompts.baseline}), "share 30 prompts|share"),
    ):
        with pytest.raises(UsageError, match=message):
            fit(ref, output=tmp_path / out, recipe=changed, machine=MACHINE, dry_run=dry_run)
    assert names(tmp_path) == {"full", "target.txt", "baseline.txt"}


def test_a_model_that_cannot_be_read_leaves_no_trace(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match=r"no config\.json"):
        fit(str(tmp_path / "model"), output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=MACHINE)
    assert names(tmp_path) == {"model", "target.txt", "baseline.txt"}
