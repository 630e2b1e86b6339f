"""What the work itself would refuse is refused by its dry run too, and by the work before weights are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from task_cases import MACHINE, a_recipe, names

import perpend
from perpend.cli.main import main
from perpend.errors import UsageError
from perpend.models import load

Dirs = Callable[[str], Path]
Case = Callable[..., Any]


@pytest.fixture(scope="module")
def edits(pico_dir: Dirs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fits of two architectures."""
    found = {}
    for family in ("llama", "gpt2"):
        folder = tmp_path_factory.mktemp(family)
        perpend.fit(str(pico_dir(family)), output=folder / "fit", recipe=a_recipe(folder), machine=MACHINE)
        found[family] = folder / "fit"
    return found


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place where weights that are read fail the test."""

    def loaded(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("weights were read")

    monkeypatch.setattr(load, "_loaded", loaded)


def tasks(model: str, out: Path, folder: Path, edit: Path) -> dict[str, Case]:
    """Calls of all tasks that take a recipe, by name."""
    recipe = a_recipe(folder)
    fits = {"output": out, "recipe": recipe, "machine": MACHINE}
    with_edit = {"edit": edit, "machine": MACHINE, "recipe": recipe}
    return {
        "run": lambda **more: perpend.run(model, **fits, **more),
        "search": lambda **more: perpend.search(model, **fits, **more),
        "fit": lambda **more: perpend.fit(model, **fits, **more),
        "apply": lambda **more: perpend.apply(model, edit=edit, output=out, machine=MACHINE, **more),
        "adapter": lambda **more: perpend.adapter(model, edit=edit, output=out, machine=MACHINE, **more),
        "eval": lambda **more: perpend.eval(model, output=out, **with_edit, **more),
        "chat": lambda **more: perpend.chat(model, **with_edit, **more),
        "serve": lambda **more: perpend.serve(model, port=0, **with_edit, **more),
        "quant": lambda **more: perpend.quant_check(model, edit=edit, machine=MACHINE, acceptance=True, **more),
    }


FITS, EDITS = ("run", "search", "fit"), ("apply", "adapter", "eval", "chat", "serve", "quant")
JUDGES, TEMPLATES = ("run", "search", "apply", "eval", "chat", "serve"), ("run", "fit", "search", "eval", "chat")


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry", "real"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_another_architecture(
    pico_dir: Dirs, edits: dict[str, Path], tmp_path: Path, no_weights: None, name: str, dry_run: bool
) -> None:
    pytest.importorskip("uvicorn" if name == "serve" else "torch")
    case = tasks(str(pico_dir("llama")), tmp_path / "out", tmp_path, edits["gpt2"])[name]
    with pytest.raises(UsageError, match=r"edit: edits transformer\.h\.0.*, which is no writer of this model"):
        case(dry_run=dry_run)
    assert names(tmp_path) <= {"target.txt", "baseline.txt"}


def test_a_benchmark_of_an_edit_of_another_architecture(
    pico_dir: Dirs, edits: dict[str, Path], tmp_path: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("perpend.tasks.bench._manager", lambda *_: None)
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="no writer of this model"):
            perpend.bench(str(pico_dir("llama")), tasks="x", edit=edits["gpt2"], machine=MACHINE, dry_run=dry_run)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"layer": 99}, r"fit\.layer: layer 99; valid: 0 to 2"),
    ({"layer": "100%"}, r"fit\.layer: layer 3; valid: 0 to 2"),
    ({"set": "edit.mlp={kind='list', values=[1.0]}"}, r"edit\.mlp: "),
    ({"layer": 1, "set": "fit.position='auto'"}, r"fit\.position: auto needs layers to be tried"),
    ({"set": "fit.refined=true"}, r"fit\.refined: a direction that a search has refined"),
]


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry", "real"])
@pytest.mark.parametrize(("given", "message"), WRONG, ids=[str(given) for given, _ in WRONG])
@pytest.mark.parametrize("name", FITS)
def test_a_fit_that_this_model_cannot_have(
    pico_dir: Dirs,
    edits: dict[str, Path],
    tmp_path: Path,
    no_weights: None,
    name: str,
    given: dict[str, Any],
    message: str,
    dry_run: bool,
) -> None:
    case = tasks(str(pico_dir("llama")), tmp_path / "out", tmp_path, edits["llama"])[name]
    with pytest.raises(UsageError, match=message):
        case(dry_run=dry_run, **given)
    assert names(tmp_path) == {"target.txt", "baseline.txt"}


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry", "real"])
def test_a_search_that_nothing_is_left_to(pico_dir: Dirs, tmp_path: Path, no_weights: None, dry_run: bool) -> None:
    given = {"output": tmp_path / "out", "machine": MACHINE, "recipe": a_recipe(tmp_path), "dry_run": dry_run}
    with pytest.raises(UsageError, match=r"fit\.strategy: a search measures the directions once"):
        perpend.run(str(pico_dir("llama")), search=True, strategy="iterative", **given)
    assert names(tmp_path) == {"target.txt", "baseline.txt"}


ALL = "valid: org/name, org/name@revision, a directory, perpend:small, endpoint:URL#model=NAME, none"
CLASSIFIERS = [
    ("perpend:smal", f"--classifier: unknown judge 'perpend:smal'; {ALL}; did you mean 'perpend:small'?"),
    ("endpint:http://h/v1#model=x", f"--classifier: unknown judge 'endpint:http://h/v1#model=x'; {ALL}; did you mean"),
    ("endpoint:http://127.0.0.1:9/v1", "which model is to judge is not said; try: endpoint:http://127.0.0.1:9/v1#mod"),
    ("endpoint:http://127.0.0.1:9/v1#modle=x", "'modle=x' is no option of an endpoint; valid: model=NAME, "),
    ("./nowhere", f"--classifier: ./nowhere: no such file or directory; {ALL}"),
    ("perpend small", f"--classifier: 'perpend small' is no model reference; {ALL}; did you mean 'perpend:small'?"),
    ("org/name#lable=x", "'lable=x' is no option of a classifier"),
]


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry", "real"])
@pytest.mark.parametrize(("classifier", "message"), CLASSIFIERS, ids=[name for name, _ in CLASSIFIERS])
@pytest.mark.parametrize("name", JUDGES)
def test_a_classifier_that_was_typed_wrong(
    pico_dir: Dirs,
    edits: dict[str, Path],
    tmp_path: Path,
    no_weights: None,
    name: str,
    classifier: str,
    message: str,
    dry_run: bool,
) -> None:
    pytest.importorskip("uvicorn" if name == "serve" else "torch")
    case = tasks(str(pico_dir("llama")), tmp_path / "out", tmp_path, edits["llama"])[name]
    with pytest.raises(UsageError, match=re.escape(message)):
        case(dry_run=dry_run, classifier=classifier)
    assert names(tmp_path) == {"target.txt", "baseline.txt"}


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry", "real"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_that_cannot_be_read(
    pico_dir: Dirs, edits: dict[str, Path], tmp_path: Path, no_weights: None, name: str, dry_run: bool
) -> None:
    case = tasks(str(pico_dir("llama")), tmp_path / "out", tmp_path, edits["llama"])[name]
    (tmp_path / "broken.jinja").write_text("{% if %}")
    for template, message in (("nofile", "nofile: cannot be read"), ("broken.jinja", "line 1: not a Jinja template")):
        with pytest.raises(UsageError, match=message):
            case(dry_run=dry_run, chat_template=tmp_path / template)
    assert names(tmp_path) == {"target.txt", "baseline.txt", "broken.jinja"}


def test_a_gguf_output_needs_a_gguf_model(pico_dir: Dirs, edits: dict[str, Path], tmp_path: Path) -> None:
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="a GGUF file is edited directly only from a GGUF file"):
            perpend.apply(str(pico_dir("llama")), edit=edits["llama"], output=tmp_path / "o.gguf", dry_run=dry_run)
    assert names(tmp_path) == set()


def test_what_is_right_goes_through(pico_dir: Dirs, edits: dict[str, Path], tmp_path: Path, no_weights: None) -> None:
    pytest.importorskip("uvicorn")
    for name, case in tasks(str(pico_dir("llama")), tmp_path / "out", tmp_path, edits["llama"]).items():
        found = case(dry_run=True).to_json()
        assert found.get("forecast", found)["edited_modules"] > 0, name


def test_a_dry_run_does_not_speak_of_what_is_not_done(
    pico_dir: Dirs, edits: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(pico_dir("llama"))
    line = ["eval", model, "--classifier", "none", "--limit", "2", "--device", "cpu", "--dry-run"]
    assert main(line) == 0
    plain = capsys.readouterr().out
    assert not re.search(r"^\s*(edits|writes)\b", plain, re.MULTILINE)
    assert re.search(r"^\s*runs +4 prompts", plain, re.MULTILINE)
    assert main([*line, "--edit", str(edits["llama"]), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^\s*edits +\d+ modules, ", said, re.MULTILINE)
    assert re.search(r"^\s*writes +1\.0 MB, ", said, re.MULTILINE)
    found = perpend.eval(model, recipe=a_recipe(tmp_path), machine=MACHINE, dry_run=True).forecast
    assert found is not None
    assert (found.edited_modules, found.edited_parameters, found.writes) == (None, None, 0)


def test_a_model_with_a_gap_is_measured_without_an_edit(
    pico_dir: Dirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perpend.models.anatomy import Anatomy

    def gap(anatomy: Anatomy, allow_partial: bool) -> None:
        raise UsageError("a layer has no editable module")

    monkeypatch.setattr(Anatomy, "require_complete", gap)
    model, given = str(pico_dir("llama")), {"recipe": a_recipe(tmp_path), "machine": MACHINE, "dry_run": True}
    assert perpend.eval(model, **given).forecast is not None
    with pytest.raises(UsageError, match="no editable module"):
        perpend.fit(model, output=tmp_path / "out", **given)
