"""Talk to a model, its edit or both, side by side from the same weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Unpack, cast

from perpend.config import Machine, Recipe
from perpend.errors import PerpendError
from perpend.options.asked import asked, path_of
from perpend.options.commands import TalkOptions
from perpend.tasks.rehearsal import Rehearsal, rehearse
from perpend.tasks.setup import open_duet, sampling
from perpend.tasks.talk import QUIT, Conversation

Read = Callable[[], str | None]
"""Gives the next line of the user, or None at the end."""
Write = Callable[[str], None]
"""Takes text to show, without a line end of its own."""


class Screen(Protocol):
    """Where a conversation takes place."""

    def read(self) -> str | None:
        """Return the next line of the user, None at the end."""

    def say(self, text: str) -> None:
        """Show what is said by nobody: lines without an end."""

    def answers(self, names: Sequence[str], parts: Iterator[tuple[int, str]]) -> None:
        """Show answers while they grow.

        Args:
            names: What each is headed by.
            parts: Which answer goes on, and how.
        """


def _read() -> str | None:
    try:
        return input("› ")
    except EOFError:
        return None


def _write(text: str) -> None:
    sys.stdout.write("".join(c if c.isprintable() or c in "\n\t" else "�" for c in text))
    sys.stdout.flush()


@dataclass
class Plain:
    """Lines of text: one answer as it grows, several one below the other when all are there."""

    next_line: Read = _read
    write: Write = _write

    def read(self) -> str | None:
        """Return the next line of the user, None at the end."""
        return self.next_line()

    def say(self, text: str) -> None:
        """Show lines."""
        self.write(f"{text}\n")

    def answers(self, names: Sequence[str], parts: Iterator[tuple[int, str]]) -> None:
        """Show answers."""
        if len(names) == 1:
            for _, piece in parts:
                self.write(piece)
            self.write("\n")
            return
        texts = [""] * len(names)
        for k, piece in parts:
            texts[k] += piece
        for name, text in zip(names, texts, strict=True):
            self.write(f"{name}: {text}\n")


def chat(
    model: str | None = None,
    *,
    edit: str | Path | None = None,
    recipe: Recipe | None = None,
    machine: Machine | None = None,
    screen: Screen | None = None,
    dry_run: bool = False,
    **options: Unpack[TalkOptions],
) -> Conversation | Rehearsal:
    """Talk to a model until the input ends.

    Args:
        model: Hub id with `@revision`, directory or GGUF file; None takes the recipe's.
        edit: `edit.safetensors`, the folder that `fit` or `run` made, or a recipe beside an edit; base and edited model
            then answer side by side, from the same weights, and `/scale` is immediate.
        recipe: System prompt, sampling, length of answers, classifier for `/label`.
        machine: Device and dtype.
        screen: Where it takes place; lines of the terminal by default.
        dry_run: Only say what would be loaded.
        **options: What `perpend chat` takes, by name: over the recipe and the machine.

    Returns:
        What was said.

    Raises:
        UsageError: the model or the edit cannot be read, or the edit is not one of this model.
    """
    recipe, machine = asked(chat, TalkOptions, options, model, recipe, machine)
    model, edit, screen = recipe.model.id, path_of(edit), screen or Plain()
    if dry_run:
        return rehearse("chat", model, recipe, machine, edit)
    duet = open_duet(model, recipe, machine, edit)
    talk = Conversation(model, duet, sampling(duet.session, recipe), recipe.eval.max_new_tokens, recipe.seed)
    screen.say(f"{model}{' with an edit' if duet.edit else ''}; /help lists the commands")
    while (line := screen.read()) is not None and line.split()[:1] != [QUIT]:
        try:
            if line.lstrip().startswith("/"):
                _carry_out(talk, line, screen)
            elif line.strip():
                _answer(talk, line, screen)
        except PerpendError as error:
            screen.say(str(error))
    return talk


def _carry_out(talk: Conversation, line: str, screen: Screen) -> None:
    try:
        screen.say(talk.command(line.strip()))
    except KeyboardInterrupt:
        screen.say("\nthe command was broken off")


def _answer(talk: Conversation, line: str, screen: Screen) -> None:
    parts = cast(Generator[tuple[int, str]], talk.ask(line))
    try:
        with closing(parts):
            screen.answers(talk.names(), parts)
    except KeyboardInterrupt:
        screen.say("\nthe answer was broken off")
