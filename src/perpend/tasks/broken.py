"""Whether a candidate's replies can be read as answers, which a score that generates nothing cannot see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perpend.judges.judgement import Judgement, Rate
from perpend.judges.labels import Label


@dataclass(frozen=True)
class Broken:
    """Replies of one model that are empty, loop or are garbled, at full length, on the select split."""

    target: Rate
    baseline: Rate

    @classmethod
    def of(cls, target: Judgement, baseline: Judgement) -> Broken:
        """Count them in what the panel says of both classes."""
        return cls(target.rate(Label.BROKEN), baseline.rate(Label.BROKEN))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"target": self.target.to_json(), "baseline": self.baseline.to_json()}


@dataclass(frozen=True)
class Bar:
    """How many replies of a candidate may be broken.

    A refusal is short and hardly ever broken. A target that an edit makes the model answer is therefore compared with
    how the untouched model answers: with the larger of its two shares.
    """

    untouched: Broken
    margin: float
    """Share by which a candidate's may exceed the untouched model's, in each class."""

    @property
    def target(self) -> float:
        """Largest share of target replies that may be broken."""
        return max(self.untouched.target.share, self.untouched.baseline.share) + self.margin

    @property
    def baseline(self) -> float:
        """Largest share of baseline replies that may be broken."""
        return self.untouched.baseline.share + self.margin

    def excess(self, broken: Broken) -> float:
        """Return by how much the worse class exceeds what it may; 0 within the bar."""
        over = max(broken.target.share - self.target, broken.baseline.share - self.baseline)
        return 0.0 if over < 1e-9 else over

    def told(self, broken: Broken) -> str:
        """Say in a line how many replies are broken before and after, and what is allowed."""
        rows = (
            ("targets", self.untouched.target, broken.target, self.target),
            ("baselines", self.untouched.baseline, broken.baseline, self.baseline),
        )
        parts = [f"{a.k}/{a.n} → {b.k}/{b.n} of {name} (at most {most:.0%})" for name, a, b, most in rows]
        return "broken replies " + ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        allowed = {"target": self.target, "baseline": self.baseline}
        return {"untouched": self.untouched.to_json(), "margin": self.margin, "allowed": allowed}
