"""`perpend run`: fit, apply and eval in one go."""

from __future__ import annotations

import perpend
from perpend.cli import views
from perpend.cli.options import MAKE, Model, Request, command
from perpend.cli.search import run_search
from perpend.options.commands import RunOptions, options_of


@command(
    "run",
    options=("output", "dry_run", "search", *options_of(RunOptions), "storage", "workers"),
    examples=("run google/gemma-3-4b-it -o out", "run --config recipe.toml -o out --set edit.mlp.peak_weight=0.8"),
    panel=MAKE,
)
def run(model: Model = None, *, request: Request) -> None:
    """Fit, apply and eval in one go.

    Writes the edited model, its measurements before and after, its card, and the recipe that made it. With --search
    the edit is searched for, as by perpend search.
    """
    if request["search"]:
        run_search(model, request)
        return
    request.require_no_search()
    output, recipe = request.output, request.recipe(model)
    result = perpend.run(
        recipe.model.id,
        output=output,
        recipe=recipe,
        machine=request.machine(),
        dry_run=request.dry_run,
        tell=request.out.teller(views.PARTS),
    )
    request.out.result(result, views.planned if request.dry_run else views.written)
