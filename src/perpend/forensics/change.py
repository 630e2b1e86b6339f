"""What is known of one matrix that differs, and which account of the difference it bears out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from perpend.forensics import accounts
from perpend.forensics.accounts import Ablation
from perpend.forensics.pairs import Place
from perpend.forensics.spectrum import RANKS, Difference, Spectrum, difference, of_difference, whiteness

EXPLAINS = 0.9
"""An account passes on a matrix when it predicts this share of what changed beyond rounding."""
WHITE = (0.8, 1.25)
"""Range of σ₁, relative to independent entries of the same energy, that passes for white noise."""

SIGMAS, UNLIKE, TELLING = 5.0, 0.05, 0.25
"""A cosine of W and W' within so many standard deviations of chance, or below `UNLIKE`, says that the two have nothing
in common; where chance alone reaches `TELLING` it says nothing."""


@dataclass(frozen=True, eq=False)
class Change:
    """A matrix of which the other checkpoint has other numbers."""

    tensor: str
    """Name in the base."""
    part: int | None
    """Which expert of a fused tensor, None for a single matrix."""
    place: Place
    shape: tuple[int, int]
    dtypes: tuple[str, str]
    """In the base and in the other."""
    sizes: Difference
    rank: int
    """Singular values of the difference above what rounding gives; `RANKS[1]` stands for that many or more."""
    singular: tuple[float, ...]
    """The largest singular values of the difference, relative to ‖W‖."""
    low_rank: float
    """Share of ‖D‖² beyond rounding in the singular values that count."""
    white: float
    """σ₁ relative to that of independent entries of the same energy."""
    lattice: bool
    """Whether blocks of 32 hold at most 16 values in the other and more in the base."""
    quantised: tuple[str, float]
    """The format or dtype whose round trip predicts the other best, and the share that it predicts."""
    towards: tuple[float, float] | None
    """α of the way to a third checkpoint and the share that it predicts, None without one."""
    ablation: Ablation | None = None
    left: Tensor = field(default_factory=lambda: torch.empty(0))
    """`[m]` float32 first left singular vector."""

    @property
    def told(self) -> bool:
        """Whether the matrix changed by more than rounding gives, so that it speaks for or against an account."""
        return self.rank > 0 or self.sizes.energy > 2 * self.sizes.rounding

    @property
    def unrelated(self) -> bool:
        """Whether the matrix has no more in common with the base's than one that knows nothing of it."""
        bound = max(UNLIKE, SIGMAS * self.sizes.chance)
        return bound < TELLING and abs(self.sizes.cosine) <= bound

    def shares(self) -> dict[str, float]:
        """Return, for every account, the share of the change beyond rounding that it predicts, 0 to 1.

        White noise predicts no numbers; its share is 1 or 0, by whether the singular values and the missing
        correlation with everything else are those of noise. So it is with unrelated weights, by the cosine.
        """
        ablation = max(0.0, self.ablation.explained) if self.ablation else 0.0
        quantised = self.quantised[1]
        lattice = EXPLAINS if self.lattice and self.low_rank < 0.5 else 0.0  # a 4-bit format that is not known here
        capped = self.rank < min(RANKS[1], min(self.shape) // 2)
        low = min(1.0, self.low_rank) if capped else 0.0
        noise = ablation < 0.1 and quantised < 0.5 and not self.lattice and WHITE[0] <= self.white <= WHITE[1]
        found = {"unrelated": float(self.unrelated), "ablation": ablation, "quantised": max(quantised, lattice)}
        found |= {"noise": float(noise), "low-rank": low}
        return found | ({"interpolation": self.towards[1]} if self.towards else {})

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        made = self.ablation
        return {
            "tensor": self.tensor,
            "part": self.part,
            "layer": self.place.layer,
            "kind": self.place.kind,
            "shape": list(self.shape),
            "dtypes": list(self.dtypes),
            "moved": self.sizes.moved,
            "changed": self.sizes.changed,
            "cosine": self.sizes.cosine,
            "rounding": (self.sizes.rounding**0.5) / self.sizes.size if self.sizes.size else 0.0,
            "rank": self.rank,
            "singular": list(self.singular[:8]),
            "floor": self.sizes.floor / self.sizes.size if self.sizes.size else 0.0,
            "white": self.white,
            "shares": self.shares(),
            "quantised": self.quantised[0] or None,
            "towards": list(self.towards) if self.towards else None,
            "ablation": None
            if made is None or made.explained <= 0
            else {
                "side": made.side,
                "mode": made.mode,
                "weight": made.weight,
                "rank": made.rank,
                "explained": made.explained,
                "misses": made.misses,
            },
        }


def measure(
    tensor: str,
    part: int | None,
    before: Tensor,
    after: Tensor,
    third: Tensor | None,
    hidden: int | None,
) -> Change:
    """Measure one matrix.

    Args:
        tensor: Its name.
        part: Which expert.
        before: `[m, n]` of the base, any float dtype.
        after: `[m, n]` of the other.
        third: `[m, n]` of a checkpoint that the other may be on the way to.
        hidden: Size of the residual stream, which says on which sides a direction can lie; None for both.
    """
    sizes = difference(before, after)
    place = Place.of(tensor)
    dtypes = (str(before.dtype).removeprefix("torch."), str(after.dtype).removeprefix("torch."))
    bare = Change(
        tensor, part, place, (before.shape[0], before.shape[1]), dtypes, sizes, 0, (), 0.0, 0.0, False, ("", 0.0), None
    )
    if not sizes.finite or not sizes.energy:
        return bare
    found = of_difference(before, after)
    rank = int((found.values > sizes.floor).sum())
    values, left = found.values, found.left
    if rank == min(RANKS[0], *before.shape) and min(before.shape) > RANKS[0]:
        wider = of_difference(before, after, RANKS[1])
        rank, values = int((wider.values > sizes.floor).sum()), wider.values
    counted = float(values[:rank].square().sum())
    bare = replace(
        bare,
        rank=rank,
        singular=tuple(float(x) / max(sizes.size, 1e-300) for x in values),
        low_rank=min(1.0, counted / sizes.beyond) if sizes.beyond else 0.0,
        white=whiteness(float(values[0]), sizes.energy, bare.shape),
        towards=accounts.along(before, after, third, sizes) if third is not None else None,
        left=left[0].float(),
    )
    if bare.unrelated:
        return bare
    return replace(bare, **_accounts(before, after, sizes, found, hidden))


def _accounts(before: Tensor, after: Tensor, sizes: Difference, found: Spectrum, hidden: int | None) -> dict[str, Any]:
    """Try the accounts that predict numbers; the costly ones only where nothing cheaper predicts them."""
    quantised = accounts.quantised(before, after)
    lattice = accounts.on_lattice(before, after)
    if quantised[1] > EXPLAINS:
        return {"quantised": quantised, "lattice": lattice}
    sides = [side for side, size in zip(("output", "input"), before.shape, strict=True) if hidden in (None, size)]
    return {
        "quantised": quantised,
        "lattice": lattice,
        "ablation": accounts.ablation(before, after, sizes, found, tuple(sides)),
    }
