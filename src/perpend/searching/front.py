"""The front of a search, how large it is, and which point of it is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

T = TypeVar("T")
Pair = tuple[float, float]
"""Two numbers that are both to be small: refusal (or the share of replies that are not accepted), and drift."""

CEILING = 0.5
"""Drift, in nats per token, at which a front counts for nothing, and which is worth all acceptance."""
FLOOR = 1e-3
"""Drift, in nats per token, below which two points cost the same: few prompts cannot tell them apart."""
GAIN = 0.01
"""Share by which a front must grow in order to grow."""


def decades(drift: float) -> float:
    """Return drift as the sampler and the growth of the front see it: decades above `FLOOR`, 0 at less.

    On the scale of nats per token nearly all edits worth having lie in the lowest tenth, and what tells them apart
    would count for nothing.
    """
    return math.log10(max(drift, FLOOR) / FLOOR)


def worth(acceptance: float, drift: float, best: float = 1.0) -> float:
    """Return what a point is worth where nothing bounds it: acceptance / best - drift / `CEILING`.

    The scale does not depend on which points it is compared with, so that a point that is not taken changes nothing.

    Args:
        acceptance: Share from 0 to 1.
        drift: Nats per token.
        best: The acceptance that counts as all there is to have.
    """
    return acceptance / max(best, 1e-9) - drift / CEILING


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

    def order(self, items: Sequence[T], pair: Callable[[T], Pair], best: float = 1.0) -> list[T]:
        """Return the items from the one that is taken to the one that would be taken last.

        Items within the bounds come first, by acceptance with `max_drift`, by drift with `min_acceptance` alone, by
        what they are `worth` without any bound; then the others, those first that miss a bound by least.

        Args:
            items: Points.
            pair: Acceptance, from 0 to 1, and drift of an item.
            best: The acceptance that counts as all there is to have, for the knee.
        """

        def key(item: T) -> tuple[float, float, float]:
            acceptance, drift = pair(item)
            if self.max_drift is None and self.min_acceptance is None:
                return (-worth(acceptance, drift, best), drift, -acceptance)
            missing = max(0.0, (self.min_acceptance or 0.0) - acceptance)
            excess = max(0.0, drift - self.max_drift) / self.max_drift if self.max_drift else 0.0
            by = (-acceptance, drift) if self.max_drift is not None else (drift, -acceptance)
            return (missing + excess, *by)

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


def along(items: Sequence[T], n: int, place: Callable[[T], Pair]) -> list[T]:
    """Return at most `n` of the items of a front, evenly along its length, the first and the last among them.

    Args:
        items: In the order of the front.
        n: How many.
        place: Where an item lies; both numbers are scaled to the extent of the items.
    """
    if n >= len(items) or n < 2:
        return spread_out(items, n)
    lengths = _lengths([place(item) for item in items])
    left, found = set(range(len(items))), []
    for k in range(n):
        found.append(min(left, key=lambda i: (abs(lengths[i] - lengths[-1] * k / (n - 1)), i)))
        left.discard(found[-1])
    return [items[i] for i in sorted(found)]


def _lengths(places: Sequence[Pair]) -> list[float]:
    """Return how far along a chain of points each of them is, both numbers scaled to their extent."""
    extents = [max(axis) - min(axis) or 1.0 for axis in zip(*places, strict=True)]
    steps = [
        math.hypot(*((b - a) / extent for a, b, extent in zip(one, other, extents, strict=True)))
        for one, other in pairwise(places)
    ]
    return list(accumulate(steps, initial=0.0))
