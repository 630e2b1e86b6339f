"""The edit: an exact linear map on what a module writes to the residual stream, as hooks and as weights.

A writer is a linear map y = W x + b with W `[d_out, d_in]`, d_out the size of the residual stream. Taking the share λ
of k orthonormal directions V `[k, d_out]` out of it is, in every mode, one formula with two low-rank factors and two
scales:

    W' = s ⊙ (W - λ Pᵀ (R W)) ⊙ t,    b' = s ⊙ (b - λ Pᵀ (R b))    which is the same as
    x → t ⊙ x,    y → s ⊙ (y - λ Pᵀ (R y)),

so a candidate edit needs no change of weights: the hooks compute what the edited weights would.

plain:  R = P = V, no scales. vᵀW' = (1 - λ) vᵀW for every v in the span (directional ablation, Arditi et al. 2024,
    https://arxiv.org/abs/2406.11717, which is λ = 1).
column: R = P = V, t_j = ‖w_j‖ / ‖(I - λ VᵀV) w_j‖ = 1 / √(1 - (2λ - λ²) ‖V w_j‖² / ‖w_j‖²) for column w_j of W. Every
    column keeps its norm and at λ = 1 still nothing of the span is left, since t scales whole columns. The bias is no
    column of W and is edited plainly.
row:    rows of unit norm Ŵ = W ⊘ n are edited and brought back to norm 1: R = V ⊘ n, P = n ⊙ V and, with A = V Ŵ
    `[k, d_in]` and V_i the i-th column of V, s_i = 1 / ‖Ŵ_i - λ V_iᵀ A‖
    = 1 / √(1 - 2λ V_iᵀ A Ŵ_iᵀ + λ² V_iᵀ A Aᵀ V_i). Rescaling rows changes what they add up to along V, so part of
    the direction comes back; the mode exists for comparison with tools that do this.

The column and row forms for k > 1 are the same derivation: ‖w - λ VᵀV w‖² = ‖w‖² - (2λ - λ²) ‖V w‖² needs only that
the rows of V are orthonormal, and it does not depend on which orthonormal basis of the span is used.

Zero columns stay zero, and in row mode zero rows. A column that lies in the span but for one part in a thousand has
no norm worth keeping when λ is near 1: it is edited and not rescaled. Norms, scales and exported matrices are computed
in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from perpend.core.kinds import Mode
from perpend.core.linear import double, orthonormalise, working
from perpend.errors import UsageError

PARALLEL = 1e-6
"""A column or row of which less than this share of the squared norm survives is not rescaled."""
BLOCK = 64
"""Columns of a matrix that are widened at a time, whole groups of a lattice: few enough that they stay in the cache,
which makes an edit three to five times as fast as 1,024 columns do."""
BLOCK_GPU = 4096
"""Likewise on a GPU, where every block costs the start of its kernels."""

Factor = float | Tensor


@dataclass(frozen=True, eq=False)
class ModuleEdit:
    """What is taken out of one writer."""

    directions: Tensor
    """`[k, d_out]` orthonormal rows, kept in float32 on the CPU."""
    weight: float
    """Weight factor λ: 1 removes the directions, 0 changes nothing, more reverses, less than 0 strengthens."""
    mode: Mode = "plain"

    def __post_init__(self) -> None:
        v = self.directions.detach().to("cpu", torch.float32)
        if v.ndim != 2 or not 1 <= v.shape[0] <= v.shape[1]:
            raise UsageError(f"directions of shape {list(v.shape)}", valid="[k, d_out] with k at most d_out")
        if not (v @ v.mT - torch.eye(len(v))).abs().max() < 1e-4:  # also catches NaN
            raise UsageError("the directions are not orthonormal", hint="perpend.core.linear.orthonormalise")
        if not math.isfinite(self.weight):
            raise UsageError(f"weight factor {self.weight}", valid="a finite number")
        if self.mode not in get_args(Mode):
            raise UsageError(f"mode '{self.mode}'", valid=", ".join(get_args(Mode)))
        object.__setattr__(self, "directions", v)
        object.__setattr__(self, "weight", float(self.weight))


def _subtract(y: Tensor, read: Tensor, write: Tensor, factor: Factor) -> Tensor:
    """Return y - λ Pᵀ (R y) over the last dimension, in the working dtype of y."""
    dtype = working(y.dtype)
    z = y.to(dtype)
    read, write = read.to(z.device, dtype), write.to(z.device, dtype)
    lam = factor.to(z.device, dtype)[..., None] if isinstance(factor, Tensor) else factor
    if read.ndim == 2:
        return z - (lam * (z @ read.mT)) @ write
    return z - torch.einsum("...k,...kd->...d", lam * torch.einsum("...kd,...d->...k", read, z), write)


def plain_map(y: Tensor, directions: Tensor, factor: Factor) -> Tensor:
    """Return y - λ Vᵀ(V y): the plain edit on activations.

    Leading dimensions broadcast, so the rows of one batch can carry different candidates: y `[B, T, d]`, directions
    `[B, 1, k, d]`, factor `[B, 1]`. Differentiable in all three.

    Args:
        y: `[..., d]`, any float dtype.
        directions: `[..., k, d]` orthonormal rows.
        factor: λ, a float or `[...]`.

    Returns:
        `[..., d]` in the dtype of y; computed in float32, or float64 for float64.
    """
    return _subtract(y, directions, directions, factor).to(y.dtype)


@dataclass(frozen=True, eq=False)
class HookMap:
    """An edit of one module as it acts on activations: x → `scale(x)` before the module, y → `apply(y)` after it."""

    read: Tensor
    """`[k, d_out]` R: what is read from y."""
    write: Tensor
    """`[k, d_out]` P: what is subtracted for it."""
    factor: Factor
    """λ: a float, or a 0-dimensional tensor to differentiate in."""
    input_scale: Tensor | None = None
    """`[d_in]` t, column mode only."""
    output_scale: Tensor | None = None
    """`[d_out]` s, row mode only."""

    @classmethod
    def of(cls, weight: Tensor | None, edit: ModuleEdit) -> HookMap:
        """Return the map that makes a module with this matrix answer as if `edit_weight` had been applied.

        Args:
            weight: `[d_out, d_in]`, any float dtype; plain mode does not need it.
            edit: What is taken out.

        Raises:
            UsageError: the shapes do not fit, or the mode needs a matrix and there is none.
        """
        mode: Mode = edit.mode if edit.weight else "plain"
        made = Geometry.of(weight, edit.directions, mode).at(edit.weight)
        return made.to("cpu") if weight is None else made.to(weight.device, working(weight.dtype))

    @property
    def is_identity(self) -> bool:
        """Whether λ is the number 0, so that nothing need be hooked."""
        return not isinstance(self.factor, Tensor) and self.factor == 0

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> HookMap:
        """Return the map with its tensors on a device, in the dtype in which it is to compute (float32 or float64)."""

        def move(x: Tensor) -> Tensor:
            return x.to(dtype).to(device)

        scales = [None if x is None else move(x) for x in (self.input_scale, self.output_scale)]
        return HookMap(move(self.read), move(self.write), self.factor, *scales)

    def scale(self, x: Tensor) -> Tensor:
        """Return t ⊙ x for the module's input `[..., d_in]`, in its dtype; x itself outside column mode."""
        return x if self.input_scale is None else _scaled(x.to(working(x.dtype)), self.input_scale).to(x.dtype)

    def apply(self, y: Tensor) -> Tensor:
        """Return the edited output for the module's output `[..., d_out]`, bias included, in its dtype."""
        if self.is_identity:
            return y
        z = _subtract(y, self.read, self.write, self.factor)
        return (z if self.output_scale is None else _scaled(z, self.output_scale)).to(y.dtype)

    def edited(self, columns: Tensor, place: slice = slice(None)) -> Tensor:
        """Return columns of the edited matrix, s ⊙ (W - λ Pᵀ (R W)) ⊙ t.

        Args:
            columns: `[d_out, c]` columns of W, in the map's dtype.
            place: Where in W they are, for the input scale.
        """
        w = torch.addmm(columns, self.write.mT, self.factor * (self.read @ columns), alpha=-1)
        w = w if self.output_scale is None else w * self.output_scale[:, None]
        return w if self.input_scale is None else w * self.input_scale[place]


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale.to(x.device, x.dtype)


