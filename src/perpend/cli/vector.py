"""`perpend vector`: a control vector for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import perpend
from perpend.cli import views
from perpend.cli.options import MAKE, Request, command
from perpend.errors import UsageError

Fit = Annotated[Path, typer.Argument(metavar="FIT_DIR", help="What perpend fit made.", show_default=False)]
File = Annotated[
    Path | None, typer.Option("--output", "-o", help="GGUF file to make.", metavar="FILE", show_default=False)
]
Layers = Annotated[
    str | None,
    typer.Option(help="18, or 12-20, counted from 0; the layer that the fit chose.", metavar="N", show_default=False),
]


@command(
    "vector",
    options=("dry_run",),
    examples=("vector fit -o refusal.gguf", "vector fit -o refusal.gguf --layers 12-20"),
    panel=MAKE,
)
def vector(source: Fit, output: File = None, layers: Layers = None, *, request: Request) -> None:
    """Make a control vector, for llama.cpp and unedited weights.

    It moves the residual stream from where target prompts lie to where baseline prompts do: by -1.0 it makes the
    model refuse instead. No model is loaded.
    """
    if output is None:
        raise UsageError("no place for the result was given", where="--output", hint="-o refusal.gguf")
    request.out.result(perpend.vector(source, output=output, layers=layers, dry_run=request.dry_run), views.vector)
