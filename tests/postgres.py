"""A PostgreSQL server that the tests start and stop themselves."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _tool(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


def _as_user() -> list[str]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]


@contextmanager
def running(parent: Path) -> Iterator[str]:
    """Yield the URL of a server of its own, run by a user who is not root; skips where there is none to run.

    Args:
        parent: For its files, where the tests are not run as root.
    """
    initdb, server, control = _tool("initdb"), _tool("postgres"), _tool("pg_ctl")
    if not (initdb and server and control):
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="the driver is not installed: pip install 'perpend[postgres]'")
    if os.geteuid() == 0 and not (shutil.which("setpriv") and _user("postgres")):
        pytest.skip("run as root, and there is no user postgres to start the server as")
    folder = (Path("/var/tmp") if os.geteuid() == 0 else parent) / f"perpend-pg-{os.getpid()}"
    folder.mkdir()
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, run = folder / "data", {"check": True, "capture_output": True, "cwd": folder}
    user = "postgres" if os.geteuid() == 0 else getpass.getuser()
    try:
        subprocess.run([*_as_user(), initdb, "-D", data, "-A", "trust", "-U", user, "--no-sync"], **run)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        start = [control, "-D", data, "-o", options, "-w", "-l", folder / "log", "start"]
        subprocess.run([*_as_user(), *start], **{**run, "capture_output": False})
        yield f"postgresql://{user}@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*_as_user(), control, "-D", data, "-m", "immediate", "stop"], cwd=folder, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def _user(name: str) -> bool:
    import pwd

    return any(entry.pw_name == name for entry in pwd.getpwall())
