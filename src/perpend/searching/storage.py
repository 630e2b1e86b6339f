"""Where the trials of a search are kept: a journal file by default, or a database by URL."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psutil

from perpend.errors import MissingExtra, UsageError
from perpend.whole import lock

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def open_storage(where: str | Path) -> BaseStorage:
    """Open a journal file, or a database by URL.

    Raises:
        MissingExtra: the driver of PostgreSQL is not installed.
        UsageError: it cannot be reached.
    """
    import optuna
    from optuna.storages import JournalStorage, RDBStorage, get_storage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    text = str(where)
    if "://" not in text:
        guard = _JournalLock(Path(text))
        backend = JournalFileBackend(text, cast(Any, guard))
        guard.acquire()
        guard.release()
        return JournalStorage(backend)
    url = _with_driver(text)
    for attempt in range(5):
        try:
            return get_storage(RDBStorage(url, engine_kwargs={"pool_pre_ping": True}))
        except Exception as error:  # two processes that make the tables at once: the second finds them made
            if attempt == 4 or "connect" in str(error).lower():
                reason = str(error).strip().splitlines()[0]
                raise UsageError(f"the storage cannot be opened: {reason}", where=masked(text)) from None
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError("unreachable")


def _with_driver(url: str) -> str:
    """Return a database URL with the driver that is installed."""
    scheme, _, rest = url.partition("://")
    if scheme not in {"postgresql", "postgres"}:
        return url
    from importlib.util import find_spec

    if find_spec("psycopg") is None:
        raise MissingExtra("psycopg", "postgres", "a PostgreSQL storage")
    return f"postgresql+psycopg://{rest}"


def masked(where: str | Path) -> str:
    """Return a storage without its password, wherever in a URL that is."""
    text = str(where)
    if "://" not in text:
        return text
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        return f"{text.partition('://')[0]}://***"
    hidden = {name: "***" for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True).replace("%2A%2A%2A", "***")


class _JournalLock:
    """Keeps the writers of a journal file apart, and cuts off a last line that a crash left unfinished.

    The system gives it up with the process that holds it. Optuna's own is a link that a killed process leaves behind,
    which others wait for 30 seconds, or for ever where the path is relative.
    """

    def __init__(self, path: Path) -> None:
        from optuna.storages.journal import JournalFileSymlinkLock

        self._path, self._held = path, -1
        self._link = JournalFileSymlinkLock(str(path.absolute()))

    def acquire(self) -> bool:
        """Wait until nobody writes."""
        held = self._locked()
        if held is None:
            self._link.acquire()
        else:
            self._held = held
        self._mend()
        return True

    def release(self) -> None:
        """Let others write."""
        if self._held < 0:
            self._link.release()
        else:
            os.close(self._held)
            self._held = -1

    def _locked(self) -> int | None:
        try:
            return lock(self._path, wait=True)
        except OSError:  # a file system that has no locks
            return None

    def _mend(self) -> None:
        with self._path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            if file.read() not in (b"", b"\n"):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)


def this_process() -> dict[str, Any]:
    """Return what tells this process from others on the same machine, and this machine from others."""
    space = Path("/proc/self/ns/pid")
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [os.readlink(space), boot.read_text().strip()]
    return {"machine": " ".join(parts), "pid": os.getpid(), "born": psutil.Process().create_time()}


def runs(record: Mapping[str, Any]) -> bool:
    """Return whether the process of a record made by `this_process` on this machine is still there."""
    try:
        process = psutil.Process(record["pid"])
        return bool(process.create_time() == record["born"] and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
