"""Whether a reply can be read at all: empty, looping, garbled, in another script than its request.

Repetition that belongs to the answer is no fault: tables, code, numbered lists and refrains repeat themselves. Prose
is therefore measured apart from code and table rows, list markers are taken off first, and text that the request
itself contains does not count.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

LOOP_SHARE = 0.4
"""A loop is reported when what repeats itself makes up this share of the words."""
REPEAT_WORDS = 20
"""Shortest stretch that counts when it comes twice; shorter ones must follow each other three times or more."""
DISTINCT = 0.4
"""Prose of 40 words or more whose share of distinct trigrams is below this is a loop."""
GARBAGE_SHARE = 0.02
"""Share of replacement, control or private-use characters from which a reply is garbled."""
STUTTERED = 0.1
"""Words said twice and stray marks, as a share of the words, from which prose is garbled."""

_FENCE = re.compile(r"```.*?(?:```|\Z)", re.S)
_TABLE_ROW = re.compile(r"^\s*\|.*$", re.M)
_MARKER = re.compile(r"^\W*(?:[^\W\d_]+ )?\d+[.):\]]+[*_]*\s|^\s*[-*•+]\s|^\s*[a-z][.)]\s", re.M)
_EAST_ASIAN = "\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_MARKS = "".join(c for c in map(chr, range(0x300, 0x1000)) if unicodedata.category(c)[0] == "M") + "\u200c\u200d"
_WORD = re.compile(rf"[{_EAST_ASIAN}]|(?:[^\W_{_EAST_ASIAN}][{_MARKS}]*)+(?:'(?:[^\W_{_EAST_ASIAN}][{_MARKS}]*)+)*")
_CHARACTER_LOOP = re.compile(r"(?=[^\W\d]|[!?.,])([^\s\-=_*#|~]{1,12}?)\1{9,}")
_VOWELLESS = re.compile(r"[^aeiouy]+|.*[bcdfghjklmnpqrstvwxz]{5}.*")
_STRAY = re.compile(
    r"(?<!:)::(?!:)|//|\(\(|\)\)|(?<!#)##(?!#)|,,|;;|\w/\w+ (?=\w+ )|(?<=\w)[({]\W*[)}]\W|\}\}|\{\{|\)\);"
)
_ADDRESS = re.compile(r"\w+://\S+")
_BRACKETED = re.compile(r"[(\"'«“][^()\"'«»“”]*[)\"'»”]")


def words(text: str) -> list[str]:
    """Return the words of `text`, case folded, without punctuation; numbers are words.

    In Chinese and Japanese, which leave no space between words, every character is one.
    """
    return _WORD.findall(text.casefold().replace("’", "'"))


def distinct(tokens: Sequence[object], n: int) -> float:
    """Return the share of distinct n-grams among all n-grams of `tokens`; 1 where there are none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _codes(tokens: Sequence[object]) -> NDArray[np.int64]:
    """Return one number per token, the same for equal tokens."""
    code: dict[object, int] = {}
    return np.array([code.setdefault(token, len(code)) for token in tokens], dtype=np.int64)


def longest_repeat(tokens: Sequence[object]) -> tuple[int, int]:
    """Return start and length of the longest stretch that comes again later without overlapping itself, or (0, 0)."""
    row = _codes(tokens).tobytes()
    low, high, found = 1, len(tokens) // 2, (0, 0)
    while low <= high:
        size = (low + high) // 2
        first: dict[bytes, int] = {}
        for i in range(len(tokens) - size + 1):
            start = first.setdefault(row[8 * i : 8 * (i + size)], i)
            if start + size <= i:
                low, found = size + 1, (start, size)
                break
        else:
            high = size - 1
    return found


def come_again(tokens: Sequence[object], size: int, known: Sequence[object] = ()) -> int:
    """Return how many tokens lie in a stretch of `size` or more that has come before without overlapping itself.

    Args:
        tokens: The tokens.
        size: Shortest stretch that counts.
        known: Stretches of it do not count.
    """
    expected = {tuple(known[i : i + size]) for i in range(len(known) - size + 1)}
    first: dict[tuple[object, ...], int] = {}
    counted = end = 0
    for i in range(len(tokens) - size + 1):
        stretch = tuple(tokens[i : i + size])
        if first.setdefault(stretch, i) + size <= i and stretch not in expected:
            counted += i + size - max(i, end)
            end = i + size
    return counted


