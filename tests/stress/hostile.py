"""Damage for files, and what every reader owes: one line, and no more memory than the file is large."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

from perpend.errors import UsageError

MEMORY = 64 << 20
"""Bytes that reading a small hostile file may take."""


def outcome(read: Callable[[], Any]) -> Any:
    """Return what `read` returned, or the one line with which it refused; anything else it raises goes through."""
    found: Any
    try:
        found = read()
    except UsageError as error:
        found = error
    if isinstance(found, UsageError):
        assert "\n" not in str(found)
        assert len(str(found)) < 2000
    return found


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail where Python allocates much inside the block."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Some bytes changed, doubled, cut out or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["set", "cut", "out", "twice", "insert"]))
        length = draw(st.integers(1, 12))
        if how == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[at:]
        elif how == "out":
            del data[at : at + length]
        elif how == "twice":
            data[at:at] = data[at : at + length]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=length))
    return bytes(data)
