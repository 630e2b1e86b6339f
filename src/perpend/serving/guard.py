"""What stands before the server: who may ask, from where, and how much."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response

from perpend.serving.requests import Refused

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LARGEST = 8 << 20
"""Bytes of the largest request."""
OPEN = frozenset({"/", "/page.css", "/page.js"})
"""What needs no key: the page, which holds nothing and asks for one."""
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def refusal(refused: Refused) -> Response:
    """Return the response to a request that is not carried out, as OpenAI words it."""
    return JSONResponse(refused.to_json(), refused.status)


class Guard:
    """Passes a request on to an application, or refuses it.

    A page elsewhere on the web cannot use the server through the reader's browser: the Host header must be an address
    or a known name, so that no name can be bound to this address later; an Origin must be the server's own or a known
    one; and a body must be declared as JSON, which browsers ask about first.
    """

    def __init__(self, app: Any, *, key: str | None, hosts: Sequence[str], origins: Sequence[str]) -> None:
        """Set up.

        Args:
            app: An ASGI application.
            key: What a client must present, None for nothing.
            hosts: Names by which the server may be reached, beside addresses and localhost.
            origins: Origins whose pages may ask, beside the server's own.
        """
        self._app, self._key = app, key
        self._hosts, self._origins = {"localhost", *map(str.lower, hosts)}, set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] != "http":
            return

        async def safely(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._check(scope, Headers(scope=scope))
        except Refused as refused:
            await refusal(refused)(scope, receive, safely)
            return
        await self._app(scope, _limited(receive), safely)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise Refused(403, f"host '{host[:80]}' is not known here; start with --allow-host", code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and origin.partition("://")[2].lower() != host.lower():
            raise Refused(
                403, f"pages of {origin[:80]} may not ask here; start with --allow-origin", code="unknown_origin"
            )
        if self._key is not None and scope["path"] not in OPEN and not self._has_key(headers.get("authorization", "")):
            raise Refused(401, "no or a wrong API key: Authorization: Bearer KEY", code="invalid_api_key")
        if (
            scope["method"] == "POST"
            and headers.get("content-type", "").partition(";")[0].strip() != "application/json"
        ):
            raise Refused(415, "the body must be JSON: Content-Type: application/json")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST:
            raise too_large()

    def _is_ours(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host).lower()
        try:
            return name in self._hosts or bool(ipaddress.ip_address(name.strip("[]")))
        except ValueError:
            return False

    def _has_key(self, authorization: str) -> bool:
        kind, _, given = authorization.partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.encode(), str(self._key).encode())


def too_large() -> Refused:
    """Return what a client is told whose request is too large."""
    return Refused(413, f"a request of more than {LARGEST >> 20} MiB", code="request_too_large")


def _limited(receive: Receive) -> Receive:
    """Return a `receive` that ends a body which is longer than it said, or did not say."""
    seen = 0

    async def limited() -> MutableMapping[str, Any]:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > LARGEST:
            raise too_large()
        return message

    return limited
