"""Float64 and orthonormal rows: what the rest of the mathematics stands on."""

from __future__ import annotations

import torch
from torch import Tensor

from perpend.errors import RunFailed, UsageError

DEPENDENT = 1e-6
"""Rows whose new part is smaller than this share of the largest row are taken for linearly dependent."""


def double(x: Tensor) -> Tensor:
    """Return `x` in float64, on its own device, or on the CPU where the device has no float64 (Apple's MPS)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def working(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which activations and weights of `dtype` are edited: float64 for itself, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def orthonormalise(rows: Tensor) -> Tensor:
    """Return orthonormal rows with the same nested spans: row i spans, with the rows before it, what it did before.

    The signs are kept (QR with a positive diagonal), so one row is only divided by its norm. Differentiable.

    Args:
        rows: `[..., k, d]`, any float dtype, k at most d.

    Returns:
        `[..., k, d]` float64 on the device of `rows` (the CPU where it has no float64).

    Raises:
        RunFailed: the rows are zero, not finite or linearly dependent.
        UsageError: more rows than dimensions.
    """
    wide = double(rows)
    k, d = wide.shape[-2:]
    if not 1 <= k <= d:
        raise UsageError(f"{k} directions in {d} dimensions", valid=f"1 to {d}")
    size: Tensor = wide.norm(dim=-1)
    largest = size.amax(dim=-1)
    if k == 1:
        sound = torch.isfinite(largest) & (largest > 0)
        result = wide / size[..., None]
    else:
        q, r = torch.linalg.qr(wide.mT)
        diagonal = r.diagonal(dim1=-2, dim2=-1)
        sound = torch.isfinite(largest) & (diagonal.abs().amin(dim=-1) > DEPENDENT * largest)
        result = q.mT * torch.where(diagonal < 0, -1.0, 1.0).to(q)[..., None]
    if not bool(sound.all()):
        raise RunFailed("the directions are zero, not finite or linearly dependent")
    return result
