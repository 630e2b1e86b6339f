"""Evaluation: the same result with and without interruption; an edit is checked before the model runs."""

from __future__ import annotations

import json

import pytest
import torch
from task_cases import MACHINE, a_recipe, contents, counting, names, stopping

import perpend.tasks.setup as setup
from perpend.core.edits import Edit, ModuleEdit
from perpend.errors import Interrupted, UsageError
from perpend.models.session import Session
from perpend.tasks.evaluate import eval
from perpend.tasks.fit import fit


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, pico_dir):
    """A folder with the prompts and, in `edit`, what a fit made."""
    folder = tmp_path_factory.mktemp("fitted")
    fit(str(pico_dir("llama")), output=folder / "edit", recipe=a_recipe(folder), machine=MACHINE)
    return folder


def essence(folder):
    """What was measured, without clock and place."""
    data = json.loads((folder / "report.json").read_text())
    return {k: v for k, v in data.items() if k not in {"seconds", "output", "about"}}


@pytest.mark.parametrize("after", [1, 5])
def test_an_interrupted_evaluation_gives_the_same_result(pico_dir, fitted, tmp_path, after):
    model, edit = str(pico_dir("llama")), fitted / "edit"
    given = {"edit": edit, "recipe": a_recipe(tmp_path), "machine": MACHINE}
    eval(model, output=tmp_path / "whole", **given)
    with stopping(Session, "_replies", after), pytest.raises(Interrupted, match=r"out\.resume"):
        eval(model, output=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    with counting(Session, "_replies") as calls:
        eval(model, output=tmp_path / "out", **given)
    assert len(calls) == 8 - after  # before and after, two classes, two batches each
    assert essence(tmp_path / "out") == essence(tmp_path / "whole")
    assert names(tmp_path / "out") == {"report.html", "report.json", "before.jsonl", "after.jsonl"}
    for name in ("before.jsonl", "after.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out.resume").exists()


def test_another_edit_is_refused_the_partial_results(pico_dir, fitted, tmp_path):
    model = str(pico_dir("llama"))
    given = {"output": tmp_path / "out", "recipe": a_recipe(tmp_path), "machine": MACHINE}
    with stopping(Session, "_replies", 1), pytest.raises(Interrupted):
        eval(model, **given)
    with pytest.raises(UsageError, match="another recipe"):
        eval(model, edit=fitted / "edit", **given)


def test_replies_are_written_with_prompts_and_labels(pico_dir, tmp_path):
    made = eval(str(pico_dir("llama")), output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=MACHINE)
    rows = [json.loads(line) for line in (tmp_path / "out" / "before.jsonl").read_text().splitlines()]
    assert [row["class"] for row in rows] == ["target"] * 4 + ["baseline"] * 4
    assert [row["reply"] for row in rows[:4]] == [r.text for r in made.before.target.replies]
    assert [row["label"] for row in rows[:4]] == [str(x) for x in made.before.target.judged.labels]
    assert made.after is None
    assert made.drift is None
    assert not (tmp_path / "out" / "after.jsonl").exists()


def test_without_an_output_nothing_is_written(pico_dir, tmp_path):
    recipe = a_recipe(tmp_path)
    before = contents(tmp_path)
    made = eval(str(pico_dir("llama")), recipe=recipe, machine=MACHINE)
    assert made.before.target.judged.n == 4
    dry = eval(str(pico_dir("llama")), output=tmp_path / "out", recipe=recipe, machine=MACHINE, dry_run=True)
    assert dry.to_json()["prompts"] == {"target.report": 4, "baseline.report": 4}
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("model.layers.9.mlp.down_proj", 32, "no writer of this model"), ("model.layers.1.mlp.down_proj", 16, "16 dim")],
)
def test_an_edit_of_another_model_is_refused_before_it_runs(pico_dir, tmp_path, monkeypatch, name, size, message):
    monkeypatch.setattr(Session, "generate", None)
    Edit({name: ModuleEdit(torch.eye(1, size), 1.0)}).save(tmp_path / "edit.safetensors")
    with pytest.raises(UsageError, match=message):
        eval(
            str(pico_dir("llama")),
            output=tmp_path / "out",
            edit=tmp_path / "edit.safetensors",
            recipe=a_recipe(tmp_path),
            machine=MACHINE,
        )
    assert names(tmp_path) == {"edit.safetensors", "target.txt", "baseline.txt"}


def test_what_cannot_work_is_said_before_anything_is_loaded(pico_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load_model", None)
    recipe, model = a_recipe(tmp_path), str(pico_dir("llama"))
    with pytest.raises(UsageError, match="no such file"):
        eval(model, edit=tmp_path / "none", recipe=recipe, machine=MACHINE)
    with pytest.raises(UsageError, match="no such file or directory"):
        eval("./nowhere", recipe=recipe, machine=MACHINE, dry_run=True)
    with pytest.raises(UsageError, match="not empty"):
        eval(model, output=tmp_path, recipe=recipe, machine=MACHINE)
