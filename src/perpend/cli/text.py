"""Text for one line of a terminal."""

from __future__ import annotations

from perpend.escape import printable as printable
from perpend.escape import printable_json as printable_json


def shortened(text: str, length: int = 160) -> str:
    """Return `text` on one line of at most `length` characters, printable, cut in the middle of nothing but words."""
    line = " ".join(printable(text).split())
    if len(line) <= length:
        return line
    cut = line[: length - 1]
    at = cut.rfind(" ")
    return (cut[:at] if at > length // 2 else cut).rstrip() + "…"
