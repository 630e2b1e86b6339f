"""Changed matrices of two checkpoints, put together by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PASSES, PARTLY = 0.9, 0.5
"""Mean shares from which an account is taken for the kind, and below which none is named."""

NO_NUMBERS = ("unrelated", "noise")
"""Accounts that a matrix passes or not, and that predict no numbers of it."""


@dataclass(frozen=True)
class Kind:
    """Matrices of one kind.

    Attributes:
        kind: Its name.
        count: How many changed.
        moved: Median size of the difference, relative to the matrix.
        ranks: Smallest and largest rank of the difference beyond rounding.
        account: What predicts them best; empty where nothing predicts half.
        share: Mean share that it predicts.
    """

    kind: str
    count: int
    moved: float
    ranks: tuple[int, int]
    account: str
    share: float

    @property
    def predicted(self) -> float | None:
        """The share; None for an account that a matrix passes or not, and that predicts no numbers of it."""
        return None if self.account in NO_NUMBERS else self.share


def by_kind(changes: Sequence[Mapping[str, Any]]) -> list[Kind]:
    """Return the changes of each kind of matrix together.

    Args:
        changes: `kind`, `moved`, `rank` and `shares` of each, as the JSON of a comparison has them.
    """
    return [_together(kind, [x for x in changes if x["kind"] == kind]) for kind in sorted({x["kind"] for x in changes})]


def _together(kind: str, own: Sequence[Mapping[str, Any]]) -> Kind:
    moved, ranks = sorted(x["moved"] or 0.0 for x in own), [x["rank"] for x in own]
    mean = {name: sum(x["shares"][name] or 0.0 for x in own) / len(own) for name in own[0]["shares"]}
    best = next((name for name, share in mean.items() if share >= min(PASSES, max(mean.values()))), "")
    if mean.get(best, 0.0) < PARTLY:
        return Kind(kind, len(own), moved[len(moved) // 2], (min(ranks), max(ranks)), "", 0.0)
    return Kind(kind, len(own), moved[len(moved) // 2], (min(ranks), max(ranks)), best, mean[best])
