"""Means of residuals, gathered while the prompts stream by.

A `ResidualFitter` takes batches and keeps sums; `stats()` freezes them as a `ResidualStats`. No residual is kept, so
a thousand prompts need no more memory than one.

Layers count from 0: index l stands for the residual stream on the *output of layer l*, before the final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from perpend.core.linear import double, working
from perpend.errors import RunFailed, UsageError

TOP = 4
"""Dimensions that count as the massive ones."""


def winsorize(residuals: Tensor, q: float) -> Tensor:
    """Clip each residual at the q-quantile of its own magnitudes, prompt by prompt and layer by layer.

    A handful of massive dimensions, hundreds of times larger than the rest, would otherwise decide every mean.

    Args:
        residuals: `[..., d]`, any float dtype.
        q: Quantile of |x| over the d dimensions, 0 to 1, interpolated linearly as `torch.quantile` does.

    Returns:
        `[..., d]` on the same device; float64 stays, all else becomes float32.

    Raises:
        UsageError: q outside 0 to 1.
    """
    if not 0 <= q <= 1:
        raise UsageError(f"winsorize quantile {q}", valid="0 to 1, such as 0.995")
    x = residuals.to(working(residuals.dtype))
    place = q * (x.shape[-1] - 1)
    below = int(place)
    largest = x.abs().topk(x.shape[-1] - below, dim=-1).values
    low, high = largest[..., -1:], largest[..., -2:][..., :1]
    bound = low + (place - below) * (high - low) if place > below else low
    return torch.minimum(torch.maximum(x, -bound), bound)


def top_share(vectors: Tensor, top: int = TOP) -> Tensor:
    """Return the share of ‖r‖² that lies in the `top` largest dimensions: `[..., d]` to float64 `[...]`."""
    square = double(vectors) ** 2
    return square.topk(min(top, square.shape[-1]), dim=-1).values.sum(-1) / square.sum(-1).clamp(min=1e-300)


@dataclass(frozen=True, eq=False)
class ResidualStats:
    """What one class of prompts looks like in the residual stream; all tensors float64 on the CPU."""

    count: int
    """Number of prompts."""
    mean: Tensor
    """`[L, d]` mean residual."""
    half_means: Tensor
    """`[2, L, d]` means over the prompts of even and of odd place; zero where a half is empty."""
    norm: Tensor
    """`[L]` mean L2 norm of the residuals."""
    top4_share: Tensor
    """`[L]` share of ‖mean‖² in its four largest dimensions."""
    second_moment: Tensor | None = None
    """`[L, d, d]` mean of r rᵀ, not centred; None unless it was asked for."""

    @property
    def n_layers(self) -> int:
        """Number of layers L."""
        return self.mean.shape[0]

    @property
    def hidden_size(self) -> int:
        """Size d of the residual stream."""
        return self.mean.shape[1]


class ResidualFitter:
    """Streaming sums of the residuals of one class of prompts.

    The sums are float64 and live on the device of the first batch (on the CPU where it has no float64).

    Example:
        >>> import torch
        >>> fitter = ResidualFitter(n_layers=2, hidden_size=8)
        >>> for batch in torch.ones(6, 2, 8).split(2):
        ...     fitter.update(batch)
        >>> fitter.stats().count
        6
    """

    def __init__(
        self, n_layers: int, hidden_size: int, *, winsorize: float | None = None, second_moment: bool = False
    ) -> None:
        """Start with nothing seen.

        Args:
            n_layers: Number of layers L.
            hidden_size: Size d of the residual stream.
            winsorize: Quantile at which every residual is clipped first, None for not at all.
            second_moment: Also sum r rᵀ, which takes L·d² float64 numbers.
        """
        self.n_layers, self.hidden_size, self.winsorize = n_layers, hidden_size, winsorize
        self._sums: dict[str, Tensor] = {
            "counts": torch.zeros(2, dtype=torch.int64),
            "sum": torch.zeros(2, n_layers, hidden_size, dtype=torch.float64),
            "norm": torch.zeros(n_layers, dtype=torch.float64),
            "broken": torch.zeros(n_layers, dtype=torch.int64),
        }
        if second_moment:
            self._sums["outer"] = torch.zeros(n_layers, hidden_size, hidden_size, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Number of prompts seen."""
        return int(self._sums["counts"].sum())

    def update(self, residuals: Tensor) -> None:
        """Take in a batch; prompts go to the two halves in turn, across batches.

        Args:
            residuals: `[B, L, d]`, any float dtype, any device.

        Raises:
            UsageError: another shape.
        """
        if residuals.ndim != 3 or tuple(residuals.shape[1:]) != (self.n_layers, self.hidden_size):
            raise UsageError(
                f"residuals of shape {list(residuals.shape)}", valid=f"[prompts, {self.n_layers}, {self.hidden_size}]"
            )
        x = residuals.detach() if self.winsorize is None else winsorize(residuals.detach(), self.winsorize)
        if x.device.type == "mps":  # it has no float64
            x = x.cpu()
        if not self.count:
            self._sums = {name: total.to(x.device) for name, total in self._sums.items()}
        first = self.count % 2
        parts = {first: x[0::2], 1 - first: x[1::2]}
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=working(x.dtype)).double()
        batch = {
            "counts": torch.tensor([len(parts[0]), len(parts[1])]),
            "sum": torch.stack([parts[half].sum(0, dtype=torch.float64) for half in (0, 1)]),
            "norm": norm.sum(0),
            "broken": (~torch.isfinite(norm)).sum(0),
        }
        if "outer" in self._sums:
            batch["outer"] = torch.einsum("bli,blj->lij", double(x), double(x))
        self._add(batch)

    def _add(self, other: Mapping[str, Tensor]) -> None:
        for name, total in self._sums.items():
            total += other[name].to(total.device)

    def merge(self, other: ResidualFitter) -> None:
        """Add what another fitter has seen, such as another process of a data-parallel run; halves stay halves.

        Raises:
            UsageError: the two were set up differently.
        """
        self._check(other.state_dict())
        if self.winsorize != other.winsorize:
            raise UsageError(f"sums clipped at {other.winsorize} and at {self.winsorize} do not add up")
        self._add(other._sums)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the sums on the CPU, from which `load_state_dict` goes on."""
        return {name: total.cpu().clone() for name, total in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from sums that `state_dict` returned.

        Raises:
            UsageError: they belong to a fitter that was set up differently.
        """
        self._check(state)
        self._sums = {name: state[name].clone() for name in self._sums}

    def _check(self, state: Mapping[str, Tensor]) -> None:
        mine = {name: tuple(total.shape) for name, total in self._sums.items()}
        theirs = {name: tuple(total.shape) for name, total in state.items()}
        if mine != theirs:
            raise UsageError(f"sums of another fitter: {theirs}", valid=str(mine))

    def stats(self) -> ResidualStats:
        """Freeze the sums.

        Raises:
            UsageError: no prompts were seen.
            RunFailed: some residual was NaN or infinite; names the first such layer.
        """
        counts, total, norm, broken = (self._sums[k].cpu() for k in ("counts", "sum", "norm", "broken"))
        if not self.count:
            raise UsageError("no prompts, so no mean residual")
        if bool(broken.any()):
            layer = int(broken.nonzero()[0])
            raise RunFailed(
                f"the residuals of {int(broken[layer])} of {self.count} prompts are not finite",
                where=f"layer {layer}",
                hint="bfloat16 or float32 instead of float16",
            )
        mean = total.sum(0) / self.count
        return ResidualStats(
            count=self.count,
            mean=mean,
            half_means=total / counts.clamp(min=1)[:, None, None],
            norm=norm / self.count,
            top4_share=top_share(mean),
            second_moment=self._sums["outer"].cpu() / self.count if "outer" in self._sums else None,
        )
