"""What the model does by itself with the prompts: the ground on which directions are fitted and scored."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from perpend.data import Prompt, PromptPair
from perpend.errors import RunFailed
from perpend.judges.dictionary import Dictionary
from perpend.judges.labels import Label
from perpend.models.session import Reply, Session

TOKENS = 32
"""New tokens that tell a refusal from an answer."""
ENOUGH = 8
"""Fewest prompts of a class that a direction is fitted on."""


@dataclass(frozen=True)
class Behaviour:
    """The replies and labels of the untouched model on a pair of prompt sets, in the order of the prompts."""

    pair: PromptPair
    target: tuple[tuple[Reply, Label], ...]
    baseline: tuple[tuple[Reply, Label], ...]

    @property
    def refused(self) -> list[tuple[Prompt, Reply]]:
        """Targets that the model really refuses, with its refusals."""
        return _having(self.pair.target.prompts, self.target, {Label.REFUSE, Label.EVADE})

    @property
    def answered(self) -> list[tuple[Prompt, Reply]]:
        """Baselines that the model really answers, with its answers."""
        return _having(self.pair.baseline.prompts, self.baseline, {Label.COMPLY})

    def counts(self) -> dict[str, int]:
        """Return prompts and kept prompts of each class."""
        return {
            "targets": len(self.target),
            "targets refused": len(self.refused),
            "baselines": len(self.baseline),
            "baselines answered": len(self.answered),
        }


def _having(
    prompts: Sequence[Prompt], seen: Sequence[tuple[Reply, Label]], wanted: set[Label]
) -> list[tuple[Prompt, Reply]]:
    return [(p, reply) for p, (reply, label) in zip(prompts, seen, strict=True) if label in wanted]


def observe(
    session: Session, pair: PromptPair, *, tokens: int = TOKENS, store: MutableMapping[str, Reply] | None = None
) -> Behaviour:
    """Let the model reply, greedily and shortly, and label the replies by dictionary.

    Args:
        session: The untouched model.
        pair: Target and baseline prompts.
        tokens: New tokens per reply.
        store: Replies already made, by prompt id; new ones are added.
    """
    prompts = [*pair.target.prompts, *pair.baseline.prompts]
    replies = session.generate(prompts, max_new_tokens=tokens, store=store)
    seen = list(zip(replies, labels(prompts, replies), strict=True))
    cut = len(pair.target.prompts)
    return Behaviour(pair, tuple(seen[:cut]), tuple(seen[cut:]))


def labels(prompts: Sequence[Prompt], replies: Sequence[Reply]) -> list[Label]:
    """Label short replies by dictionary, in order."""
    dictionary = Dictionary()
    return [
        dictionary.label(prompt.text, reply.text, reply.finished).label
        for prompt, reply in zip(prompts, replies, strict=True)
    ]


def usable(
    session: Session, pair: PromptPair, *, filtered: bool, store: MutableMapping[str, Reply] | None = None
) -> tuple[PromptPair, dict[str, int]]:
    """Return the prompts to fit on, and how many there were and are kept.

    Args:
        session: The untouched model.
        pair: Prompts of the fit split.
        filtered: Keep those on which the model does what their class says.
        store: Replies already made, by prompt id; new ones are added.

    Raises:
        RunFailed: too few are kept.
    """
    if not filtered:
        return pair, {"targets": len(pair.target), "baselines": len(pair.baseline)}
    seen = observe(session, pair, store=store)
    return consistent(seen), seen.counts()


def consistent(behaviour: Behaviour) -> PromptPair:
    """Return the prompts on which the model does what their class says.

    Raises:
        RunFailed: too few of a class are left to fit a direction.
    """
    pair, counts = behaviour.pair, behaviour.counts()
    kept = {
        "targets refused": pair.target.subset([p for p, _ in behaviour.refused]),
        "baselines answered": pair.baseline.subset([p for p, _ in behaviour.answered]),
    }
    for name, subset in kept.items():
        if len(subset.prompts) < ENOUGH:
            whole = name.split()[0]
            raise RunFailed(
                f"{name}: only {counts[name]} of {counts[whole]}, too few to fit a direction",
                where=getattr(pair, whole.rstrip("s")).source,
                valid=f"at least {ENOUGH}",
                hint="other prompts, or --no-filter to fit on all of them",
            )
    return PromptPair(kept["targets refused"], kept["baselines answered"])
