"""`perpend serve`: a model and its edit over HTTP, for any OpenAI client and on one page."""

from __future__ import annotations

from typing import Annotated

import typer

import perpend
from perpend.cli import views
from perpend.cli.options import MEASURE, Model, Request, command
from perpend.options.commands import TalkOptions, options_of

PANEL = "Server"

Host = Annotated[str, typer.Option(help="Address to listen at.", metavar="ADDRESS", rich_help_panel=PANEL)]
Port = Annotated[
    int, typer.Option(help="Port to listen at; 0 for any that is free.", min=0, max=65535, rich_help_panel=PANEL)
]
Key = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="PERPEND_API_KEY",
        help="What clients must present; better in the environment than typed, where others can see it.",
        metavar="KEY",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Hosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        help="Name by which clients may call the server, beside addresses and localhost.",
        metavar="NAME",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Origins = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin",
        help="Origin of another web page that may use the server, such as https://example.org.",
        metavar="URL",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]


@command(
    "serve",
    options=("edit", "dry_run", *options_of(TalkOptions)),
    examples=("serve ./out --port 8080", "serve google/gemma-3-4b-it --edit out"),
    panel=MEASURE,
)
def serve(
    model: Model = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Key = None,
    allow_host: Hosts = None,
    allow_origin: Origins = None,
    *,
    request: Request,
) -> None:
    """Serve a model and its edit over HTTP.

    Any OpenAI client can ask for base, edited or edited@0.5, all from the same loaded weights; the page at / shows two
    answers side by side. Sampling and length here are for requests that say nothing about them. Ctrl-C ends it.
    """
    edit, recipe = request.edit, request.recipe(model)
    result = perpend.serve(
        recipe.model.id,
        edit=edit,
        host=host,
        port=port,
        api_key=api_key,
        allow_host=allow_host or (),
        allow_origin=allow_origin or (),
        recipe=recipe,
        machine=request.machine(),
        ready=lambda served: request.out.result(served, views.served),
        dry_run=request.dry_run,
    )
    if request.dry_run:
        request.out.result(result, views.rehearsal)
