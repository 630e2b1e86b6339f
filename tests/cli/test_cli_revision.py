"""A revision of a model from the hub is honoured by every command that reads one, and its commit is recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from perpend.config import load

BRIEF = ("--limit", "4", "--device", "cpu", "--classifier", "none", "--max-new-tokens", "4")
COMMIT = "b" * 40


@pytest.fixture
def cached(pico_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub model in the local cache: one architecture on `main`, another one on the branch `v2`."""
    cache = tmp_path / "cache"
    repo = cache / "models--owner--m"
    for branch, commit, family in (("main", "a" * 40, "gpt2"), ("v2", COMMIT, "llama")):
        shutil.copytree(pico_dir(family), repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return "owner/m"


def test_the_revision_that_was_asked_for_is_read_and_its_commit_recorded(cli, cached, tmp_path):
    assert cli("inspect", cached, "--json").json["architecture"] == "GPT2LMHeadModel"
    assert cli("inspect", cached, "--revision", "v2", "--json").json["architecture"] == "LlamaForCausalLM"

    said = cli("fit", cached, "--revision", "v2", "-o", "edit", "--no-filter", "--layer", "50%", *BRIEF[:4])
    assert said.code == 0, said.err
    assert cli("eval", cached, "--revision", "v2", "-e", "edit", "-o", "judged", *BRIEF).code == 0
    brief = (*BRIEF, "--set", "export.gate_prompts=2")
    assert cli("apply", cached, "--revision", "v2", "-e", "edit", "-o", "out", *brief).code == 0
    for folder in ("edit", "judged", "out"):
        about = json.loads((tmp_path / folder / "report.json").read_text())["about"]
        assert (about["model"]["id"], about["model"]["revision"]) == (cached, COMMIT)
    for folder in ("edit", "out"):
        assert load(tmp_path / folder / "recipe.toml").model.id == f"{cached}@{COMMIT}"
    assert COMMIT in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    assert cli("apply", "edit/recipe.toml", "-o", "again", *brief[:4], "-q").code == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == two


def test_a_revision_that_is_not_there_is_one_line(cli, cached):
    said = cli("inspect", cached, "--revision", "v3")
    assert said.code == 2
    assert "owner/m@v3" in said.err
    assert len(said.err.splitlines()[-1]) < 200
