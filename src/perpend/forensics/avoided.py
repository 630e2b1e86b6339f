"""Which directions the writers of neighbouring layers write least, when there is none to ask for.

Each matrix W `[d, n]` counts by W Wᵀ scaled to trace d, and those of a window of layers are averaged. The eigenvectors
of the last r eigenvalues are the directions along which the window writes least. A matrix has such directions by
nature, so what counts is the gap: the last of the r eigenvalues relative to the next one up. An edit leaves (1 - λ)² of
what was written there, whatever its rank; the spectrum of random matrices ends at an edge, where neighbours are alike.

How wide a window should be depends on the edit. Where a weight factor passes 1, one or two layers write nothing along
the direction and their neighbours much of it, so a wide window hides it; where it stays at 0.5 throughout, the edge of
a wide window is sharper and shows it. So several widths are looked at; in short windows attention and MLP each alone
too, as they may have weight factors of their own. Not in long ones: the MLPs of half an untouched model were seen to
avoid a direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from perpend.errors import UsageError
from perpend.forensics.audit import Writers
from perpend.progress import track

SHORT = (1, 3)
"""Layers of the short windows."""
LONG = 5
"""The fewest layers that a long window, half the model and all of it, may have."""
AVOIDED, AVOIDED_LONG = 0.25, 0.5
"""Directions are avoided when their eigenvalues are below this share of the next; in short windows and in long ones.

Of untouched models the least seen are 0.41 and 0.89 (docs/forensics.md).
"""
RANKS = 4
"""The most directions that are looked for together."""
COLUMNS = 2
"""A window is looked at when its matrices have this many times d columns together.

With fewer the spectrum of random matrices ends at or near 0, where neighbours differ by any factor.
"""
ITERATIONS, GUARD = 6, 7
"""Of the block Krylov iteration for the last eigenvalues, and vectors beyond those that are asked for."""
SHIFT = 1e-6
"""Added to every eigenvalue, whose mean is 1, so that a direction that nothing is written along can be divided by."""


@dataclass(frozen=True, eq=False)
class Avoided:
    """The directions that the writers of some neighbouring layers write least."""

    layers: tuple[int, int]
    """First and last layer."""
    component: str | None
    """`attention` or `mlp`; None for all writers of these layers together."""
    ratio: float
    """The last eigenvalues, the largest of them, relative to the next: mean squares of what is written."""
    bound: float
    """Below this they count as avoided."""
    written: float
    """Root mean of the last eigenvalues: what `Written.written` would be on average."""
    directions: Tensor
    """`[r, d]` float32, orthonormal."""

    @property
    def rank(self) -> int:
        """How many directions."""
        return len(self.directions)

    @property
    def found(self) -> bool:
        """Whether they are avoided."""
        return self.ratio < self.bound

    def covers(self, layer: int) -> bool:
        """Return whether the layer is one of them."""
        return self.layers[0] <= layer <= self.layers[1]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, without the vectors."""
        return {
            "layers": list(self.layers),
            "component": self.component,
            "rank": self.rank,
            "ratio": self.ratio,
            "bound": self.bound,
            "found": self.found,
            "written": self.written,
        }


@dataclass(eq=False)
class Sum:
    """The matrices of one kind, added up."""

    gram: Tensor | float = 0.0
    """`[d, d]` float32, Σ W Wᵀ d / ‖W‖²."""
    matrices: int = 0
    columns: int = 0

    def add(self, other: Sum) -> None:
        """Add those of another sum."""
        self.gram = self.gram + other.gram
        self.matrices += other.matrices
        self.columns += other.columns


@dataclass(eq=False)
class Window:
    """Neighbouring layers, whose matrices are added up as they are read."""

    first: int
    last: int
    bound: float
    sums: dict[str, Sum] = field(default_factory=dict)

    def add(self, layer: dict[str, Sum]) -> None:
        """Add a layer's."""
        for component, part in layer.items():
            self.sums.setdefault(component, Sum()).add(part)

    def told(self) -> Iterator[Avoided]:
        """Yield what all its matrices avoid, and in a short window those of one kind where there are several."""
        kinds: dict[str | None, list[Sum]] = {None: list(self.sums.values())}
        if len(self.sums) > 1 and self.bound == AVOIDED:
            kinds.update({component: [part] for component, part in self.sums.items()})
        for component, parts in kinds.items():
            whole = Sum()
            for part in parts:
                whole.add(part)
            if isinstance(whole.gram, Tensor) and whole.columns >= COLUMNS * len(whole.gram):
                yield self._least(component, whole.gram / whole.matrices)

    def _least(self, component: str | None, gram: Tensor) -> Avoided:
        living = gram.diagonal().nonzero().flatten()  # a dimension that no matrix writes is a dead one, not an edit
        values, vectors = least(gram[living][:, living].double(), RANKS + 1)
        ratios = [float(low / high) if high > 0 else 1.0 for low, high in pairwise(values)]
        below = [r for r, ratio in enumerate(ratios) if ratio < self.bound]
        r = below[-1] if below else min(range(len(ratios)), key=ratios.__getitem__, default=0)
        directions = torch.zeros(r + 1, len(gram))
        directions[:, living] = vectors[:, : r + 1].mT.float()
        written = math.sqrt(float(values[: r + 1].mean()))
        ratio = ratios[r] if ratios else 1.0
        return Avoided((self.first, self.last), component, ratio, self.bound, written, directions)


