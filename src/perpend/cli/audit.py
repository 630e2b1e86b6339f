"""`perpend audit`: how much of a direction a model still writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

import perpend
from perpend.cli import render, views
from perpend.cli.options import MEASURE, Model, Request, command
from perpend.cli.text import printable
from perpend.options.commands import AuditOptions, options_of

Wanted = Annotated[
    Path | None,
    typer.Option(
        help="directions.safetensors, edit.safetensors or the folder of perpend fit; without it one is looked for.",
        metavar="FILE",
        show_default=False,
    ),
]
Base = Annotated[
    str | None, typer.Option(help="The unedited model: says how much is left.", metavar="MODEL", show_default=False)
]
Layer = Annotated[
    int | None,
    typer.Option(help="Layer of directions.safetensors to ask for; each its own by default.", show_default=False),
]


SHOWN = 8
"""Windows that are printed; JSON has all."""


@command(
    "audit",
    options=("dry_run", *options_of(AuditOptions)),
    examples=("audit ./other --directions fit", "audit ./other --directions fit --base google/gemma-3-4b-it"),
    panel=MEASURE,
)
def audit(
    model: Model = None, directions: Wanted = None, base: Base = None, layer: Layer = None, *, request: Request
) -> None:
    """Tell how much of a direction the writers still write.

    From the weights alone; an unedited model is not needed. Without --directions, looks for up to four that
    neighbouring writers avoid together, which they do not by nature, and tells how much every writer writes of them.
    """
    recipe = request.recipe(model)
    result = perpend.audit(
        recipe.model.id,
        directions=directions,
        base=base,
        layer=layer,
        recipe=recipe,
        machine=request.machine(),
        dry_run=request.dry_run,
    )
    request.out.result(result, views.planned if request.dry_run else view)


def view(data: dict[str, Any]) -> Iterator[RenderableType]:
    """Show the verdict and what every layer writes."""
    yield Text(printable(data["verdict"]), style="bold")
    if data["writers"]:
        yield Text(
            "1 is a direction like any other; missing is less than half of the least of 64 random directions",
            style="dim",
        )
        with_base = data["writers"][0]["left"] is not None
        columns = ("written", "least random")
        made = render.table("Written along the direction", "layer", "component", *columns, right=("layer", *columns))
        if with_base:
            made.add_column("left of the base's", justify="right")
        made.add_column("")
        for row in data["writers"]:
            cells = [str(row["layer"]), row["component"], f"{row['written']:.3f}", f"{row['least']:.3f}"]
            cells += [f"{row['left']:.3f}"] if with_base else []
            made.add_row(*cells, "missing" if row["missing"] else "", style="yellow" if row["missing"] else "")
        yield made
    if data["search"]:
        wanted = [w for w in data["search"] if w["found"]] or data["search"]
        wanted = sorted(wanted, key=lambda window: window["ratio"] / window["bound"])[:SHOWN]
        yield Text("written: what is written along the directions that these writers write least", style="dim")
        numbers = ("directions", "written", "to the next", "found below")
        made = render.table("Directions written least", "layers", "writers", *numbers, right=numbers)
        for window in wanted:
            first, last = window["layers"]
            cells = [f"{first} – {last}" if last > first else str(first), window["component"] or "all"]
            cells += [str(window["rank"]), f"{window['written']:.3f}", f"{window['ratio']:.3f}", f"{window['bound']}"]
            made.add_row(*cells, style="yellow" if window["found"] else "")
        yield made
