"""Talk to a model, with an edit in place that can be scaled or switched off between turns."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perpend.config import Machine, Recipe
from perpend.core.edits import Edit
from perpend.models.session import Session
from perpend.tasks.recipes import find_edit
from perpend.tasks.setup import open_session, require_fitting, sampling

HELP = """\
/scale X   multiply every weight factor by X: 0 is the base model, 1 the edit as it is, -1 its opposite
/reset     forget the conversation
/help      this
/quit      end (also Ctrl-D)"""

Read = Callable[[], str | None]
"""Gives the next line of the user, or None at the end."""
Write = Callable[[str], None]
"""Takes text to show, without a line end of its own."""


def _read() -> str | None:
    try:
        return input("› ")
    except EOFError:
        return None


def _write(text: str) -> None:
    sys.stdout.write("".join(c if c.isprintable() or c in "\n\t" else "�" for c in text))
    sys.stdout.flush()


@dataclass
class Conversation:
    """What was said, and the edit under which the next answer is made."""

    edit: Edit | None
    scale: float = 1.0
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def in_place(self) -> Edit | None:
        """The edit at its present scale; None when there is none or it changes nothing."""
        return self.edit.scaled(self.scale) if self.edit is not None and self.scale else None

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash; returns what to show."""
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.messages.clear()
            return "the conversation is forgotten"
        if name == "/scale" and self.edit is None:
            return "there is no edit to scale: begin with --edit"
        if name == "/scale":
            try:
                scale = float(rest)
            except ValueError:
                scale = math.nan
            if not math.isfinite(scale):
                return f"'{rest}' is no number; try: /scale 0.5"
            self.scale = scale
            return f"the edit is in place {self.scale:g} times"
        return HELP if name == "/help" else f"no command {name}; valid: /scale, /reset, /help, /quit"


def chat(
    model: str,
    *,
    edit: Path | None = None,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    read: Read = _read,
    write: Write = _write,
) -> Conversation:
    """Talk to a model until the input ends.

    Args:
        model: Hub id with `@revision`, directory or GGUF file.
        edit: `edit.safetensors`, or the folder that `fit` or `run` made; applied as hooks, so `/scale` is immediate.
        recipe: System prompt, sampling, length of answers.
        machine: Device and dtype.
        read: Gives the user's lines; the terminal by default.
        write: Shows text; the terminal by default.

    Returns:
        What was said.

    Raises:
        UsageError: the model or the edit cannot be read, or the edit is not one of this model.
    """
    recipe, machine = (recipe or Recipe()).for_model(model), machine or Machine()
    talk = Conversation(find_edit(Path(edit)) if edit is not None else None)
    session = open_session(model, recipe, machine)
    if talk.edit is not None:
        require_fitting(session, talk.edit)
    write(f"{model}{' with an edit' if talk.edit else ''}; /help lists the commands\n")
    while (line := read()) is not None and line.strip() != "/quit":
        if line.startswith("/"):
            write(talk.command(line.strip()) + "\n")
        elif line.strip():
            _answer(session, talk, line, recipe, write)
    return talk


def _answer(session: Session, talk: Conversation, line: str, recipe: Recipe, write: Write) -> None:
    talk.messages.append({"role": "user", "content": line})
    pieces: list[str] = []
    with session.edited(talk.in_place):
        for piece in session.stream(talk.messages, sampling(session, recipe), recipe.eval.max_new_tokens):
            pieces.append(piece)
            write(piece)
    write("\n")
    talk.messages.append({"role": "assistant", "content": "".join(pieces)})
