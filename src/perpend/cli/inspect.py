"""`perpend inspect`: what can be edited in a model."""

from __future__ import annotations

import perpend
from perpend.cli import views
from perpend.cli.options import MEASURE, Model, Request, command
from perpend.options.commands import InspectOptions, options_of


@command(
    "inspect",
    options=("output", "dry_run", *options_of(InspectOptions)),
    examples=("inspect google/gemma-3-4b-it", "inspect ./model -o anatomy.json"),
    panel=MEASURE,
)
def inspect(model: Model = None, *, request: Request) -> None:
    """Show what can be edited.

    Lists the layers, the modules that write to the residual stream, and those that cannot be edited. --output is a file
    for what --json prints.
    """
    output, recipe = request["output"], request.recipe(model)
    result = perpend.inspect(
        recipe.model.id, output=output, recipe=recipe, machine=request.machine(), dry_run=request.dry_run
    )
    request.out.result(result, views.planned if request.dry_run else views.inspection)
