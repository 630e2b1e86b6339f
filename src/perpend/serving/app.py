"""The server: OpenAI's chat completions for a model and its edit, and one page to compare them on."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

import anyio
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from perpend._version import __version__
from perpend.models.replies import Sampling
from perpend.models.streaming import Answer, Answers, Ask
from perpend.progress import note
from perpend.serving.duet import Duet
from perpend.serving.guard import Guard, Receive, Scope, Send, refusal
from perpend.serving.requests import Comparison, Completion, Refused, ask, conversation, read

WAITING = 32
"""Requests that may wait; more are told to come back later."""
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


@dataclass(frozen=True)
class Settings:
    """What a server does where a request does not say.

    Attributes:
        model: Name of the model, for the page.
        max_new_tokens: Length of an answer.
        sampling: How tokens are drawn; None for greedy.
        seed: Of the random numbers.
        key: What a client must present; None for nothing.
        hosts: Names by which the server may be reached, beside addresses and localhost.
        origins: Origins whose pages may ask, beside the server's own.
    """

    model: str
    max_new_tokens: int = 128
    sampling: Sampling | None = None
    seed: int = 0
    key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


class Queue:
    """Who has the model: one request at a time, in the order in which they came."""

    def __init__(self, most: int = WAITING) -> None:
        self._lock, self._most, self._waiting = anyio.Lock(), most, 0

    def check(self) -> None:
        """Refuse a request for which there is no room to wait.

        Raises:
            Refused: come back later.
        """
        if self._waiting >= self._most:
            raise Refused(429, f"{self._most} requests are waiting", kind="rate_limit_error", code="queue_full")

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the model and keep it inside the block."""
        self._waiting += 1
        try:
            await self._lock.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._lock.release()


Emit = Callable[[Any], Awaitable[None]]
"""Sends an event of a stream."""


class Making(Response):
    """A response that runs the model, and stops it when the client goes."""

    def __init__(self, queue: Queue, duet: Duet, asks: Sequence[Ask]) -> None:
        queue.check()
        self._queue, self._duet, self._asks = queue, duet, asks
        self._began = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or stop when the client goes."""
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            try:
                async with self._queue.turn():
                    await self._make(scope, receive, send)
            except Exception as error:
                await self._fail(Refused.of(error), scope, receive, send)
            tasks.cancel_scope.cancel()

    async def _make(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers = await to_thread.run_sync(self._duet.session.answers, self._asks)
        growing = iter(answers)
        try:
            await self.respond(answers, _steps(growing), scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(growing.close)  # type: ignore[attr-defined]

    async def respond(
        self, answers: Answers, steps: AsyncIterator[tuple[int, str]], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Send the response to answers that grow with `steps`."""
        raise NotImplementedError

    async def emit(self, send: Send, event: Any) -> None:
        """Send one event of a stream, with the headers before the first."""
        if not self._began:
            self._began = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
        await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

    async def end(self, send: Send) -> None:
        """End a stream."""
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, refused: Refused, scope: Scope, receive: Receive, send: Send) -> None:
        if refused.status >= 500:
            note(refused.message)
        if self._began:
            await self.emit(send, refused.to_json())
            await self.end(send)
        else:
            await refusal(refused)(scope, receive, send)


async def _steps(growing: Iterator[tuple[int, str]]) -> AsyncIterator[tuple[int, str]]:
    while (step := await to_thread.run_sync(next, growing, None)) is not None:
        yield step


