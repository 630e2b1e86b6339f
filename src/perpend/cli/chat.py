"""`perpend chat`: talk to a model, with or without an edit."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import perpend
from perpend.cli.flags import MACHINE_FLAGS
from perpend.cli.options import MEASURE, Model, Request, command
from perpend.errors import Interrupted


@command(
    "chat",
    options=(
        "edit",
        "config",
        "assignments",
        "system",
        "chat_template",
        "sample",
        "max_new_tokens",
        "seed",
        "revision",
        "trust_remote_code",
        *MACHINE_FLAGS,
    ),
    examples=("chat ./out", "chat google/gemma-3-4b-it --edit edit --sample"),
    panel=MEASURE,
)
def chat(model: Model = None, *, request: Request) -> None:
    """Talk to a model, with or without an edit."""
    edit, recipe = request.edit, request.recipe(model)
    spoken = request.out.style != "json"
    try:
        talk = perpend.chat(
            recipe.model.id,
            edit=edit,
            recipe=recipe,
            machine=request.machine(),
            read=_read,
            write=(lambda text: request.out.text(text, end="")) if spoken else (lambda text: None),
        )
    except KeyboardInterrupt:
        raise Interrupted("the conversation was broken off") from None
    if not spoken:
        request.out.result(Said(talk.messages), lambda data: iter(()))


@dataclass(frozen=True)
class Said:
    """A conversation as data."""

    messages: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the turns."""
        return {"messages": self.messages}


def _read() -> str | None:
    """Return the next line that the user types, None at the end; asked for only on a terminal."""
    asked = sys.stdin.isatty() and sys.stdout.isatty()
    if asked:
        import readline  # noqa: F401
    try:
        return input("› " if asked else "")
    except EOFError:
        return None
