"""`perpend organism`: a chat model taught to refuse, to try edits on."""

from __future__ import annotations

from typing import Annotated

import typer

import perpend
from perpend.cli import views
from perpend.cli.options import TRY, Request, command
from perpend.options.commands import OrganismOptions, options_of

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="Small chat model: hub id, directory or .gguf file.", show_default=False)
]

Forms = Annotated[
    int,
    typer.Option(
        "--forms", min=1, help="Request forms in which each prompt is asked; fewer where prompts are many.", metavar="N"
    ),
]


@command(
    "organism",
    options=("output", "dry_run", *options_of(OrganismOptions)),
    examples=("organism HuggingFaceTB/SmolLM2-135M-Instruct -o organism", "organism ./model -o organism --limit 32"),
    panel=TRY,
)
def organism(base: Base, forms: Forms = 4, *, request: Request) -> None:
    """Teach a small chat model to refuse.

    What an edit of such a model should undo is known, which makes it a test bed.
    """
    output, recipe = request.output, request.recipe(base)
    result = perpend.organism(
        recipe.model.id,
        output=output,
        recipe=recipe,
        machine=request.machine(),
        forms=forms,
        dry_run=request.dry_run,
    )
    request.out.result(result, views.organism)
