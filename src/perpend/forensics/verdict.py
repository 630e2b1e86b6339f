"""The verdict: which account the changed matrices bear out together, with what share, and what else would do.

Every account gives every changed matrix a share, 0 to 1: how much of what changed beyond rounding it predicts
(`Change.shares`). Its score is the mean share over the matrices, so a matrix that it says nothing of counts as 0. An
account holds when its score is 0.9 or more. Of those that hold the most specific is the verdict, the one that would be
wrong most easily: a round trip through a format has no unknowns, an ablation a few hundred per matrix, white noise
predicts a spectrum, a low-rank change leaves a few thousand numbers open, and a fine-tune is what remains of weights
that have something in common with the base's. Those that have not are unrelated: the cosine of the two matrices is that
of chance.

The confidence is the score of the verdict or the lower bound of the 95 % Wilson interval of the share of matrices on
which it passes, whichever is smaller: it says both how well it predicts and how many matrices there were to be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perpend.core.stats import wilson
from perpend.forensics.change import EXPLAINS, Change

ORDER = ("quantised", "ablation", "interpolation", "unrelated", "noise", "low-rank")
"""Accounts from the most specific to the least."""
PARTLY = 0.5


@dataclass(frozen=True)
class Rest:
    """What two checkpoints say of each other beside the matrices that changed.

    Attributes:
        matrices: Matrices, and stacks of them, that both have.
        kept: Those of which the numbers are the same.
        vectors: Norms and biases that differ.
        cast: Tensors that have the same numbers in another dtype.
        unread: Tensors that differ and could not be read.
        apart: Tensors of the base that are missing or of another shape.
        added: Tensors that only the other has.
        third: Whether a third checkpoint was given.
    """

    matrices: int
    kept: int
    vectors: int = 0
    cast: int = 0
    unread: int = 0
    apart: int = 0
    added: int = 0
    third: bool = False


@dataclass(frozen=True)
class Verdict:
    """What was done."""

    name: str
    """identical, cast, quantised, ablation, interpolation, unrelated, noise, low-rank, fine-tune, mixed, rounding or
    unknown."""
    detail: str
    """The same in words."""
    confidence: float
    score: float
    """Mean share of the change that the account predicts; of a fine-tune, the share that none does."""
    passed: int
    """Matrices on which the account passes; of a fine-tune, those of which no account predicts half."""
    told: int
    """Matrices that changed by more than rounding."""
    scores: dict[str, float]
    """Of every account."""
    grounds: tuple[str, ...]

    @property
    def basis(self) -> str:
        """What the confidence rests on, in words; empty where no matrix changed."""
        of = f"{self.passed} of {self.told} changed matrices"
        if not self.told:
            return ""
        if self.name == "unrelated":
            return f"{of} have no more in common with the base's than chance gives"
        if self.name == "fine-tune":
            return f"on {of} no account predicts half of the change"
        if self.name == "noise":
            return f"{of} pass for it"
        return f"passes on {of} and predicts {self.score:.1%} of the change beyond rounding"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "basis": self.basis, "grounds": list(self.grounds)}


def judge(changes: Sequence[Change], rest: Rest) -> Verdict:
    """Weigh the accounts.

    Args:
        changes: Matrices that differ.
        rest: Everything else.
    """
    told = [change for change in changes if change.told]
    if not told:
        return _nothing(changes, rest)
    shares = [change.shares() for change in told]
    scores = {name: sum(s[name] for s in shares) / len(told) for name in ORDER if name in shares[0]}
    scores["fine-tune"] = sum(1 - max(s.values()) for s in shares) / len(told)
    name = next((n for n in ORDER if scores.get(n, 0.0) >= EXPLAINS), None)
    if name is None:
        name = "fine-tune" if max(scores[n] for n in scores if n != "fine-tune") < PARTLY else "mixed"
    passed = sum(s.get(name, 1 - max(s.values())) >= EXPLAINS for s in shares)
    score = scores.get(name, 0.0)
    if name == "fine-tune":
        passed, score = sum(max(s.values()) < PARTLY for s in shares), max(PARTLY, score)
    if name == "mixed":
        best = [max(s, key=lambda key: s[key]) if max(s.values()) >= EXPLAINS else "fine-tune" for s in shares]
        passed, score = sum(n != "fine-tune" for n in best), sum(max(s.values()) for s in shares) / len(told)
    confidence = min(score, wilson(passed, len(told))[0])
    detail, grounds = _words(name, told, shares, rest)
    if rest.vectors:
        grounds = (*grounds, f"{rest.vectors} norms or biases differ as well")
    return Verdict(name, detail, confidence, score, passed, len(told), scores, grounds)


def _nothing(changes: Sequence[Change], rest: Rest) -> Verdict:
    """Return the verdict when no matrix changed by more than rounding."""
    if rest.unread:
        return Verdict("unknown", f"{rest.unread} tensors differ in a dtype that is not read", 0.0, 0.0, 0, 0, {}, ())
    if changes and all(change.quantised[1] >= EXPLAINS for change in changes):
        kind = _commonest(changes)
        return Verdict("cast", f"every number rounded to {kind} and nothing else", 1.0, 1.0, 0, 0, {}, ())
    if changes:
        return Verdict("rounding", f"{len(changes)} matrices differ by no more than rounding", 1.0, 1.0, 0, 0, {}, ())
    if not rest.matrices:
        detail = f"another architecture: not one matrix has the name and the shape of one of the base's{_apart(rest)}"
        return Verdict("unrelated", detail, wilson(rest.apart, rest.apart)[0], 0.0, 0, 0, {}, ())
    if rest.vectors:
        return Verdict("unknown", f"only {rest.vectors} norms or biases differ", 0.0, 0.0, 0, 0, {}, ())
    common = f" in what both have{_apart(rest)}" if rest.apart or rest.added else ""
    if rest.cast:
        return Verdict("cast", f"the same numbers in another dtype{common}", 1.0, 1.0, 0, 0, {}, ())
    return Verdict("identical", f"the same byte for byte{common}", 1.0, 1.0, 0, 0, {}, ())


def _apart(rest: Rest) -> str:
    """Return how many tensors have no counterpart, in words that follow a clause; empty where all have one."""
    lost = "of the base's {} missing or of another shape"
    counts = (
        (rest.apart, f"tensor {lost.format('is')}", f"tensors {lost.format('are')}"),
        (rest.added, "tensor is new", "tensors are new"),
    )
    found = [f"{count} {one if count == 1 else several}" for count, one, several in counts if count]
    return f"; {' and '.join(found)}" if found else ""


def _commonest(changes: Sequence[Change]) -> str:
    found = [change.quantised[0] for change in changes if change.quantised[0]]
    return max(set(found), key=found.count) if found else "a 4-bit format"


def _unrelated(rest: Rest) -> str:
    if 2 * (rest.apart + rest.added) > rest.matrices:
        return f"another architecture, with weights that have nothing in common with the base's{_apart(rest)}"
    if rest.kept:
        kept = f"{rest.kept} matrices are as they were"
        return f"weights replaced by ones that have nothing in common with the base's; {kept}"
    return "another model of this architecture: the weights have nothing in common with the base's"


def _words(
    name: str, told: Sequence[Change], shares: Sequence[dict[str, float]], rest: Rest
) -> tuple[str, tuple[str, ...]]:
    ranks = sorted(change.rank for change in told)
    kinds = sorted({change.place.kind for change in told})
    spread = f"rank {ranks[0]} to {ranks[-1]} beyond rounding, median {ranks[len(ranks) // 2]}"
    where = (
        f"{len(told)} matrices of {len(kinds)} kinds changed: {', '.join(kinds[:8])}{', …' if len(kinds) > 8 else ''}"
    )
    if name == "quantised":
        kind = _commonest(told)
        few = sum(change.lattice for change in told)
        return f"a round trip through {kind}", (
            where,
            f"blocks of 32 hold at most 16 values in {few} of {len(told)} matrices",
        )
    if name == "ablation":
        chance = [1 / min(change.shape) for change in told]
        return "a directional ablation", (
            where,
            f"what was subtracted along the direction is λ times what the base wrote along it; a rank-one change that "
            f"knows nothing of the base would agree by {max(chance):.2%}",
        )
    if name == "interpolation":
        alphas = sorted(change.towards[0] for change in told if change.towards)
        middle = alphas[len(alphas) // 2]
        return f"{middle:.3g} of the way to the third model, in every matrix", (
            where,
            f"from {alphas[0]:.3g} to {alphas[-1]:.3g} of the way",
        )
    cosines = sorted(change.sizes.cosine for change in told)
    alike = f"cosine with the base's from {cosines[0]:.3f} to {cosines[-1]:.3f}, median {cosines[len(told) // 2]:.3f}"
    if name == "unrelated":
        return _unrelated(rest), (
            where,
            alike,
            f"for independent matrices {max(c.sizes.chance for c in told):.3f} is one standard deviation",
            "the same model with its dimensions reordered or rotated would look so too",
        )
    if name == "noise":
        return "white noise", (where, "singular values of independent entries, no low-rank part", spread)
    if name == "low-rank":
        return "a low-rank change that is no ablation, as an adapter (LoRA) merged in makes", (where, spread)
    if name == "mixed":
        best = [max(s, key=lambda key: s[key]) if max(s.values()) >= PARTLY else "fine-tune" for s in shares]
        parts = ", ".join(f"{n} in {best.count(n)}" for n in sorted(set(best), key=best.count, reverse=True))
        return f"several things at once: {parts} of {len(told)} matrices", (where, spread)
    text = "training of all weights, or a merge with another model"
    grounds = (
        where,
        alike,
        spread,
        "full rank with a few large singular values, as training leaves and noise does not",
    )
    return text, grounds if rest.third else (*grounds, "name the other parent with --third to tell a merge")
