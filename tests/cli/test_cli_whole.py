"""The commands on a small model, from the command line to the files: what one writes, the next one reads."""

from __future__ import annotations

import io
import json
import socket
import sys
from types import SimpleNamespace

import pytest

from perpend.cli import views
from perpend.cli.output import Output
from perpend.config import load
from perpend.judges import server
from perpend.judges.dictionary import Dictionary
from perpend.judges.labels import Label, Verdict

BRIEF = ("--no-filter", "--layer", "50%", "--limit", "6", "--device", "cpu")
REPLIES = ("--classifier", "none", "--max-new-tokens", "6", "--set", "export.gate_prompts=2")


@pytest.fixture
def model(pico_dir):
    return str(pico_dir("llama"))


def _weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors") if path.name.startswith("model")}


def test_inspect_says_what_can_be_edited(cli, model):
    said = cli("inspect", model, "--json")
    assert said.code == 0, said.err
    assert said.json["writers"] == 2 * said.json["n_layers"]
    assert said.json["gaps"] == []
    shown = cli("inspect", model).out
    assert "LlamaForCausalLM" in shown
    assert f"0 – {said.json['n_layers'] - 1}" in shown


def test_inspect_writes_a_file_once(cli, model, tmp_path):
    said = cli("inspect", model, "-o", "deep/anatomy.json", "--dry-run")
    assert (said.code, "would write deep/anatomy.json" in said.out) == (0, True), said.err
    assert cli("inspect", model, "--dry-run", "--json").json["forecast"]["reads"] > 0
    assert not (tmp_path / "deep").exists()
    said = cli("inspect", model, "-o", "deep/anatomy.json", "--json")
    assert json.loads((tmp_path / "deep" / "anatomy.json").read_text()) == said.json
    assert said.json["output"] == "deep/anatomy.json"
    for more in ((), ("--dry-run",)):
        again = cli("inspect", model, "-o", "deep/anatomy.json", *more)
        assert (again.code, "already exists" in again.err) == (2, True)


def test_fit_then_apply_then_eval(cli, model, tmp_path):
    said = cli("fit", model, "-o", "edit", *BRIEF)
    assert said.code == 0, said.err
    assert "layer" in said.out
    assert "wrote edit" in said.out
    assert load(tmp_path / "edit" / "recipe.toml").fit.filter is False

    applied = cli("apply", model, "-e", "edit", "-o", "out", "--limit", "6", *REPLIES)
    assert applied.code == 0, applied.err
    assert "Weight factors on the saved file" in applied.out
    assert "missed" not in applied.out

    judged = cli("eval", model, "-e", "edit", "--limit", "6", *REPLIES, "--json")
    assert judged.code == 0, judged.err
    assert judged.json["report"]["after"]["target"]["n"] == 6
    alone = cli("eval", "out", "--limit", "6", *REPLIES)
    assert alone.code == 0, alone.err
    assert "after" not in alone.out


def test_run_writes_what_apply_writes_again_byte_for_byte(cli, model, tmp_path):
    said = cli("run", model, "-o", "one", *BRIEF, *REPLIES)
    assert said.code == 0, said.err
    for heading in ("Writers", "Direction", "Target prompts", "Baseline prompts", "Drift", "Weight factors"):
        assert heading in said.out
    assert "wrote one" in said.out
    assert json.loads((tmp_path / "one" / "report.json").read_text())["model"] == model

    again = cli("apply", "one/recipe.toml", "-o", "two", "-q")
    assert (again.code, again.out) == (0, "two\n"), again.err
    assert _weights(tmp_path / "two") == _weights(tmp_path / "one")
    assert cli("run", model, "-o", "one", *BRIEF, *REPLIES).code == 2


def test_a_dry_run_writes_nothing(cli, model, tmp_path):
    for command in ("run", "fit"):
        said = cli(command, model, "-o", "out", *BRIEF, "--dry-run")
        assert said.code == 0, said.err
        assert "would write out" in said.out
        assert "target.fit 6" in said.out
    assert not list(tmp_path.iterdir())


