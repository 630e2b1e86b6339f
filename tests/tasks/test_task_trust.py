"""Python code that comes with a model runs only where the user named that very model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from task_cases import MACHINE, a_recipe

import perpend
from perpend.cli.main import main
from perpend.config import Machine, load
from perpend.errors import UsageError
from perpend.judges.classifier import Classifier
from perpend.models.load import load_model, skeleton
from perpend.models.trust import trusted
from perpend.refs import ModelRef

Dirs = Callable[[str], Path]

CODE = """
import pathlib

from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

pathlib.Path(MARK).touch()


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnForSequenceClassification(LlamaForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the code of the model makes when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "was-run"


@pytest.fixture
def own(pico_dir: Dirs, tmp_path: Path, mark: Path) -> Path:
    """A model that transformers has no class for; its repository carries one."""
    folder = tmp_path / "own"
    shutil.copytree(pico_dir("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-llama", "architectures": ["OwnForCausalLM"]}
    names = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
    config["auto_map"] = {"AutoConfig": "own.OwnConfig"} | {n: f"own.{n.replace('AutoModel', 'Own')}" for n in names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.replace("MARK", repr(str(mark))))
    return folder


def naming(*models: str | Path) -> Machine:
    return MACHINE.model_copy(update={"trust_remote_code": tuple(str(m) for m in models)})


def test_the_code_of_a_model_runs_when_the_model_is_named_and_its_edited_copy_too(
    own: Path, mark: Path, tmp_path: Path
) -> None:
    recipe = a_recipe(tmp_path)
    for machine in (MACHINE, naming("owner/other"), naming(tmp_path)):
        with pytest.raises(UsageError, match="needs Python code that comes with the model") as caught:
            perpend.fit(str(own), output=tmp_path / "fit", recipe=recipe, machine=machine)
        assert f"try: --trust-remote-code {own}, after reading that code" in str(caught.value)
        with pytest.raises(UsageError, match="needs Python code"):
            skeleton(ModelRef("dir", str(own)).resolve(), str(own), machine)
    assert not mark.exists()
    perpend.fit(str(own), output=tmp_path / "fit", recipe=recipe, machine=naming(own))
    assert mark.exists()
    made = perpend.apply(str(own), edit=tmp_path / "fit", output=tmp_path / "out", machine=naming(own))
    assert made.gate is not None
    assert made.gate.prompts > 0
    with pytest.raises(UsageError, match="needs Python code"):
        load_model(tmp_path / "out", naming(own))
    spelt_otherwise = naming(tmp_path / "own" / ".." / "out")
    assert type(load_model(tmp_path / "out", spelt_otherwise).model).__name__ == "OwnForCausalLM"


def test_a_recipe_cannot_ask_for_it(own: Path, mark: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'[model]\nid = "{own}"\ntrust_remote_code = true\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"unknown key 'model.trust_remote_code'"):
        load(path)
    assert main(["inspect", str(own), "--set", "model.trust_remote_code=true", "-q"]) == 2
    assert not mark.exists()


def test_the_flag_names_the_model(own: Path, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(own), "--device", "cpu"]) == 2
    assert f"--trust-remote-code {own}" in capsys.readouterr().err
    assert main(["inspect", str(own), "--device", "cpu", "--trust-remote-code", "./nowhere"]) == 2
    assert "nowhere: no such file or directory" in capsys.readouterr().err
    assert not mark.exists()
    typed = ["--trust-remote-code", "owner/other", "--trust-remote-code", str(own)]
    assert main(["inspect", str(own), "--device", "cpu", *typed]) == 0
    assert "OwnForCausalLM" in capsys.readouterr().out


def test_a_judge_is_not_covered_by_the_flag_of_the_model(own: Path, mark: Path, tmp_path: Path) -> None:
    judge = tmp_path / "judge"
    shutil.copytree(own, judge)
    found, why = Classifier.load(f"{judge}#label=LABEL_1", naming(own))
    assert found is None
    assert f"needs Python code that comes with it; try: --trust-remote-code {judge}" in why
    assert not mark.exists()
    Classifier.load(f"{judge}#label=LABEL_1", naming(judge))
    assert mark.exists()


def test_code_of_another_repository_is_named_too(own: Path, mark: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "stranger/code--own.OwnForCausalLM"
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="Python code of another repository, stranger/code; try: --trust-remote-code"):
        load_model(own, naming(own))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("named", "asked", "runs"),
    [
        ("org/m", "org/m", True),
        ("org/m", "org/m@v1", True),
        ("org/m@v1", "org/m@v1", True),
        ("org/m@v1", "org/m@v2", False),
        ("org/m@v1", "org/m", False),
        ("org/m", "org/m2", False),
        ("m", "org/m", False),
    ],
)
def test_a_name_without_a_revision_stands_for_all(named: str, asked: str, runs: bool) -> None:
    assert trusted(ModelRef.parse(asked), naming(named)) is runs