def windows(n: int) -> list[Window]:
    """Return the windows of a model of n layers: short ones at every layer, half the model and all of it."""
    made = []
    for size in sorted({min(size, n) for size in SHORT}):
        made += [Window(first, first + size - 1, AVOIDED) for first in range(n - size + 1)]
    half = n // 2
    if half >= LONG:
        made += [Window(first, first + half - 1, AVOIDED_LONG) for first in range(0, n - half + 1, max(1, half // 2))]
        made.append(Window(0, n - 1, AVOIDED_LONG))
    return made


def least(gram: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the last eigenvalues of a positive semidefinite matrix, by block Krylov iteration of its inverse.

    Args:
        gram: `[d, d]` float64 of mean eigenvalue about 1.
        k: How many.

    Returns:
        `[k]` rising, none below 0, and `[d, k]` their eigenvectors; fewer where d is less.
    """
    d, block = len(gram), k + GUARD
    factor, failed = torch.linalg.cholesky_ex(gram + SHIFT * torch.eye(d, dtype=gram.dtype))
    if d <= ITERATIONS * block or failed:
        values, vectors = torch.linalg.eigh(gram)
        return values[:k].clamp_min(0), vectors[:, :k]
    part = torch.randn(d, block, generator=torch.Generator().manual_seed(0), dtype=gram.dtype)
    basis = part[:, :0]
    for _ in range(ITERATIONS):
        for _ in range(2):  # once more, as the first pass leaves rounding of what was large
            part = torch.linalg.qr(part - basis @ (basis.mT @ part)).Q
        basis = torch.cat([basis, part], 1)
        part = torch.cholesky_solve(part, factor)
    values, inner = torch.linalg.eigh(basis.mT @ gram @ basis)
    return values[:k].clamp_min(0), basis @ inner[:, :k]


def _layers(writers: Writers) -> Iterator[tuple[int, dict[str, Sum]]]:
    """Yield the sums of every layer, by component."""
    d = writers.anatomy.hidden_size
    ordered = sorted(writers.all(), key=lambda found: found[0].layer)
    for layer, found in groupby(track(ordered, "look for avoided directions"), key=lambda found: found[0].layer):
        sums: dict[str, Sum] = {}
        for writer, pieces in found:
            for piece in pieces:
                matrix = writers.read(piece)
                gram = torch.zeros(d, d)
                for start in range(0, matrix.shape[1], 4096):
                    part = matrix[:, start : start + 4096].float()
                    gram += part @ part.mT
                trace = float(gram.trace())
                if not math.isfinite(trace):
                    raise UsageError("weights that are not finite", where=piece.entry.name)
                if trace:
                    sums.setdefault(writer.component, Sum()).add(Sum(gram * (d / trace), 1, matrix.shape[1]))
        yield layer, sums


@torch.no_grad()
def avoided(writers: Writers) -> list[Avoided]:
    """Look for directions that the writers of neighbouring layers avoid together.

    Returns:
        One per window and kind of writer: layer by layer, three by three, and, of all writers together, halves of the
        model and all of it.

    Raises:
        UsageError: weights that are not finite.
    """
    waiting = windows(writers.anatomy.n_layers)
    found: list[Avoided] = []
    for layer, sums in _layers(writers):
        for window in waiting:
            if window.first <= layer <= window.last:
                window.add(sums)
        for window in [window for window in waiting if window.last <= layer]:
            found += window.told()
        waiting = [window for window in waiting if window.last > layer]
    for window in waiting:
        found += window.told()  # the last layers may hold no writer
    return found


def most(search: Iterable[Avoided]) -> Avoided | None:
    """Return the window that says most: one that is found before others, one of all writers before one of a kind."""
    return min(
        search, key=lambda w: (not w.found, w.found and w.component is not None, w.ratio / w.bound), default=None
    )
