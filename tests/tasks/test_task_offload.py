"""`eval` and `search` of a model whose layers stay in the files find what they find of one in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from task_cases import MACHINE, Labels, a_recipe, counting, names

import perpend.fitting.behaviour
import perpend.searching.forward as forward
from perpend.cli.main import main
from perpend.config import to_toml
from perpend.models.offload import Shelf
from perpend.tasks.fit import fit

Dirs = Callable[[str], Path]
Typed = Callable[..., Path]
SMALL = {"trials": 8, "generation": 4, "batch": 2, "prompts": 4, "survivors": 2, "finalists": 2, "patience": 0}
ITS_OWN = {"seconds", "output", "about", "export"}
"""What a report says of clock, place and machine."""


@pytest.fixture
def typed(tmp_path: Path, pico_dir: Dirs) -> Typed:
    """`typed("eval", "disk")` types the command, sees that layers were read from disk just then, gives its output."""
    plain = a_recipe(tmp_path).model_dump(mode="json")
    recipes = {"eval": plain, "search": plain | {"edit": {}, "fit": {"filter": False}, "search": SMALL | {"refine": 2}}}
    for name, data in recipes.items():
        (tmp_path / f"{name}.toml").write_text(to_toml(data), encoding="utf-8")

    def run(command: str, where: str, *more: str) -> Path:
        out = tmp_path / f"{command}-{where}"
        words = [command, str(pico_dir("llama")), "-o", str(out), "--config", str(tmp_path / f"{command}.toml")]
        with counting(Shelf, "together") as passes:
            assert main([*words, "--device", "cpu", "--batch-size", "2", "--offload", where, *more, "-q"]) == 0
        assert bool(passes) == (where == "disk")
        return out

    return run


def measured(folder: Path) -> dict[str, Any]:
    data = json.loads((folder / "report.json").read_text())
    return {key: value for key, value in data.items() if key not in ITS_OWN}


def test_eval_finds_the_same_replies_labels_and_drift(typed: Typed, pico_dir: Dirs, tmp_path: Path) -> None:
    fit(str(pico_dir("llama")), output=tmp_path / "edit", recipe=a_recipe(tmp_path), machine=MACHINE)
    here, away = (typed("eval", where, "--edit", str(tmp_path / "edit")) for where in ("none", "disk"))
    assert names(here) == names(away) == {"report.html", "report.json", "before.jsonl", "after.jsonl"}
    for name in ("before.jsonl", "after.jsonl"):
        assert (here / name).read_bytes() == (away / name).read_bytes()
    assert measured(here) == measured(away)
    assert measured(here)["report"]["drift"]["mean"] > 0


def test_search_finds_the_same_trials_front_and_weights(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perpend.fitting.behaviour, "Dictionary", Labels)  # pico models say nothing that is a refusal
    away = typed("search", "disk")
    monkeypatch.setattr(forward, "find_room", lambda sheet, rows: None)  # layers on disk take one edit after the other
    here = typed("search", "none")
    one, other = ([json.loads(row) for row in (p / "trials.jsonl").read_text().splitlines()] for p in (here, away))
    for row in (*one, *other):
        for name in ("worker", "seconds"):
            del row[name]
    assert one == other
    assert len(one) == 8
    for name in ("front.json", "edit.safetensors", "model.safetensors"):
        assert (here / name).read_bytes() == (away / name).read_bytes()
    assert measured(here) == measured(away)
