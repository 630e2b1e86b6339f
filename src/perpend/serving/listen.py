"""Where a server listens, and running it there."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from perpend.errors import UsageError


def require_key(host: str, key: str | None) -> None:
    """Refuse to let a whole network use the model unasked.

    Raises:
        UsageError: the address can be reached from elsewhere, and there is no key.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not key:
        raise UsageError(
            f"{host} can be reached from other machines, and there is no API key",
            where="--host",
            valid="127.0.0.1, ::1, or any address with a key",
            hint="PERPEND_API_KEY=... perpend serve MODEL --host ADDRESS",
        )


def take(host: str, port: int) -> socket.socket:
    """Return a socket that is bound and does not listen yet, so that a taken port is known before a model is loaded.

    Raises:
        UsageError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        reason = "is in use" if in_use else f"cannot be had: {error.strerror or error}"
        raise UsageError(
            f"port {port} of {host} {reason}", where="--port", hint="--port 0, which takes a free one" if in_use else ""
        ) from None
    return taken


def address_of(taken: socket.socket, host: str) -> str:
    """Return the URL of a bound socket."""
    return f"http://{f'[{host}]' if ':' in host else host}:{taken.getsockname()[1]}"


class Listener(uvicorn.Server):
    """Runs an application on a socket until it is told to stop, or the process is."""

    def __init__(self, app: Any, taken: socket.socket, ready: Callable[[], object]) -> None:
        """Set up.

        Args:
            app: An ASGI application.
            taken: What `take` returned.
            ready: Called when requests are taken.
        """
        quiet: dict[str, Any] = {
            "log_config": None,
            "log_level": "critical",
            "access_log": False,
            "server_header": False,
        }
        still: dict[str, Any] = {"lifespan": "off", "ws": "none", "proxy_headers": False}
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=2, **quiet, **still))
        self._taken, self._ready = taken, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        self._ready()

    def serve_until_stopped(self) -> None:
        """Answer requests; Ctrl-C and SIGTERM end it, and so does `should_exit`."""
        try:
            self.run(sockets=[self._taken])
        except KeyboardInterrupt:  # raised again by uvicorn once everything is closed
            pass
        finally:
            self._taken.close()
