"""`perpend report`: the page of an earlier result, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import perpend
from perpend.cli import views
from perpend.cli.options import MEASURE, Request, command

Folder = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", help="What run, fit, apply, eval or bench made.", show_default=False)
]
File = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="File to write; report.html in the folder.", metavar="FILE", show_default=False
    ),
]


@command("report", options=("dry_run",), examples=("report out", "report out -o page.html"), panel=MEASURE)
def report(folder: Folder, output: File = None, *, request: Request) -> None:
    """Make report.html again from the report.json beside it.

    Nothing is measured. A front.json or bench.json in the folder is shown as well.
    """
    request.out.result(perpend.write_report(folder, output=output, dry_run=request.dry_run), views.written)
