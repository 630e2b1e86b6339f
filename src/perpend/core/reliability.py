"""How far a measured direction can be trusted, and how alike the directions of two layers are."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expected_cosine(split_half: float) -> float:
    """Return the cosine expected between a mean difference and the one that endless prompts would give.

    With c the cosine between the mean differences of two halves of the prompts, that is √(2c / (1 + c)): each half is
    the true vector plus noise, c = ‖true‖² / (‖true‖² + noise²), and the whole has half the noise² of a half. It is the
    square root of the Spearman-Brown reliability (Spearman 1910, Brown 1910). 0 for c ≤ 0: nothing but noise.
    """
    return math.sqrt(2 * split_half / (1 + split_half)) if split_half > 0 else 0.0


def cosines(vectors: Tensor) -> list[list[float]]:
    """Return the cosine between the first directions of every two layers.

    Args:
        vectors: `[L, k, d]` unit rows, as `Directions.vectors`.

    Returns:
        L rows of L numbers from -1 to 1, to four decimals.
    """
    first = vectors[:, 0].double()
    found = (first @ first.mT).clamp(-1, 1)
    return [[round(float(x), 4) for x in row] for row in torch.where(found.abs() < 5e-5, 0.0, found)]
