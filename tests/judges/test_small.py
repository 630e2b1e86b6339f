from __future__ import annotations

import json

import numpy as np
import pytest
from replies import load

from perpend.errors import UsageError
from perpend.judges.classifier import load_classifier
from perpend.judges.labels import Label
from perpend.judges.small import SIZE, Example, SmallClassifier, features, main, read_examples, report, train_small


def examples(split: str = "dev") -> list[Example]:
    return [Example(r.request, r.reply, Label(r.label)) for r in load(split)]


@pytest.fixture(scope="module")
def trained() -> SmallClassifier:
    return train_small(examples())


def made_up(words: int, per_word: int) -> list[Example]:
    """Return replies whose label hangs on their first words alone, which no other reply shares."""
    found = []
    for i in range(words):
        label = Label.REFUSE if i % 2 else Label.COMPLY
        opening = " ".join(f"{letter}{i}{letter}{i}" for letter in "qzxv")
        found += [Example(f"request {i} {k}", f"{opening}.", label) for k in range(per_word)]
    return found


def test_the_shipped_classifier_is_small_and_knows_refusals_it_has_not_seen():
    shipped, reason = load_classifier("perpend:small")
    assert (shipped.name, reason) == ("perpend:small", "")
    assert shipped.weights.nbytes < 500_000
    kept = [e for e in examples("test") if e.label in (Label.REFUSE, Label.COMPLY)]
    p = np.array(shipped.refusal_probability([(e.request, e.reply) for e in kept]))
    truth = np.array([float(e.label is Label.REFUSE) for e in kept])
    assert report(p, truth)["f1"] >= 0.7
    assert {"new_requests", "new_wordings"} <= set(shipped.describe()["held_out"])


def test_training_twice_gives_the_same_bytes(trained, tmp_path):
    again = train_small(examples())
    again.save(tmp_path / "a.safetensors")
    trained.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_saved_classifier_answers_as_before(trained, tmp_path):
    trained.save(tmp_path / "c.safetensors")
    loaded = SmallClassifier.load(tmp_path / "c.safetensors")
    pairs = [(r.request, r.reply) for r in load("test")]
    assert loaded.refusal_probability(pairs) == trained.refusal_probability(pairs)
    assert loaded.facts == trained.facts


def test_a_batch_gives_what_each_pair_gives_alone(trained):
    pairs = [(r.request, r.reply) for r in load("test")[:20]]
    alone = [trained.refusal_probability([pair])[0] for pair in pairs]
    assert trained.refusal_probability(pairs) == pytest.approx(alone, abs=1e-12)
    assert trained.refusal_probability([]) == []


def test_training_replies_are_learnt(trained):
    kept = [e for e in examples() if e.label in (Label.REFUSE, Label.COMPLY)]
    p = np.array(trained.refusal_probability([(e.request, e.reply) for e in kept]))
    assert report(p, np.array([float(e.label is Label.REFUSE) for e in kept]))["f1"] > 0.95


def test_a_reply_may_be_empty_and_quotes_may_be_curly(trained):
    where, values = features("", "")
    assert where.max() < SIZE
    assert np.isfinite(values).all()
    plain, curly = trained.refusal_probability([("a", "I can't help."), ("a", "I can’t help.")])
    assert plain == curly


def test_only_beginning_and_end_of_a_reply_are_read():
    def grams(middle: str) -> list[int]:
        begin, end = " ".join(f"b{i}" for i in range(60)), " ".join(f"e{i}" for i in range(20))
        return list(features("", f"{begin} {middle} {end}")[0])

    assert grams("some other thing") == grams("what a surprise")


def test_held_out_wordings_are_really_held_out():
    facts = train_small(made_up(40, 6)).facts["held_out"]
    assert facts["new_requests"]["f1"] > 0.95
    assert facts["new_wordings"]["f1"] < 0.8


def test_one_wording_only_leaves_nothing_to_hold_out():
    facts = train_small(made_up(2, 12)).facts
    assert set(facts["held_out"]) == {"new_requests"}


def test_too_few_replies_are_an_error():
    with pytest.raises(UsageError, match="0 refusals and 12 compliant"):
        train_small(made_up(1, 12))


def test_report_counts_by_hand():
    figures = report(np.array([0.9, 0.9, 0.1, 0.5, 0.2]), np.array([1.0, 0.0, 1.0, 1.0, 0.0]))
    assert (figures["n"], figures["refusals"]) == (5, 3)
    assert figures["precision"] == figures["recall"] == figures["f1"] == pytest.approx(2 / 3)
    low, high = figures["f1_interval"]
    assert low < 2 / 3 < high


def test_the_command_trains_saves_and_prints_json(tmp_path, capsys):
    train, out = tmp_path / "train.jsonl", tmp_path / "out.safetensors"
    lines = [{"request": e.request, "reply": e.reply, "label": e.label.value, "more": 1} for e in examples()]
    train.write_text("\n".join(map(json.dumps, lines)))
    assert main([str(train), "-o", str(out), "--test", str(train)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["test"]["f1"] > 0.9
    assert SmallClassifier.load(out).describe()["sha256"] == printed["sha256"]
    assert not list(tmp_path.glob("*.partial"))


def test_broken_files_are_errors_that_name_the_line(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"request": "a", "reply": "b", "label": "comply"}\n{"request": "a", "reply": "b", "label": "yes"}')
    with pytest.raises(UsageError, match=r"x\.jsonl:2: not a labelled reply.*comply, refuse"):
        read_examples(file)
    with pytest.raises(UsageError, match="no classifier weights"):
        SmallClassifier.load(tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="no classifier weights"):
        SmallClassifier.load(file)
