"""The labelled replies, the error of the judges on them, and rates corrected for it."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from replies import load

from perpend.core.stats import rogan_gladen
from perpend.errors import UsageError
from perpend.judges.accuracy import (
    ALL,
    Counts,
    Gold,
    KnownError,
    acceptance,
    fingerprint,
    known_error,
    read_gold,
    refusals,
)
from perpend.judges.classifier import SMALL
from perpend.judges.coherence import words
from perpend.judges.dictionary import Dictionary
from perpend.judges.labels import Label, Record
from perpend.judges.languages import shipped_languages
from perpend.judges.panel import Panel

VOICES = Path(__file__).parents[2] / "examples" / "replies"
GOLD = {split: read_gold(Path(__file__).with_name(f"gold.{split}.jsonl")) for split in ("dev", "test")}


def measured(name: str):
    older = [Gold("en", Label(r.label), r.tag, r.finished, r.request, r.reply) for r in load("test")]
    gold = [*GOLD["test"], *older]
    found = Panel.load(name).judge([Record(g.request, g.reply, g.finished, str(k)) for k, g in enumerate(gold)])
    return found, acceptance(gold, found.labels)


def test_the_labelled_replies_are_many_and_of_every_kind_in_every_language():
    assert sum(map(len, GOLD.values())) >= 400
    for part in GOLD.values():
        kinds = {(g.language, g.label) for g in part}
        wanted = set(itertools.product(shipped_languages(), (Label.COMPLY, Label.REFUSE, Label.EVADE, Label.BROKEN)))
        assert kinds == wanted


def test_long_replies_of_every_kind_are_in_both_parts():
    for part in GOLD.values():
        long = [g for g in part if 100 <= len(words(g.reply)) <= 350]
        assert len(long) >= 19
        assert {g.label for g in long} == {Label.COMPLY, Label.REFUSE, Label.EVADE, Label.BROKEN}
        assert {g.language for g in long} == set(shipped_languages())
        assert sum(g.label is Label.REFUSE and g.reason == "late" for g in long) >= 6


def test_the_dictionary_hears_other_voices_than_ours():
    """The lists were widened with these; what they find there is not to be lost again."""
    found: Counter[tuple[str, bool]] = Counter()
    for path in sorted(VOICES.glob("*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            label = Dictionary().label(row["request"], row["reply"], row.get("finished", True)).label
            found[row["label"], label.value == row["label"]] += 1
    assert found["refuse", True] >= 0.72 * (found["refuse", True] + found["refuse", False])
    assert found["comply", True] >= 0.95 * (found["comply", True] + found["comply", False])


def test_no_reply_of_one_part_is_nearly_one_of_the_other():
    def grams(text: str) -> set[str]:
        line = " ".join(text.casefold().split())
        return {line[i : i + 5] for i in range(len(line) - 4)}

    for one, other in itertools.product(GOLD["dev"], GOLD["test"]):
        if one.language == other.language and one.reply and other.reply:
            a, b = grams(one.reply), grams(other.reply)
            assert len(a & b) <= 0.5 * max(1, len(a | b)), f"{one.reply} / {other.reply}"


def test_the_dictionary_tells_refusals_that_it_was_not_fitted_to():
    counts = refusals(GOLD["test"], [Dictionary().label(g.request, g.reply, g.finished).label for g in GOLD["test"]])
    assert counts.both + counts.missed >= 70
    assert counts.f1 >= 0.9, counts


@pytest.mark.parametrize("name", ["none", SMALL])
def test_the_shipped_error_is_what_is_measured(name):
    found, counts = measured(name)
    hint = "python bench/judges.py --write"
    known = known_error(found.judges, ["fr", "de"])
    assert known is not None, hint
    assert known == KnownError(tuple(counts[ALL]["accepted"]), tuple(counts[ALL]["rejected"]), ALL), hint
    english = known_error(found.judges, ["en", "en"])
    assert english == KnownError(tuple(counts["en"]["accepted"]), tuple(counts["en"]["rejected"]), "en"), hint
    assert known_error(found.judges, ["fr"]) == known, "too few French replies for an error of their own"


def test_judges_that_were_not_measured_have_no_known_error():
    other = {"dictionary": Dictionary().describe(), "classifier": {"name": "org/judge", "revision": "abc"}}
    assert known_error(other, ["en"]) is None
    assert known_error({"dictionary": Dictionary("fr").describe()}, ["fr"]) is None
    assert fingerprint(other)["classifier"] == "org/judge@abc"


def test_a_rate_is_corrected_unless_it_cannot_be():
    error = KnownError((90, 100), (45, 50), "en")
    assert error.correct(70, 100) == rogan_gladen(70, 100, (90, 100), (45, 50))
    assert error.correct(0, 0) is None
    assert KnownError((50, 100), (25, 50), "en").correct(50, 100) is None


def test_a_rate_that_the_error_rules_out_is_not_corrected():
    error = KnownError((24, 62), (110, 118), "en")
    assert error.correct(30, 100) is not None
    assert not error.holds(128, 200)
    for k in (56, 60):
        assert KnownError((25, 62), (116, 118), "en").correct(k, 100) is None
    assert error.correct(128, 200) is None
    assert KnownError((60, 62), (60, 118), "en").correct(2, 200) is None


def test_counts_by_hand():
    counts = Counts.of([True, True, True, False, False], [True, True, False, True, False])
    assert counts == Counts(2, 1, 1, 1)
    assert counts.precision[0] == counts.recall[0] == counts.f1 == pytest.approx(2 / 3)
    low, high = counts.f1_interval()
    assert 0 <= low < 2 / 3 < high <= 1
    assert Counts(0, 0, 0, 0).f1_interval() == (0.0, 1.0)


def test_a_line_that_is_no_labelled_reply_is_named(tmp_path):
    path = tmp_path / "gold.jsonl"
    path.write_text('{"label": "maybe"}\n')
    with pytest.raises(UsageError, match=r"gold.jsonl:1"):
        read_gold(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_gold(tmp_path / "none")
