"""`perpend chat`: talk to a model, with or without an edit."""

from __future__ import annotations

import perpend
from perpend.cli.flags import MACHINE_FLAGS
from perpend.cli.options import MEASURE, Model, Request, command


@command(
    "chat",
    options=(
        "edit",
        "config",
        "assignments",
        "system",
        "sample",
        "max_new_tokens",
        "seed",
        "allow_partial",
        "trust_remote_code",
        *MACHINE_FLAGS,
    ),
    examples=("chat ./out", "chat google/gemma-3-4b-it --edit edit --sample"),
    panel=MEASURE,
)
def chat(model: Model = None, *, request: Request) -> None:
    """Talk to a model, with or without an edit."""
    edit, recipe = request.edit, request.recipe(model)
    perpend.chat(recipe.model.id, edit=edit, recipe=recipe, machine=request.machine())
