"""`perpend quant`: what a quantisation would do to a model and its edit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

import perpend
from perpend.cli import render, views
from perpend.cli.options import MEASURE, Model, Request, command, group
from perpend.cli.text import printable
from perpend.options.commands import QuantOptions, options_of

Types = Annotated[
    str,
    typer.Option(
        help="Types of the plain passes: q4_0, q4_1, q5_0, q5_1, q8_0, bf16. \\[default: q4_0,q8_0,bf16]",
        metavar="LIST",
        show_default=False,
    ),
]
Acceptance = Annotated[
    bool,
    typer.Option(
        "--acceptance",
        help="Also let the model reply, untouched and edited, as it is and quantised.",
        metavar=" ",
        show_default=False,
    ),
]


@command(
    "check",
    options=("edit", "dry_run", *options_of(QuantOptions)),
    examples=(
        "quant check google/gemma-3-4b-it",
        "quant check google/gemma-3-4b-it --edit fit --types q4_0 --acceptance",
    ),
)
def check(
    model: Model = None, types: Types = "q4_0,q8_0,bf16", acceptance: Acceptance = False, *, request: Request
) -> None:
    """Simulate plain passes of llama.cpp over the writers, untouched and edited.

    Weights that were trained for q4_0 lie on its lattice, and a plain pass rounds small edits of them back: this says
    so before anything is written, and how much of each weight factor would be left.

    With --acceptance the model replies to the target prompts, untouched and edited, as it is and with all layers
    quantised in memory: an edit that is lost and a quantisation that changes refusals by itself are told apart.
    """
    recipe = request.recipe(model)
    result = perpend.quant_check(
        recipe.model.id,
        edit=request.edit,
        types=types,
        acceptance=acceptance,
        recipe=recipe,
        machine=request.machine(),
        dry_run=request.dry_run,
    )
    request.out.result(result, views.planned if request.dry_run else view)


def view(data: dict[str, Any]) -> Iterator[RenderableType]:
    """Show one row per type, what it comes to, and the labels where there are any."""
    edited = any(found["kept"] is not None for found in data["passes"])
    columns = ("writers", "on the lattice", "moved, median", "moved, most")
    made = render.table("Plain passes over the writers", "type", *columns, right=columns)
    for name in ("λ left", "modules that miss it") if edited else ():
        made.add_column(name, justify="right")
    for found in data["passes"]:
        cells = [found["type"], str(found["held"]), str(found["lattice"])]
        cells += [f"{found['moved']:.2%}", f"{found['most']:.2%}"]
        cells += [f"{found['kept']:.1%}", str(found["missed"])] if found["kept"] is not None else []
        made.add_row(*cells, style="yellow" if found["missed"] else "")
    yield made
    for found in data["passes"]:
        yield Text(printable(found["text"]))
    if data["replies"]:
        yield from _replies(data["replies"])


def _replies(data: dict[str, Any]) -> Iterator[RenderableType]:
    made = render.table("Target prompts", "model", "accepted", "95 %", "refused", "broken", right=("accepted",))
    for name, judged in data["judged"].items():
        labels = judged["labels"]
        made.add_row(
            name, *render.rate(labels["comply"]), render.rate(labels["refuse"])[0], render.rate(labels["broken"])[0]
        )
    yield made
    for name, compared in data["compared"].items():
        yield Text.assemble((f"{name}: ", "dim"), render.comparison(compared))


app = group("quant", "What a quantisation would do to a model and its edit.", (check,), also=check.examples[1:])
PANEL = MEASURE
