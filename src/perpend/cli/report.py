"""`perpend report`: the page of an earlier result, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import perpend
from perpend.cli import views
from perpend.cli.options import MEASURE, Request, command

Folder = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", help="What a command made: a folder, or a file.", show_default=False)
]
File = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="File to write; the page in the folder or beside the file.",
        metavar="FILE",
        show_default=False,
    ),
]


@command("report", options=("dry_run",), examples=("report out", "report edited.gguf -o page.html"), panel=MEASURE)
def report(folder: Folder, output: File = None, *, request: Request) -> None:
    """Make the page of a result again from the JSON beside it.

    That is report.html from the report.json of a folder, and FILE.report.html from the FILE.report.json of a file.
    Nothing is measured. A front.json or bench.json in the folder is shown as well.
    """
    request.out.result(perpend.write_report(folder, output=output, dry_run=request.dry_run), views.written)
