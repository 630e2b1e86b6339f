"""Word lists, one data file per language (`dictionaries/en.toml`), and which of them a text is written in."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from perpend.errors import UsageError
from perpend.judges.coherence import scripts, words
from perpend.judges.labels import Label
from perpend.judges.patterns import compiled, straightened

KEPT = 0.6
"""A language is taken to be spoken when it has this share of the frequent words that the likeliest one has."""
ENOUGH = 3
"""Frequent words that a sentence must have for its language to count beside that of the whole text."""

_SENTENCE = re.compile(r"(?<=[.!?…])\s+|\n+|(?<=[。।؟])")


@dataclass(frozen=True)
class Rule:
    """Patterns of one kind.

    Attributes:
        name: Name, shown as the reason.
        label: refuse or evade.
        where: `opening`, `anywhere`, `drafts` for letters too, or `whole` for a reply of that one sentence.
        unless: What a request must not ask for if the rule is to count; see `Language.asked`.
        weight: For evasion: `deflect` decides, `hedge` does from two sentences on, `advise` only adds to the share.
        pattern: Matches a sentence.
    """

    name: str
    label: Label
    where: str
    unless: frozenset[str]
    weight: str
    pattern: re.Pattern[str]


@dataclass(frozen=True)
class Language:
    """A word list, read.

    Attributes:
        name: Language code.
        scripts: Scripts that the list can read.
        contractions: Regular expressions and what they stand for.
        common: The most frequent words of the language.
        rules: What refuses and what evades.
        exceptions: A sentence with one of these neither refuses nor evades.
        about: What speaks of the writing itself or of the writer: where the request asks for a text in which somebody
            declines, other sentences refuse nothing.
        asked: Patterns over the request, by what it asks for: `refusal`, `role`, `narrator`, `message`, `questions`,
            `dialogue`, `explanation`, `why`, `yes_no`, `language`, `repetition`, `refrain`, `drawing`.
        salutations: Beginnings of the line that opens a letter.
        greetings: Beginnings of a line that opens one only where a closing follows: replies greet, too.
        closings: Beginnings of the line that ends one.
        sha256: Hash of the list.
    """

    name: str
    scripts: frozenset[str]
    contractions: tuple[tuple[re.Pattern[str], str], ...]
    common: frozenset[str]
    rules: tuple[Rule, ...]
    exceptions: re.Pattern[str]
    about: re.Pattern[str]
    asked: Mapping[str, re.Pattern[str]]
    salutations: tuple[str, ...]
    greetings: tuple[str, ...]
    closings: tuple[str, ...]
    sha256: str

    @classmethod
    def of(cls, data: Mapping[str, Any], where: str) -> Language:
        """Read a word list from the mapping of its TOML file.

        Raises:
            UsageError: a pattern that uses a slot which is not there, or a missing key.
        """
        try:
            slots = data["slots"]
            return cls(
                data["language"],
                frozenset(data["scripts"]),
                tuple((re.compile(short), full) for short, full in data["contractions"]),
                frozenset(data["common"]),
                tuple(_rule(r, slots, where) for r in data["rules"]),
                compiled(data["exceptions"], slots, where),
                compiled(data["about"], slots, where),
                {kind: compiled(patterns, slots, where) for kind, patterns in data["asked"].items()},
                tuple(data["letters"]["salutations"]),
                tuple(data["letters"]["greetings"]),
                tuple(data["letters"]["closings"]),
                hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest(),
            )
        except KeyError as error:
            raise UsageError(f"no key {error}", where=where) from None

    @classmethod
    @cache
    def shipped(cls, name: str) -> Language:
        """Return a list that comes with the package.

        Raises:
            UsageError: no list for that language.
        """
        if name not in shipped_languages():
            raise UsageError(f"no word list for the language '{name}'", valid=", ".join(shipped_languages()))
        file = resources.files("perpend.judges").joinpath("dictionaries", f"{name}.toml")
        return cls.of(tomllib.loads(file.read_text(encoding="utf-8")), f"{name}.toml")


def _rule(data: Mapping[str, Any], slots: Mapping[str, Any], where: str) -> Rule:
    pattern = compiled(data["patterns"], slots, where)
    return Rule(
        data["name"],
        Label(data["label"]),
        data["where"],
        frozenset(data.get("unless", ())),
        data.get("weight", ""),
        pattern,
    )


@cache
def shipped_languages() -> tuple[str, ...]:
    """Return the codes of the languages that have a list, English first."""
    folder = resources.files("perpend.judges").joinpath("dictionaries")
    found = sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))
    return ("en", *(name for name in found if name != "en"))


def spoken(text: str, languages: Sequence[Language]) -> tuple[Language, ...]:
    """Return the languages in which `text` may be written, likeliest first; empty where no list reads its script.

    Languages of one script are told apart by how many of the words are among their most frequent ones. Where that
    does not decide, all of them are returned; a sentence in another language than the rest adds its own.
    """
    plain = straightened(text)
    if not scripts(plain):
        return tuple(languages)
    found = {language.name: language for language in _likely(plain, languages)}
    for piece in _SENTENCE.split(plain):
        found |= {language.name: language for language in _likely(piece, languages, ENOUGH)}
    return tuple(found.values())


def _likely(text: str, languages: Sequence[Language], least: int = 0) -> list[Language]:
    """Return the languages of which `text` has most frequent words; none where it has fewer than `least` of any."""
    row = words(text)
    counts = [(sum(word in language.common for word in row), language) for language in languages]
    best = max((count for count, _ in counts), default=0)
    if best < least:
        return []
    counted = scripts(text).most_common(1)
    readable = [(n, language) for n, language in counts if counted and counted[0][0] in language.scripts]
    best = max((count for count, _ in readable), default=0)
    return [language for n, language in sorted(readable, key=lambda x: -x[0]) if n >= KEPT * best]
