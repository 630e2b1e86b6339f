"""`perpend config`: show, write and check recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import perpend
from perpend.cli import views
from perpend.cli.options import LOOK, Model, Request, command, group
from perpend.options.commands import ConfigOptions, options_of

File = Annotated[Path, typer.Argument(metavar="FILE", help="Recipe (TOML).", show_default=False)]


@command(
    "show",
    options=options_of(ConfigOptions),
    examples=("config show", "config show --config recipe.toml --mode column --json"),
    processes="several",
)
def show(model: Model = None, *, request: Request) -> None:
    """Print the effective recipe: defaults, then the file, then flags, then --set."""
    shown = perpend.config_show(recipe=request.recipe(model, needs_model=False))
    request.out.document(shown, shown.text)


@command(
    "init",
    options=("output", *options_of(ConfigOptions)),
    examples=("config init -o recipe.toml", "config init google/gemma-3-4b-it -o recipe.toml --mode column"),
)
def init(model: Model = None, *, request: Request) -> None:
    """Write a recipe in which every key has a comment; without --output, print it."""
    output = request.optional_output
    written = perpend.config_init(output=output, recipe=request.recipe(model, needs_model=False))
    if output is None:
        request.out.document(written, written.text)
    else:
        request.out.result(written, views.written)


@command(
    "validate",
    examples=("config validate recipe.toml", "config validate recipe.toml --json"),
    processes="several",
)
def validate(file: File, *, request: Request) -> None:
    """Check a recipe file: unknown keys, wrong values."""
    request.out.result(perpend.config_validate(file), views.validated)


app = group("config", "Show, write and check recipes.", (show, init, validate))
PANEL = LOOK
