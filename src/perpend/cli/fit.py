"""`perpend fit`: measure directions and choose an edit."""

from __future__ import annotations

import perpend
from perpend.cli import views
from perpend.cli.options import MAKE, Model, Request, command
from perpend.options.commands import FitOptions, options_of


@command(
    "fit",
    options=("output", "dry_run", *options_of(FitOptions)),
    examples=("fit google/gemma-3-4b-it -o edit", "fit ./model -o edit --layer 53% --mode column --limit 64"),
    panel=MAKE,
    processes="several",
)
def fit(model: Model = None, *, request: Request) -> None:
    """Measure the direction and write it as an edit.

    The direction is the difference between target and baseline prompts in the residual stream. The weights are not
    changed: `perpend apply` does that.
    """
    output, recipe = request.output, request.recipe(model)
    result = perpend.fit(
        recipe.model.id, output=output, recipe=recipe, machine=request.machine(), dry_run=request.dry_run
    )
    request.out.result(result, views.fitted)