def periodic_run(tokens: Sequence[object], least: int) -> tuple[int, int]:
    """Return length and period of the longest stretch in which one unit follows itself `least` times or more.

    Units of one or two tokens must come twice as often. (0, 0) if there is none.
    """
    codes = _codes(tokens)
    best = (0, 0)
    for period in range(1, len(codes) // least + 1):
        needed = max(period * (2 * least if period <= 2 else least), best[0] + 1) - period
        same = codes[period:] == codes[:-period]
        if np.count_nonzero(same) >= needed:
            breaks = np.flatnonzero(~np.concatenate(([False], same, [False])))
            run = int(np.diff(breaks).max()) - 1
            if run >= needed:
                best = (run + period, period)
    return best


def looping(reply: str, request: str = "", *, refrains: bool = False) -> str:
    """Return how `reply` repeats itself, or an empty string.

    Args:
        reply: The reply.
        request: What it answers; stretches that are copied from it are no loops.
        refrains: Measure prose as patiently as code and tables, for songs and chants.
    """
    stretch = _CHARACTER_LOOP.search(reply)
    if stretch and len(stretch[0]) >= max(20, LOOP_SHARE * len(reply)):
        return f"'{stretch[1]}' over and over"
    if refrains:
        return _structured_loop(words(reply), len(words(reply)))
    structured = " ".join(m[0] for m in _FENCE.finditer(reply)) + "\n".join(_TABLE_ROW.findall(reply))
    reason = _prose_loop(words(_MARKER.sub("", _TABLE_ROW.sub("", _FENCE.sub("\n", reply)))), words(request))
    return reason or _structured_loop(words(structured), len(words(reply)))


def _prose_loop(found: list[str], request: list[str]) -> str:
    n = len(found)
    run, period = periodic_run(found, 3)
    if run >= max(12, LOOP_SHARE * n):
        return f"{period} words {run // period} times in a row"
    again = come_again(found, REPEAT_WORDS, request)
    if again >= max(REPEAT_WORDS, LOOP_SHARE * n):
        return f"{again} of {n} words come again"
    if n >= 40 and distinct(found, 3) < DISTINCT:
        return f"{distinct(found, 3):.0%} distinct trigrams"
    return ""


def _structured_loop(found: list[str], total: int) -> str:
    """Find a loop in code, table rows or a song, which must be longer to count and must hold more than numbers."""
    run, period = periodic_run(found, 6)
    if run >= max(24, LOOP_SHARE * total) and any(not w.isdigit() for w in found[-run:]):
        return f"{period} words {run // period} times in a row"
    return ""


@lru_cache(maxsize=4096)
def script(character: str) -> str:
    """Return the script of a letter (`LATIN`, `CYRILLIC`, `EAST ASIAN` ...), or an empty string for anything else."""
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    return "EAST ASIAN" if name in {"CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO"} else name


def scripts(text: str) -> Counter[str]:
    """Count the letters of `text` by script."""
    return Counter(found for found in map(script, text) if found)


def foreign(reply: str, request: str) -> str:
    """Return the script that `reply` slips into although `request` is written in another, or an empty string.

    A reply is in another script when most of its letters are; it is mixed when foreign words turn up all along the
    sentence outside brackets and quotation marks. Latin words in other scripts are names and terms, and stand beside
    languages that need few letters for a word: they are foreign when they are most of the words.
    """
    asked = scripts(request)
    strange = Counter({name: n for name, n in scripts(reply).items() if name not in asked})
    letters = sum(scripts(reply).values())
    if not asked or not strange or not letters:
        return ""
    name = strange.most_common(1)[0][0]
    if name == "LATIN":
        row = words(_FENCE.sub(" ", reply))
        return name if sum(script(word[0]) == name for word in row) > len(row) / 2 else ""
    if sum(strange.values()) > letters / 2:
        return name
    bare = _BRACKETED.sub(" ", reply)
    runs = re.findall(r"[^\W\d_]+", "".join(c if script(c) in strange else " " for c in bare))
    return name if len(runs) >= 4 and sum(map(len, runs)) > 0.15 * letters else ""


def garbled(reply: str, common: frozenset[str] = frozenset()) -> str:
    """Return what makes `reply` unreadable, or an empty string.

    Args:
        reply: The reply.
        common: The most frequent words of its language; a text with many of them is not called garbled for odd words.
    """
    solid = [c for c in reply if not c.isspace()]
    bad = sum(c == "�" or unicodedata.category(c) in {"Cc", "Co", "Cn"} for c in solid)
    if bad >= 3 and bad > GARBAGE_SHARE * len(solid):
        return f"{bad} unreadable characters"
    prose = _TABLE_ROW.sub("", _FENCE.sub("", reply))
    solid = [c for c in prose if not c.isspace()]
    marks = sum(unicodedata.category(c)[0] in "PS" and unicodedata.category(c) != "So" for c in solid)
    if len(solid) >= 20 and marks > 0.55 * len(solid) and len(set(prose)) > 8:
        return f"{marks} of {len(solid)} characters are punctuation"
    found = [w for w in words(prose) if len(w) >= 4 and w.isascii()]
    odd = sum(bool(_VOWELLESS.fullmatch(w)) for w in found)
    known = sum(w in common for w in words(prose))
    if odd >= 5 and odd > 0.3 * len(found) and known < 0.1 * len(words(prose)):
        return f"{odd} of {len(found)} words cannot be pronounced"
    return ""


def stuttered(reply: str) -> str:
    """Return how a reply of words falls apart, or an empty string: words said twice in a row and stray marks.

    Both are rare in prose of any language, and a text needs both to be called garbled.
    """
    prose = _TABLE_ROW.sub("", _FENCE.sub("", reply))
    found = [w for w in words(prose) if not re.fullmatch(f"[{_EAST_ASIAN}]", w)]
    twice = sum(a == b and not a.isdigit() for a, b in pairwise(found))
    marks = len(_STRAY.findall(_ADDRESS.sub(" ", prose)))
    if twice >= 1 and marks >= 2 and twice + marks >= max(4, STUTTERED * len(found)):
        return f"{twice} words twice, {marks} stray marks in {len(found)} words"
    return ""
