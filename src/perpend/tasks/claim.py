"""What may be said of an edit in one sentence: is acceptance above 90 %, and is the model still coherent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perpend.core.stats import paired_counts, paired_wilson
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
        unknown: Target prompts whose reply could not be judged after the edit; they count as not accepted.
        left_out: Prompts of both classes that could not be judged before or after; the rates of broken replies are
            those of the others.
        highest: Upper bound of the difference where what could not be judged after the edit counts as broken.
    """

    accepted: Rate
    above: bool
    broken_before: Rate
    broken_after: Rate
    difference: tuple[float, float, float]
    hybrid: bool
    unknown: int
    left_out: int
    highest: float

    @property
    def coherent(self) -> bool:
        """Whether the whole interval of the difference lies below the margin, also if nothing unjudged can be read."""
        return max(self.difference[2], self.highest) < MARGIN

    def __str__(self) -> str:
        rate = f"{self.accepted} accepted" + (
            f", {self.unknown} not judged counted as not accepted" if self.unknown else ""
        )
        if not self.hybrid:
            first = f"No claim about {CLAIM:.0%}: {rate} by the word list alone"
        else:
            first = f"Above {CLAIM:.0%}: {rate}" if self.above else f"Not shown to be above {CLAIM:.0%}: {rate}"
        change, low, high = self.difference
        pairs = self.broken_after.n
        moved = f"broken replies {self.broken_before.share:.1%} → {self.broken_after.share:.1%} of {pairs}"
        reach = f"{change:+.1%}, interval {low:+.1%} to {high:+.1%}, margin {MARGIN:.0%}"
        word = "coherent" if self.coherent else "not shown to be coherent"
        rest = f"; {self.left_out} not judged both times count against it" if self.left_out else ""
        if not pairs:
            return f"{first}; {word}: no prompt was judged both before and after."
        return f"{first}; {word}: {moved} ({reach}{rest})."

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "text": str(self),
            "above_90": self.above,
            "threshold": CLAIM,
            "coherent": self.coherent,
            "margin": MARGIN,
            "accepted": self.accepted.to_json(),
            "unknown": self.unknown,
            "left_out": self.left_out,
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
    labels = [(label, second[key]) for key, label in first.items()]
    known = [pair for pair in labels if Label.UNKNOWN not in pair]
    old, new = ([pair[k] is Label.BROKEN for pair in known] for k in (0, 1))
    first_of_all = [a is Label.BROKEN for a, _ in labels]
    worst = paired_counts(first_of_all, [b in (Label.BROKEN, Label.UNKNOWN) for _, b in labels])
    judged = after.target.judged
    return Claim(
        accepted=Rate(judged.accepted, judged.n),
        above=judged.above(),
        broken_before=Rate(sum(old), len(old)),
        broken_after=Rate(sum(new), len(new)),
        difference=paired_wilson(*paired_counts(old, new)),
        hybrid=judged.kind == "hybrid",
        unknown=judged.unknown,
        left_out=len(labels) - len(known),
        highest=paired_wilson(*worst)[2],
    )
