"""One request to an OpenAI-style server: retries with growing pauses, a budget, a time limit, a bounded answer."""

from __future__ import annotations

import ipaddress
import json
import random
import time
from collections.abc import Callable
from http.client import HTTPException
from threading import Lock
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from perpend.errors import UsageError

ATTEMPTS = 4
"""Times that one request is sent before it counts as unanswered."""
PAUSE, LONGEST = 0.5, 30.0
"""Seconds before the second attempt, doubled before each further one; and the longest pause, also of `Retry-After`."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_LIMIT = 4 << 20
"""Bytes of an answer that are read."""


class Unanswered(Exception):
    """A request got no answer that can be used; says why."""


class _NoRedirect(HTTPRedirectHandler):
    """An answer that sends elsewhere is an error: neither text nor key goes to a server that was not named."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """An OpenAI-style server.

    Attributes:
        left: Requests that may still be sent.
    """

    def __init__(
        self, url: str, timeout: float, calls: int, key: str = "", sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self._url, self._timeout, self._sleep, self.left = f"{url}/chat/completions", timeout, sleep, calls
        parts = urlsplit(url)
        near = _loopback(parts.hostname or "")
        if key and parts.scheme != "https" and not near:
            raise UsageError("a key is sent over https alone", where=url, valid="https://…, or no key")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._opener = build_opener(_NoRedirect, *([ProxyHandler({})] if near else []))
        self._lock = Lock()

    def chat(self, body: dict[str, Any]) -> str:
        """Return the text that the server answers.

        Raises:
            Unanswered: it refuses, stays silent or answers nothing that can be read, or the budget is spent.
        """
        data, reason, wait = json.dumps(body).encode(), "", 0.0
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(wait)
            self._spend(reason)
            wait = min(LONGEST, PAUSE * 2**attempt) * random.uniform(0.75, 1.25)
            try:
                with self._opener.open(Request(self._url, data, self._headers), timeout=self._timeout) as found:
                    return _text(found.read(_LIMIT))
            except HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code not in _PASSING:
                    break
                wait = max(wait, _asked_to_wait(error.headers.get("Retry-After")))
            except (URLError, TimeoutError, OSError, HTTPException) as error:
                reason = f"no answer: {getattr(error, 'reason', None) or error or type(error).__name__}"
        raise Unanswered(f"{reason} ({attempt + 1} of {ATTEMPTS} attempts)")

    def _spend(self, reason: str) -> None:
        with self._lock:
            if self.left <= 0:
                raise Unanswered(f"the budget of calls is spent{f' after {reason}' if reason else ''}")
            self.left -= 1


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _asked_to_wait(header: str | None) -> float:
    return min(LONGEST, float(header)) if header and header.isascii() and header.isdigit() else 0.0


def _text(data: bytes) -> str:
    try:
        choice = json.loads(data)["choices"][0]
        text = str(choice["message"]["content"] or "")
        return f"{text} … (cut off)" if choice.get("finish_reason") == "length" else text
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise Unanswered("the answer is no chat completion") from None
