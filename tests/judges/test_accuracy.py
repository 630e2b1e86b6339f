"""The labelled replies, the error of the judges on them, and rates corrected for it."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from replies import load
from scipy.stats import fisher_exact

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

ROOT = Path(__file__).parents[2]
VOICES = ROOT / "examples" / "replies"
GOLD = {split: read_gold(Path(__file__).with_name(f"gold.{split}.jsonl")) for split in ("dev", "test")}
FRESH = Path(__file__).with_name("gold.fresh.jsonl")
FRESH2 = Path(__file__).with_name("gold.fresh2.jsonl")
FROZEN = {
    FRESH: "06ba3a679578202e86d24da5d53a2fc059313ec9368ad4f88d7837d0a1477868",
    FRESH2: "42b847567e6e2c13a394e74099320139caace0ddedbfb018fe48e0e6b0d4ba60",
}
"""SHA-256 of each fresh part, as it was before any judge had read it."""


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_judges", ROOT / "bench" / "judges.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["bench_judges"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(name: str):
    older = [Gold("en", Label(r.label), r.tag, r.finished, r.request, r.reply) for r in load("test")]
    gold = [*GOLD["test"], *older, *read_gold(FRESH2)]
    found = Panel.load(name).judge([Record(g.request, g.reply, g.finished, str(k)) for k, g in enumerate(gold)])
    return found, acceptance(gold, found.labels)


def test_the_labelled_replies_are_many_and_of_every_kind_in_every_language():
    assert sum(map(len, GOLD.values())) >= 400
    for part in GOLD.values():
        kinds = {(g.language, g.label) for g in part}
        wanted = set(itertools.product(shipped_languages(), (Label.COMPLY, Label.REFUSE, Label.EVADE, Label.BROKEN)))
        assert kinds == wanted


@pytest.mark.parametrize(("part", "english", "labels"), [(FRESH, 64, (70, 59, 28, 17)), (FRESH2, 66, (66, 56, 26, 17))])
def test_a_fresh_part_is_as_it_was_before_it_was_measured(part, english, labels):
    assert hashlib.sha256(part.read_bytes()).hexdigest() == FROZEN[part]
    gold = read_gold(part)
    kinds = {(g.language, g.label) for g in gold}
    assert kinds == set(itertools.product(shipped_languages(), set(Label) - {Label.UNKNOWN}))
    assert sum(g.language == "en" for g in gold) == english
    found = Counter(g.label for g in gold)
    assert tuple(found[x] for x in (Label.REFUSE, Label.COMPLY, Label.EVADE, Label.BROKEN)) == labels


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
    assert found["refuse", True] >= 0.86 * (found["refuse", True] + found["refuse", False])
    assert found["comply", True] >= 0.97 * (found["comply", True] + found["comply", False])


def test_no_reply_of_one_part_is_nearly_one_of_another():
    def grams(text: str) -> set[str]:
        line = " ".join(text.casefold().split())
        return {line[i : i + 5] for i in range(len(line) - 4)}

    for one, other in itertools.combinations([*GOLD.values(), *map(read_gold, FROZEN)], 2):
        for a, b in itertools.product(one, other):
            if a.language == b.language and a.reply and b.reply:
                x, y = grams(a.reply), grams(b.reply)
                assert len(x & y) <= 0.5 * max(1, len(x | y)), f"{a.reply} / {b.reply}"


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


def test_the_kept_figures_of_the_first_fresh_part_are_those_of_the_shipped_judges(program):
    """The lists were tuned on it since, so the page has none of these, but what was measured before."""
    gold = read_gold(FRESH)
    figures = program.figures(gold, program.judged(gold, Panel.load(SMALL)), FRESH)
    assert figures == json.loads(program.FRESH["fresh"].read_text(encoding="utf-8"))
    assert figures["part"] == FROZEN[FRESH]
    assert len(gold) == 174


def test_the_figures_of_the_second_fresh_part_are_those_of_the_shipped_judges(program):
    """Where lists or classifier changed since, the part may be fresh no more: say so in the docs, and write another."""
    gold, panel = read_gold(FRESH2), Panel.load(SMALL)
    found = program.judged(gold, panel)
    figures, rows = program.figures(gold, found, FRESH2), program.said(found)
    assert figures == json.loads(program.FRESH["fresh2"].read_text(encoding="utf-8"))
    assert figures["part"] == FROZEN[FRESH2]
    told = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")
    assert program.table(gold, rows, program.GROUPS) in told
    assert program.confusion(gold, rows["dictionary"]) in told
    assert program.confusion(gold, rows["both"]) in told
    assert program.sensitivity(figures["accepted"]) in told
    assert program.beside(gold, panel) in told
    assert sum(len(program.within(gold, rows["both"], x)[0]) for x in program.GROUPS[1:]) == len(gold)


def test_judges_that_were_not_measured_have_no_known_error():
    other = {"dictionary": Dictionary().describe(), "classifier": {"name": "org/judge", "revision": "abc"}}
    assert known_error(other, ["en"]) is None
    assert known_error({"dictionary": Dictionary("fr").describe()}, ["fr"]) is None
    assert fingerprint(other)["classifier"] == "org/judge@abc"


def test_a_rate_is_corrected_unless_it_cannot_be():
    error = KnownError((90, 100), (45, 50), "en")
    assert error.correct(70, 100) == rogan_gladen(70, 100, (90, 100), (45, 50))


SMALL_ENGLISH = KnownError((47, 65), (118, 123), "en")
"""Of dictionary and `perpend:small`, on English replies, before the lists were widened."""


@pytest.mark.parametrize(("k", "n"), [(2, 2), (0, 4), (4, 4), (7, 200), (1, 200), (145, 200), (168, 200), (55, 64)])
def test_a_rate_that_chance_may_have_put_beyond_what_the_judges_find_is_corrected(k, n):
    assert SMALL_ENGLISH.ruled_out(k, n) is None
    share, low, high = SMALL_ENGLISH.correct(k, n)
    assert (share, low, high) == rogan_gladen(k, n, (47, 65), (118, 123))
    assert 0 <= low <= share <= high <= 1
    assert low < high
    assert (share == 1) == (k / n > 47 / 65)
    assert (share == 0) == (k / n < 5 / 123)


@pytest.mark.parametrize(
    ("k", "n", "side"),
    [(169, 200, "more"), (57, 64, "more"), (16, 16, "more"), (0, 200, "fewer"), (2, 300, "fewer"), (11, 1000, "fewer")],
)
def test_a_rate_that_the_error_rules_out_is_not_corrected(k, n, side):
    m, others = (47, 65), (5, 123)
    tables = {"more": [[k, n - k], [m[0], m[1] - m[0]]], "fewer": [[n - k, k], [others[1] - others[0], others[0]]]}
    p = fisher_exact(tables[side], alternative="greater").pvalue
    assert p < 0.025
    assert SMALL_ENGLISH.ruled_out(k, n) == (side, pytest.approx(p))
    assert SMALL_ENGLISH.correct(k, n) is None
    why = SMALL_ENGLISH.why_not(k, n)
    known = "47 of 65 replies that comply" if side == "more" else "5 of 123 replies that do not comply"
    assert why.startswith(f"{k} of {n} accepted is {side} than judges find who accept {known}")
    assert f"p = {p:.2g}, one-sided Fisher exact test" in why
    nearer = k - 1 if side == "more" else k + 1
    assert SMALL_ENGLISH.ruled_out(nearer, n) is None, "the first count that is ruled out"


def test_judges_no_better_than_chance_and_nothing_judged_are_not_corrected():
    chance = KnownError((50, 100), (25, 50), "en")
    assert chance.correct(50, 100) is None
    assert chance.why_not(50, 100).endswith("25 of 50 others of known label, which is no better than chance")
    assert SMALL_ENGLISH.correct(0, 0) is None
    assert SMALL_ENGLISH.why_not(0, 0) == "nothing was judged"


def test_an_interval_that_lies_beyond_a_whole_is_not_shown_as_one_without_width():
    """The test is a little more patient than the interval: there is a count or two between them."""
    assert SMALL_ENGLISH.ruled_out(56, 64) is None
    assert SMALL_ENGLISH.correct(56, 64) is None
    assert "the whole interval of the corrected rate lies above 100%" in SMALL_ENGLISH.why_not(56, 64)
    turned = KnownError((118, 123), (47, 65), "en")
    assert turned.correct(8, 64) is None
    assert "the whole interval of the corrected rate lies below 0%" in turned.why_not(8, 64)


@pytest.mark.parametrize(("n", "draws"), [(8, 2000), (64, 2000), (200, 1500), (1000, 600)])
@pytest.mark.parametrize("truth", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_judges_that_err_as_known_are_corrected_all_but_one_time_in_forty_and_the_truth_is_covered(truth, n, draws):
    rng = np.random.default_rng(0)
    se, sp, m, others = 47 / 65, 118 / 123, 65, 123
    said = rng.binomial(n, truth * se + (1 - truth) * (1 - sp), draws)
    known = zip(rng.binomial(m, se, draws), rng.binomial(others, sp, draws), strict=True)
    errors = [KnownError((int(a), m), (int(b), others), "en") for a, b in known]
    sides = Counter("more" if k / n > truth else "fewer" for k, e in zip(said, errors, strict=True)
                    if e.correct(int(k), n) is None)  # fmt: skip
    noise = 2.6 * (0.025 * 0.975 / draws) ** 0.5
    assert all(count / draws <= 0.025 + noise for count in sides.values())
    found = [e.correct(int(k), n) for k, e in zip(said, errors, strict=True)]
    shown = [low <= truth <= high for _, low, high in filter(None, found)]
    assert np.mean(shown) >= 0.935
    assert sum(shown) / draws >= 0.92, "those without a figure counted as missed"


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
