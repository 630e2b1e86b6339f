"""Files that appear whole, each written by one process: `NAME.partial` under a lock, flushed, then named."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from perpend.errors import RunFailed, UsageError

try:
    import fcntl
except ImportError:  # not on Windows, where what was left behind cannot be told from what is being written
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".partial"


def partial_of(path: Path) -> Path:
    """Return what an output is called until it is complete."""
    return path.with_name(path.name + SUFFIX)


def lock(path: Path, *, wait: bool) -> int | None:
    """Lock a file or folder until the descriptor that is returned is closed; None where that is not possible.

    Raises:
        BlockingIOError: locked by another process and `wait` is false.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def being_written(path: Path) -> UsageError:
    """Say that another process is at work there."""
    hint = "wait for it or choose another -o/--output"
    return UsageError("another process is writing this output", where=str(path), hint=hint)


def occupied(partial: Path) -> UsageError:
    """Say whether an existing `.partial` is being written or was left behind, and what to do."""
    remove = f"rm {'-r ' if partial.is_dir() else ''}{partial}"
    try:
        descriptor = lock(partial, wait=False)
    except BlockingIOError:
        return being_written(partial)
    except OSError:
        return UsageError("is in the way", where=str(partial), hint=remove)
    if descriptor is not None:
        os.close(descriptor)
    return UsageError("an earlier export stopped here; inspect it, then remove it", where=str(partial), hint=remove)


@contextmanager
def claimed(partial: Path, *, anew: bool, kept: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Make an empty `.partial` file and hold it for this process; at the end it is removed unless it was renamed.

    Args:
        partial: File to make.
        anew: Refuse one that is there. Otherwise what a killed process left is taken over.
        kept: Failures of the block that leave the file for inspection.

    Raises:
        UsageError: one is there, it cannot be made, or another process is writing it.
    """
    try:
        descriptor = _hold(partial, anew)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(partial)) from None
    try:
        os.truncate(partial, 0)
        yield
    except kept:
        raise
    except BaseException:
        _remove(partial, descriptor)
        raise
    else:
        _remove(partial, descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _hold(partial: Path, anew: bool) -> int | None:
    """Return the lock of a file, which it makes or takes over."""
    while True:
        try:
            descriptor = os.open(partial, os.O_CREAT | os.O_WRONLY | (os.O_EXCL if anew else 0), 0o666)
        except FileExistsError:
            raise occupied(partial) from None
        if fcntl is None:
            os.close(descriptor)
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if anew else fcntl.LOCK_NB))
            if _still(partial, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise being_written(partial) from None
        os.close(descriptor)  # its writer was done in between


def _remove(partial: Path, descriptor: int | None) -> None:
    """Remove a file unless it was renamed, and never one that another process has made since."""
    if descriptor is None or _still(partial, descriptor):
        partial.unlink(missing_ok=True)


def _still(path: Path, descriptor: int) -> bool:
    """Say whether a name still stands for an open file, rather than for one that was put in its place."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


class Taken(RunFailed):
    """Somebody else made the output meanwhile."""


def name_all(partial: Sequence[Path], files: Sequence[Path]) -> None:
    """Give complete files their names, the last one last; if that fails none of them keeps it.

    Raises:
        Taken: one of the names is; what has it stays as it is, and so do the `.partial` files.
    """
    path, file = partial[0], files[0]
    named = 0
    try:
        for path, file in zip(partial, files, strict=True):
            _name(path, file)
            named += 1
    except BaseException as error:
        for first, second in zip(partial[: named + 1], files, strict=False):
            _take_back(first, second, given=second is not file)
        if not isinstance(error, FileExistsError):
            raise
        reason = f"cannot be renamed to {file.name}, which appeared meanwhile; the finished file is kept"
        raise Taken(reason, where=str(path)) from None
    for path in partial:
        path.unlink(missing_ok=True)
    flush(files[0].absolute().parent)


def _take_back(partial: Path, file: Path, *, given: bool) -> None:
    """Take a name from a file, if it has it; without hard links, only where it was `given` for sure."""
    if unfinished(file):
        file.unlink()
    elif given and not partial.exists():
        file.rename(partial)


def unfinished(file: Path) -> bool:
    """Say whether a file has its name and is still called `.partial`, too: the rest of its output is not there yet."""
    try:
        return partial_of(file).samefile(file)
    except FileNotFoundError:
        return False


def _name(partial: Path, file: Path) -> None:
    """Give a file another name, which may not be taken; without hard links it loses its own.

    Raises:
        FileExistsError: it is taken.
    """
    try:
        os.link(partial, file)
    except FileExistsError:
        raise
    except OSError:
        if file.exists():
            raise FileExistsError from None
        partial.rename(file)


def flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    if path.is_dir() and os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes, *, replace: bool) -> None:
    """Write a file that appears whole; what a killed process left of it is taken over.

    Args:
        path: File to make.
        data: Its content.
        replace: Put it in the place of one that is there.

    Raises:
        UsageError: it is there and is not to be replaced, cannot be written, or another process is writing it.
    """
    partial = partial_of(path)
    try:
        if not replace and unfinished(path):  # killed when the file was whole and had its name: not to be written into
            partial.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with claimed(partial, anew=False):
            partial.write_bytes(data)
            flush(partial)
            if replace:
                os.replace(partial, path)
                flush(path.absolute().parent)
            else:
                name_all([partial], [path])
    except Taken:
        raise UsageError("already exists", where=str(path), hint="choose another -o/--output, or remove it") from None
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(path)) from None
