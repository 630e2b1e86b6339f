"""Hypothesis strategies: writers with uneven rows, zero rows and columns, square and not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

FACTORS = (-0.5, 0.0, 0.25, 1.0, 1.5)
MODES = ("plain", "column", "row")
few = settings(max_examples=40, deadline=None)


@dataclass
class Case:
    """A writer y = W x + b, orthonormal directions and an input, all float64."""

    weight: Tensor
    bias: Tensor
    directions: Tensor
    x: Tensor


@st.composite
def cases(draw: st.DrawFn, zeros: bool = True) -> Case:
    """Draw a writer with d_out and d_in above k; half of them square, rows uneven by up to e^5."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k = draw(st.integers(1, 3))
    d_out = draw(st.integers(k + 4, 24))
    d_in = d_out if draw(st.booleans()) else draw(st.integers(k + 4, 24))
    weight = randn(d_out, d_in) * (draw(st.floats(0, 2)) * randn(d_out, 1)).clamp(-2.5, 2.5).exp()
    if zeros:
        weight[:, sorted(draw(st.sets(st.integers(0, d_in - 1), max_size=2)))] = 0
        weight[sorted(draw(st.sets(st.integers(0, d_out - 1), max_size=2)))] = 0
    v = torch.linalg.qr(randn(d_out, k)).Q.mT.float().double()
    v = torch.linalg.qr(v.mT).Q.mT
    return Case(weight, randn(d_out), v, randn(5, d_in))


def largest_terms(case: Case, scale: Tensor | None = None) -> Tensor:
    """Return the size of the numbers that are summed up on the way to y, the unit of a rounding error."""
    x = case.x if scale is None else case.x * scale.double()
    return (x.abs() @ case.weight.abs().mT + case.bias.abs()).norm()
