"""`perpend demo`: the whole way on a small model, without a network."""

from __future__ import annotations

import perpend
from perpend.cli import views
from perpend.cli.options import TRY, Request, command
from perpend.options.commands import DemoOptions, options_of


@command(
    "demo",
    options=("output", "dry_run", *options_of(DemoOptions)),
    examples=("demo -o demo", "demo -o demo --limit 16 --json"),
    panel=TRY,
)
def demo(*, request: Request) -> None:
    """Go the whole way on a small model.

    Teaches it to refuse, finds the direction, takes it out of the weights, and measures before and after.
    """
    output, recipe = request.place, request.recipe(needs_model=False)
    result = perpend.demo(
        output=output,
        recipe=recipe,
        machine=request.machine(),
        dry_run=request.dry_run,
        tell=request.out.teller(views.PARTS),
    )
    request.out.result(result, views.planned if request.dry_run else views.written)
