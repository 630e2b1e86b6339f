"""Behaviour and directions for the tests of scoring: what a pico model says, called refusals and answers."""

from __future__ import annotations

import torch

from perpend.core.directions import Directions
from perpend.core.kinds import Basis
from perpend.core.linear import orthonormalise
from perpend.data import Prompt, PromptPair, PromptSet
from perpend.fitting.behaviour import Behaviour
from perpend.judges.labels import Label
from perpend.models.session import Session


def behaviour(session: Session, n: int = 6) -> Behaviour:
    kinds = ("target", "baseline")
    both = PromptPair(*(PromptSet(k, tuple(Prompt(f"{k} {i} ?") for i in range(n)), f"{k}.txt") for k in kinds))
    said = [session.generate(part.prompts, max_new_tokens=14) for part in (both.target, both.baseline)]
    labels = (Label.REFUSE, Label.COMPLY)
    return Behaviour(both, *(tuple((reply, label) for reply in part) for part, label in zip(said, labels, strict=True)))


def directions(session: Session) -> dict[Basis, Directions]:
    generator = torch.Generator().manual_seed(0)
    layers, size = session.n_layers, session.hidden_size
    found = {}
    for rank in (1, 2):
        vectors = orthonormalise(torch.randn(layers, rank, size, generator=generator)).float()
        means = torch.randn(2, layers, size, generator=generator)
        found["mean", rank] = Directions(vectors, torch.ones(layers), means[0], means[1], "mean", {}, {})
    return found
