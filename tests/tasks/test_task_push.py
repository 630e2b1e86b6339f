"""Uploading an output: what leaves the machine, what does not, and what happens when the hub fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from task_cases import MACHINE, a_recipe, contents, names

import perpend
from hub import Hub, Repo, serving
from perpend.cli.main import main
from perpend.config import Recipe, load, to_toml
from perpend.errors import RunFailed, UsageError
from perpend.progress import reporting
from steps import Steps

CARD = "---\nbase_model:\n- owner/base\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# An edit\n"
REPLIES = {"report.html", "report.json", "after.jsonl", "vocab.gguf.report.json", "vocab.gguf.report.html"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine that `huggingface_hub` takes for the real one."""
    constants = huggingface_hub.constants
    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", found.token)
        yield found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output as `run` leaves one, with small stand-ins for its weights."""
    folder = tmp_path / "out"
    folder.mkdir()
    recipe = Recipe.model_validate(
        {"model": {"id": "owner/base@0123abc"}, "prompts": {"target": str(tmp_path / "mine" / "t.txt")}}
    )
    written = to_toml({**recipe.model_dump(mode="json"), "result": {"edit": "edit.safetensors"}})
    texts = {
        "README.md": CARD,
        "recipe.toml": written,
        "config.json": "{}",
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "",
        "LICENSE": "a licence",
        "report.html": "a prompt",
        "report.json": "a prompt",
        "vocab.gguf.report.html": "a prompt",
        "vocab.gguf.report.json": "a prompt, in a file that is called like a part of a tokenizer",
        "after.jsonl": "a reply",
        "notes.txt": "mine",
        ".hidden": "mine",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for k, name in enumerate(("model-00001-of-00002", "model-00002-of-00002", "edit")):
        (folder / f"{name}.safetensors").write_bytes(bytes([k]) * (1 << 12))
    return folder


def test_an_output_arrives_whole_private_and_without_replies(hub: Hub, out: Path) -> None:
    with reporting(Steps()) as told:
        made = perpend.push(out, "owner/edit")
    size = sum(file.size for file in made.files)
    assert [(step.total, step.unit) for step in told.named("upload")] == [(size, "B")]
    repo = hub.repos["owner/edit"]
    assert repo.private
    assert len(repo.commits) == 1
    assert made.commit == repo.commits[0]
    files = repo.branches["main"]
    assert set(files) == names(out) - REPLIES - {"notes.txt", ".hidden"}
    kept = contents(out)
    assert {name: data for name, data in files.items() if data != kept[name]}.keys() == {"recipe.toml"}
    assert {file.name for file in made.kept} == REPLIES | {"notes.txt"}
    assert made.output == f"{hub.url}/owner/edit"


def test_no_folder_of_this_machine_leaves_it(
    hub: Hub, out: Path, tmp_path: Path, pico_dir: Callable[[str], Path]
) -> None:
    shutil.copytree(pico_dir("llama"), tmp_path / "base")  # a local model, whose edit remembers what it is of
    perpend.fit(str(tmp_path / "base"), output=tmp_path / "fit", recipe=a_recipe(tmp_path), machine=MACHINE)
    shutil.copy(tmp_path / "fit" / "edit.safetensors", out)
    shutil.copytree(tmp_path / "fit", out / "earlier")
    assert str(tmp_path) in (out / "earlier" / "recipe.toml").read_text(encoding="utf-8")
    perpend.push(out, "owner/edit")
    sent = hub.repos["owner/edit"].branches["main"]
    assert {"earlier/recipe.toml", "earlier/edit.safetensors"} <= set(sent)
    assert not [name for name, data in sent.items() if str(tmp_path).encode() in data]
    (tmp_path / "recipe.toml").write_bytes(sent["recipe.toml"])
    there, here = load(tmp_path / "recipe.toml"), load(out / "recipe.toml")
    assert there.prompts.target == "t.txt"
    assert there.model_copy(update={"prompts": here.prompts}) == here


def test_replies_and_the_public_are_asked_for(hub: Hub, out: Path) -> None:
    perpend.push(out, "owner/edit", public=True, with_replies=True, revision="v2")
    repo = hub.repos["owner/edit"]
    assert not repo.private
    assert set(repo.branches["v2"]) >= REPLIES
    assert repo.branches["main"] == {}


def test_an_interrupted_upload_goes_on_where_it_was(hub: Hub, out: Path) -> None:
    hub.fail("PUT", "/store/", 503, times=7, after=1)
    with pytest.raises(RunFailed, match=r"the hub failed \(503\); try: the same command again"):
        perpend.push(out, "owner/edit")
    assert hub.repos["owner/edit"].branches["main"] == {}, "nothing appears before all is there"
    first = set(hub.blobs)
    assert len(first) == 1
    hub.failures.clear()
    hub.asked.clear()
    perpend.push(out, "owner/edit")
    assert first.isdisjoint(hub.uploads())
    assert len(hub.uploads()) == 2
    assert len(hub.repos["owner/edit"].branches["main"]) == 10


def test_a_connection_that_breaks_is_tried_again(hub: Hub, out: Path) -> None:
    hub.fail("PUT", "/store/", 0, times=2)
    perpend.push(out, "owner/edit")
    assert len(hub.repos["owner/edit"].commits) == 1


def test_a_dry_run_lists_files_and_asks_nothing(hub: Hub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(out), "owner/edit", "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    listed = {file["name"]: file["bytes"] for file in data["files"]}
    assert listed["model-00001-of-00002.safetensors"] == 1 << 12
    assert data["bytes"] == sum(listed.values())
    assert (data["private"], data["dry_run"], data["commit"]) == (True, True, None)
    assert main(["push", str(out), "owner/edit", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "stays here: report.html, holds prompts and replies: --with-replies" in said
    assert "would send 10 files" in said
    assert hub.asked == []


@pytest.mark.parametrize(
    ("method", "path", "status", "error", "says"),
    [
        ("GET", "/api/models/", 401, UsageError, "the hub does not accept the token; try: hf auth login"),
        ("POST", "/api/repos/create", 403, UsageError, "the token may not write there"),
        ("POST", "/commit/", 409, RunFailed, "changed on the hub meanwhile; try: the same command again"),
        ("POST", "/commit/", 500, RunFailed, r"the hub failed \(500\)"),
        ("POST", "/batch", 422, UsageError, r"the hub refuses it \(422\)"),
        ("PUT", "/store/", 0, RunFailed, "not sent: .*; try: the same command again"),
        ("POST", "/preupload/", 429, RunFailed, r"the hub failed \(429\)"),
    ],
)
def test_a_failing_hub_is_one_line_without_the_token(
    hub: Hub,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    method: str,
    path: str,
    status: int,
    error: type[Exception],
    says: str,
) -> None:
    hub.fail(method, path, status)
    with pytest.raises(error, match=says) as caught:
        perpend.push(out, "owner/edit")
    assert "\n" not in str(caught.value)
    assert main(["push", str(out), "owner/edit", "--debug"]) == getattr(error, "exit_code", None)
    captured = capsys.readouterr()
    told = [captured.out, captured.err, caplog.text, str(caught.value)]
    told += [data.decode("utf-8", "replace") for data in contents(tmp_path).values()]
    assert not [text for text in told if hub.token in text]
    assert "signature" not in str(caught.value)


def test_what_is_public_there_is_not_taken_for_private(hub: Hub, out: Path) -> None:
    hub.repos["owner/edit"] = Repo(private=False)
    with pytest.raises(UsageError, match="is public, and nothing is published unless asked; try: --public"):
        perpend.push(out, "owner/edit")
    assert hub.blobs == {}
    perpend.push(out, "owner/edit", public=True)
    hub.repos["owner/other"] = Repo(private=True)
    with pytest.raises(UsageError, match="is there and private"):
        perpend.push(out, "owner/other", public=True)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("license: apache-2.0\n", "", "names no licence"),
        ("- owner/base", "- owner/another", "names base model owner/another, and the recipe owner/base"),
        ("base_model:\n- owner/base\n", "", "names base model none, and the recipe owner/base"),
        ("license: apache-2.0", "license: gemma", "NOTICE"),
        ("license: apache-2.0", "license: [", "no valid front matter"),
        ("license: apache-2.0", "license: nonsense", 'the hub refuses this card: "license" must be'),
    ],
)
def test_a_card_is_checked_before_anything_is_sent(hub: Hub, out: Path, old: str, new: str, says: str) -> None:
    (out / "README.md").write_text(CARD.replace(old, new), encoding="utf-8")
    with pytest.raises(UsageError, match=says):
        perpend.push(out, "owner/edit")
    assert hub.repos == {}
    assert {path for _, path in hub.asked} <= {"/api/validate-yaml"}


def test_what_is_no_model_no_name_or_has_no_token_is_refused(
    hub: Hub, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        perpend.push(tmp_path / "none", "owner/edit")
    with pytest.raises(UsageError, match=r"'a/b/c' is no repository; valid: owner/name"):
        perpend.push(out, "a/b/c")
    (out / "config.json").unlink()
    with pytest.raises(UsageError, match=r"no config.json: not a model to push"):
        perpend.push(out, "owner/edit")
    (out / "adapter_config.json").write_text("{}", encoding="utf-8")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="no token of the hub; try: hf auth login, or HF_TOKEN"):
        perpend.push(out, "owner/edit")
    assert hub.asked == []


def test_the_environment_is_honoured_from_the_command_line(out: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with serving() as hub:
        (home / "token").write_text(hub.token, encoding="utf-8")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}

        def typed(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
            line = [sys.executable, "-m", "perpend", "push", str(out), *arguments]
            return subprocess.run(line, env=kept | more, capture_output=True, text=True, check=False)

        offline = typed("owner/edit", HF_HUB_OFFLINE="1")
        assert (offline.returncode, hub.asked) == (2, [])
        assert "offline, as HF_HUB_OFFLINE asks for" in offline.stderr
        wrong = typed("owner/edit", HF_TOKEN="hf_another_secret", HF_DEBUG="1")
        assert wrong.returncode == 2
        done = typed("owner/edit", "-q")
        assert (done.returncode, done.stdout) == (0, f"{hub.url}/owner/edit\n"), done.stderr
        said = "".join(run.stdout + run.stderr for run in (offline, wrong, done))
        assert hub.token not in said
        assert "hf_another_secret" not in said
        assert len(hub.repos["owner/edit"].commits) == 1
    assert [path for path, data in contents(tmp_path).items() if hub.token.encode() in data] == ["home/token"]
