"""The recipes in examples/ are valid, the commands of their page are commands, and they run on a small model."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from inspect import isfunction, signature
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "export"))

from gguf_cases import save_wide

import perpend
from perpend.cli.main import app
from perpend.config import load
from perpend.core.quant import simulate
from perpend.data import load_splits
from perpend.refs import ModelRef

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.toml"))
PAGE = ROOT / "docs" / "recipes.md"
OWN_PROMPTS = ("over-refusal", "tone")
KINDS = {
    "gemma-3": "gemma3",
    **dict.fromkeys(("more-refusal", "over-refusal", "tone"), "gemma3_text"),
    **{"llama": "llama", "qwen": "qwen3", "moe": "qwen3_moe"},
}
"""The small model by recipe."""
BRIEF = ("--no-filter", "--layer", "1", "--limit", "3", "--device", "cpu", "--classifier", "none")
SHORT = ("--max-new-tokens", "2", "--set", "eval.control_prompts=0", "--set", "export.gate_prompts=1")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_named_on_the_page(cli, path):
    said = cli("config", "validate", str(path))
    assert said.code == 0, said.err
    assert ModelRef.parse(load(path).model.id).kind == "hub"
    assert f"examples/recipes/{path.name}" in PAGE.read_text(encoding="utf-8")


PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "cli.md"]  # that one is generated


EVERY_PAGE = [ROOT / "README.md", *PAGES]


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda path: path.stem)
def test_commands_on_a_page_are_commands(page):
    root = typer.main.get_command(app)
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in (line for line in lines if line.startswith("perpend ")):
        words = shlex.split(re.split(r" [<>|] ", line)[0], comments=True)
        if len(words) == 1 or words[1].startswith("-"):
            continue
        command, rest = root.commands[words[1]], words[2:]
        if hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(words[1], rest, resilient_parsing=False)


SMALL = """limit=4, set=["fit.filter=false", "fit.layer=1", "export.gate_prompts=1", "eval.classifier='none'",
    "eval.max_new_tokens=2", "eval.drift_tokens=2", "eval.control_prompts=0"]"""


def test_the_python_on_the_pages_runs_on_a_small_model(pico_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for page in ("extend", "python"):
        blocks = re.findall(
            r"^```python\n(.*?)^```", (ROOT / "docs" / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL
        )
        assert len(blocks) == 2
        for block in blocks:
            text = block.replace("google/gemma-3-1b-it", str(pico_dir("llama"))).replace("limit=64", SMALL)
            exec(compile(text, page, "exec"), {})
    said = capsys.readouterr().out
    assert "hybrid ['refuse']" in said
    assert "[1, 3, 32]" in said


def test_the_page_of_functions_gives_their_signatures():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"`(\w+)\(([^`]*)\)`", "".join(re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE))))
    assert set(told) == {name for name in perpend.__all__ if isfunction(getattr(perpend, name))}
    for name, arguments in told.items():
        scope: dict[str, Any] = {}
        exec(f"def told({arguments.replace('…', 'recipe=None, machine=None, **options')}): pass", scope)
        page_says, is_so = (
            {p.name: (p.kind, p.default) for p in signature(f).parameters.values()}
            for f in (scope["told"], getattr(perpend, name))
        )
        assert page_says == is_so, name


@pytest.mark.parametrize("name", OWN_PROMPTS)
def test_prompts_of_a_recipe_are_there_and_disjoint(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    splits = load_splits(load(ROOT / "examples" / "recipes" / f"{name}.toml").prompts)
    assert min(len(side) for side in splits.sets()) >= 4


@pytest.fixture
def small(pico_dir, tmp_path):
    """`small("gemma-3-qat")` is the folder of a small model of the kind that a recipe is written for."""

    def found(name: str) -> Path:
        if name != "gemma-3-qat":
            return pico_dir(KINDS[name])
        folder = save_wide("gemma3_text", tmp_path / "qat", dtype=torch.bfloat16)
        weights = load_file(folder / "model.safetensors")
        on_lattice = {k: simulate(v, "q4_0") if k.endswith("proj.weight") else v for k, v in weights.items()}
        save_file(on_lattice, folder / "model.safetensors", {"format": "pt"})
        return folder

    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_on_a_small_model_of_its_kind(cli, small, tmp_path, monkeypatch, path):
    made, model = tmp_path / "out", small(path.stem)
    monkeypatch.chdir(ROOT)
    said = cli("run", str(model), "-c", str(path), "-o", str(made), *BRIEF, *SHORT)
    assert said.code == 0, said.err
    recipe, asked = load(made / "recipe.toml"), load(path)
    assert (recipe.edit, recipe.prompts.target) == (asked.edit, asked.prompts.target)
    assert (recipe.fit.winsorize, recipe.export.rounding) == (asked.fit.winsorize, asked.export.rounding)
    leak = json.loads((made / "report.json").read_text())["gate"]["leak"]
    assert len({row["module"] for row in leak if row["asked"]}) >= 2
    assert all(row["ok"] for row in leak)
    assert any(row["expert"] is not None for row in leak) == (path.stem == "moe")
    if path.stem == "gemma-3-qat":  # a plain q4_0 pass leaves the edit as it is
        before, after = (load_file(folder / "model.safetensors") for folder in (model, made))
        changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
        assert changed
        for name in changed:
            assert (simulate(after[name], "q4_0") - after[name]).abs().max() < 0.01 * after[name].abs().max(), name


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda path: path.stem)
def test_a_page_installs_from_the_checkout_alone(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in re.findall(r"pip install ([^`\n#]*[^`\n# ])", page.read_text(encoding="utf-8")):
        if line in (".", "peft", "'llama-cpp-python[server]'"):  # the latter two are not for Perpend itself
            continue
        found = re.fullmatch(r"'\.\[([a-z,]+)\]'", line)
        assert found, line
        assert set(found[1].split(",")) <= set(extras), line


def test_links_lead_somewhere_and_the_index_names_every_page():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == [], page.name
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index] == ["README.md"]
