"""Where the trials of a search are kept: a journal file by default, or a database by URL."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from perpend.errors import MissingExtra, UsageError

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
        _mend(Path(text))
        return JournalStorage(JournalFileBackend(text))
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


def _mend(path: Path) -> None:
    """Cut off a last line that a crash left unfinished; nobody has read it."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        from optuna.storages.journal import JournalFileSymlinkLock

        lock = JournalFileSymlinkLock(str(path))
        lock.acquire()
        try:
            data = path.read_bytes()
            if not data.endswith(b"\n"):
                os.truncate(path, data.rfind(b"\n") + 1)
        finally:
            lock.release()


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
