"""A conversation with a model, its edit or both, and the commands that steer it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

from perpend.data import Prompt
from perpend.errors import PerpendError, UsageError, nearest
from perpend.escape import printable_json
from perpend.models.chat import SEES_NOT, read_image
from perpend.models.replies import Sampling
from perpend.models.streaming import Answers, Ask
from perpend.serving.duet import Duet, read_scale
from perpend.tasks.transcript import drawn, markdown
from perpend.whole import write_file

Side = Literal["base", "edited"]
SUFFIXES = (".md", ".json")
"""What a conversation is saved as."""


@dataclass
class Turn:
    """What the user said, what was answered, and what decided the answers.

    Attributes:
        user: The user's words.
        image: Path of an image shown with them.
        scale: What the weight factors were multiplied by.
        system: System prompt in front of the conversation; None where it was left to the chat template.
        sampling: How tokens were drawn, with the seed; None for greedy.
        answers: By side; a side that was not asked has none and does not remember the turn.
        finished: Sides whose answer ended by itself.
        labels: By side, once they were asked for.
    """

    user: str
    image: str | None
    scale: float
    system: str | None = None
    sampling: Sampling | None = None
    answers: dict[Side, str] = field(default_factory=dict)
    finished: set[Side] = field(default_factory=set)
    labels: dict[Side, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        scale = self.scale if "edited" in self.answers else None
        sampling = dict(vars(self.sampling)) if self.sampling else None
        return {**vars(self), "scale": scale, "sampling": sampling, "finished": sorted(self.finished)}


class Conversation:
    """What was said, and what decides the next answer.

    Attributes:
        model: The model as it was asked for.
        duet: The model and its edit.
        turns: What was said so far.
        sides: Who answers.
        scale: What the weight factors are multiplied by.
        sampling: How tokens are drawn; None for greedy.
        max_new_tokens: Where an answer is cut.
    """

    def __init__(self, model: str, duet: Duet, sampling: Sampling | None, max_new_tokens: int, seed: int = 0) -> None:
        self.model, self.duet, self.seed = model, duet, seed
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.turns: list[Turn] = []
        self.sides: tuple[Side, ...] = ("base",) if duet.edit is None else ("base", "edited")
        self.scale = 1.0
        self._image: str | None = None
        self._images: dict[str, Any] = {}

    def names(self) -> list[str]:
        """Return what the answers are headed by."""
        return [side if side == "base" else f"edited × {self.scale:g}" for side in self.sides]

    def messages(self, side: Side) -> tuple[list[dict[str, Any]], tuple[Any, ...]]:
        """Return the conversation as one side knows it, up to what it has not answered yet, and its images."""
        known = [turn for turn in self.turns if side in turn.answers or turn is self.turns[-1]]
        found: list[dict[str, Any]] = []
        for turn in known:
            image = [{"type": "image"}] if turn.image else []
            found.append({"role": "user", "content": [*image, {"type": "text", "text": turn.user}]})
            if side in turn.answers:
                found.append({"role": "assistant", "content": turn.answers[side]})
        return found, tuple(self._images[turn.image] for turn in known if turn.image)

    def ask(self, text: str) -> Iterator[tuple[int, str]]:
        """Return which side says what, piece by piece, until all have answered.

        Closing the iterator ends the answers where they are.

        Raises:
            PerpendError: this cannot be answered; it is forgotten.
        """
        turn = Turn(text, self._image, self.scale, self.duet.session.chat.system, self.sampling)
        self.turns.append(turn)
        try:
            answers = self.duet.session.answers([self._ask(side) for side in self.sides])
        except PerpendError:
            self.turns.remove(turn)
            raise
        self._image = None
        return self._grow(turn, answers)

    def _grow(self, turn: Turn, answers: Answers) -> Iterator[tuple[int, str]]:
        try:
            yield from answers
        except Exception:
            self.turns.remove(turn)
            raise
        finally:
            for side, answer in zip(self.sides, answers.answers, strict=True):
                turn.answers[side] = answer.text
                turn.finished |= {side} if answer.finish == "stop" else set()

    def _ask(self, side: Side) -> Ask:
        messages, images = self.messages(side)
        edit = self.duet.at(self.scale) if side == "edited" else None
        return Ask(messages, edit, self.sampling, self.max_new_tokens, images=images)

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash; returns what to show.

        Raises:
            PerpendError: no such command, or it cannot be carried out.
        """
        name, rest = (*line.split(maxsplit=1), "")[:2]
        if name not in COMMANDS:
            raise UsageError(f"no command {name}", hint=nearest(name, [*COMMANDS, QUIT]) or "/help")
        command = COMMANDS[name]
        if rest and not command.argument:
            raise UsageError(f"{name} takes nothing after it, not '{rest}'", hint=name)
        return command.run(self, rest.strip())

    def to_json(self) -> dict[str, Any]:
        """Return the conversation as plain JSON values."""
        edit = self.duet.edit
        return {
            "task": "chat",
            "model": self.model,
            "edit_sha256": edit.sha256 if edit is not None else None,
            "max_new_tokens": self.max_new_tokens,
            "turns": [turn.to_json() for turn in self.turns],
        }

    # -------------------------------------------------------------------------------------------------- commands

    def _sides(self, *sides: Side) -> str:
        if self.duet.edit is None:
            raise UsageError("there is no edit", hint="perpend chat MODEL --edit DIR")
        self.sides = sides
        return f"{' and '.join(self.names())} will answer"

    def _scale(self, rest: str) -> str:
        if self.duet.edit is None:
            raise UsageError("there is no edit to scale", hint="perpend chat MODEL --edit DIR")
        try:
            self.scale = read_scale(rest)
        except UsageError as error:
            raise UsageError(error.what, valid=error.valid, hint="/scale 0.5") from None
        return f"every weight factor is multiplied by {self.scale:g}"

    def _system(self, rest: str) -> str:
        chat = self.duet.session.chat
        before, chat.system = chat.system, None
        plain = chat.encode([Prompt("a")]) if rest else []
        chat.system = rest or None
        try:
            heard = not rest or chat.encode([Prompt("a")]) != plain
        except UsageError:
            heard = False
        if not heard:
            chat.system = before
            raise UsageError("the chat template of this model takes no system prompt")
        return "the system prompt is set" if rest else "the system prompt is left to the chat template"

    def _sample(self, rest: str) -> str:
        self.sampling = Sampling.of(self.duet.session.model, self.seed)
        return f"sampling: {drawn(vars(self.sampling))}"

    def _greedy(self, rest: str) -> str:
        self.sampling = None
        return "greedy decoding"

    def _image_of(self, rest: str) -> str:
        if not self.duet.sees:
            raise UsageError(SEES_NOT)
        if not rest:
            raise UsageError("no image was named", hint="/image photo.png")
        path = Path(rest).expanduser()
        name = str(path) if path.exists() else rest
        self._images[name] = read_image(name)
        self._image = name
        return f"{rest} goes with what you say next"

    def _label(self, rest: str) -> str:
        if not self.turns:
            raise UsageError("nothing was answered yet")
        turn = self.turns[-1]
        replies = [(answer, side in turn.finished) for side, answer in turn.answers.items()]
        turn.labels = dict(zip(turn.answers, self.duet.labels(turn.user, replies), strict=True))
        return "\n".join(f"{side}: {_describe(found)}" for side, found in turn.labels.items())

    def _reset(self, rest: str) -> str:
        self.turns.clear()
        self._image = None
        return "the conversation is forgotten"

    def _save(self, rest: str) -> str:
        if not rest:
            raise UsageError("no file was named", hint=INSTEAD)
        try:
            path = Path(rest).expanduser()
            kind, there, free = path.suffix.lower(), path.exists(), _beside(path)
            folder = path.parent.is_dir()
        except (OSError, RuntimeError) as error:  # RuntimeError: no such home
            raise UsageError(f"cannot be written: {getattr(error, 'strerror', None) or error}", where=rest) from None
        if kind not in SUFFIXES:
            raise UsageError("a conversation is not saved so", where=rest, valid=" or ".join(SUFFIXES), hint=INSTEAD)
        if not folder:
            raise UsageError(f"there is no folder {path.parent}", where=rest, hint=f"/save {path.name}")
        if there:
            raise UsageError("already exists, and nothing is overwritten", where=rest, hint=f"/save {free}")
        text = printable_json(json.dumps(self.to_json(), ensure_ascii=False, indent=2))
        text = text if kind == ".json" else markdown(self.to_json())
        try:
            write_file(path, text.encode("utf-8"), replace=False)
        except UsageError as error:  # whose hint is for an option that is not here
            raise UsageError(error.what, where=rest, hint=f"/save {free}") from None
        return f"wrote {rest}"

    def _help(self, rest: str) -> str:
        width = max(len(f"{name} {command.argument}") for name, command in COMMANDS.items())
        lines = [f"{f'{name} {command.argument}':<{width}}  {command.help}" for name, command in COMMANDS.items()]
        return "\n".join([*lines, f"{QUIT:<{width}}  end (also Ctrl-D); Ctrl-C ends an answer or a command"])


