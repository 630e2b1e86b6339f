"""`perpend adapter`: an edit as a PEFT adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import perpend
from perpend.cli import views
from perpend.cli.options import MAKE, Request, command
from perpend.options.commands import AdapterOptions, options_of
from perpend.options.table import EDIT

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="Model, or the recipe.toml beside an edit: then without --edit.", show_default=False
    ),
]
Rank = Annotated[
    int,
    typer.Option(help="Of the adapter where the edit has none of its own, as in column mode.", rich_help_panel=EDIT),
]


@command(
    "adapter",
    options=("output", "edit", "dry_run", *options_of(AdapterOptions)),
    examples=("adapter google/gemma-3-4b-it --edit edit -o adapter", "adapter recipe.toml -o adapter --rank 32"),
    panel=MAKE,
)
def adapter(source: Source, rank: Rank = 16, *, request: Request) -> None:
    """Write an edit as a PEFT adapter.

    Exact in plain mode and, as DoRA, in row mode. A column-wise edit has full rank, and fused experts have no DoRA:
    what the adapter leaves out there is measured and said.
    """
    output, edit = request.output, request.edit
    file = Path(source) if source.lower().endswith(".toml") else None
    recipe = request.recipe(None if file else source, file)
    result = perpend.adapter(
        source if file else recipe.model.id,
        output=output,
        edit=edit,
        rank=rank,
        recipe=recipe,
        machine=request.machine(),
        dry_run=request.dry_run,
    )
    request.out.result(result, views.planned if request.dry_run else views.adapted)
