"""Text of unknown origin made safe to show: nothing that a model writes may steer a terminal or turn a page around."""

from __future__ import annotations

import re

_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_TURNS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return `text` with control, escape, invisible and direction-changing characters shown as `\x1b` or `\u202e`.

    Line feeds and tabs are kept; a carriage return before a line feed is dropped.
    """
    return _STEERS.sub(lambda found: _shown(found[0]), text.replace("\r\n", "\n"))


def printable_json(text: str) -> str:
    """Return JSON text with the same characters as JSON escapes: equal when parsed, harmless when printed."""
    return _STEERS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def on_page(text: str) -> str:
    r"""Return `text` for a page: control characters and those that override direction shown as `\x1b` or `\u202e`.

    Marks that join letters and emoji are kept: several scripts need them, and they turn nothing around.
    """
    return _TURNS.sub(lambda found: _shown(found[0]), text.replace("\r\n", "\n"))


def _shown(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
