"""`perpend eval`: acceptance and drift of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import perpend
from perpend.cli import views
from perpend.cli.options import MEASURE, Model, Request, command
from perpend.options.commands import EvalOptions, options_of
from perpend.options.table import MACHINE

Adapter = Annotated[
    Path | None,
    typer.Option(
        help="PEFT adapter that vLLM answers with, as perpend adapter makes one.",
        metavar="DIR",
        show_default=False,
        rich_help_panel=MACHINE,
    ),
]


@command(
    "eval",
    options=("output", "edit", "dry_run", *options_of(EvalOptions)),
    examples=(
        "eval ./model --limit 64",
        "eval google/gemma-3-4b-it --edit edit -o report --json",
        "eval google/gemma-3-4b-it --engine vllm --adapter adapter",
    ),
    panel=MEASURE,
    processes="several",
)
def evaluate(model: Model = None, adapter: Adapter = None, *, request: Request) -> None:
    """Measure acceptance, with intervals, and drift.

    With --edit the model is measured before and after; without, as it is. Uses the report split, which nothing is
    chosen on.

    With --engine vllm, vLLM answers the prompts of an exported directory, or of a model with --adapter.
    """
    output, edit, recipe = request.optional_output, request.edit, request.recipe(model)
    result = perpend.eval(
        recipe.model.id,
        edit=edit,
        output=output,
        recipe=recipe,
        machine=request.machine(),
        adapter=adapter,
        dry_run=request.dry_run,
    )
    request.out.result(result, views.evaluation)
