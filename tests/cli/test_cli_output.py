"""Data on stdout, the rest on stderr; nothing of a model's text steers the terminal."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpend.cli import render
from perpend.cli.text import printable, printable_json, seconds, shortened
from perpend.progress import note, track

HOSTILE = "\x1b]0;title\x07\x1b[31mred\x9b1m\u202egnp\u200b\x00 [bold]markup[/bold]"


def noisy(*args, **kwargs):
    warnings.warn("a warning of a library", UserWarning, stacklevel=1)
    logging.getLogger("some.library").warning("a log line of a library")
    note("batch size halved to 4")
    for _ in track(range(3), "count"):
        pass
    return {"output": "out", "n": 3}


def test_human_output_has_data_on_stdout_and_the_rest_on_stderr(cli, task):
    task("inspect", noisy)
    said = cli("inspect", "org/m")
    assert "wrote out" in said.out
    assert said.err.splitlines() == ["batch size halved to 4", "count: 3 to do", said.err.splitlines()[-1]]
    assert said.err.splitlines()[-1].startswith("count: 3 in ")


def test_json_is_all_of_stdout(cli, task):
    task("inspect", lambda *a, **k: noisy() | {"share": float("nan"), "rate": float("inf"), "path": os.path})
    said = cli("inspect", "org/m", "--json")
    assert said.json["n"] == 3
    assert said.json["share"] is None
    assert said.json["rate"] is None
    assert "NaN" not in said.out
    assert "count" in said.err


def test_quiet_prints_the_path_alone(cli, task):
    task("inspect", noisy)
    said = cli("inspect", "org/m", "-q")
    assert (said.out, said.err) == ("out\n", "")


def test_verbose_lets_libraries_speak(cli, task):
    def loud(*args, **kwargs):
        warnings.warn("a warning of a library", UserWarning, stacklevel=1)
        return {}

    task("inspect", loud)
    with pytest.warns(UserWarning, match="of a library"):
        cli("inspect", "org/m", "-v")
    assert "of a library" not in cli("inspect", "org/m").err


def test_libraries_are_as_before_afterwards(cli, task):
    task("inspect", noisy)
    cli("inspect", "org/m")
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize("style", [(), ("--json",), ("-q",)])
def test_hostile_text_is_shown_not_executed(cli, task, style):
    row = {"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE, "label_before": HOSTILE, "label_after": "comply"}
    rows = [
        {"module": HOSTILE, "layer": 0, "component": "mlp", "asked": 1.0, "realised": 0.5, "noise": 0.0, "ok": False}
    ]
    task(
        "inspect",
        {"pairs": [row], "gate": rows, "gaps": [HOSTILE], "notes": [HOSTILE], "output": HOSTILE, "x": HOSTILE},
    )
    said = cli("inspect", "org/m", *style)
    assert said.code == 0
    for character in "\x1b\x07\x9b\u202e\u200b\x00":
        assert character not in said.out
    if not style:
        assert "[bold]markup[/bold]" in said.out
        assert "\\x1b[31mred" in said.out
    if style == ("--json",):
        assert said.json["x"] == HOSTILE


@given(st.text())
def test_printable_text_has_no_character_that_acts(text):
    shown = printable(text)
    assert all(c in "\n\t" or ord(c) >= 0x20 for c in shown)
    assert not set("\x7f\x9b\u202e\u2066\u200f") & set(shown)
    shown.encode()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_printable_json_means_the_same(text):
    dumped = printable_json(json.dumps({"a": text}, ensure_ascii=False))
    assert json.loads(dumped) == {"a": text}


@given(st.text(), st.integers(2, 80))
def test_shortened_text_is_one_short_line(text, length):
    line = shortened(text, length)
    assert len(line) <= length
    assert "\n" not in line


def test_durations_read_well():
    assert [seconds(s) for s in (0.0421, 12.34, 65, 3599, 7380)] == [
        "42 ms", "12.3 s", "1 min 05 s", "59 min 59 s", "2 h 03 min",
    ]  # fmt: skip


def test_a_table_goes_to_a_pipe_without_colour_or_trailing_spaces(cli):
    said = cli("ls", "methods")
    assert "\x1b" not in said.out
    assert all(line == line.rstrip() for line in said.out.splitlines())


@pytest.mark.parametrize("arguments", [["ls", "methods"], ["--help"], ["config", "init"]])
def test_a_reader_that_leaves_early_is_no_error(arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "perpend", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_text_that_the_terminal_cannot_encode_ends_nothing():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "perpend", "ls", "modes"], capture_output=True, env=environment, check=True
    )
    assert b"\\u03bb" in done.stdout


def test_no_color_is_honoured(monkeypatch, capsys):
    from rich.console import Console

    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(force_terminal=True, color_system="truecolor")
    with console.capture() as captured:
        console.print(render.verdict(True))
    assert "\x1b[32m" not in captured.get()


def test_coverage_folds_layers_that_agree():
    rows = [
        {"layer": layer, "component": "mlp", "matched": int(layer != 3), "total": 1, "parameters": 1000}
        for layer in range(6)
    ]
    text = _plain(render.coverage(rows, ["model.layers.3.mlp"]))
    assert "0–2" in text
    assert "4–5" in text
    assert "0 of 1" in text
    assert "not editable: model.layers.3.mlp" in text


def test_labels_show_both_sides_with_intervals():
    before = {"hybrid": {"accepted": 8, "n": 100, "low": 0.041, "high": 0.15}}
    after = {"hybrid": {"accepted": 96, "n": 100, "low": 0.902, "high": 0.984}}
    text = _plain([render.labels(before, after)])
    assert "8 of 100 (8.0 %)" in text
    assert "96 of 100 (96.0 %)" in text
    assert "90.2–98.4 %" in text
    assert "before" in text
    assert "before" not in _plain([render.labels(None, after)])


def test_gate_names_every_miss():
    row = {"layer": 1, "component": "mlp", "asked": 1.0, "noise": 0.001}
    rows = [row | {"module": "a", "realised": 1.0, "ok": True}, row | {"module": "b", "realised": 0.2, "ok": False}]
    text = _plain(render.gate(rows))
    assert "missed" in text
    assert "0.8000" in text
    assert "b " in text.split("Missed")[1]
    assert "Missed" not in _plain(render.gate(rows[:1]))


def test_pairs_are_folded_to_one_line():
    text = _plain(render.pairs([{"prompt": "p", "before": "word " * 200, "after": "ok", "label_after": "comply"}]))
    assert "…" in text
    assert "[comply]" in text
    assert len(text) < 600


def _plain(parts) -> str:
    from rich.console import Console

    console = Console(width=200, no_color=True)
    with console.capture() as captured:
        for part in parts:
            console.print(part, markup=False, highlight=False)
    return captured.get()
