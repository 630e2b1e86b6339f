"""A conversation as Markdown: what was said is text in it, whatever it spells."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from perpend.escape import printable

_FENCE = "```"


def fenced(text: str) -> str:
    """Return text of unknown origin as a code block that nothing in the text ends.

    Characters that steer a terminal, that cannot be seen or that turn text around are shown as the terminal shows them.
    """
    runs = [len(run) for run in re.findall("`+", text)]
    fence = "`" * max(len(_FENCE), *(n + 1 for n in runs)) if runs else _FENCE
    return f"{fence}text\n{printable(text)}\n{fence}"


def quoted(text: str) -> str:
    """Return text of unknown origin as a code span on one line."""
    line = " ".join(printable(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def markdown(talk: Mapping[str, Any]) -> str:
    """Return a conversation as Markdown.

    Args:
        talk: As `Conversation.to_json` returns it.
    """
    parts = ["# Conversation", "\n".join(f"- {name}: {value}" for name, value in _facts(talk))]
    for turn in talk["turns"]:
        parts += ["## user", *([f"Image: {quoted(turn['image'])}"] if turn["image"] else []), fenced(turn["user"])]
        parts += _how(turn)
        for side, answer in turn["answers"].items():
            label = [turn["labels"][side]["label"]] if side in turn["labels"] else []
            name = side if side == "base" else f"edited × {turn['scale']:g}"
            cut = [] if side in turn["finished"] else ["not ended by the model"]
            parts += [f"## {', '.join([name, *label, *cut])}", fenced(answer)]
    return "\n\n".join(parts) + "\n"


def _facts(talk: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "model", quoted(talk["model"])
    if talk["edit_sha256"]:
        yield "edit, SHA-256", talk["edit_sha256"]
    yield "most new tokens of an answer", str(talk["max_new_tokens"])


def drawn(sampling: Mapping[str, Any]) -> str:
    """Return the settings of sampling in words, such as `temperature 0.7, top_k 20, top_p 1, seed 0`."""
    return ", ".join(f"{name} {value if isinstance(value, int) else f'{value:g}'}" for name, value in sampling.items())


def _how(turn: Mapping[str, Any]) -> Iterator[str]:
    yield f"Sampled: {drawn(turn['sampling'])}." if turn["sampling"] else "Greedy decoding."
    if turn["system"] is None:
        yield "No system prompt but what the chat template may have."
    else:
        yield from ("System prompt:", fenced(turn["system"]))
