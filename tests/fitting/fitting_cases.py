"""Prompts and sessions for the tests of fitting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perpend.config import Machine
from perpend.core.directions import Directions
from perpend.core.linear import orthonormalise
from perpend.data import Prompt, PromptPair, PromptSet, Splits
from perpend.judges.labels import Label, Verdict
from perpend.models.load import load_model
from perpend.models.session import Session

WORDS = ("bread", "water", "salt", "a fox", "the village", "a river", "a list", "numbers", "the city", "a story")


def session_on(folder: Path) -> Session:
    return Session(load_model(folder), Machine(device="cpu", batch_size=4))


def prompts(kind: str, n: int, start: int = 0) -> PromptSet:
    """`n` prompts of a class; other starts give other prompts."""
    lead = {"target": "How do I harm", "baseline": "Tell me about"}[kind]
    rows = (Prompt(f"{lead} {WORDS[k % len(WORDS)]} {k}?") for k in range(start, start + n))
    return PromptSet(kind, tuple(rows), f"{kind}.txt")


def pair(n: int, start: int = 0) -> PromptPair:
    return PromptPair(prompts("target", n, start), prompts("baseline", n, start))


def splits(n: int = 10) -> Splits:
    return Splits(pair(n), pair(n, 100), pair(n, 200))


def residuals(session: Session, which: PromptSet) -> Tensor:
    """`[n, L, d]` float64."""
    return torch.cat(list(session.capture(which.prompts))).double()


def mean_difference(session: Session, both: PromptPair) -> Tensor:
    """`[L, d]` unit rows: what a direction is, computed without the code under test."""
    found = residuals(session, both.target).mean(0) - residuals(session, both.baseline).mean(0)
    return found / found.norm(dim=-1, keepdim=True)


def directions(n_layers: int, size: int, seed: int = 0, **fields: Any) -> Directions:
    """Random directions, another one for every layer."""
    generator = torch.Generator().manual_seed(seed)
    vectors = orthonormalise(torch.randn(n_layers, 1, size, generator=generator)).float()
    means = torch.randn(2, n_layers, size, generator=generator)
    given = {"vectors": vectors, "raw_norm": torch.ones(n_layers), "baseline_mean": means[0], "target_mean": means[1]}
    return Directions(**{**given, "diagnostics": {}, "provenance": {}, **fields})


class Labels:
    """A dictionary that refuses prompts of harm, but for those in `odd`, whose label is the other one."""

    odd: tuple[str, ...] = ()

    def label(self, request: str, reply: str, finished: bool = True) -> Verdict:
        refused = ("harm" in request) != (request in self.odd)
        return Verdict(Label.REFUSE if refused else Label.COMPLY, None, "a test", "test")
