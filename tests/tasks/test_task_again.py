"""The command that a report prints runs as it is typed, beside the recipe of the page, and finds the same figures."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from task_cases import a_recipe, colours

import perpend
from perpend.cli.main import main
from perpend.config import Machine, Recipe
from perpend.tasks.about import again

Dirs = Callable[[str], Path]
MACHINE = Machine(device="cpu", batch_size=2, dtype="bfloat16")
BY_MACHINE = "--device cpu --dtype bfloat16 --batch-size 2"
MOVING = {"made", "seconds", "peak_memory", "output", "about", "provenance", "recipe_hash", "recipe"}
"""What differs between two runs of one recipe: times, and what is called by another name."""


@pytest.fixture
def place(pico_dir: Dirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and prompts in it, which are meant by their names alone; the working folder is another."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    for one in (folder, elsewhere):
        one.mkdir()
    shutil.copytree(pico_dir("llama"), folder / "llama")
    monkeypatch.chdir(elsewhere)
    return folder


def typed_again(place: Path, out: Path, monkeypatch: pytest.MonkeyPatch, page: bool = True) -> tuple[Any, Any, str]:
    """Type the command of a report beside its recipe; returns both reports and the command."""
    first = json.loads((out / "report.json").read_text())
    command = first["about"]["command"]
    assert str(place) not in command
    assert command in (out / "report.html").read_text().replace("&#x27;", "'").replace("&#39;", "'")
    if page:
        (place / "recipe.toml").write_text(first["about"]["recipe"])
    else:
        for name in ("recipe.toml", "edit.safetensors"):
            shutil.copy(out / name, place / name)
    monkeypatch.chdir(place)
    program, *words = shlex.split(command)
    assert program == "perpend"
    assert main(words) == 0
    return first, json.loads((place / "OUT" / "report.json").read_text()), command


def figures(data: Any) -> Any:
    """What a report found, without times and names of folders."""
    if isinstance(data, dict):
        return {key: figures(value) for key, value in data.items() if key not in MOVING}
    return [figures(value) for value in data] if isinstance(data, list) else data


def same(first: Any, second: Any, *names: str) -> None:
    for name in names or ("model", "edit", "fit", "report", "bench", "gate", "prompts"):
        one, other = figures(first.get(name)), figures(second.get(name))
        if name == "model":
            one, other = Path(one).name, Path(other).name
        assert one == other, name


@pytest.mark.parametrize("task", ["fit", "run"])
def test_a_fit_and_a_run(place: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    recipe = a_recipe(place, edit={"mode": "column"})
    getattr(perpend, task)(str(place / "llama"), output=place / "first", recipe=recipe, machine=MACHINE)
    first, second, command = typed_again(place, place / "first", monkeypatch)
    assert command == f"perpend {task} --config recipe.toml {BY_MACHINE} -o OUT"
    same(first, second)


@pytest.mark.parametrize("task", ["apply", "adapter"])
def test_an_edit_that_is_applied(place: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    recipe, model = a_recipe(place, edit={"mode": "column"}), str(place / "llama")
    perpend.fit(model, output=place / "fit", recipe=recipe, machine=MACHINE)
    more: dict[str, Any] = {"rank": 3} if task == "adapter" else {}
    getattr(perpend, task)(model, edit=place / "fit", output=place / "first", machine=MACHINE, **more)
    first, second, command = typed_again(place, place / "first", monkeypatch, page=False)
    rank = "--rank 3 " if more else ""
    assert command == f"perpend {task} recipe.toml {rank}{BY_MACHINE} -o OUT"
    assert first.get("gate" if task == "apply" else "adapter")
    same(first, second, "model", "edit", "gate", "adapter")  # without what an earlier result said of the edit


@pytest.mark.parametrize("edited", [True, False])
def test_an_evaluation(place: Path, monkeypatch: pytest.MonkeyPatch, edited: bool) -> None:
    recipe, model = a_recipe(place), str(place / "llama")
    perpend.fit(model, output=place / "fit", recipe=recipe, machine=MACHINE)
    edit = place / "fit" if edited else None
    perpend.eval(model, edit=edit, output=place / "first", recipe=recipe, machine=MACHINE)
    first, second, command = typed_again(place, place / "first", monkeypatch)
    assert command == f"perpend eval --config recipe.toml {'--edit fit ' if edited else ''}{BY_MACHINE} -o OUT"
    same(first, second)
    assert bool(first.get("edit")) is edited


@pytest.mark.parametrize("edited", [True, False])
def test_a_benchmark(place: Path, monkeypatch: pytest.MonkeyPatch, edited: bool) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": f"A fox {k}", "choices": ["bread", "water", "salt"], "answer": k % 3} for k in range(12)]
    (place / "own").mkdir()
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "own" / "colours.yaml").write_text(colours(place / "rows.jsonl"))
    recipe, model = a_recipe(place), str(place / "llama")
    perpend.fit(model, output=place / "fit", recipe=recipe, machine=MACHINE)
    given: dict[str, Any] = {"tasks": "colours", "include": place / "own"}
    given |= {"edit": place / "fit", "questions": 5, "fewshot": 1, "chat": True} if edited else {}
    perpend.bench(model, output=place / "first", recipe=recipe, machine=MACHINE, **given)
    first, second, command = typed_again(place, place / "first", monkeypatch)
    more = "--include own --questions 5 --fewshot 1 --chat" if edited else "--include own"
    edit = "--edit fit " if edited else ""
    assert command == f"perpend bench --config recipe.toml {edit}--tasks colours {more} {BY_MACHINE} -o OUT"
    same(first, second)


def test_a_search_gives_its_edit_again() -> None:
    recipe = Recipe()
    assert again("search", recipe, Machine()) == "perpend run --config recipe.toml -o OUT"
    turned = Recipe.model_validate({"fit": {"refined": True}})
    assert again("search", turned, Machine()) == "perpend apply recipe.toml -o OUT", "which cannot be measured again"


def test_what_of_a_machine_decides_figures_is_said(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text("{}")
    machine = Machine(
        dtype="float32",
        memory="3GB",
        offload="disk",
        quantization="4bit",
        device_map=str(tmp_path / "map.json"),
        engine="vllm",
        trust_remote_code=("org/a", "org/b"),
    )
    assert again("eval", Recipe(), machine, "--adapter", tmp_path) == (
        f"perpend eval --config recipe.toml --adapter {tmp_path.name} --dtype float32 --quantization 4bit "
        "--device-map map.json --engine vllm --trust-remote-code org/a --trust-remote-code org/b -o OUT"
    )
    shared = again("fit", Recipe(), Machine(tensor_parallel=2))
    assert shared == "torchrun --nproc-per-node 2 -m perpend fit --config recipe.toml --tensor-parallel 2 -o OUT"
