"""What may be said of an edit in one sentence: is acceptance above 90 %, and is the model still coherent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perpend.core.stats import paired_wilson
from perpend.judges.judgement import CLAIM, Rate
from perpend.judges.labels import Label
from perpend.tasks.measure import Measured

MARGIN = 0.05
"""Share by which broken replies may exceed the untouched model's before it is no longer called coherent."""


@dataclass(frozen=True)
class Claim:
    """The verdict, and what it rests on.

    Attributes:
        accepted: Target prompts accepted after the edit.
        above: The lower bound of that rate is above 90 %, by both judges.
        broken_before: Broken replies of the untouched model, both classes.
        broken_after: Broken replies under the edit, the same prompts.
        difference: Share of broken replies after minus before, with its 95 % interval (paired).
        hybrid: Whether a classifier took part.
    """

    accepted: Rate
    above: bool
    broken_before: Rate
    broken_after: Rate
    difference: tuple[float, float, float]
    hybrid: bool

    @property
    def coherent(self) -> bool:
        """Whether the whole interval of the difference lies below the margin."""
        return self.difference[2] < MARGIN

    def __str__(self) -> str:
        rate = f"{self.accepted} accepted"
        if not self.hybrid:
            first = f"No claim about {CLAIM:.0%}: {rate} by the word list alone"
        else:
            first = f"Above {CLAIM:.0%}: {rate}" if self.above else f"Not shown to be above {CLAIM:.0%}: {rate}"
        change, low, high = self.difference
        moved = f"broken replies {self.broken_before.share:.1%} → {self.broken_after.share:.1%}"
        reach = f"{change:+.1%}, interval {low:+.1%} to {high:+.1%}, margin {MARGIN:.0%}"
        word = "coherent" if self.coherent else "not shown to be coherent"
        return f"{first}; {word}: {moved} ({reach})."

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "text": str(self),
            "above_90": self.above,
            "threshold": CLAIM,
            "coherent": self.coherent,
            "margin": MARGIN,
            "accepted": self.accepted.to_json(),
            "broken_before": self.broken_before.to_json(),
            "broken_after": self.broken_after.to_json(),
            "broken_difference": self.difference[0],
            "broken_difference_interval": list(self.difference[1:]),
        }


def claim(before: Measured, after: Measured) -> Claim:
    """Say what both measurements of the same prompts allow to be said."""
    first, second = (
        {(k, r.id): r.label for k, side in enumerate((m.target, m.baseline)) for r in side.judged.replies}
        for m in (before, after)
    )
    pairs = [(label is Label.BROKEN, second[key] is Label.BROKEN) for key, label in first.items()]
    counts = [pairs.count(x) for x in ((False, True), (True, False), (True, True), (False, False))]
    old, new = (Rate(sum(x[k] for x in pairs), len(pairs)) for k in (0, 1))
    judged = after.target.judged
    return Claim(
        Rate(judged.accepted, judged.n), judged.above(), old, new, paired_wilson(*counts), judged.kind == "hybrid"
    )
