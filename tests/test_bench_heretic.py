"""The comparison with heretic-llm judges the edits that the search found, and says which of them it cannot have."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tasks"))

from task_cases import MACHINE, Labels, a_recipe

import perpend
import perpend.fitting.behaviour
from perpend.core.edits import Edit
from perpend.models.load import load_model
from perpend.models.session import Session

SMALL = {"trials": 8, "generation": 4, "batch": 4, "prompts": 4, "survivors": 3, "finalists": 1, "refine": 0}


@pytest.fixture(scope="module")
def program() -> ModuleType:
    path = Path(__file__).parent.parent / "bench" / "versus_heretic.py"
    spec = importlib.util.spec_from_file_location("bench_versus_heretic", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(pico_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a search wrote in `perpend`."""
    folder = tmp_path_factory.mktemp("heretic")
    data = a_recipe(folder).model_dump() | {"edit": {}, "fit": {"filter": False}, "search": SMALL}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perpend.fitting.behaviour, "Dictionary", Labels)
        recipe = type(a_recipe(folder)).model_validate(data)
        perpend.search(str(pico_dir("llama")), output=folder / "perpend", recipe=recipe, machine=MACHINE)
    return folder


def front(found: Path) -> list[dict]:
    return json.loads((found / "perpend" / "front.json").read_text())["front"]


def test_the_edit_of_a_point_is_the_one_that_was_searched_for(program, found, pico_dir) -> None:
    session = Session(load_model(pico_dir("llama")), MACHINE)
    (chosen,) = (p for p in front(found) if p["chosen"])
    saved = Edit.load(found / "perpend" / "edit.safetensors")
    for point in (chosen, chosen | {"chosen": False}):  # as it was saved, and from the study
        assert program.edit_of(session, found / "perpend", point).sha256 == saved.sha256
    other = next(p for p in front(found) if not p["chosen"])
    assert program.edit_of(session, found / "perpend", other).sha256 != saved.sha256


def test_a_point_whose_refined_direction_is_gone_is_refused(program, found, pico_dir) -> None:
    session = Session(load_model(pico_dir("llama")), MACHINE)
    (chosen,) = (p for p in front(found) if p["chosen"])
    refined = chosen | {"direction_refined": True}
    assert program.edit_of(session, found / "perpend", refined).modules  # as it was saved
    with pytest.raises(SystemExit, match=r"trial \d+: its refined direction was not kept"):
        program.edit_of(session, found / "perpend", refined | {"chosen": False})


def test_such_a_point_is_left_out_of_what_is_judged_and_that_is_said(program, found, tmp_path, capsys) -> None:
    points = front(found)
    chosen = next(p for p in points if p["chosen"])
    start = chosen | {"name": "trial 90", "chosen": False}
    refined = start | {"name": "trial 90, refined", "direction_refined": True}
    known = json.loads((found / "perpend" / "front.json").read_text())
    (tmp_path / "front.json").write_text(json.dumps(known | {"front": [*points, start, refined]}))
    judged = [point["name"] for point in program._ours_on_front(tmp_path, {}, 9, 1.0)]
    assert judged[0] == f"perpend, {chosen['name']}: chosen"
    assert not any(name.endswith("refined") for name in judged)
    assert "not judged, for its refined direction was not kept: trial 90, refined\n" in capsys.readouterr().err
    assert program._ours_on_front(found / "perpend", {}, 9, 1.0)
    assert capsys.readouterr().err == ""
