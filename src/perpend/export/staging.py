"""A folder that appears whole: written beside its place under a lock, flushed, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perpend.errors import RunFailed, UsageError
from perpend.units import size
from perpend.whole import being_written, flush, lock, occupied, partial_of

HEADROOM = 64 << 20
"""Free disk space asked for beyond the copied bytes: card, recipe, report."""


def nearest_folder(path: Path) -> Path:
    """Return an absolute path, or the nearest folder above it that is there."""
    return next(p for p in (path, *path.parents) if p.exists())


def require_space(out: Path, need: int) -> None:
    """Refuse an output for which the disk has no room.

    Args:
        out: Absolute path of the output; the free space is that of the nearest folder above it that is there.
        need: Bytes about to be written, room for card and report not counted.

    Raises:
        UsageError: says how much is needed and how much is free.
    """
    above = nearest_folder(out)
    free = shutil.disk_usage(above).free
    if free < need + HEADROOM:
        hint = "make room there, or another -o/--output"
        raise UsageError(
            f"needs {size(need + HEADROOM)} of disk space, {size(free)} are free", where=str(above), hint=hint
        )


@contextmanager
def staged(out: Path, need: int) -> Iterator[Path]:
    """Give a fresh, locked folder `out.partial`; flush it and rename it to `out` when the block ends well.

    Ctrl-C removes it, as it would be in the way of the same command; what else fails leaves it to the caller.

    Args:
        out: Absolute path of the folder to appear.
        need: Bytes about to be written.

    Raises:
        UsageError: too little free disk space, or `out.partial` exists: says whether a process is writing it.
        RunFailed: `out` was filled by somebody else meanwhile.
    """
    require_space(out, need)
    unfinished = partial_of(out)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        unfinished.mkdir()
    except FileExistsError:
        raise occupied(unfinished) from None
    held = None
    try:
        held = lock(unfinished, wait=True)
        yield unfinished
        for root, _, names in os.walk(unfinished):
            for name in (*names, ""):
                flush(Path(root) / name)
        try:
            os.rename(unfinished, out)
        except OSError as error:
            reason = f"cannot be renamed to {out.name}: {error.strerror}; the finished files are kept"
            raise RunFailed(reason, where=str(unfinished)) from None
        flush(out.parent)
    except KeyboardInterrupt:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        if held is not None:
            os.close(held)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder that exists for this process inside the block.

    Raises:
        UsageError: another process holds it.
    """
    try:
        held = lock(folder, wait=False)
    except BlockingIOError:
        raise being_written(folder) from None
    try:
        yield
    finally:
        if held is not None:
            os.close(held)
