"""How much of a direction a matrix has really lost: weights only, no forward pass."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from perpend.core.kinds import Mode
from perpend.core.linear import double
from perpend.core.maps import Geometry, blocks, inverse
from perpend.errors import UsageError

SILENT = 1e-14
"""A matrix that writes less than this share of its squared norm along the directions writes nothing along them."""


class Realised(NamedTuple):
    """How much of a direction is really missing."""

    weight: float
    """Realised λ; NaN when the matrix never wrote along the directions."""
    noise: float
    """‖what is left beyond (1 - λ) of the old‖ / ‖old‖ along the directions."""


def realised(
    before: Tensor, after: Tensor, directions: Tensor, gain: Tensor | None = None, *, mode: Mode = "plain"
) -> Realised:
    """Measure the weight factor on two matrices alone: 1 - slope of what W' writes along V on what W wrote.

    In plain mode that is 1 - <V W', V W> / ‖V W‖². The other modes scale columns or rows besides, and V W' is no
    multiple of V W; the scale is therefore measured first, on the part that the edit does not touch, and allowed for:

    - column: t_j is the slope of column j of (I - VᵀV) W' on that of W, and V W' is compared with V W diag(t).
    - row: s_i is the slope of row i of W' on that of W, both orthogonal to the rows of A = (V ⊘ n) W, and
      (V ⊘ n ⊘ s) W' is compared with A; a zero row takes no part in V.

    So in exact arithmetic the asked λ comes back in every mode. `mode="plain"` on a column- or row-edited matrix
    measures instead how much of the direction is left for whatever reason.

    Args:
        before: `[d_out, d_in]` W, any float dtype.
        after: `[d_out, d_in]` W', any float dtype: reloaded, rounded, dequantised.
        directions: `[k, d_out]` the directions of the edit, linearly independent rows.
        gain: `[d_out]` gain of the norm that follows; then V D is read in place of V, the leak into the residual
            stream. For directions made by `through_post_norm` both are the same: leave it None.
        mode: Mode of the edit.

    Returns:
        Realised λ and noise.

    Raises:
        UsageError: the shapes do not fit.
    """
    if before.shape != after.shape:
        raise UsageError(f"matrices of shape {list(before.shape)} and {list(after.shape)}", valid="the same shape")
    geometry = Geometry.of(before, directions, "row" if mode == "row" else "plain")
    v, after = geometry.directions, after.to(before.device)
    read = v if gain is None else v * double(gain).to(v.device)
    undone, takes = read, torch.eye(len(v), dtype=v.dtype, device=v.device)
    if geometry.norms is not None:
        unit = inverse(geometry.norms)
        undone = read * unit / _row_scale(before, after, v * unit)
        read = read * unit
        takes = v @ (v * (unit > 0)).mT  # what λ = 1 takes out of A: all of it, unless rows are zero
    dot = lost_square = unit_square = whole = 0.0
    for _, (w, w_new) in blocks(before, after):
        old, new = read @ w, undone @ w_new
        if mode == "column":
            old = old * _column_scale(w, w_new, v)
        lost, one = old - new, takes @ old
        dot, unit_square = dot + float((lost * one).sum()), unit_square + float(one.square().sum())
        lost_square, whole = (
            lost_square + float(lost.square().sum()),
            whole + float((read @ read.mT).trace() * w.square().sum()),
        )
    if unit_square <= SILENT * whole:
        return Realised(math.nan, 0.0)
    weight = dot / unit_square
    return Realised(weight, math.sqrt(max(0.0, lost_square / unit_square - weight * weight)))


def _slope(new: Tensor, old: Tensor, whole: Tensor) -> Tensor:
    """Return new/old, and 1 where the old is nothing but rounding of `whole`."""
    sound = old > SILENT * whole
    return torch.where(sound, new / torch.where(sound, old, 1.0), 1.0)


def _column_scale(w: Tensor, w_new: Tensor, v: Tensor) -> Tensor:
    """Return t `[c]`: the slope of the columns of W' on those of W, outside the span of V."""
    rest, rest_new = w - v.mT @ (v @ w), w_new - v.mT @ (v @ w_new)
    return _slope((rest_new * rest).sum(0), rest.square().sum(0), w.square().sum(0))


def _row_scale(before: Tensor, after: Tensor, read: Tensor) -> Tensor:
    """Return s `[d_out]`: the slope of the rows of W' on those of W, outside the rows of A = (V ⊘ n) W."""
    gram = read.new_zeros(len(read), len(read))
    mixed = square = read.new_zeros(read.shape[1])
    old = new = torch.zeros_like(read)  # A Wᵀ and A W'ᵀ
    for _, (w, w_new) in blocks(before, after):
        a = read @ w
        gram, old, new = gram + a @ a.mT, old + a @ w.mT, new + a @ w_new.mT
        mixed, square = mixed + (w_new * w).sum(1), square + w.square().sum(1)
    weighted = torch.linalg.pinv(gram, hermitian=True) @ old
    return _slope(mixed - (new * weighted).sum(0), square - (old * weighted).sum(0), square)
