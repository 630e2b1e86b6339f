"""`perpend push`: upload an output to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import perpend
from perpend.cli import views
from perpend.cli.options import MAKE, Request, command

HUB = "Hub"

Folder = Annotated[
    Path,
    typer.Argument(metavar="OUT_DIR", help="What perpend run, apply or adapter made.", show_default=False),
]
Repo = Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name; made when it is not there.")]
Branch = Annotated[
    str | None,
    typer.Option(
        "--revision",
        help="Branch; made when it is not there.",
        metavar="NAME",
        rich_help_panel=HUB,
        show_default="main",
    ),
]
Public = Annotated[
    bool, typer.Option("--public", help="Let everybody see it.", metavar=" ", rich_help_panel=HUB, show_default=False)
]
WithReplies = Annotated[
    bool,
    typer.Option(
        "--with-replies",
        help="Also send reports and replies: they hold prompts and what the model said.",
        metavar=" ",
        rich_help_panel=HUB,
        show_default=False,
    ),
]


@command(
    "push",
    options=("dry_run",),
    examples=("push out/gemma owner/gemma-edited --dry-run", "push out/gemma owner/gemma-edited --revision v2"),
    panel=MAKE,
)
def push(
    folder: Folder,
    repo: Repo,
    revision: Branch = None,
    public: Public = False,
    with_replies: WithReplies = False,
    *,
    request: Request,
) -> None:
    """Upload an output to the Hugging Face Hub: private, and without prompts and replies, unless asked.

    The card is checked first, by Perpend (licence, base model) and by the hub. Everything appears in one commit; when
    an upload breaks off, the same command goes on where it was.

    The token is that of `hf auth login` or HF_TOKEN. HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they always do.
    """
    result = perpend.push(
        folder, repo, revision=revision, public=public, with_replies=with_replies, dry_run=request.dry_run
    )
    request.out.result(result, views.pushed)
