"""vLLM as the engine of an evaluation, against a stand-in with its interface: the same ids in, the same replies out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from task_cases import MACHINE, a_recipe

import perpend
from perpend.cli.main import main
from perpend.errors import MissingExtra, UsageError

STAND_INS = Path(__file__).parent.parent / "stand_ins"
VLLM = MACHINE.model_copy(update={"engine": "vllm"})


@pytest.fixture(scope="module")
def fitted(pico_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a plain edit of it, the adapter of the edit and the edited model."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("fitted")
    model, recipe = str(pico_dir("llama")), a_recipe(folder, edit={"mode": "plain"})
    shutil.copytree(model, folder / "model")
    perpend.fit(model, output=folder / "fit", recipe=recipe, machine=MACHINE)
    perpend.adapter(model, edit=folder / "fit", output=folder / "adapter", machine=MACHINE)
    perpend.apply(model, edit=folder / "fit", output=folder / "out", recipe=recipe, machine=MACHINE)
    return folder


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, where vLLM would be."""
    monkeypatch.syspath_prepend(STAND_INS)
    import vllm

    vllm.LLM.opened, vllm.LLM.generated = [], 0
    yield vllm
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)


def replies(folder: Path) -> list[tuple[str, str, bool]]:
    rows = map(json.loads, (folder / "before.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["prompt"], row["reply"], row["finished"]) for row in rows]


def test_an_exported_directory_is_judged_as_by_transformers(vllm: Any, fitted: Path, tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path, eval={"max_new_tokens": 8})
    for name, machine in (("ours", MACHINE), ("theirs", VLLM)):
        perpend.eval(str(fitted / "out"), output=tmp_path / name, recipe=recipe, machine=machine)
    assert replies(tmp_path / "ours") == replies(tmp_path / "theirs")
    assert vllm.LLM.generated == len(replies(tmp_path / "ours"))
    about = json.loads((tmp_path / "theirs" / "report.json").read_text())["about"]
    assert about["machine"]["engine"] == f"vllm {vllm.__version__}"
    assert about["model"]["parameters"] > 0
    assert vllm.LLM.opened[0]["model"] == str(fitted / "out")


def test_an_adapter_answers_as_the_edited_model_does(vllm: Any, fitted: Path, tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path, eval={"max_new_tokens": 8})
    perpend.eval(str(fitted / "out"), output=tmp_path / "merged", recipe=recipe, machine=MACHINE)
    model = str(fitted / "model")
    perpend.eval(model, output=tmp_path / "adapted", recipe=recipe, machine=VLLM, adapter=fitted / "adapter")
    assert replies(tmp_path / "adapted") == replies(tmp_path / "merged")
    assert (vllm.LLM.opened[0]["enable_lora"], vllm.LLM.opened[0]["max_lora_rank"]) == (True, 8)


def test_without_vllm_the_line_to_type_is_said(
    fitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("perpend.models.vllm.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'--engine vllm needs the package vllm; try: pip install "perpend\[vllm\]"'):
        perpend.eval(str(fitted / "out"), machine=VLLM)
    assert main(["eval", str(fitted / "out"), "--engine", "vllm"]) == 2
    assert 'pip install "perpend[vllm]"' in capsys.readouterr().err


def test_what_vllm_cannot_do_is_said_before_anything_is_loaded(vllm: Any, fitted: Path, tmp_path: Path) -> None:
    model, recipe = str(fitted / "model"), a_recipe(tmp_path)
    with pytest.raises(UsageError, match=r"--edit: no hook reaches vLLM; valid: an exported directory, --adapter"):
        perpend.eval(model, edit=fitted / "fit", recipe=recipe, machine=VLLM)
    with pytest.raises(UsageError, match=r"--adapter: is for vLLM"):
        perpend.eval(model, adapter=fitted / "adapter", recipe=recipe, machine=MACHINE)
    with pytest.raises(UsageError, match="no PEFT adapter"):
        perpend.eval(model, adapter=tmp_path, recipe=recipe, machine=VLLM)
    shutil.copytree(fitted / "adapter", tmp_path / "dora")
    path = tmp_path / "dora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(UsageError, match=r"vLLM holds no adapter with DoRA; .*perpend apply"):
        perpend.eval(model, adapter=tmp_path / "dora", recipe=recipe, machine=VLLM)
    assert vllm.LLM.opened == []
