"""Which trials of a search reply: along the front by its length, some of the second front, then beside the best.

The front is dense where the sampler has been, and that is not where its points differ most. So those that reply are
spread by the length of the front, refusal against the logarithm of drift, both scaled to the extent of the front.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from perpend.searching.front import CEILING, along, front
from perpend.searching.study import Trial, View
from perpend.searching.workers import pair, place, scored

OTHERS = 4
"""Trials of the second front that reply too, so that the score is checked beside the front as well."""
LEADERS = 2
"""Points that replied best, beside which others are asked."""


def first(view: View, on_front: Sequence[Trial], n: int) -> list[Trial]:
    """Return up to `n` trials along the front, and a few along the front of the others."""
    slots = {trial.slot for trial in on_front}
    return along(on_front, n, place) + second(view, slots, OTHERS)


def second(view: View, but: Container[int], n: int) -> list[Trial]:
    """Return up to `n` trials along the front of those whose slots are not in `but`."""
    rest = [t for t in scored(view) if t.slot not in but and pair(t)[1] <= CEILING]
    return along(front(rest, pair), n, place)


def beside(on_front: Sequence[Trial], replied: Sequence[Trial], n: int) -> list[Trial]:
    """Return up to `n` trials of the front that have not replied, beside those that replied best.

    Where there are several between one of the best and the next that has replied, the middle one is asked.

    Args:
        on_front: The front.
        replied: Trials that have replied, the best first.
        n: How many.
    """
    known, found = {trial.slot for trial in replied}, dict[int, Trial]()
    chain = sorted([*(t for t in on_front if t.slot not in known), *replied], key=lambda t: (pair(t)[1], t.slot))
    for best in replied[:LEADERS]:
        at = chain.index(best)
        for side in (chain[at + 1 :], chain[:at][::-1]):
            gap = next((k for k, trial in enumerate(side) if trial.slot in known), len(side))
            if gap:
                middle = along(side[:gap], 3, place)[min(gap, 3) // 2]
                found[middle.slot] = middle
    return list(found.values())[:n]
