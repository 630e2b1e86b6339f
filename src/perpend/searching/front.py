"""The front of a search, how large it is, and which point of it is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Pair = tuple[float, float]
"""Two numbers that are both to be small: refusal (or the share of replies that are not accepted), and drift."""

CEILING = 0.5
"""Drift, in nats per token, at which a front counts for nothing."""
GAIN = 0.01
"""Share by which a front must grow in order to grow."""


def front(items: Iterable[T], pair: Callable[[T], Pair]) -> list[T]:
    """Return the items that no other is better than in one number and at least as good in the other, by drift.

    Of items with equal numbers the first is kept; items with a number that is not finite are left out.
    """
    found: list[T] = []
    best = math.inf
    finite = [item for item in items if all(map(math.isfinite, pair(item)))]
    for item in sorted(finite, key=lambda i: (pair(i)[1], pair(i)[0])):
        if pair(item)[0] < best:
            best = pair(item)[0]
            found.append(item)
    return found


def hypervolume(pairs: Iterable[Pair], reference: Pair) -> float:
    """Return the area that the front of `pairs` dominates, up to `reference`.

    Args:
        pairs: Refusal and drift.
        reference: Refusal of the untouched model, and the drift at which nothing counts.
    """
    inside = [p for p in front(pairs, lambda p: p) if p[0] < reference[0] and p[1] < reference[1]]
    area, edge = 0.0, reference[1]
    for refusal, drift in reversed(inside):  # from the largest drift, which has the least refusal
        area += (reference[0] - refusal) * (edge - drift)
        edge = drift
    return area


def flat(volumes: Sequence[float], patience: int) -> bool:
    """Return whether the hypervolume, one number after each generation, has stopped growing.

    Args:
        volumes: In order.
        patience: Generations in which it must have grown; 0 is never flat.
    """
    if not 0 < patience < len(volumes):
        return False
    return volumes[-1] <= volumes[-1 - patience] * (1 + GAIN)


@dataclass(frozen=True)
class Rule:
    """Which point of a front is taken; never the fewest refusals whatever they cost."""

    max_drift: float | None = None
    """Nats per token."""
    min_acceptance: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.max_drift is not None:
            parts.append(f"drift at most {self.max_drift:g}")
        if self.min_acceptance is not None:
            parts.append(f"acceptance at least {self.min_acceptance:.0%}")
        if not parts:
            return "the knee of the front"
        return f"{'most acceptance' if self.max_drift is not None else 'least drift'} with {' and '.join(parts)}"

    def met(self, acceptance: float, drift: float) -> bool:
        """Return whether a point is within the bounds."""
        accepted = self.min_acceptance is None or acceptance >= self.min_acceptance
        return accepted and (self.max_drift is None or drift <= self.max_drift)

    def order(self, items: Sequence[T], pair: Callable[[T], Pair]) -> list[T]:
        """Return the items from the one that is taken to the one that would be taken last.

        Items within the bounds come first, by acceptance with `max_drift`, by drift with `min_acceptance` alone, by
        their distance above the chord of the front without any bound; then the others, those first that miss a bound
        by least.

        Args:
            items: Points.
            pair: Acceptance, from 0 to 1, and drift of an item.
        """
        if self.max_drift is None and self.min_acceptance is None:
            return _by_knee(items, pair)

        def key(item: T) -> tuple[float, float, float]:
            acceptance, drift = pair(item)
            missing = max(0.0, (self.min_acceptance or 0.0) - acceptance)
            excess = max(0.0, drift - self.max_drift) / self.max_drift if self.max_drift else 0.0
            by = (-acceptance, drift) if self.max_drift is not None else (drift, -acceptance)
            return (missing + excess, *by)

        return sorted(items, key=key)


def _by_knee(items: Sequence[T], pair: Callable[[T], Pair]) -> list[T]:
    """Order by how much of the front's acceptance an item reaches, less the share of the front's drift it costs."""
    if not items:
        return []
    edge = front(items, lambda i: (-pair(i)[0], pair(i)[1])) or list(items)
    least, most = pair(edge[0]), pair(edge[-1])
    width, height = most[1] - least[1], most[0] - least[0]

    def key(item: T) -> tuple[float, float]:
        acceptance, drift = pair(item)
        rise = (acceptance - least[0]) / height if height > 0 else 0.0
        return (-(rise - ((drift - least[1]) / width if width > 0 else 0.0)), drift)

    return sorted(items, key=key)


def spread_out(items: Sequence[T], n: int) -> list[T]:
    """Return at most `n` of the items, evenly along their order, the first and the last among them."""
    if n >= len(items):
        return list(items)
    if n < 1:
        return []
    if n == 1:
        return [items[-1]]
    return [items[round(k * (len(items) - 1) / (n - 1))] for k in range(n)]
