"""What the ablated matrices have in common: the direction, the mode, and what weak modules lost along it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from perpend.forensics.accounts import MODES, Ablation
from perpend.forensics.change import EXPLAINS, Change

SAME = 0.9
"""Share of the directions' squared length in their common span, above which they count as one."""
TURNED = 0.01
"""What directions must share less between layers than within, beyond noise, to count as one per layer: those of
neighbouring layers are much alike."""
CERTAIN = 5.0
"""Standard errors by which one mode must predict better than the next to be told from it."""


@dataclass(frozen=True, eq=False)
class Shared:
    """The direction of an ablation."""

    side: str
    """`output` or `input`."""
    rank: int
    """k, the most common among the matrices."""
    scope: str
    """`one for all layers`, `one per layer`, or `one per matrix`."""
    common: float
    """Share of the directions' squared length in the best common k-dimensional space; 1 for one direction."""
    within: float | None
    """The same within layers, averaged over layers with several matrices; None where there are none."""
    neighbours: float | None
    """Mean |cos| of the first directions of neighbouring layers."""
    mode: str
    """The mode that predicts best over all matrices."""
    certainty: float
    """By how many standard errors it predicts better than the next."""
    runner_up: str | None
    directions: Tensor
    """`[k, d]` float32 orthonormal rows: the common space."""
    by_layer: dict[int, Tensor]
    """The same for every layer."""

    @property
    def keeps(self) -> str:
        """Which norms are kept, as far as the mode can be told from the next."""
        kept = {"column": "the norms of columns", "row": "the norms of rows"}.get(self.mode, "no norms")
        return kept if self.certainty >= CERTAIN else f"{kept}, but {self.runner_up} mode predicts as well"

    def at(self, layer: int | None) -> Tensor | None:
        """Return the directions that matrices of a layer should share, None when each has its own."""
        if self.scope == "one for all layers":
            return self.directions
        return self.by_layer.get(layer) if layer is not None and self.scope == "one per layer" else None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, without the vectors."""
        made = {k: v for k, v in vars(self).items() if k not in ("directions", "by_layer")}
        return {**made, "keeps": self.keeps}


def ablated(changes: Sequence[Change]) -> list[tuple[Change, Ablation]]:
    """Return the matrices on which the account of an ablation passes."""
    return [(c, c.ablation) for c in changes if c.told and c.ablation and c.ablation.explained >= EXPLAINS]


def common_span(frames: Sequence[Tensor], rank: int) -> tuple[Tensor, float]:
    """Return the k-dimensional space nearest to several, `[k, d]`, and the share of their squared length in it."""
    rows = torch.cat([frame.double() for frame in frames])
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    share = float(values[:rank].square().sum() / values.square().sum())
    return right[:rank].float(), share


def shared(changes: Sequence[Change]) -> Shared | None:
    """Return what the directions of the ablated matrices have in common; None without any."""
    every = ablated(changes)
    if not every:
        return None
    sides = [a.side for _, a in every]
    side = max(set(sides), key=sides.count)
    width = [a.directions.shape[1] for _, a in every if a.side == side]
    d = max(set(width), key=width.count)
    found = [(c, a) for c, a in every if a.side == side and a.directions.shape[1] == d]
    ranks = [a.rank for _, a in found]
    rank = max(set(ranks), key=ranks.count)
    span, common = common_span([a.directions for _, a in found], rank)
    layers: dict[int, list[Tensor]] = {}
    for change, made in found:
        if change.place.layer is not None:
            layers.setdefault(change.place.layer, []).append(made.directions)
    spans = {layer: common_span(frames, rank) for layer, frames in layers.items()}
    several = [share for layer, (_, share) in spans.items() if len(layers[layer]) > 1]
    within = sum(several) / len(several) if several else None
    mode, certainty, runner_up = _mode([change for change, _ in found])
    by_layer = {layer: frame for layer, (frame, _) in spans.items()}
    near = [abs(float(by_layer[a][0] @ by_layer[b][0])) for a, b in combinations(sorted(by_layer), 2) if b == a + 1]
    beside = sum(near) / len(near) if near else None
    return Shared(
        side, rank, _scope(common, within), common, within, beside, mode, certainty, runner_up, span, by_layer
    )


def _scope(common: float, within: float | None) -> str:
    """Say how far the directions are shared.

    What noise takes from the share within a layer of two matrices is about half of what it takes over many.
    """
    if within is not None and within >= SAME and within - common > TURNED + 2 * (1 - within):
        return "one per layer"
    if common >= SAME:
        return "one for all layers"
    return "one per layer" if within is not None and within >= SAME else "one per matrix"


def _mode(changes: Sequence[Change]) -> tuple[str, float, str | None]:
    """Choose the mode over all matrices.

    Two predictions that differ by δ miss by sums of squares that differ by ‖δ‖² when one is exact and the rest is
    rounding of standard deviation σ per element; the standard error of that difference is 2 σ ‖δ‖.
    """
    total = dict.fromkeys(MODES, 0.0)
    noise = 0.0
    for change in changes:
        made = change.ablation
        assert made is not None
        for mode in MODES:
            total[mode] += made.misses.get(mode, math.inf)
        noise = max(noise, change.sizes.rounding / (change.shape[0] * change.shape[1] * change.sizes.size**2))
    first, second = sorted(MODES, key=lambda mode: total[mode])[:2]
    if not math.isfinite(total[second]):
        return first, math.inf, None
    apart = max(0.0, total[second] - total[first])
    return first, math.sqrt(apart) / (2 * math.sqrt(noise)) if noise else math.inf, second
