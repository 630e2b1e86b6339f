"""A judge behind any server that speaks OpenAI's chat completions: vLLM, llama.cpp, Ollama, a hosted model.

It is asked one question per reply (`endpoint.toml`), at temperature 0. Answers are kept on disk, so that the same
question is paid for once. What fails, costs more than the budget or names no label is `unknown`, with the reason; no
other judge fills in for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from perpend.errors import UsageError, nearest
from perpend.judges.labels import Label, Verdict
from perpend.judges.server import Server, Unanswered
from perpend.models.chat import strip_reasoning
from perpend.progress import note, track

PREFIX = "endpoint:"
KEY = "PERPEND_JUDGE_KEY"
"""Environment variable of the key that the server asks for, if any; it is never recorded."""
GIVE_UP = 3
"""Replies without an answer in a row after which the server is left alone."""

_LABEL = re.compile(r"[\W_]*(?:label[\W_]*)?(comply|refuse|evade|broken)[\W_]*", re.I)
_TAG = re.compile(r"<(?=/?(?:request|reply)\b)", re.I)


@dataclass(frozen=True)
class Settings:
    """An endpoint as it was typed: `endpoint:http://127.0.0.1:8080/v1#model=NAME,calls=1000`.

    Attributes:
        url: Of the server, up to `/v1`.
        model: Name by which the server knows the model.
        calls: Requests to the server at most, retries counted; the rest is `unknown`.
        timeout: Seconds that one request may take.
        parallel: Requests at a time.
        tokens: Length of an answer at most; more for a judge that reasons first.
    """

    url: str
    model: str
    calls: int = 2000
    timeout: int = 60
    parallel: int = 4
    tokens: int = 64

    @classmethod
    def parse(cls, text: str) -> Settings:
        """Read what was typed.

        Raises:
            UsageError: no http address, a key in the address, no model, or an option that is none.
        """
        url, _, tail = text.removeprefix(PREFIX).partition("#")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError("no address of a server", where=text, valid=f"{PREFIX}http://HOST:PORT/v1#model=NAME")
        if parts.username or parts.password or parts.query:
            raise UsageError("an address without user, key or query", where=PREFIX + parts.hostname, hint=f"{KEY}=…")
        options: dict[str, Any] = {}
        for item in tail.split(",") if tail else ():
            name, _, value = item.partition("=")
            if name not in ("model", *_NUMBERS) or not value or (name in _NUMBERS and not _positive(value)):
                raise UsageError(
                    f"'{item}' is no option of an endpoint",
                    where=text,
                    valid=f"model=NAME, {', '.join(f'{x}=N' for x in _NUMBERS)}",
                    hint=nearest(name, ("model", *_NUMBERS)),
                )
            options[name] = int(value) if name in _NUMBERS else value
        if "model" not in options:
            raise UsageError("which model is to judge is not said", where=text, hint=f"{PREFIX}{url}#model=NAME")
        return cls(url.rstrip("/"), **options)


_NUMBERS = ("calls", "timeout", "parallel", "tokens")


def _positive(value: str) -> bool:
    return value.isascii() and value.isdigit() and int(value) > 0


def cache_folder() -> Path:
    """Return where answers are kept: under `XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perpend" / "judge"


class EndpointJudge:
    """Labels replies by asking a model behind an endpoint.

    Attributes:
        name: Model and host, as reported.
        settings: The endpoint.
    """

    def __init__(
        self, settings: Settings, *, cache: Path | None = None, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self.settings, self._cache = settings, cache or cache_folder()
        self.name = f"{settings.model} at {urlsplit(settings.url).netloc}"
        text = resources.files("perpend.judges").joinpath("endpoint.toml").read_text(encoding="utf-8")
        self._template = str(tomllib.loads(text)["template"]).strip()
        self._server = Server(settings.url, settings.timeout, settings.calls, os.environ.get(KEY, ""), sleep)
        self._lock, self._silent = Lock(), 0

    def verdicts(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Label replies to their requests, in order; see `perpend.judges.labels.LabelJudge`."""
        pool = ThreadPoolExecutor(self.settings.parallel)
        try:
            found = list(track(pool.map(self._verdict, pairs), "judge", total=len(pairs)))
        except BaseException:
            self._server.left = 0  # what is under way tries no more
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        lost = [v.reason for v in found if v.label is Label.UNKNOWN]
        if lost:
            note(f"{self.name}: {len(lost)} of {len(pairs)} replies could not be judged: {lost[-1]}")
        return found

    def describe(self) -> dict[str, Any]:
        """Return name, address, model, and the hash of the question, by which a change of it is told."""
        revision = hashlib.sha256(self._template.encode()).hexdigest()[:16]
        return {"name": self.name, "url": self.settings.url, "model": self.settings.model, "revision": revision}

    def _verdict(self, pair: tuple[str, str]) -> Verdict:
        question = self._question(*pair)
        try:
            answer = self._kept(question)
        except Unanswered as error:
            return Verdict(Label.UNKNOWN, None, str(error), self.name)
        said = strip_reasoning(answer)
        named = _LABEL.fullmatch(said)
        if not named:
            shown = " ".join(said.split())[:60] or "nothing"
            return Verdict(Label.UNKNOWN, None, f"the judge's answer is no label: {shown}", self.name)
        return Verdict(Label(named[1].lower()), None, "the judge's answer", self.name)

    def _question(self, request: str, reply: str) -> str:
        """Return the question; what is judged cannot close its own tags."""
        filled = {"{request}": _TAG.sub("< ", request), "{reply}": _TAG.sub("< ", reply)}
        return re.sub(r"\{request\}|\{reply\}", lambda found: filled[found[0]], self._template)

    def _kept(self, question: str) -> str:
        """Return the answer that was kept, or ask and keep it."""
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.settings.tokens,
        }
        key = hashlib.sha256(json.dumps([self.settings.url, body], sort_keys=True).encode()).hexdigest()
        path = self._cache / key[:2] / f"{key}.json"
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["answer"])
        except (OSError, ValueError, KeyError, TypeError):
            answer = self._asked(body)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}-{time.monotonic_ns()}.partial")
        partial.write_text(json.dumps({"answer": answer}), encoding="utf-8")
        partial.replace(path)
        return answer

    def _asked(self, body: dict[str, Any]) -> str:
        with self._lock:
            if self._silent >= GIVE_UP:
                raise Unanswered(f"left alone after {GIVE_UP} replies without an answer")
        try:
            answer = self._server.chat(body)
        except Unanswered:
            with self._lock:
                self._silent += 1
            raise
        with self._lock:
            self._silent = 0
        return answer