class CompletionMaking(Making):
    """One answer, in OpenAI's form, whole or in pieces."""

    def __init__(self, queue: Queue, duet: Duet, asked: Ask, request: Completion, fingerprint: str) -> None:
        super().__init__(queue, duet, [asked])
        self._request = request
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": fingerprint,
        }

    async def respond(
        self, answers: Answers, steps: AsyncIterator[tuple[int, str]], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Send the completion."""
        (answer,) = answers.answers
        if not self._request.stream:
            async for _ in steps:
                pass
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None,
                "finish_reason": answer.finish,
            }
            body = {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(answer)}
            await JSONResponse(body)(scope, receive, send)
            return
        await self.emit(send, self._chunk({"role": "assistant", "content": ""}))
        async for _, piece in steps:
            if piece:
                await self.emit(send, self._chunk({"content": piece}))
        await self.emit(send, self._chunk({}, answer.finish))
        if self._request.stream_options and self._request.stream_options.include_usage:
            await self.emit(send, {**self._chunk({}), "choices": [], "usage": usage(answer)})
        await self.emit(send, "[DONE]")
        await self.end(send)

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


class ComparisonMaking(Making):
    """Two answers side by side, and their labels."""

    def __init__(self, queue: Queue, duet: Duet, asks: Sequence[Ask], sides: Sequence[str], request: str) -> None:
        super().__init__(queue, duet, asks)
        self._sides, self._said = sides, request

    async def respond(
        self, answers: Answers, steps: AsyncIterator[tuple[int, str]], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Send pieces, then how each answer ended, then its label."""
        for side in self._sides:
            await self.emit(send, {"side": side, "text": ""})
        async for k, piece in steps:
            if piece:
                await self.emit(send, {"side": self._sides[k], "text": piece})
            if answers.answers[k].finish:
                ended = {"finish": answers.answers[k].finish, "tokens": len(answers.answers[k].tokens)}
                await self.emit(send, {"side": self._sides[k], **ended})
        replies = [(answer.text, answer.finish == "stop") for answer in answers.answers]
        labels = await to_thread.run_sync(self._duet.labels, self._said, replies)
        for side, label in zip(self._sides, labels, strict=True):
            await self.emit(send, {"side": side, "label": label})
        await self.end(send)


def usage(answer: Answer) -> dict[str, int]:
    """Return what an answer took, in tokens."""
    asked, made = answer.prompt_tokens, len(answer.tokens)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


class Server:
    """The endpoints of one model and its edit."""

    def __init__(self, duet: Duet, settings: Settings) -> None:
        self._duet, self._settings, self._queue = duet, settings, Queue()
        self._began = int(time.time())
        self._fingerprint = f"perpend-{__version__}" + (f"-{duet.edit.sha256[:12]}" if duet.edit else "")

    async def models(self, request: Request) -> Response:
        """List what can be asked for."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._duet.names]})

    async def model(self, request: Request) -> Response:
        """Describe one of them."""
        name = request.path_params["name"]
        try:
            self._duet.scale_of(name)
        except Exception as error:
            raise Refused(404, str(error), code="model_not_found", param="model") from None
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "perpend"}

    async def about(self, request: Request) -> Response:
        """Say what the page needs to know."""
        panel = self._duet.panel
        return JSONResponse(
            {
                "model": self._settings.model,
                "edit": self._duet.edit.sha256 if self._duet.edit else None,
                "judges": panel.kind,
                "max_tokens": self._settings.max_new_tokens,
                "version": __version__,
            }
        )

    async def complete(self, request: Request) -> Response:
        """Answer a conversation."""
        asked, settings = read(Completion, await request.body()), self._settings
        made = ask(asked, self._duet, settings.sampling, settings.seed, settings.max_new_tokens)
        return CompletionMaking(self._queue, self._duet, made, asked, self._fingerprint)

    async def compare(self, request: Request) -> Response:
        """Let both sides answer."""
        asked, settings = read(Comparison, await request.body()), self._settings
        given = {"base": asked.base, "edited": asked.edited}
        sides = [side for side, turns in given.items() if turns is not None]
        if not sides or ("edited" in sides and self._duet.edit is None):
            raise Refused(400, "nobody is to answer" if not sides else "there is no edit", param="base")
        asks = []
        for side in sides:
            messages, images = conversation(given[side] or (), self._duet)
            edit = self._duet.at(asked.scale) if side == "edited" else None
            tokens = asked.max_tokens or settings.max_new_tokens
            drawn = asked.sampling(settings.sampling, settings.seed)
            asks.append(Ask(messages, edit, drawn, tokens, images=images))
        return ComparisonMaking(self._queue, self._duet, asks, sides, _words(asks[0]))

    async def page(self, request: Request) -> Response:
        """Show the page, or a part of it."""
        name, kind = PAGE[request.url.path]
        return Response(resources.files("perpend.serving").joinpath("page", name).read_bytes(), media_type=kind)


def _words(asked: Ask) -> str:
    """Return what the user said last."""
    content = asked.messages[-1]["content"]
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = Refused(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}".lower())
    return refusal(error if isinstance(error, Refused) else Refused.of(error))


def application(duet: Duet, settings: Settings) -> Any:
    """Return the ASGI application of a model and its edit."""
    server = Server(duet, settings)
    routes = [
        *(Route(path, server.page) for path in PAGE),
        Route("/about", server.about),
        Route("/compare", server.compare, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/v1/chat/completions", server.complete, methods=["POST"]),
    ]
    guard = Middleware(Guard, key=settings.key, hosts=settings.hosts, origins=settings.origins)
    cors = Middleware(
        CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
    )
    handlers: Any = {Refused: _refused, HTTPException: _refused, Exception: _refused}
    return Starlette(
        routes=routes, middleware=[*([cors] if settings.origins else []), guard], exception_handlers=handlers
    )