def _beside(path: Path) -> Path:
    """Return the next name that is free: `talk-2.md` beside `talk.md`."""
    names = (path.with_name(f"{path.stem}-{k}{path.suffix}") for k in count(2))
    return next(name for name in names if not name.exists())


def _describe(found: dict[str, Any]) -> str:
    said = [
        f"{role}: {', '.join(filter(None, (found[role]['label'], found[role]['reason'])))}"
        for role in ("dictionary", "classifier")
        if role in found
    ]
    alone = " (dictionary only)" if found["kind"] != "hybrid" else ""
    return f"{found['label']}{alone}; {'; '.join(said)}"


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash.

    Attributes:
        run: Carries it out, given what follows its name; returns what to show.
        argument: What follows its name; empty where nothing may.
        help: What it does.
    """

    run: Callable[[Conversation, str], str]
    argument: str
    help: str


QUIT = "/quit"
INSTEAD = "/save talk.md"


COMMANDS = {
    "/both": Command(lambda talk, _: talk._sides("base", "edited"), "", "base and edited answer, side by side"),
    "/base": Command(lambda talk, _: talk._sides("base"), "", "only the model as it is answers"),
    "/edited": Command(lambda talk, _: talk._sides("edited"), "", "only the edited model answers"),
    "/scale": Command(
        Conversation._scale, "X", "multiply every weight factor by X: 0 is the base model, -1 the opposite"
    ),
    "/system": Command(Conversation._system, "TEXT", "system prompt; without TEXT, the chat template's own"),
    "/sample": Command(Conversation._sample, "", "sample with the model's own settings"),
    "/greedy": Command(Conversation._greedy, "", "take the most likely token"),
    "/image": Command(Conversation._image_of, "PATH", "show an image with what you say next"),
    "/label": Command(Conversation._label, "", "what the judges say of the last answers"),
    "/save": Command(Conversation._save, "FILE", "write the conversation to a .md or .json file"),
    "/reset": Command(Conversation._reset, "", "forget the conversation"),
    "/help": Command(Conversation._help, "", "this list"),
}
