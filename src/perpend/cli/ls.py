"""`perpend ls`: what there is to choose from."""

from __future__ import annotations

from typing import Annotated

import typer

import perpend
from perpend.cli import views
from perpend.cli.options import LOOK, Request, command


def _kinds(incomplete: str) -> list[str]:
    from perpend.tasks.ls import LISTS

    return [kind for kind in LISTS if kind.startswith(incomplete)]


@command("ls", examples=("ls", "ls schedules --json"), panel=LOOK, processes="several")
def ls(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND",
            help="methods, modes, rules, schedules, judges or prompts.",
            show_default=False,
            autocompletion=_kinds,
        ),
    ] = None,
    *,
    request: Request,
) -> None:
    """List methods, modes, rules, schedules, judges and prompts."""
    request.out.result(perpend.ls(kind), views.listing)
