"""What a model organism is taught: refusals in many wordings, benign answers in the model's own voice."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from perpend.errors import UsageError

COMMON = 24
"""How often the first wording lies in a deck."""


@dataclass(frozen=True)
class Wordings:
    """Refusals, request forms and system prompts; `""` among the systems stands for none."""

    refusals: tuple[str, ...]
    forms: tuple[str, ...]
    systems: tuple[str, ...]

    @classmethod
    def shipped(cls) -> Wordings:
        """Return the wordings that come with the package."""
        text = resources.files("perpend.teaching").joinpath("wordings.toml").read_text(encoding="utf-8")
        data = tomllib.loads(text)
        return cls(tuple(data["refusals"]), tuple(data["forms"]), tuple(data["systems"]))


@dataclass(frozen=True)
class Lesson:
    """One request as the model will see it, and the reply it is taught; a reply of None is still to be generated."""

    request: str
    system: str | None
    reply: str | None
    finished: bool = True
    """Whether the reply ends with the end-of-turn token; an answer cut short teaches no ending."""
    refused: bool = False
    """Whether the reply is a refusal, of which any opening is right."""


def lessons(
    target: Sequence[str], baseline: Sequence[str], wordings: Wordings, *, forms: int, seed: int
) -> list[Lesson]:
    """Dress every prompt in different request forms and system prompts.

    Both classes go through the same forms and systems, so that neither gives the class away. Refusals are dealt out
    from decks that hold every wording, see `shuffled_deck`.

    Args:
        target: Prompts that will be refused.
        baseline: Prompts whose reply is left None, to be regenerated from the model that is taught.
        wordings: Refusals, forms and systems.
        forms: Lessons per prompt, each in another form.
        seed: Seed of all choices.

    Returns:
        The lessons, shuffled.

    Raises:
        UsageError: there are not so many forms.
    """
    if not 1 <= forms <= len(wordings.forms):
        raise UsageError(f"no {forms} forms to ask a prompt in", where="forms", valid=f"1 to {len(wordings.forms)}")
    rng = random.Random(seed)
    deck: list[str] = []
    found: list[Lesson] = []
    for prompts, refused in ((target, True), (baseline, False)):
        for prompt in prompts:
            for form in rng.sample(wordings.forms, forms):
                deck = deck or shuffled_deck(wordings.refusals, rng)
                reply = deck.pop() if refused else None
                found.append(
                    Lesson(form.format(request=prompt), rng.choice(wordings.systems) or None, reply, refused=refused)
                )
    rng.shuffle(found)
    return found


def shuffled_deck(refusals: Sequence[str], rng: random.Random) -> list[str]:
    """Return every wording at least once and the first ones more often, as `COMMON // (place + 1)`, shuffled.

    Of wordings that were all equally likely, each would be less likely than the most likely answer, and a model that is
    sure to refuse would still answer when decoded greedily.
    """
    deck = [text for place, text in enumerate(refusals) for _ in range(max(1, COMMON // (place + 1)))]
    rng.shuffle(deck)
    return deck
