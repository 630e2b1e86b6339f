"""The size of a difference, its singular values, and what rounding alone would give.

Weights are kept in bfloat16 or float16, so that every difference has full rank: the rounding of the edited weights is
white noise on top of it. Rounding to the nearest number with spacing u is off by a uniform error of variance u²/12, so
what it adds to the squared norm is the sum of u²/12, and to the largest singular value at most about

    max_i √(Σ_j σ_ij²) + max_j √(Σ_i σ_ij²),

the bound of Bandeira and van Handel 2016 (https://arxiv.org/abs/1408.6185) on independent entries of variance σ_ij²,
whose smaller terms are covered by `MARGIN`. Singular values above it are taken for real.

Singular values and left vectors come from a randomised range finder with power iteration (Halko, Martinsson and Tropp
2011, https://arxiv.org/abs/0909.4061), column block by column block in float64, so that nothing but the two matrices
is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perpend.core.maps import blocks

MARGIN = 1.1
"""How far above the bound of rounding noise a singular value must lie to count."""
RANKS = (16, 72)
"""Singular values that are looked for; the second number only when all of the first count."""
OVERSAMPLE, ITERATIONS = 8, 2

Columns = Callable[[], Iterator[Tensor]]
"""Gives the columns of a matrix `[m, c]` block by block, float64, from the beginning each time."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Largest singular values of a matrix and their left vectors."""

    values: Tensor
    """`[r]` float64, descending."""
    left: Tensor
    """`[r, m]` float64 orthonormal rows."""


@dataclass(frozen=True, eq=False)
class Difference:
    """Sizes of two matrices W and W' and of their difference D = W' - W."""

    size: float
    """‖W‖."""
    energy: float
    """‖D‖²."""
    rounding: float
    """What rounding of W' to its dtype adds to ‖D‖²."""
    floor: float
    """Largest singular value that rounding alone gives."""
    changed: float
    """Share of the elements that differ."""
    finite: bool
    cosine: float
    """⟨W, W'⟩ / (‖W‖ ‖W'‖): what the two have in common, 0 where one of them is zero."""
    chance: float
    """Standard deviation of that cosine for matrices that know nothing of each other."""

    @property
    def moved(self) -> float:
        """‖D‖ / ‖W‖."""
        return math.sqrt(self.energy) / self.size if self.size else math.inf

    @property
    def beyond(self) -> float:
        """‖D‖² without what rounding added."""
        return max(0.0, self.energy - self.rounding)


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbouring numbers of `dtype` at the size of each element of `x` float64."""
    exponent = torch.frexp(torch.where(x == 0, torch.finfo(dtype).tiny, x)).exponent
    return torch.ldexp(torch.full_like(x, torch.finfo(dtype).eps / 2), exponent)


def difference(before: Tensor, after: Tensor) -> Difference:
    """Measure two matrices `[m, n]` of any float dtype.

    The cosine of W and a W' turned at random has variance 1 / mn, whatever the spectra; with the sizes of all elements
    kept and the signs of W' drawn, it is Σ w² w'² / (‖W‖² ‖W'‖²). The larger of the two is its `chance`.
    """
    rows = torch.zeros(before.shape[0], dtype=torch.float64)
    columns, size, energy, changed = 0.0, 0.0, 0.0, 0
    dot = made = both = 0.0
    for _, (w, new) in blocks(before, after):
        noise = spacing(new, after.dtype).square() / 12
        rows += noise.sum(1)
        columns = max(columns, float(noise.sum(0).max()))
        delta = new - w
        size, energy = size + float(w.square().sum()), energy + float(delta.square().sum())
        changed += int((delta != 0).sum())
        product = w * new
        dot, made = dot + float(product.sum()), made + float(new.square().sum())
        both += float(product.square().sum())
    floor = MARGIN * (math.sqrt(float(rows.max())) + math.sqrt(columns))
    finite = math.isfinite(energy) and math.isfinite(size)
    lengths = math.sqrt(size * made) if finite else 0.0
    cosine = dot / lengths if lengths else 0.0
    chance = max(1 / math.sqrt(before.numel()), math.sqrt(both) / lengths) if lengths else 1.0
    share = changed / before.numel()
    return Difference(math.sqrt(size), energy, float(rows.sum()), floor, share, finite, cosine, chance)


def spectrum(columns: Columns, shape: Sequence[int], rank: int = RANKS[0], seed: int = 0) -> Spectrum:
    """Return the largest singular values of a matrix `[m, n]` that is given by its columns.

    Args:
        columns: Its blocks of columns.
        shape: m and n.
        rank: How many.
        seed: Of the random start.
    """
    m, n = shape
    width = min(rank + OVERSAMPLE, m, n)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(m, width, generator=generator, dtype=torch.float64)
    for _ in range(ITERATIONS):
        product = torch.zeros_like(basis)
        for d in columns():
            product += d @ (d.mT @ basis)
        basis = torch.linalg.qr(product).Q
    gram = basis.new_zeros(width, width)
    for d in columns():
        part = basis.mT @ d
        gram += part @ part.mT
    squares, turn = torch.linalg.eigh(gram)
    order = torch.arange(width - 1, max(-1, width - 1 - rank), -1)
    return Spectrum(squares[order].clamp(min=0).sqrt(), (basis @ turn[:, order]).mT)


def of_difference(before: Tensor, after: Tensor, rank: int = RANKS[0]) -> Spectrum:
    """Return the largest singular values of W' - W."""

    def columns() -> Iterator[Tensor]:
        for _, (w, new) in blocks(before, after):
            yield new - w

    return spectrum(columns, before.shape, rank)


def whiteness(largest: float, energy: float, shape: tuple[int, int]) -> float:
    """Return σ₁ relative to that of independent entries of the same energy, σ (√m + √n); near 1 for white noise."""
    m, n = shape
    white = math.sqrt(energy / (m * n)) * (math.sqrt(m) + math.sqrt(n))
    return largest / white if white else 0.0
