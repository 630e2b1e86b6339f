"""`perpend search`: the edit with the most acceptance for the least drift, measured and proven."""

from __future__ import annotations

from typing import Any

import perpend
from perpend.cli import search_views, views
from perpend.cli.options import MAKE, Model, Request, command
from perpend.options.commands import SearchOptions, options_of
from perpend.tasks.output import to_text


@command(
    "search",
    options=("output", "dry_run", *options_of(SearchOptions), "storage", "workers"),
    examples=(
        "search google/gemma-3-4b-it -o out --max-drift 0.1",
        "search google/gemma-3-4b-it --storage postgresql://me@host/perpend --workers 2",
    ),
    panel=MAKE,
)
def search(model: Model = None, *, request: Request) -> None:
    """Find the edit with the most acceptance for the least drift.

    Trials are forward passes; the few best reply and are judged on the select split, the rule takes one, and that one
    is measured on the report split, written and proven as by perpend run. The same command goes on after an
    interruption. With --json, a line of JSON per event.
    """
    run_search(model, request)


def run_search(model: str | None, request: Request) -> None:
    """Search as a request says, and show what was found."""
    recipe, out = request.recipe(model), request.out
    result = perpend.search(
        recipe.model.id,
        output=request["output"],
        recipe=recipe,
        machine=request.machine(),
        storage=request["storage"],
        workers=request["workers"] if request["workers"] is not None else 1,
        dry_run=request.dry_run,
        tell=_events(request) if out.style == "json" else out.teller({**views.PARTS, **search_views.PARTS}),
    )
    if out.style == "json":
        _events(request)("result", result.to_json())
    elif request["output"] is None:
        out.result(result, search_views.joined)
    else:
        out.result(result, views.planned if request.dry_run else search_views.written)


def _events(request: Request) -> Any:
    """Return what prints each part of the result as a line of JSON as soon as it is known."""

    def tell(name: str, data: dict[str, Any]) -> None:
        request.out.text(to_text({"event": name, **data}, indent=None))

    return tell
