"""Outputs appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perpend.errors import RunFailed, UsageError


def require_free(out: Path) -> None:
    """Refuse an output that is there and not empty, or that could not be written.

    Raises:
        UsageError: says which, before anything is loaded.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("already exists and is not empty", where=str(out), hint="choose another -o/--output")
    above = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError("cannot be written: permission denied", where=str(above), hint="choose another -o/--output")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Give `out.partial` to write to, and rename it to `out` when the block ends well; else it is removed.

    Raises:
        UsageError: `out` is there and not empty, or cannot be written.
        RunFailed: the disk is full.
    """
    require_free(out)
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(out)) from None
    try:
        yield partial
        partial.replace(out)
    except OSError as error:
        raise RunFailed(f"cannot be written: {error.strerror}", where=str(out)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
