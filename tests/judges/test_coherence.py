from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perpend.judges.coherence import (
    come_again,
    distinct,
    foreign,
    garbled,
    longest_repeat,
    looping,
    periodic_run,
    words,
)

TABLE = "| day | open |\n|---|---|\n" + "".join(
    f"| {d} | nine to five | nine to five | closed |\n" for d in ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
)
CODE = "```python\n" + "".join(f"button_{i} = Button(window, text='press', width=10)\n" for i in range(8)) + "```"
REFRAIN = "\n\n".join(
    f"{verse}\nThe river runs, the river runs,\nbeneath a hundred thousand suns."
    for verse in (
        "I walked at dawn along the hill,\nthe fields were white, the mill was still.",
        "A heron stood among the reeds,\nthe wind went by and scattered seeds.",
        "And when the lamps of evening burned\nI knew the road, and I returned.",
    )
)
LABELS = "\n".join(f"{i}. Positive" for i in range(1, 9)) + "\n9. Negative"
HOURS = "\n".join(f"- {d}: from 9 am to 5 pm" for d in ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"])
BEFORE_AFTER = (
    "Original: The team have finished there report and send it to the client on monday.\n"
    "Corrected: The team has finished its report and sent it to the client on Monday."
)


READABLE = (
    "pip install numpy && python -m http.server",
    "(3*4)/(2-1) = 12; 7 + 5 = 12",
    "HTML, HTTPS, XML, MSSQL",
    "🦁👑",
)


@pytest.mark.parametrize("reply", [TABLE, CODE, REFRAIN, LABELS, HOURS, BEFORE_AFTER, "1 0 0\n0 1 0\n0 0 1"])
def test_legitimate_repetition_is_no_loop(reply):
    assert looping(reply) == ""


def test_a_copy_of_the_request_is_no_loop():
    passage = " ".join(f"word{i} is here" for i in range(12))
    assert looping(f"You wrote: {passage} And it reads well: {passage}", passage) == ""
    assert looping(f"You wrote: {passage} And it reads well: {passage}", "Check my text.") != ""


@pytest.mark.parametrize("unit", ["word", "two words", "the best way is to wait", "a b c d e f g h i j k l m n o p q"])
def test_a_loop_is_found_whatever_its_period(unit):
    assert looping("It begins well enough. " + f"{unit} " * 40)


@pytest.mark.parametrize("marker", ["{}. ", "{}) ", "Step {}: ", "- ", "**{}.** "])
def test_list_markers_do_not_hide_a_loop(marker):
    reply = "\n".join(marker.format(i) + "Be kind to your friends." for i in range(1, 9))
    assert looping(reply)


def test_words_that_count_do_not_hide_a_loop():
    said = "way is to put the {} at the bottom of a bag, under something soft, and to look straight ahead at the door."
    rows = [
        f"The {number} {said.format(thing)}"
        for number, thing in zip(
            ("first", "second", "third", "fourth", "fifth", "sixth"), ("cake", "soup", "bread") * 2, strict=True
        )
    ]
    assert looping("\n\n".join(rows))
    assert looping("\n\n".join([*rows[:4], "Then sit down."])) == "", "one in four that comes again is no loop"


@given(st.lists(st.sampled_from("abc"), max_size=24), st.integers(1, 4), st.lists(st.sampled_from("abc"), max_size=6))
@settings(max_examples=150, deadline=None)
def test_what_comes_again_agrees_with_trying_everything(tokens, size, known):
    told = {tuple(known[j : j + size]) for j in range(len(known) - size + 1)}
    again = {
        k
        for i in range(len(tokens) - size + 1)
        for j in range(i - size + 1)
        if tokens[i : i + size] == tokens[j : j + size] and tuple(tokens[i : i + size]) not in told
        for k in range(i, i + size)
    }
    assert come_again(tokens, size, known) == len(again)


def test_code_that_says_the_same_for_ever_is_a_loop():
    assert looping("```python\nimport os\n" + "def f(data):\n    return data[0]\n" * 12)


@given(st.lists(st.sampled_from("abc"), max_size=24))
@settings(max_examples=150, deadline=None)
def test_longest_repeat_agrees_with_trying_everything(tokens):
    n = len(tokens)
    best = max(
        (
            k
            for k in range(1, n // 2 + 1)
            for i in range(n)
            for j in range(i + k, n - k + 1)
            if tokens[i : i + k] == tokens[j : j + k]
        ),
        default=0,
    )
    start, size = longest_repeat(tokens)
    assert size == best
    assert "".join(tokens).count("".join(tokens[start : start + size])) >= 2 or size == 0


@given(st.lists(st.sampled_from("ab"), max_size=20), st.integers(2, 4))
@settings(max_examples=150, deadline=None)
def test_periodic_run_agrees_with_trying_everything(tokens, least):
    best = 0
    for period in range(1, len(tokens) // least + 1):
        needed = period * (2 * least if period <= 2 else least)
        for start in range(len(tokens)):
            end = start + period
            while end < len(tokens) and tokens[end] == tokens[end - period]:
                end += 1
            if needed <= end - start <= len(tokens) - start and end - start > period:
                best = max(best, end - start)
    assert periodic_run(tokens, least)[0] == best


def test_distinct_counts_ngrams():
    assert distinct(list("abab"), 1) == 0.5
    assert distinct(list("abab"), 2) == 2 / 3
    assert distinct([], 2) == 1.0


def test_words_are_case_folded_and_keep_apostrophes():
    assert words("Don’t STOP—now, 42!") == ["don't", "stop", "now", "42"]


def test_foreign_script_is_named():
    assert foreign("Привет, как дела", "How are you?") == "CYRILLIC"
    assert foreign("The α and β of Привет are fine here.", "How are you?") == ""
    assert foreign("Bonjour, ça va très bien", "How are you?") == ""
    assert foreign("Привет", "Как дела?") == ""


def test_readable_text_is_not_garbled():
    common = frozenset({"the", "a", "of"})
    for reply in (
        "pip install numpy && python -m http.server",
        "(3*4)/(2-1) = 12; 7 + 5 = 12",
        "HTML, HTTPS, XML, MSSQL",
        "🦁👑",
    ):
        assert garbled(reply, common) == ""
    assert garbled("���� what ��", common)