def test_chat_reads_lines_and_answers(cli, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/reset\nAgain\n"))
    said = cli("chat", model, "--max-new-tokens", "4")
    assert said.code == 0, said.err
    assert "the conversation is forgotten" in said.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    (turn,) = cli("chat", model, "--max-new-tokens", "4", "--json").json["turns"]
    assert turn["user"] == "Hello"
    assert list(turn["answers"]) == ["base"]
    assert "211 kB" in cli("chat", model, "--dry-run").out


def test_answers_cannot_steer_the_terminal(cli, model, monkeypatch):
    def hostile(self, ids):
        return "\x1b]0;owned\x07\x1b[2J\u202eabc"

    monkeypatch.setattr("perpend.models.chat.Chat.decode", hostile)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    said = cli("chat", model, "--max-new-tokens", "4")
    assert r"\x1b]0;owned\x07\x1b[2J\u202eabc" in said.out
    assert "\x1b" not in said.out


def test_columns_show_both_answers_and_only_the_end_of_long_ones_while_they_grow():
    from rich.console import Console

    from perpend.cli.screen import Columns, side_by_side

    console = Console(width=80, height=20, file=io.StringIO())
    long = "\n".join(f"line {k}" for k in range(40)) + "\x1b[2J"
    console.print(side_by_side(console, ["base", "edited × 1"], [long, "short"], 5))
    shown = console.file.getvalue()
    assert "line 39\\x1b[2J" in shown
    assert "line 34" not in shown
    assert "short" in shown
    written = []
    Columns(lambda: None, written.append).answers(["base"], iter([(0, "a"), (0, "b")]))
    assert "".join(written) == "ab\n"


def test_a_model_that_does_not_refuse_is_one_line(cli, model):
    said = cli("fit", model, "-o", "edit", "--limit", "6", "--layer", "50%")
    assert said.code == 1
    assert said.err.splitlines()[-1].startswith("perpend: ")
    assert "Traceback" not in said.err


def test_commands_that_write_a_report_name_its_page_in_their_last_line(cli, model, tmp_path):
    for words in (
        ("fit", model, "-o", "edit", *BRIEF),
        ("apply", model, "-e", "edit", "-o", "made", "--set", "export.gate_prompts=0"),
        ("eval", model, "-o", "said", "--limit", "2", *REPLIES[:4]),
        ("adapter", model, "-e", "edit", "-o", "peft"),
    ):
        said = cli(*words)
        place = words[words.index("-o") + 1]
        assert said.code == 0, said.err
        assert said.out.splitlines()[-1] == f"report: {place}/report.html"
        assert (tmp_path / place / "report.html").is_file()
    assert "report:" not in cli("fit", model, "-o", "other", *BRIEF, "--dry-run").out
    said = cli("eval", model, "-o", "again", "--limit", "2", *REPLIES[:4], "--json")
    assert said.json["pages"] == ["again/report.json", "again/report.html"]
    assert cli("eval", model, "--limit", "2", *REPLIES[:4], "--json").json.get("pages") is None


def test_a_demo_names_the_page_of_its_run(tmp_path, capsys):
    made = tmp_path / "demo" / "edited"
    made.mkdir(parents=True)
    for name in ("report.json", "report.html"):
        (made / name).write_text("")
    data = {"output": str(tmp_path / "demo"), "run": {"output": str(made)}, "seconds": 3.0}
    Output().result(SimpleNamespace(to_json=lambda: dict(data)), views.written)
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {made}/report.html"


def test_a_judge_that_cannot_be_reached_is_told_in_every_table_and_ends_with_0(cli, model, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "ATTEMPTS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Dictionary, "label", lambda *_: Verdict(Label.COMPLY, None, "a test", "test"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        judge = f"endpoint:http://127.0.0.1:{closed.getsockname()[1]}/v1#model=judge"
        cli("fit", model, "-o", "edit", *BRIEF)
        given = ("--limit", "6", "--max-new-tokens", "6", "--classifier", judge)
        said = cli("eval", model, "-e", "edit", "-o", "out", *given)
    assert said.code == 0, said.err
    assert "6 of 6 replies could not be judged" in said.err
    rows = [line.split() for line in said.out.splitlines()]
    assert rows.count(["not", "judged", "100.0%", "6/6", "100.0%", "6/6"]) == 2
    assert said.out.count("difference: no prompt was judged both times") == 2
    flat = " ".join(said.out.split())
    assert "0 of 6 (0.0%, 95 % interval 0.0% to 39.0%) accepted, 6 not judged counted as not accepted" in flat
    page = (tmp_path / "out" / "report.html").read_text()
    assert "of 0 → 0 judged replies to 6 held-out target prompts accepted" in " ".join(page.split())
    assert "0/0" not in page
    assert page.count('<th scope="row">not judged</th>') >= 2
