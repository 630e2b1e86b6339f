"""Serve a model and its edit over HTTP, from the same weights: to any OpenAI client, and on one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

from perpend.config import Machine, Recipe
from perpend.errors import MissingExtra
from perpend.options.asked import asked, path_of
from perpend.options.commands import TalkOptions
from perpend.refs import ModelRef
from perpend.tasks.rehearsal import Rehearsal, rehearse
from perpend.tasks.setup import open_duet, sampling


@dataclass(frozen=True)
class Served:
    """A server that is up, or was."""

    url: str
    """Of the page; `/v1` below it is the base URL of clients."""
    model: str
    models: tuple[str, ...]
    """Names that clients can ask for."""
    edit_sha256: str | None
    judges: str
    """Who labels answers on the page: hybrid, or dictionary only."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"task": "serve", **self.__dict__, "models": list(self.models), "api": f"{self.url}/v1"}


def serve(
    model: str | None = None,
    *,
    edit: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allow_host: Sequence[str] = (),
    allow_origin: Sequence[str] = (),
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    ready: Callable[[Served], object] | None = None,
    dry_run: bool = False,
    **options: Unpack[TalkOptions],
) -> Served | Rehearsal:
    """Serve a model until Ctrl-C or SIGTERM.

    Args:
        model: Hub id with `@revision`, directory or GGUF file; None takes the recipe's.
        edit: As for `chat`; clients then ask for `base`, `edited` or, at another scale, `edited@0.5`.
        host: Address to listen at; one that other machines can reach needs a key.
        port: Port to listen at; 0 for any that is free.
        api_key: What clients must present as `Authorization: Bearer KEY`; None for nothing.
        allow_host: Names by which clients may call the server, beside addresses and localhost.
        allow_origin: Origins of other web pages that may use the server, such as `https://example.org`.
        recipe: System prompt, and what a request leaves open: sampling, seed, length of an answer.
        machine: Device and dtype.
        ready: Called once requests are taken.
        dry_run: Only say what would be loaded, and where the server would listen.
        **options: What `perpend serve` takes, by name: over the recipe and the machine.

    Returns:
        What was served, when it is over.

    Raises:
        UsageError: the model, the edit or the address cannot be had, or the edit is not one of this model.
        MissingExtra: starlette or uvicorn is not installed.
    """
    recipe, machine = asked(serve, TalkOptions, options, model, recipe, machine)
    model, edit = recipe.model.id, path_of(edit)
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise MissingExtra(package, "serve", "a server")
    from perpend.serving.app import Settings, application
    from perpend.serving.listen import Listener, address_of, require_key, take

    require_key(host, api_key)
    with take(host, port) as taken:
        url = address_of(taken, host)
        if dry_run:
            return rehearse("serve", model, recipe, machine, edit, url)
        duet = open_duet(model, recipe, machine, edit)
        title = ModelRef.parse(model).title
        served = Served(url, model, duet.names, duet.edit.sha256 if duet.edit else None, duet.panel.kind)
        draw, length = sampling(duet.session, recipe), recipe.eval.max_new_tokens
        settings = Settings(title, length, draw, recipe.seed, api_key, tuple(allow_host), tuple(allow_origin))
        app = application(duet, settings)
        Listener(app, taken, lambda: ready(served) if ready is not None else None).serve_until_stopped()
    return served
