"""An error says what is wrong once and in our words, where, what is valid, the nearest match, and what to type."""

from __future__ import annotations

import json

import pytest

SIZES = "a number of bytes, or a number with KB, MB, GB, TB, KiB, MiB, GiB, TiB, such as 3GB"
DATA = "perpend:target, FILE#column=text, hub/id@revision#split=train[:400],column=text"
DEVICES = "auto, cpu, cuda, cuda:N, mps"
RUN = ("run", "org/m", "-o", "out")
LINES = [
    ((*RUN, "--memory", "3XB"), f"--memory: unknown value '3XB'; valid: {SIZES}"),
    ((*RUN, "--memory", "much"), f"--memory: unknown value 'much'; valid: {SIZES}"),
    ((*RUN, "--memory", "0"), "--memory: 0 is out of range; valid: at least 1"),
    (
        (*RUN, "--dtype", "bfloat61"),
        "--dtype: unknown value 'bfloat61'; valid: auto, float32, bfloat16, float16; did you mean 'bfloat16'?",
    ),
    (
        ("eval", "org/m", "--engine", "vlm"),
        "--engine: unknown value 'vlm'; valid: transformers, vllm; did you mean 'vllm'?",
    ),
    ((*RUN, "--batch-size", "x"), "--batch-size: unknown value 'x'; valid: auto, a whole number"),
    ((*RUN, "--batch-size", "0"), "--batch-size: unknown value 0; valid: auto, at least 1"),
    ((*RUN, "--limit", "0"), "--limit: 0 is out of range; valid: at least 1"),
    (("search", *RUN[1:], "--max-drift", "0"), "--max-drift: 0.0 is out of range; valid: more than 0"),
    ((*RUN, "--set", "search.trials=many"), "--set: search.trials: 'many' is not a whole number"),
    ((*RUN, "--set", "eval.sample='often'"), "--set: eval.sample: 'often' is not true or false"),
    ((*RUN, "--set", "prompts.system=3"), "--set: prompts.system: 3 is not text"),
    ((*RUN, "--target", "nofile.txt"), f"--target: nofile.txt: no such file; valid: {DATA}"),
    (
        (*RUN, "--baseline", "answerd.csv"),
        f"--baseline: answerd.csv: no such file; valid: {DATA}; did you mean 'answered.csv'?",
    ),
    (
        (*RUN, "--target", "perpend:targt"),
        "--target: unknown prompts 'perpend:targt'; valid: perpend:target, perpend:baseline; did you mean "
        "'perpend:target'?",
    ),
    ((*RUN, "--set", "prompts.target='nofile.txt'"), f"prompts.target: nofile.txt: no such file; valid: {DATA}"),
    (("eval", "org/m", "--edit", "gone"), "--edit: gone: no such file; try: perpend fit MODEL -o edit"),
]


@pytest.mark.parametrize(("typed", "line"), LINES, ids=[" ".join(typed) for typed, _ in LINES])
def test_the_line_says_it_once_and_what_is_valid(cli, task, tmp_path, typed, line):
    started = task(typed[0])
    (tmp_path / "answered.csv").write_text("text\nTell me about bread.\n")
    said = cli(*typed)
    assert (said.code, said.out, said.err) == (2, "", f"perpend: {line}\n")
    assert not started


def test_a_device_that_there_is_not_has_a_near_one(cli, pico_dir):
    given = ("inspect", pico_dir("llama"), "--device")
    line = f"perpend: --device: unknown device 'cudaa'; valid: {DEVICES}; did you mean 'cuda'?\n"
    assert cli(*given, "cudaa").err == line
    assert cli(*given, "cuda:x").err.startswith("perpend: --device: unknown device 'cuda:x'; valid: ")
    assert "--device: device 'cuda:77' cannot be used: " in cli(*given, "cuda:77").err


def test_a_rank_is_refused_before_anything_is_read(cli):
    line = "perpend: --rank: a rank of 0; valid: 1 or more, 16 by default\n"
    said = cli("adapter", "org/m", "--edit", ".", "-o", "out", "--rank", "0")
    assert (said.code, said.err) == (2, line)


def test_a_task_of_lm_eval_has_a_near_one(cli, pico_dir, tmp_path):
    pytest.importorskip("lm_eval")
    own = tmp_path / "tasks"
    own.mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "A fox"}))
    (own / "colours.yaml").write_text(f"task: colours\ndataset_path: json\ndataset_kwargs: {{data_files: {rows}}}\n")
    given = ("bench", pico_dir("llama"), "--dry-run", "--tasks")
    usual = "valid: what `lm-eval ls tasks` lists"
    said = cli(*given, "colurs", "--include", own)
    assert (said.code, said.err) == (
        2,
        f"perpend: --tasks: no task 'colurs'; {usual}, colours; did you mean 'colours'?\n",
    )
    said = cli(*given, "arc_esy")
    assert (said.code, said.err) == (2, f"perpend: --tasks: no task 'arc_esy'; {usual}; did you mean 'arc_easy'?\n")
    said = cli(*given, "colours")
    assert said.err == f"perpend: --tasks: no task 'colours'; {usual}; try: --include FOLDER for tasks of your own\n"
    said = cli(*given, "colours", "--include", "nodir")
    assert said.err == "perpend: --include: nodir: no such folder; valid: a folder with lm-eval task files (YAML)\n"