def blocks(*matrices: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Yield slices of columns and those columns of each matrix, in float64."""
    width = matrices[0].shape[1]
    size = BLOCK if matrices[0].device.type == "cpu" else BLOCK_GPU
    for start in range(0, width, size):
        columns = slice(start, min(start + size, width))
        yield columns, tuple(double(m.detach()[:, columns]) for m in matrices)


@dataclass(frozen=True, eq=False)
class Geometry:
    """What an edit needs to know of a matrix, whatever the weight factor: gathered once, then O(d) per candidate.

    All tensors are float64 on the matrix's device (on the CPU where it has no float64).
    """

    directions: Tensor
    """`[k, d_out]` V, orthonormal to float64 precision."""
    share: Tensor | None = None
    """`[d_in]` column mode: ‖V w_j‖² / ‖w_j‖², 0 for a zero column."""
    norms: Tensor | None = None
    """`[d_out]` row mode: n, 0 for a zero row."""
    linear: Tensor | None = None
    """`[d_out]` row mode: V_iᵀ A Ŵ_iᵀ."""
    square: Tensor | None = None
    """`[d_out]` row mode: V_iᵀ A Aᵀ V_i, 0 for a zero row."""

    @classmethod
    def of(cls, weight: Tensor | None, directions: Tensor, mode: Mode) -> Geometry:
        """Gather it from a matrix; differentiable in `directions`.

        Args:
            weight: `[d_out, d_in]`, any float dtype; plain mode does not need it.
            directions: `[k, d_out]` linearly independent rows.
            mode: How the directions will be taken out.

        Raises:
            UsageError: the shapes do not fit, or the mode needs a matrix and there is none.
        """
        if weight is None:
            if mode != "plain":
                raise UsageError(f"{mode} mode needs the module's matrix", valid="plain mode")
            return cls(orthonormalise(directions))
        if weight.ndim != 2 or weight.shape[0] != directions.shape[-1]:
            raise UsageError(
                f"a matrix of shape {list(weight.shape)} for directions of size {directions.shape[-1]}",
                valid=f"[{directions.shape[-1]}, d_in]",
            )
        v = orthonormalise(directions.to(weight.device))
        if mode == "plain":
            return cls(v)
        return cls._of_columns(weight, v) if mode == "column" else cls._of_rows(weight, v)

    @classmethod
    def _of_columns(cls, weight: Tensor, v: Tensor) -> Geometry:
        parts = [((v @ w).square().sum(0), w.square().sum(0)) for _, (w,) in blocks(weight)]
        along, whole = (torch.cat(x) for x in zip(*parts, strict=True))
        return cls(v, share=along / torch.where(whole > 0, whole, 1.0))

    @classmethod
    def _of_rows(cls, weight: Tensor, v: Tensor) -> Geometry:
        norms = torch.zeros(weight.shape[0], dtype=torch.float64, device=v.device)
        for _, (w,) in blocks(weight):
            norms += w.square().sum(1)
        norms = norms.sqrt()
        norms = torch.where(norms > 1e-30 * norms.max(), norms, 0.0)
        unit = inverse(norms)
        gram, cross = v.new_zeros(len(v), len(v)), v.new_zeros(v.shape)  # A Aᵀ and A Ŵᵀ
        for _, (w,) in blocks(weight):
            a = (v * unit) @ w
            gram = gram + a @ a.mT
            cross = cross + (a @ w.mT) * unit
        square = torch.einsum("ki,kl,li->i", v, gram, v)
        return cls(v, norms=norms, linear=(v * cross).sum(0), square=torch.where(norms > 0, square, 0.0))

    def at(self, factor: Factor) -> HookMap:
        """Return the map of a weight factor, in float64; differentiable in a 0-dimensional tensor."""
        v = self.directions
        lam = double(factor).to(v.device) if isinstance(factor, Tensor) else factor
        if self.share is not None:
            return HookMap(v, v, factor, input_scale=_rescale(1 - lam * (2 - lam) * self.share))
        if self.norms is not None and self.linear is not None and self.square is not None:
            scale = _rescale(1 - 2 * lam * self.linear + lam * lam * self.square)
            return HookMap(v * inverse(self.norms), v * self.norms, factor, output_scale=scale)
        return HookMap(v, v, factor)


def inverse(norms: Tensor) -> Tensor:
    """Return 1/n, and 0 where n is 0."""
    return torch.where(norms > 0, 1 / torch.where(norms > 0, norms, 1.0), 0.0)


def _rescale(survives: Tensor) -> Tensor:
    """Return 1/√x for the share x of a squared norm that survives, and 1 where hardly any does."""
    return torch.where(survives > PARALLEL, survives, 1.0).rsqrt()


def edit_weight(weight: Tensor, edit: ModuleEdit) -> Tensor:
    """Return the edited matrix W'.

    Args:
        weight: `[d_out, d_in]`, any float dtype, any device.
        edit: What is taken out.

    Returns:
        `[d_out, d_in]` float32 (float64 for float64) on the device of `weight`, computed in float64 block by block
        and rounded once; with λ = 0, `weight` itself.

    Raises:
        UsageError: the shapes do not fit.
    """
    if edit.weight == 0:
        return weight
    made = Geometry.of(weight, edit.directions, edit.mode).at(edit.weight)
    result = torch.empty(weight.shape, dtype=working(weight.dtype), device=weight.device)
    for columns, (w,) in blocks(weight):
        result[:, columns] = made.edited(w, columns).to(result.dtype)
    return result


def edit_bias(bias: Tensor, edit: ModuleEdit, weight: Tensor | None = None) -> Tensor:
    """Return the edited bias b', so that hooks on the whole output W x + b are the same as edited weights.

    Args:
        bias: `[d_out]`, any float dtype.
        edit: What is taken out.
        weight: `[d_out, d_in]` the matrix before the edit; only row mode needs it.

    Returns:
        `[d_out]` float32 (float64 for float64); with λ = 0, `bias` itself.

    Raises:
        UsageError: row mode without the matrix.
    """
    if edit.weight == 0:
        return bias
    mode: Mode = edit.mode if edit.mode == "row" else "plain"
    made = Geometry.of(weight if mode == "row" else None, edit.directions.to(bias.device), mode).at(edit.weight)
    return made.apply(double(bias.detach())).to(working(bias.dtype)).to(bias.device)


def low_rank(weight: Tensor, edit: ModuleEdit) -> tuple[Tensor, Tensor]:
    """Return a plain edit as an adapter: W' = W + B A.

    Args:
        weight: `[d_out, d_in]`, any float dtype.
        edit: What is taken out.

    Returns:
        B `[d_out, k]` and A `[k, d_in]`, float32 (float64 for float64). An adapter of this form leaves a bias as it is.

    Raises:
        UsageError: the mode scales columns or rows, which is no low-rank change.
    """
    if edit.mode != "plain":
        raise UsageError(f"an edit in {edit.mode} mode has no low-rank form", valid="plain mode")
    v = Geometry.of(weight, edit.directions, edit.mode).directions
    a = torch.cat([v @ w for _, (w,) in blocks(weight)], dim=1)
    dtype = working(weight.dtype)
    return (-edit.weight * v.mT).to(dtype).to(weight.device), a.to(dtype).to(weight.device)


def through_post_norm(directions: Tensor, gain: Tensor) -> Tensor:
    """Return the directions to take out before a norm so that `directions` are missing after it.

    Where the residual stream receives D·RMSnorm(y), D = diag(gain), the span of D v has to leave y: V D (I - UᵀU) = 0
    for U = orthonormalise(V D).

    Args:
        directions: `[k, d]` orthonormal rows in the residual stream.
        gain: `[d]` what the norm multiplies with, 1 + γ or γ by family.

    Returns:
        `[k, d]` float32 orthonormal rows in the module's output space.

    Raises:
        RunFailed: the gain blanks out a direction.
    """
    rows = double(directions)
    return orthonormalise(rows * double(gain).to(rows.device)).float()
