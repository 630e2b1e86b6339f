"""Racing: a candidate that can't reach the front any more is not scored to the end.

A candidate is dominated when some point of the front has no more drift and no more refusal. Both are means over
prompts, of which a part has been read:

- drift is never negative, so that what has been read, over all prompts, is an *exact lower bound* of the mean;
- for refusal the same prompts are compared pairwise with the point of the front. With mean m and standard deviation s
  of n differences read, the mean of the N - n others lies above m - z s √(1/n + 1/(N - n)) with the stated confidence,
  if differences are about normal; that bound and what has been read give one of the mean over all N.

What is dropped is told as these two bounds, which the point of the front beats as well. Means over the prompts that
were read would be of other prompts than those of the others, and easy ones may come first.

Racing never changes what is on the front but with the probability that is left, 0.1 % for every look. There is a look
after every `LOOK` prompts of each class, at exactly those, however prompts lie in batches: workers with more or less
memory drop the same candidates with the same numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from perpend.fitting.layers import RUIN
from perpend.searching.study import Outcome

Z = 3.09
"""One-sided 99.9 % quantile of the normal distribution."""
LOOK = 12
"""Prompts of each class between two looks."""
NOT_FINITE = "the logits are not finite"
FEWEST = 8
"""Differences that are needed for a standard deviation to be believed."""


def least_mean(differences: Sequence[float], total: int) -> float:
    """Return the lower bound of the mean over `total` prompts of which some have been read."""
    n, left = len(differences), total - len(differences)
    mean = statistics.fmean(differences)
    if left <= 0:
        return mean
    if n < FEWEST:
        return -math.inf
    others = mean - Z * statistics.stdev(differences) * math.sqrt(1 / n + 1 / left)
    return (n * mean + left * others) / total


def hopeless(
    odds: Sequence[float], drift: Sequence[float], targets: int, baselines: int, rivals: Sequence[Outcome]
) -> Outcome | None:
    """Return the lower bounds of a candidate that cannot reach the front any more; None while it can.

    Args:
        odds: Log-odds of refusing the targets that have been read, the first of all.
        drift: Drift on the baselines that have been read, likewise.
        targets: Targets in all.
        baselines: Baselines in all.
        rivals: What lies on the front, with its numbers for every prompt.
    """
    if not all(map(math.isfinite, [*odds, *drift])):
        return Outcome(failed=NOT_FINITE)
    spent = sum(max(0.0, x) for x in drift) / baselines
    if spent > RUIN:
        return Outcome(drift=spent, dropped=f"drift {spent:.2f} nats per token or more: ruined")
    for rival in rivals:
        own = rival.per_target
        if own is None or len(own) != targets or rival.drift > spent or not odds:
            continue
        more = least_mean([a - b for a, b in zip(odds, own, strict=False)], targets)
        if more > 0:
            told = (
                f"after {len(odds)} of {targets} targets it cannot reach refusal {rival.refusal:.2f} at drift "
                f"{rival.drift:.3f} (99.9 % confidence)"
            )
            return Outcome(rival.refusal + more, spent, dropped=told)
    return None


class Race:
    """Candidates that are scored together, and what of them has been read.

    Attributes:
        odds: For each candidate, log-odds of refusing the targets so far.
        drift: Likewise, drift on the baselines.
        left: Candidates that have not been dropped, ascending.
        dropped: What the others are told as.
    """

    def __init__(self, n: int, targets: int, baselines: int, rivals: Sequence[Outcome]) -> None:
        """Begin with n candidates and nothing read; `rivals` lie on the front."""
        self.odds: list[list[float]] = [[] for _ in range(n)]
        self.drift: list[list[float]] = [[] for _ in range(n)]
        self.left, self.dropped = tuple(range(n)), dict[int, Outcome]()
        self._targets, self._baselines, self._rivals, self._read = targets, baselines, rivals, 0

    def add(self, lists: list[list[float]], found: Sequence[Sequence[float]]) -> None:
        """Add numbers of further prompts, one list for each candidate that is left."""
        for k, numbers in zip(self.left, found, strict=True):
            lists[k] += numbers

    def look(self) -> tuple[int, ...]:
        """Drop what cannot reach the front any more, as soon as enough has been read; returns what is left."""
        while self.left and (n := self._read + LOOK) < max(self._targets, self._baselines):
            k = self.left[0]
            if len(self.odds[k]) < min(n, self._targets) or len(self.drift[k]) < min(n, self._baselines):
                break
            self._read = n
            for k in self.left:
                odds, drift = self.odds[k][:n], self.drift[k][:n]
                if bounds := hopeless(odds, drift, self._targets, self._baselines, self._rivals):
                    self.dropped[k] = bounds
            self.left = tuple(k for k in self.left if k not in self.dropped)
        return self.left
