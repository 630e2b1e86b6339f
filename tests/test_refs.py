"""References: what is parsed is printed back, what is wrong is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hub import Hub, Repo, serving
from perpend.errors import UsageError
from perpend.progress import reporting
from perpend.refs import DataRef, ModelRef, without_secrets
from steps import Steps


@pytest.mark.parametrize(
    ("text", "kind", "name", "revision"),
    [
        ("org/name", "hub", "org/name", None),
        ("org/name@v1.0", "hub", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "hub", "org/name", "refs/pr/3"),
        ("gpt2", "hub", "gpt2", None),
    ],
)
def test_hub_models_are_parsed_and_printed_back(text: str, kind: str, name: str, revision: str | None) -> None:
    ref = ModelRef.parse(text)
    assert (ref.kind, ref.name, ref.revision) == (kind, name, revision)
    assert str(ref) == text
    assert ModelRef.parse(str(ref)) == ref


def test_what_is_on_disk_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for text, kind in (("org/name", "dir"), (str(tmp_path), "dir"), ("a.gguf", "gguf"), ("./a.gguf", "gguf")):
        ref = ModelRef.parse(text)
        assert (ref.kind, str(ref)) == (kind, text)
    assert ModelRef.parse("org/name").resolve().path == tmp_path / "org" / "name"
    found = ModelRef.parse("a.gguf").resolve()
    assert (found.path, found.gguf_file, found.revision) == (tmp_path, "a.gguf", None)


@pytest.mark.parametrize(
    "text", ["", "  ", "./none", "/no/where", "~/nowhere-at-all", "a/b/c", "org/name@", "a b", "x.gguf"]
)
def test_what_is_no_model_is_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        ModelRef.parse(text)
    assert "\n" not in str(caught.value)


def test_a_weights_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="neither a directory nor a GGUF file"):
        ModelRef.parse(str(path))


def test_a_hub_model_that_is_not_cached_is_one_line_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"^org/name@v1: .*cache") as caught:
        ModelRef.parse("org/name@v1").resolve()
    assert "\n" not in str(caught.value)
    assert "directory" not in str(caught.value)
    with pytest.raises(UsageError, match=r"^org/name: .*cache.*, and no such directory here"):
        ModelRef.parse("org/name").resolve()  # perhaps a path with a slip in it


@pytest.mark.parametrize(
    "text",
    [
        "perpend:target",
        "perpend:baseline#split=report",
        "org/set",
        "org/set@main",
        "org/set@abc#split=train[:400],column=text",
        "set#split=test,column=goal,config=small",
    ],
)
def test_data_references_are_printed_back(text: str) -> None:
    ref = DataRef.parse(text)
    assert str(ref) == text
    assert DataRef.parse(str(ref)) == ref


def test_data_options_are_read(tmp_path: Path) -> None:
    ref = DataRef.parse("org/set@abc#split=train[:400],column=text")
    assert (ref.kind, ref.name, ref.revision, ref.split, ref.column) == ("hub", "org/set", "abc", "train[:400]", "text")
    path = tmp_path / "p.jsonl"
    path.touch()
    ref = DataRef.parse(f"{path}#column=goal,image=picture")
    assert (ref.kind, ref.column, ref.image) == ("file", "goal", "picture")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("perpend:targets", "did you mean 'perpend:target'"),
        ("none.jsonl", "no such file"),
        ("org/set#colum=text", "did you mean 'column'"),
        ("org/set#column", "no value"),
        ("org/set#column=a,column=b", "twice"),
        ("a b", "no data reference"),
        ("", "no data reference"),
    ],
)
def test_what_is_no_data_is_one_line(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        DataRef.parse(text)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.docx").touch()
    with pytest.raises(UsageError, match="not a prompt file"):
        DataRef.parse(str(tmp_path / "a.docx"))


def test_references_and_data_load_no_tensor_library() -> None:
    code = "import sys, perpend.refs, perpend.data; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def reach(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's client ask a hub of this machine, with an empty cache and no token."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def test_a_revision_is_downloaded_and_its_commit_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as hub:
        reach(hub, tmp_path, monkeypatch)
        branches = {"main": {"config.json": b"{}"}, "v2": {"config.json": b'{"v": 2}'}}
        hub.repos["org/name"] = Repo(False, branches, ["a" * 40], {"v2": "b" * 40})
        for asked, commit, branch in (
            ("org/name", "a" * 40, "main"),
            ("org/name@v2", "b" * 40, "v2"),
            (f"org/name@{'b' * 40}", "b" * 40, "v2"),
        ):
            found = ModelRef.parse(asked).resolve()
            assert found.revision == commit
            assert (found.path / "config.json").read_bytes() == branches[branch]["config.json"]


def test_what_the_hub_refuses_is_one_line_without_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as hub:
        reach(hub, tmp_path, monkeypatch)
        files = {"main": {"config.json": b"{}"}}
        hub.repos = {
            "org/mine": Repo(True, files, ["a" * 40]),
            "org/gated": Repo(False, files, ["a" * 40], gated=True),
        }
        refused = {
            "org/mine": "no such repository on the hub, or no access",  # 401: nobody is logged in
            "org/none": "no such repository on the hub, or no access",
            "org/gated": "access to this repository must be granted first",
        }
        for name, said in refused.items():
            with pytest.raises(UsageError, match=said):
                ModelRef.parse(name).resolve()
        monkeypatch.setenv("HF_TOKEN", hub.token)
        assert ModelRef.parse("org/mine").resolve().revision == "a" * 40
        hub.fail("GET", "/api/models/org/broken", 400)  # answers with the token that it was given
        refused |= {"org/mine@v9": "no revision 'v9'", "org/broken": "the hub cannot be reached"}
        for name in ("org/none", "org/gated", "org/mine@v9", "org/broken"):
            with pytest.raises(UsageError, match=refused[name]) as caught:
                ModelRef.parse(name).resolve()
            assert hub.token not in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_token_that_an_error_repeats_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")

    def refuse(*args: object, **options: object) -> None:
        raise ValueError("bad header 'Bearer hf_a_secret'")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UsageError, match=r"bad header 'Bearer \(the token\)'") as caught:
        ModelRef.parse("org/name").resolve(fetch=False)
    assert "hf_a_secret" not in str(caught.value)


def test_a_download_is_a_step_in_bytes_of_what_the_cache_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving() as hub:
        reach(hub, tmp_path, monkeypatch)
        files = {"config.json": b"{}", "model-1.safetensors": b"1" * (3 << 20), "model-2.safetensors": b"2" * (2 << 20)}
        hub.repos["org/name"] = Repo(False, {"main": {**files, "picture.png": b"3" * (9 << 20)}}, ["a" * 40])
        with reporting(Steps()) as first:
            found = ModelRef.parse("org/name").resolve()
        hub.repos["org/name"].branches["main"]["model-3.safetensors"] = b"4" * (1 << 20)
        hub.repos["org/name"].commits.append("b" * 40)
        with reporting(Steps()) as more:
            assert ModelRef.parse("org/name").resolve().revision == "b" * 40
        with reporting(Steps()) as again:
            ModelRef.parse("org/name").resolve()
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == files
    assert [(step.total, step.unit) for step in first.named("download")] == [((5 << 20) + 2, "B")]
    assert first.notes == ["fetching org/name: 3 files, 5.2 MB"]
    assert len(first.steps[0].moves) > 1
    assert (again.steps, again.notes) == ([], [])
    assert sum(sum(step.moves) for step in more.steps) >= 1 << 20
    assert capfd.readouterr().err == ""


def test_neither_the_token_nor_a_signed_address_is_in_what_is_said() -> None:
    said = "hf_abc may not read https://cdn.example/file?Signature=xyz&Expires=1 now"
    assert without_secrets(said, "hf_abc") == "(the token) may not read https://cdn.example/file now"
    assert without_secrets(said, None) == "hf_abc may not read https://cdn.example/file now"
