"""`perpend chat`: talk to a model, to an edited one, or to both side by side."""

from __future__ import annotations

import perpend
from perpend.cli import views
from perpend.cli.options import MEASURE, Model, Request, command
from perpend.errors import Interrupted
from perpend.options.commands import TalkOptions, options_of


@command(
    "chat",
    options=("edit", "dry_run", *options_of(TalkOptions)),
    examples=("chat ./out", "chat google/gemma-3-4b-it --edit out --sample"),
    panel=MEASURE,
)
def chat(model: Model = None, *, request: Request) -> None:
    """Talk to a model; with an edit, to both side by side.

    Base and edited answers come from the same loaded weights. Lines that begin with a slash are commands: /help lists
    them, /scale 0.5 halves the edit at once.
    """
    edit, recipe = request.edit, request.recipe(model)
    from perpend.cli.screen import screen_of

    try:
        result = perpend.chat(
            recipe.model.id,
            edit=edit,
            recipe=recipe,
            machine=request.machine(),
            screen=screen_of(request.out),
            dry_run=request.dry_run,
        )
    except KeyboardInterrupt:
        raise Interrupted("the conversation was broken off") from None
    if request.dry_run:
        request.out.result(result, views.rehearsal)
    elif request.out.style == "json":
        request.out.result(result, lambda data: iter(()))
