"""Prompts: read from anywhere, identified by their text, split so that no split sees another's."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from functools import cached_property


def normalised(text: str) -> str:
    """Return `text` in NFKC, case folded, with runs of white space as one space: two prompts that agree are one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True)
class Prompt:
    """One request to the model.

    Attributes:
        text: What the user says.
        image: Path or URL of an image shown with it.
        topic: Label of what it is about.
        form: Label of how it is put, such as `question` or `imperative`.
    """

    text: str
    image: str | None = None
    topic: str = ""
    form: str = ""

    @cached_property
    def id(self) -> str:
        """First 16 hex digits of the SHA-256 of the normalised text (and of the image's name, if there is one)."""
        key = normalised(self.text) + (f"\n{self.image}" if self.image else "")
        return hashlib.sha256(key.encode()).hexdigest()[:16]
