"""`perpend eval`: acceptance and drift of a model."""

from __future__ import annotations

import perpend
from perpend.cli import views
from perpend.cli.flags import MACHINE_FLAGS, PROMPT_FLAGS, RECIPE_FLAGS, REPLY_FLAGS
from perpend.cli.options import MEASURE, Model, Request, command


@command(
    "eval",
    options=(
        "output",
        "edit",
        "dry_run",
        *RECIPE_FLAGS,
        *PROMPT_FLAGS,
        *REPLY_FLAGS,
        "revision",
        "trust_remote_code",
        *MACHINE_FLAGS,
    ),
    examples=("eval ./model --limit 64", "eval google/gemma-3-4b-it --edit edit -o report --json"),
    panel=MEASURE,
)
def evaluate(model: Model = None, *, request: Request) -> None:
    """Measure acceptance, with intervals, and drift.

    With --edit the model is measured before and after; without, as it is. Uses the report split, which nothing is
    chosen on.
    """
    output, edit, recipe = request.optional_output, request.edit, request.recipe(model)
    result = perpend.eval(
        recipe.model.id, edit=edit, output=output, recipe=recipe, machine=request.machine(), dry_run=request.dry_run
    )
    request.out.result(result, views.evaluation)
