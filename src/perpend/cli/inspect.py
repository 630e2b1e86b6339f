"""`perpend inspect`: what can be edited in a model."""

from __future__ import annotations

import perpend
from perpend.cli import views
from perpend.cli.flags import MACHINE_FLAGS
from perpend.cli.options import MEASURE, Model, Request, command


@command(
    "inspect",
    options=("config", "assignments", "chat_template", "revision", "trust_remote_code", *MACHINE_FLAGS),
    examples=("inspect google/gemma-3-4b-it", "inspect ./model --json"),
    panel=MEASURE,
)
def inspect(model: Model = None, *, request: Request) -> None:
    """Show what can be edited.

    Lists the layers, the modules that write to the residual stream, and those that cannot be edited.
    """
    recipe = request.recipe(model)
    result = perpend.inspect(recipe.model.id, recipe=recipe, machine=request.machine())
    request.out.result(result, views.inspection)
