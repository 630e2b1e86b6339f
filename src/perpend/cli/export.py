"""`perpend export`: an output in another format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

import perpend
from perpend.cli import render, views
from perpend.cli.options import MAKE, Request, command, group
from perpend.cli.text import printable

Source = Annotated[
    Path, typer.Argument(metavar="OUT_DIR", help="What perpend apply or perpend run made.", show_default=False)
]
Kind = Annotated[
    str | None,
    typer.Option("--type", help="bf16, f16, q8_0, q4_0. \\[default: bf16]", metavar="TYPE", show_default=False),
]
Base = Annotated[
    Path | None,
    typer.Option(
        help="GGUF file of the model before the edit: copied, with the edited matrices in its own types.",
        metavar="FILE",
        show_default=False,
    ),
]
LlamaCpp = Annotated[
    Path | None,
    typer.Option("--llama-cpp", help="Checkout of llama.cpp; the PATH by default.", metavar="DIR", show_default=False),
]


@command(
    "gguf",
    options=("output", "allow_leak", "dry_run"),
    examples=(
        "export gguf out -o edited.gguf --base gemma-3-4b-it-q4_0.gguf",
        "export gguf out -o edited.gguf --type q8_0 --llama-cpp ~/llama.cpp",
    ),
)
def gguf(source: Source, kind: Kind = None, base: Base = None, llama_cpp: LlamaCpp = None, *, request: Request) -> None:
    """Make a GGUF file of an edited checkpoint, and prove the edit on its weights.

    With --base no converter is needed: the edited matrices go into a copy of the base model's GGUF file, rounded so
    that the edit is kept; every other tensor and all metadata stay as they are.

    Without it llama.cpp's own converter is called, and its quantiser for q4_0; the commands are printed. That is a
    plain pass, which an edit on a lattice survives only if it was made by perpend apply --for q4_0.
    """
    result = perpend.export_gguf(
        source,
        output=request.output,
        type=kind,
        base=base,
        llama_cpp=llama_cpp,
        allow_leak=bool(request["allow_leak"]),
        dry_run=request.dry_run,
    )
    request.out.result(result, view)


def view(data: dict[str, Any]) -> Iterator[RenderableType]:
    """Show what was called, what the saved weights say, and where the file is."""
    for step in data["commands"]:
        yield Text(printable(step), style="dim")
    if data["leak"]:
        yield from render.leak(data["leak"])
    if data["types"]:
        yield Text(", ".join(f"{n} tensors {kind}" for kind, n in data["types"].items()), style="dim")
    if data["untouched"]:
        yield Text(f"{data['untouched']['tensors']} other tensors and all metadata are the base's", style="dim")
    yield from views.written(data)


app = group("export", "Make another format of an edited checkpoint.", (gguf,), also=gguf.examples[1:])
PANEL = MAKE
