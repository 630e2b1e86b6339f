"""Text of unknown origin made safe to print: nothing that a model writes may steer the terminal."""

from __future__ import annotations

import re

_KEPT = "\n\t"
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return `text` with control, escape, invisible and direction-changing characters shown as `\x1b` or `\u202e`.

    Line feeds and tabs are kept; a carriage return before a line feed is dropped.
    """
    return _STEERS.sub(lambda found: _shown(found[0]), text.replace("\r\n", "\n"))


def printable_json(text: str) -> str:
    """Return JSON text with the same characters as JSON escapes: equal when parsed, harmless when printed."""
    return _STEERS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def shortened(text: str, length: int = 160) -> str:
    """Return `text` on one line of at most `length` characters, printable, cut in the middle of nothing but words."""
    line = " ".join(printable(text).split())
    if len(line) <= length:
        return line
    cut = line[: length - 1]
    at = cut.rfind(" ")
    return (cut[:at] if at > length // 2 else cut).rstrip() + "…"


def _shown(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
