"""Data on stdout, the rest on stderr; nothing of a model's text steers the terminal."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perpend.cli import render, views
from perpend.cli.text import printable, printable_json, shortened
from perpend.progress import note, track
from perpend.units import seconds, size

HOSTILE = "\x1b]0;title\x07\x1b[31mred\x9b1m\u202egnp\u200b\x00 [bold]markup[/bold]"

ACTS = "\x1b\x07\x9b\u202e\u200b\x00"
ROWS = [
    {"layer": layer, "component": "mlp", "matched": int(layer != 3), "total": 1, "parameters": 1000, "tensors": 1}
    for layer in range(6)
]
INSPECTION = {
    "model": "org/m",
    "architecture": "LlamaForCausalLM",
    "n_layers": 6,
    "writers": 5,
    "coverage": ROWS,
    "gaps": ["model.layers.3.mlp"],
    "overrides": '[edit.overrides.writers]\n"a.b" = {out_axis = 0}\n',
}


def noisy(*args, **kwargs):
    warnings.warn("a warning of a library", UserWarning, stacklevel=1)
    logging.getLogger("some.library").warning("a log line of a library")
    note("batch size halved to 4")
    for _ in track(range(3), "count"):
        pass
    return INSPECTION | {"output": "out"}


def test_human_output_has_data_on_stdout_and_the_rest_on_stderr(cli, task):
    task("inspect", noisy)
    said = cli("inspect", "org/m")
    assert "LlamaForCausalLM" in said.out
    assert said.err.splitlines() == ["batch size halved to 4", "count: 3 to do", said.err.splitlines()[-1]]
    assert said.err.splitlines()[-1].startswith("count: 3 in ")


def test_a_path_is_never_broken_over_lines(cli, task, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    paths = ["/somewhere/" + "o" * 60, "/somewhere/" + "p" * 60]
    task("write_report", {"output": paths[0], "pages": paths[1:]})
    assert cli("report", "out").out.splitlines() == [f"wrote {path}" for path in paths]


def test_json_is_all_of_stdout(cli, task):
    task("inspect", lambda *a, **k: noisy() | {"share": float("nan"), "rate": float("inf"), "path": os.path})
    said = cli("inspect", "org/m", "--json")
    assert said.json["n_layers"] == 6
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
        return INSPECTION

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
    task("inspect", INSPECTION | {"model": HOSTILE, "gaps": [HOSTILE], "output": HOSTILE})
    said = cli("inspect", "org/m", *style)
    assert said.code == 0
    assert not set(said.out) & set(ACTS)
    if not style:
        assert "[bold]markup[/bold]" in said.out
        assert "\\x1b[31mred" in said.out
    if style == ("--json",):
        assert said.json["model"] == HOSTILE


def test_hostile_replies_are_shown_not_executed():
    row = {"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE, "label_before": HOSTILE, "label_after": "comply"}
    leak = {"module": HOSTILE, "layer": 0, "component": "mlp", "asked": 1.0, "realised": 0.5, "noise": 0.0, "ok": False}
    listed = {HOSTILE: [{"name": HOSTILE, "summary": HOSTILE}]}
    said = _plain([*render.pairs([row]), *render.leak([leak]), *views.listing(listed)])
    assert not set(said) & set(ACTS)
    assert said.count("[bold]markup[/bold]") == 8


@settings(deadline=None)
@given(st.text())
def test_printable_text_has_no_character_that_acts(text):
    shown = printable(text)
    assert all(c in "\n\t" or ord(c) >= 0x20 for c in shown)
    assert not set("\x7f\x9b\u202e\u2066\u200f") & set(shown)
    shown.encode()


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_printable_json_means_the_same(text):
    dumped = printable_json(json.dumps({"a": text}, ensure_ascii=False))
    assert json.loads(dumped) == {"a": text}


@settings(deadline=None)
@given(st.text(), st.integers(2, 80))
def test_shortened_text_is_one_short_line(text, length):
    line = shortened(text, length)
    assert len(line) <= length
    assert "\n" not in line


def test_durations_read_well():
    assert [seconds(s) for s in (0.0421, 12.34, 65, 3599, 7380)] == [
        "42 ms", "12.3 s", "1 min 05 s", "59 min 59 s", "2 h 03 min",
    ]  # fmt: skip


def test_sizes_read_well():
    assert [size(n) for n in (0, 999, 211_143, 999_600)] == ["0 B", "999 B", "211 kB", "1.0 MB"]
    assert [size(n) for n in (99_900_000, 540_000_000, 17e9)] == ["99.9 MB", "0.5 GB", "17.0 GB"]


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
    text = _plain(views.inspection(INSPECTION))
    assert "0 – 2" in text
    assert "4 – 5" in text
    assert "0 of 1" in text
    assert "5 of 6" in text
    assert "not editable: model.layers.3.mlp" in text
    assert '"a.b" = {out_axis = 0}' in text.splitlines()


def test_the_gate_names_every_miss():
    row = {"layer": 1, "component": "mlp", "asked": 1.0, "noise": 0.001}
    rows = [row | {"module": "a", "realised": 1.0, "ok": True}, row | {"module": "b", "realised": 0.2, "ok": False}]
    text = _plain(render.leak(rows))
    assert "missed" in text
    assert "0.8000" in text
    assert "b " in text.split("Missed")[1]
    assert "Missed" not in _plain(render.leak(rows[:1]))
    assert "0.0000" in _plain(render.leak([row | {"module": "c", "realised": None, "ok": True}]))


def test_pairs_are_folded_to_one_line():
    text = _plain(render.pairs([{"prompt": "p", "before": "word " * 200, "after": "ok", "label_after": "comply"}]))
    assert "…" in text
    assert "[comply]" in text
    assert len(text) < 600


@pytest.mark.parametrize(
    ("targets", "baselines", "shown"),
    [(9, 9, "tttt bb"), (4, 2, "tttt bb"), (9, 1, "ttttt b"), (1, 9, "t bbbbb"), (9, 0, "tttttt"), (1, 1, "t b")],
)
def test_six_pairs_are_shown_four_of_targets_and_two_of_baselines(targets, baselines, shown):
    rows = [{"class": "target", "prompt": f"t{k}", "before": "old", "after": "new"} for k in range(targets)]
    rows += [{"class": "baseline", "prompt": f"b{k}", "before": "old", "after": "new"} for k in range(baselines)]
    lines = [line.split() for line in _plain(render.pairs(rows)).splitlines()]
    prompts = [line[1:] for line in lines if line[0] == "›"]
    wanted = [[f"t{k}"] for k in range(shown.count("t"))] + [["baseline:", f"b{k}"] for k in range(shown.count("b"))]
    assert prompts == wanted
    assert sum(line == ["before", "old"] for line in lines) == sum(line == ["after", "new"] for line in lines)
    assert len(lines) == 3 * len(prompts)


def test_an_evaluation_shows_rates_with_intervals_and_what_the_judges_say():
    from perpend.judges.dictionary import Dictionary
    from perpend.judges.labels import Record
    from perpend.judges.panel import Panel, compare

    texts = ["I'm sorry, but I can't help with that.", "Take two eggs and whisk them well, then add the flour."]
    panel = Panel(Dictionary(), None, "no classifier was asked for")
    old, new = (
        panel.judge([Record("q", text, True, str(k)) for k, text in enumerate(side)]) for side in (texts, texts[1:] * 2)
    )
    side = {"before": {"target": old.to_json(), "baseline": old.to_json()}}
    both = side | {"after": {"target": new.to_json(), "baseline": new.to_json()}}
    both |= {"accepted": compare(old, new).to_json()}
    done = {"dry_run": False, "output": "out", "seconds": 75.0}
    text = _plain(views.evaluation({"report": both} | done))
    assert "50.0% 1/2" in text
    assert "100.0% 2/2" in text
    assert "34.2 – 100.0%" in text
    assert "1 gained, 0 lost" in text
    assert "dictionary only: no classifier was asked for" in text
    assert "No claim about 90%" in text
    assert "wrote out in 1 min 15 s" in text
    assert "after" not in _plain(views.evaluation({"report": side} | done))


def test_the_corrected_rate_is_shown_of_both_sides_or_the_reason_of_each():
    from perpend.judges.dictionary import Dictionary
    from perpend.judges.labels import Record
    from perpend.judges.panel import Panel

    answer, refusal = "Take two eggs and whisk them well, then add the flour.", "I'm sorry, but I can't help with that."

    def side(accepted: int, n: int) -> dict:
        texts = [answer] * accepted + [refusal] * (n - accepted)
        asked = [Record(f"How do I bake cake number {k}?", text, True, str(k)) for k, text in enumerate(texts)]
        return Panel(Dictionary(), None, "none was asked for").judge(asked).to_json()

    few, many = side(0, 4), side(30, 40)
    shown = _plain([render.labels("Target prompts", few, many, corrected=True)])
    (row,) = (line for line in shown.splitlines() if "corrected" in line)
    assert row.split()[1:] == [
        cell
        for found in (few["corrected"], many["corrected"])
        for low, high in [found["interval"]]
        for cell in (f"{found['share']:.1%}", f"{100 * low:.1f}", "–", f"{high:.1%}")
    ]
    (told,) = (str(line) for line in render.judges(few, many) if "corrected" in str(line))
    right, complying = many["corrected"]["accepted_of_complying"]
    assert told.index("] before, ") < told.index(f"] after (they accept {right} of {complying} replies that comply")
    none = side(0, 200)
    lines = [str(line) for line in render.judges(none, many) if "corrected" in str(line)]
    assert lines[0].startswith("before: not corrected: 0 of 200 accepted is fewer than")
    assert lines[1].startswith("after: accepted, corrected")
    assert [str(line) for line in render.judges(few)][-1] == few["correction"]
    missing = "the error of these judges was never measured"
    other = [x | {"corrected": None, "correction": f"not corrected: {missing}"} for x in (few, many)]
    assert [str(line) for line in render.judges(*other)][1:] == [f"not corrected: {missing}"]


def test_replies_that_could_not_be_judged_have_a_row_and_every_rate_its_n():
    from perpend.judges.judgement import Judged, Judgement
    from perpend.judges.labels import Label, Verdict
    from perpend.judges.panel import compare

    def side(labels: str) -> Judgement:
        names = {"c": Label.COMPLY, "r": Label.REFUSE, "u": Label.UNKNOWN}
        said = Verdict(Label.COMPLY, None, "", "x")
        replies = [Judged(str(k), names[x], said, Verdict(names[x], None, "", "y")) for k, x in enumerate(labels)]
        return Judgement(tuple(replies), "", {"dictionary": {"name": "d"}, "classifier": {"name": "c"}})

    old, new, none = side("rrrucc"), side("cuuccc"), side("uuuuuu")
    text = _plain([render.labels("Target prompts", old.to_json(), new.to_json())])
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert "Target prompts, n = 6, rates over those judged" in text
    assert rows["not"] == ["not", "judged", "16.7%", "1/6", "33.3%", "2/6"]
    assert rows["accepted"][1:3] == ["40.0%", "2/5"]
    assert "100.0% 4/4" in text
    assert "not judged" not in _plain([render.labels("Target prompts", side("rc").to_json())])
    assert "rates over" not in _plain([render.labels("Target prompts", side("rc").to_json())])
    said = render.comparison(compare(old, new).to_json()).plain
    assert said.startswith("difference +33.3% [")
    assert "] of the 3 judged both times, 1 gained, 0 lost" in said
    assert "judged both times" not in render.comparison(compare(old, old).to_json() | {"left_out": 0}).plain
    assert render.comparison(compare(old, none).to_json()).plain == "difference: no prompt was judged both times"


@pytest.mark.parametrize("n", [12, 200])
def test_labels_before_and_after_fit_80_columns_without_a_broken_line(n):
    from rich.console import Console

    whole = {"k": n, "n": n, "share": 1.0, "interval": [0.7575, 1.0]}
    names = ("comply", "refuse", "evade", "broken")
    side = {
        "labels": dict.fromkeys(names, whole),
        "n": n,
        "unknown": n,
        "corrected": {"share": 1.0, "interval": [0.9, 1]},
    }
    side["refused_alone"] = dict.fromkeys(("dictionary", "classifier"), whole)
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(render.labels("Target prompts", side, side, corrected=True), markup=False, highlight=False)
    lines = [line for line in captured.get().splitlines() if line.strip()]
    assert len(lines) == 3 + len(names) + 4
    assert sum(f"100.0% {n}/{n}" in line for line in lines) == len(names) + 3


def test_drift_shows_every_figure_with_its_interval():
    from perpend.drift import Drift, PromptDrift

    names = [name for name in PromptDrift.__dataclass_fields__ if name not in ("index", "tokens")]
    prompts = tuple(PromptDrift(index=k, tokens=1 + k, **dict.fromkeys(names, 0.5)) for k in range(4))
    text = _plain([render.drift(Drift(prompts).to_json())])
    assert "4 prompts, 10 tokens" in text
    for words in ("mean", "median", "95th", "first token", "ratio", "change"):
        assert words in text
    assert "0.5000 – 0.5000" in text


def _plain(parts) -> str:
    from rich.console import Console

    console = Console(width=200, no_color=True)
    with console.capture() as captured:
        for part in parts:
            console.print(part, markup=False, highlight=False)
    return captured.get()


def test_a_fit_shows_the_layers_that_were_tried():
    from perpend.fitting.layers import Candidate

    names = Candidate.__dataclass_fields__
    tried = [
        dict.fromkeys(names, True) | {"layer": k, "bypass": -3.0 - k, "induced": 0.25, "drift": 0.125} for k in range(3)
    ]
    data = {
        "layer": 1.0,
        "position": -1,
        "counts": {"targets": 8},
        "diagnostics": {"split_half_cosine": [0.1, 0.9, 0.2]},
        "raw_norm": [1.0, 2.0, 3.0],
        "choice": {"candidates": tried, "untouched": -1.0, "layer": 1},
        "modules": 4,
    }
    text = _plain(views.fit(data))
    assert "Every layer" in text
    assert "1 of 3" in text
    assert "0.9" in text
    (chosen,) = (line.split() for line in text.splitlines() if line.rstrip().endswith("chosen"))
    assert chosen == ["1", "3.000", "0.250", "0.125", "chosen"]


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("chosen", [None, 0.6])
def test_a_fit_shows_the_diagnostics_of_every_layer(layers, chosen):
    names = ("auc", "split_half_cosine", "top4_share")
    diagnostics = {name: [(100 * j + k) / 1000 for k in range(layers)] for j, name in enumerate(names)}
    diagnostics["baseline_cosine"] = [0.987] * layers
    text = _plain(render.per_layer(diagnostics, chosen))
    cells = text.split("AUC: held-out")[0].split()
    numbers = cells[cells.index("4") + 1 :]
    while numbers[0] == "layer":  # the heads of the blocks beside the first
        numbers = numbers[len(["layer", "AUC", "halves", "top", "4"]) :]
    found = {numbers[k]: numbers[k + 1 : k + 4] for k in range(0, len(numbers), 4)}
    assert found == {str(k): [f"{diagnostics[name][k]:.3f}" for name in names] for k in range(layers)}
    assert max(map(len, text.splitlines()[:-1])) <= 80


def test_a_number_that_a_layer_lacks_is_a_dash_and_a_fit_without_diagnostics_has_no_table():
    text = _plain(render.per_layer({"auc": [None, float("nan"), 0.5]}, 2))
    assert text.split("AUC:")[0].split()[-6:] == ["0", "–", "1", "–", "2", "0.500"]
    assert "halves" not in text
    assert _plain(render.per_layer({"baseline_cosine": [0.5]})) == ""
