"""Benchmarks on local task files, offline: paired, with what could have been seen."""

from __future__ import annotations

import json

import pytest
from task_cases import MACHINE, a_recipe, colours

from perpend.core.edits import Edit
from perpend.errors import MissingExtra, UsageError
from perpend.progress import reporting
from perpend.tasks import bench as module
from perpend.tasks.bench import bench, paired, values
from perpend.tasks.fit import fit
from steps import Steps

WRITING = """\
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{question}}}}"
generation_kwargs: {{max_gen_toks: 3, until: ["."]}}
metric_list: [{{metric: {metric}}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"A fox {k}", "choices": ["bread", "water", "salt"], "answer": k % 3} for k in range(12)]
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "colours.yaml").write_text(colours(data, "acc", "acc_norm"))
    return folder


def test_before_and_after_on_the_same_questions(pico_dir, tmp_path, tasks):
    model = str(pico_dir("llama"))
    fit(model, output=tmp_path / "edit", recipe=a_recipe(tmp_path), machine=MACHINE)
    given = {"tasks": ["colours"], "include": tasks, "machine": MACHINE}
    made = bench(model, edit=tmp_path / "edit", output=tmp_path / "out", **given)
    alone = bench(model, questions=5, **given)
    planned = bench(model, edit=tmp_path / "edit", dry_run=True, output=tmp_path / "none", **given)
    assert planned.to_json()["forecast"]["edited_modules"] > 0
    assert not (tmp_path / "none").exists()
    assert {(s.task, s.metric, s.n) for s in made.scores} == {("colours", "acc", 12), ("colours", "acc_norm", 12)}
    assert all(s.after is not None and s.detectable >= 0.5 for s in made.scores)  # 6 of 12
    assert alone.scores[0].n == 5
    assert alone.scores[0].after is None
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"bench.json", "report.json", "report.html"}
    assert "Detectable" in (tmp_path / "out" / "report.html").read_text()
    nothing = Edit.load(tmp_path / "edit" / "edit.safetensors").scaled(0)
    nothing.save(tmp_path / "nothing.safetensors")
    same = bench(model, edit=tmp_path / "nothing.safetensors", **given)
    assert [(s.difference, s.p) for s in same.scores] == [(0.0, 1.0)] * 2
    with pytest.raises(UsageError, match="no task 'colour'"):
        bench(model, **{**given, "tasks": ["colour"]})


def test_six_changes_are_the_least_that_a_test_can_see():
    few = paired("t", "acc", [0.0] * 100, [1.0] * 5 + [0.0] * 95)
    six = paired("t", "acc", [0.0] * 100, [1.0] * 6 + [0.0] * 94)
    assert few.p > 0.05 > six.p
    assert few.difference < few.detectable
    assert paired("t", "acc", [1.0] * 50, [1.0] * 50).detectable == 6 / 50
    scale = paired("t", "f1", [0.1, 0.5, 0.3, 0.2], [0.2, 0.4, 0.6, 0.2])
    assert scale.p is None
    assert scale.difference_interval[0] <= scale.difference <= scale.difference_interval[1]


def test_only_numbers_per_question_are_paired():
    rows = [{"doc_id": 0, "filter": "none", "metrics": ["acc", "word_perplexity"], "acc": 1, "word_perplexity": (1, 2)}]
    assert values({"t": rows}) == {("t", "acc"): {"0": 1.0}}


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"perpend\[bench\]"):
        bench("org/name", tasks=["x"])


def test_every_step_of_lm_eval_is_told_and_nothing_else(pico_dir, tmp_path, tasks, capfd):
    rows = tmp_path / "rows.jsonl"
    for kind, metric in (("generate_until", "exact_match"), ("loglikelihood_rolling", "word_perplexity")):
        text = WRITING.format(path=rows, kind=kind, metric=metric).replace("writing", kind)
        (tasks / f"{kind}.yaml").write_text(text)
    given = {"include": tasks, "machine": MACHINE, "questions": 10}
    model, names = str(pico_dir("llama")), ["colours", "generate_until", "loglikelihood_rolling"]
    fit(model, output=tmp_path / "edit", recipe=a_recipe(tmp_path), machine=MACHINE)
    capfd.readouterr()
    with reporting(Steps()) as told:
        bench(model, tasks=names, edit=tmp_path / "edit", **given)
    assert capfd.readouterr().err == ""
    for when in ("before", "after"):
        assert [step.total for step in told.named(f"read questions, {when}")] == [10, 10, 10]
        assert [step.total for step in told.named(f"score answers, {when}")] == [30]
        assert [step.total for step in told.named(f"generate answers, {when}")] == [10]
        (texts,) = told.named(f"score texts, {when}")
        assert texts.moves == [2] * 5
    assert len(told.named("load weights")) == 1
    assert len(told.steps) == 13
    with reporting(Steps()) as told:
        bench(model, tasks=["colours"], **given)
    assert len(told.named("score answers")) == 1
