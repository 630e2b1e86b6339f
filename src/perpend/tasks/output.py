"""Outputs appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perpend.errors import RunFailed, UsageError
from perpend.whole import partial_of, write_file

ANOTHER = "choose another -o/--output"


def require_free(out: Path) -> None:
    """Refuse an output that is there and not empty, or that could not be written, also for want of disk space.

    Raises:
        UsageError: says which, before anything is loaded.
    """
    from perpend.export.staging import require_space

    if not out.name:
        raise UsageError("not a folder that can be made", where=str(out), hint=ANOTHER)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("already exists and is not empty", where=str(out), hint=ANOTHER)
    above = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not above.is_dir():
        raise UsageError("is a file, and a folder would have to be made in it", where=str(above), hint=ANOTHER)
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError("cannot be written: permission denied", where=str(above), hint=ANOTHER)
    require_space(out.absolute(), 0)


def require_no_partial(out: Path) -> None:
    """Refuse an output of which an unfinished export is there: it is kept for inspection and never overwritten.

    Raises:
        UsageError: names it, before anything is loaded.
    """
    partial = partial_of(out)
    if partial.exists():
        raise UsageError(
            "an earlier export stopped here, or is still running; inspect it, then remove it",
            where=str(partial),
            hint=f"rm -r {partial}",
        )


def to_text(data: Any, *, indent: int | None = 1) -> str:
    """Return JSON text; what JSON has no number for is null."""
    return json.dumps(_finite(data), ensure_ascii=False, indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def replace_text(path: Path, text: str) -> None:
    """Write a text file that appears whole, in the place of an older one if there is one.

    Raises:
        UsageError: it cannot be written, or another process is writing it.
    """
    write_file(path, text.encode("utf-8"), replace=True)


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Give `out.partial` to write to, flush it and rename it to `out` when the block ends well; else it is removed.

    Raises:
        UsageError: `out` is there and not empty, cannot be written, or `out.partial` is there.
        RunFailed: the disk is full.
    """
    from perpend.export.staging import staged

    require_free(out)
    try:
        with staged(out.absolute(), 0) as partial:
            try:
                yield partial
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise RunFailed(f"cannot be written: {error.strerror or error}", where=str(out)) from error
