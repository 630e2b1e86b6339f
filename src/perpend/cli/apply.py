"""`perpend apply`: write the edited model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import perpend
from perpend.cli import views
from perpend.cli.options import MAKE, Request, command
from perpend.errors import UsageError
from perpend.options.commands import ApplyOptions, options_of
from perpend.options.table import EDIT

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Model, the recipe.toml of an earlier run, or with --undo its output.",
        show_default=False,
    ),
]

Undo = Annotated[
    bool,
    typer.Option(
        "--undo", help="SOURCE is an output: write its original.", rich_help_panel=EDIT, metavar=" ", show_default=False
    ),
]


@command(
    "apply",
    options=("output", "edit", "dry_run", *options_of(ApplyOptions)),
    examples=(
        "apply google/gemma-3-4b-it --edit edit -o out",
        "apply recipe.toml -o out --dry-run",
        "apply out --undo -o original",
    ),
    panel=MAKE,
)
def apply(source: Source, undo: Undo = False, *, request: Request) -> None:
    """Write the edited model and prove it on the saved file.

    The checkpoint's own files are copied and only the edited tensors change. What was saved is read back: a module
    that misses its weight factor by more than 0.05 is an error, unless --allow-leak.

    --for q4_0 is for weights that were trained for q4_0: perpend quant check says whether they were. Ordinary weights
    keep their edit in a plain pass, and rounding them moves the model by itself, which the gate may not let through.

    With --undo the original of an output is written: bit for bit where the output was made with --reversible, else by
    inverting the edit, which a weight factor of 1 and row mode do not allow.
    """
    output, edit = request.output, request.edit
    file = Path(source) if source.lower().endswith(".toml") else None
    if file is not None and request["config"] is not None:
        raise UsageError("two recipes", where="--config", hint=f"leave out --config or {source}")
    recipe = request.recipe(None if file else source, file)
    result = perpend.apply(
        source if file or undo else recipe.model.id,
        edit=edit,
        output=output,
        recipe=recipe,
        machine=request.machine(),
        dry_run=request.dry_run,
        undo=undo,
    )
    request.out.result(result, views.undone if undo else views.applied)
