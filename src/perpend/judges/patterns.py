"""The small language in which word lists are written, and the text that it is matched against.

A pattern is a row of words. `(a b|c)` is one of several phrases and `(a b|c)?` one or none; `word*` is any word that
begins so, `..` up to four words of any kind, `{slot}` one of the phrases of a named list and `{slot?}` one or none; `^`
is the beginning of a sentence and `$` its end. Patterns see sentences as words alone: case folded, curly quotes
straightened, contractions written out, punctuation gone. Of Chinese and Japanese every character is a word, in
patterns too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

from perpend.errors import UsageError, nearest
from perpend.judges.coherence import words

_QUOTES = str.maketrans(dict.fromkeys("’‘ʼ´`‚", "'") | dict.fromkeys("“”„‟«»‹›「」『』《》〈〉", '"'))
_EMPHASIS = re.compile(r"(?<!\w)[*_]{1,3}(?=\S)|(?<=\S)[*_]{1,3}(?!\w)|^\s*#+\s*", re.M)
_BREAK = re.compile(
    r"(?<=[.!?…])[\"')\]]*\s+|\n+|(?<=[a-z]):\s+(?=[\"A-Z])|\s[—–]\s|(?<=[。।؟۔])[\"')\]]*|(?<=[!?])(?=[\u3041-\u9fff])"
)
_CHARACTERS = re.compile(r"[\u3005-\u3007\u3041-\u30ff\u3400-\u9fff]|[^\u3005-\u3007\u3041-\u30ff\u3400-\u9fff]+")
_TOKEN = re.compile(r"\(|\)\??|\||\{\w+\??\}|\.\.|\^|\$|[^\s()|{}]+")
_FIXED = {"(": "(?:", ")": ")", ")?": ")?", "|": "|", "..": r"(?:\S+ ){0,4}", "^": "(?<=^ )", "$": "$"}


def straightened(text: str) -> str:
    """Return `text` in NFKC, with straight quotes and without Markdown emphasis; case and lines are kept."""
    return _EMPHASIS.sub("", unicodedata.normalize("NFKC", text).translate(_QUOTES))


def sentences(text: str, contractions: Sequence[tuple[re.Pattern[str], str]]) -> list[str]:
    """Split straightened `text` into sentences, each as ` word word word `, with contractions written out.

    Args:
        text: What `straightened` returned.
        contractions: What is written out how, in the order in which it is done.
    """
    found = []
    for piece in _BREAK.split(text):
        line = piece.casefold()
        for short, full in contractions:
            line = short.sub(full, line)
        row = words(line)
        if row:
            found.append(f" {' '.join(row)} ")
    return found


def compiled(patterns: Sequence[str], slots: Mapping[str, Sequence[str]], where: str = "") -> re.Pattern[str]:
    """Return a regular expression that finds any of `patterns` in a sentence.

    Args:
        patterns: In the notation above.
        slots: Patterns by slot name; they may use other slots.
        where: File that they come from, for the error.

    Raises:
        UsageError: a slot that is not there, one that contains itself, or unbalanced brackets.
    """
    try:
        return re.compile("(?<= )" + _either(patterns, slots, where))
    except re.error as error:
        raise UsageError(f"not a pattern: {error}: {' / '.join(patterns)[:80]}", where=where) from None
    except RecursionError:
        raise UsageError("a slot contains itself", where=where) from None


def _either(patterns: Sequence[str], slots: Mapping[str, Sequence[str]], where: str) -> str:
    return "(?:" + "|".join("".join(_token(t, slots, where) for t in _TOKEN.findall(p)) for p in patterns) + ")"


def _token(token: str, slots: Mapping[str, Sequence[str]], where: str) -> str:
    if token in _FIXED:
        return _FIXED[token]
    if not token.startswith("{"):
        return "".join(re.escape(part).replace(r"\*", r"\S*") + " " for part in _CHARACTERS.findall(token))
    name = token.strip("{?}")
    if name not in slots:
        raise UsageError(f"unknown slot '{name}'", where=where, valid=", ".join(slots), hint=nearest(name, slots))
    return _either(slots[name], slots, where) + ("?" if token.endswith("?}") else "")
