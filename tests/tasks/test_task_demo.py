"""The demo, with pico models in place of the organism that it carries."""

from __future__ import annotations

import pytest
from task_cases import MACHINE, a_recipe, names, stopping

import perpend.tasks.demo as demos
import pico
from perpend.config import load
from perpend.errors import GateFailed, Interrupted, RunFailed
from perpend.tasks.apply import apply
from perpend.tasks.demo import demo


@pytest.fixture(autouse=True)
def small(monkeypatch):
    def make(folder, machine):
        pico.save("llama", folder / "original", seed=1)
        pico.save("llama", folder / "organism")

    monkeypatch.setattr(demos, "make_organism", make)


def test_the_edited_model_can_be_made_again_from_its_recipe(tmp_path):
    made = demo(output=tmp_path / "out", recipe=a_recipe(tmp_path), machine=MACHINE, limit=3)
    assert names(tmp_path / "out") == {"original", "organism", "edited"}
    assert made.truth.original.judged.n == 3
    assert made.truth.before.mean > 0
    written = tmp_path / "out" / "edited" / "recipe.toml"
    assert load(written).model.id == str(tmp_path / "out" / "organism")
    apply(str(written), output=tmp_path / "again", machine=MACHINE)
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "out" / "edited" / weights).read_bytes()


@pytest.mark.parametrize("step", ["run", "compare_with_original"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RunFailed])
def test_a_demo_that_stopped_leaves_nothing(tmp_path, step, error):
    recipe = a_recipe(tmp_path)
    with stopping(demos, step, 0, error), pytest.raises(Interrupted if error is KeyboardInterrupt else error):
        demo(output=tmp_path / "out", recipe=recipe, machine=MACHINE)
    assert names(tmp_path) == {"target.txt", "baseline.txt"}


def test_a_gate_that_failed_leaves_the_folder_for_inspection(tmp_path):
    recipe = a_recipe(tmp_path)
    with stopping(demos, "run", 0, GateFailed), pytest.raises(GateFailed):
        demo(output=tmp_path / "out", recipe=recipe, machine=MACHINE)
    assert names(tmp_path / "out") == {"original", "organism"}
