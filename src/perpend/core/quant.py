"""Rounding to the block formats of llama.cpp, plainly and so that an edit survives it.

The formats keep 32 neighbours along the input axis as small whole numbers (codes) and a float16 scale, the largest of
the block at the end of the range (https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c). Weights
that lie on such a lattice already, as those trained for q4_0 do, are rounded *back* to it by a plain pass, and an edit
whose steps are smaller than half a code is lost.

`preserve` rounds an edited matrix T so that nothing of the error Q - T lies along the directions of the edit. Per
column, the codes that minimise ‖q - t‖² under V (q - t) = 0 are those of round(t - Vᵀμ) for a multiplier μ `[k]`, up
to the granularity of single codes; for one direction μ is found by moving codes in the order of what that costs per
progress, cheapest first, for several by doing so for one after the other. Single moves then take away what is left. In
every block the extreme keeps its code, and its value is one that the file's dtype holds exactly, so a later plain pass
finds the same scale and the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perpend.core.linear import double, orthonormalise
from perpend.errors import UsageError

Kind = Literal["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]

GROUP = 32
"""Neighbours along the input axis that share a scale."""
RANGES: dict[str, tuple[int, int]] = {"q4_0": (-8, 7), "q5_0": (-16, 15), "q8_0": (-127, 127)}
"""Codes of the formats without an offset."""
LEVELS: dict[str, int] = {"q4_1": 15, "q5_1": 31}
"""Largest code of the formats with an offset; the smallest is 0."""
LATTICE = 0.02
"""A plain pass that changes a matrix by less than this share of its norm finds it on the lattice: ordinary weights
change by 0.08 in q4_0, and weights of a lattice that are kept in bfloat16 by 0.002."""
LATTICE_8 = 0.0035
"""The same for q8_0: ordinary weights change by 0.005, and those of its lattice that are kept in bfloat16 by 0.002."""
COLUMNS = 1 << 19
"""Elements of a matrix that are rounded at a time."""
SWEEPS, MOVES = 6, 4
THRIFT = 1e-4
"""What a single move must take off the squared error along the directions, per squared error that it adds."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that the elements of a matrix can take: base + step · code."""

    step: Tensor
    """`[d_out, d_in]` float64, of either sign; 0 where there is only one value."""
    base: Tensor
    """`[d_out, d_in]` float64, the value of code 0."""
    codes: Tensor
    """`[d_out, d_in]` float64 whole numbers: the nearest codes."""
    held: Tensor
    """`[d_out, d_in]` bool: codes that must stay."""
    low: int
    high: int

    def nearest(self, wanted: Tensor) -> Tensor:
        """Return the codes nearest to values, those that are held unchanged."""
        step = torch.where(self.step != 0, self.step, 1.0)
        codes = torch.floor((wanted - self.base) / step + 0.5).clamp(self.low, self.high)
        return torch.where(self.held | (self.step == 0), self.codes, codes)

    def values(self, codes: Tensor) -> Tensor:
        """Return the values of codes."""
        return self.base + self.step * codes


@dataclass(frozen=True)
class Cost:
    """What rounding to a lattice cost, over any number of matrices.

    Attributes:
        own: ‖Q - T‖², summed, for the exact edited T and what was saved, Q.
        plain: The same for a plain pass.
        whole: ‖T‖², summed.
    """

    own: float = 0.0
    plain: float = 0.0
    whole: float = 0.0

    @classmethod
    def of(cls, target: Tensor, rounded: Tensor, kind: str) -> Cost:
        """Measure one matrix `[..., d_in]`, any float dtypes."""
        exact = double(target)
        found = (double(rounded) - exact, double(simulate(target, kind)) - exact, exact)
        return cls(*(float(x.square().sum()) for x in found))

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.own + other.own, self.plain + other.plain, self.whole + other.whole)

    def to_json(self) -> dict[str, float]:
        """Return both errors relative to the size of the exact edit: RMS error over RMS weight."""
        size = self.whole or 1.0
        return {"error": (self.own / size) ** 0.5, "plain_error": (self.plain / size) ** 0.5}


def require_groups(weight: Tensor, name: str = "") -> None:
    """Refuse a matrix whose rows cannot be cut into groups.

    Raises:
        UsageError: says the length.
    """
    if weight.shape[-1] % GROUP:
        raise UsageError(f"rows of {weight.shape[-1]} elements", where=name, valid=f"multiples of {GROUP}")


def simulate(weight: Tensor, kind: str) -> Tensor:
    """Return what a plain pass of llama.cpp makes of a matrix.

    Args:
        weight: `[..., d_in]`, any float dtype; d_in a multiple of 32 but for bf16.
        kind: q4_0, q4_1, q5_0, q5_1, q8_0, or bf16.

    Returns:
        `[..., d_in]` float32 on the device of `weight`, bit for bit what the quantised file holds.

    Raises:
        UsageError: an unknown kind, or rows that cannot be cut into groups.
    """
    if kind == "bf16":
        return weight.to(torch.bfloat16).float()
    if kind not in RANGES and kind not in LEVELS:
        raise UsageError(f"unknown type '{kind}'", valid=", ".join((*RANGES, *LEVELS, "bf16")))
    require_groups(weight)
    x = weight.detach().float().reshape(-1, GROUP)
    if kind in LEVELS:
        low, top = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        d = (top - low) / LEVELS[kind]
        codes = torch.trunc((x - low) * _inverse(d) + 0.5).clamp(0, LEVELS[kind])
        return (_half(d) * codes + _half(low)).reshape(weight.shape)
    least, most = RANGES[kind]
    d = _extreme(x) / least if kind != "q8_0" else x.abs().amax(-1, keepdim=True) / most
    scaled = x * _inverse(d)
    if kind == "q8_0":
        codes = scaled.sign() * torch.floor(scaled.abs() + 0.5)
    else:
        codes = torch.trunc(scaled + (0.5 - least)).clamp(0, most - least) + least
    return (_half(d) * codes).reshape(weight.shape)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1 / torch.where(d == 0, 1.0, d))


def _half(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(x.dtype)


def _extreme(groups: Tensor) -> Tensor:
    """Return the element of largest size of each group, sign included; of equals the first."""
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))


def moved(weight: Tensor, kind: str) -> float:
    """Return ‖Q(W) - W‖ / ‖W‖ for a plain pass Q: near 0 on the lattice of `kind`, 0 for a matrix of zeros.

    Args:
        weight: `[..., d_in]`, any float dtype.
        kind: As for `simulate`.
    """
    size = double(weight.detach()).norm()
    return float((double(simulate(weight, kind)) - double(weight.detach())).norm() / size) if size > 0 else 0.0


def on_lattice(share: float, kind: str) -> bool:
    """Whether a matrix that a plain pass changes by a share of its norm, see `moved`, lay on the lattice before."""
    return kind != "bf16" and share < (LATTICE_8 if kind == "q8_0" else LATTICE)


def grid(target: Tensor, kind: str, stored: torch.dtype = torch.float32) -> Grid:
    """Return the lattice that a plain pass would choose for a matrix, its extremes held.

    Args:
        target: `[d_out, d_in]` float64.
        kind: q4_0, q4_1, q5_0, q5_1 or q8_0.
        stored: Dtype in which the values are going to be kept; the extreme of each group is one of its numbers, and so
            survives. float32 also stands for a file that keeps codes and scales.

    Raises:
        UsageError: rows that cannot be cut into groups.
    """
    require_groups(target)
    x = target.reshape(target.shape[0], -1, GROUP)
    if kind in LEVELS:
        floor, top = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        low, high, base = 0, LEVELS[kind], _half(floor)
        step = _half((top - base) / high)
        ends = torch.where(x == floor, 0.0, torch.where(x == top, float(high), torch.nan))
    else:
        low, high = RANGES[kind]
        peak = _extreme(x)
        peak = peak.abs() if kind == "q8_0" else peak
        step = _half(peak.to(stored).double() / (high if kind == "q8_0" else low))
        base = torch.zeros_like(step)
        outer = torch.where(x == -peak, float(low), torch.nan) if kind == "q8_0" else torch.nan
        ends = torch.where(x == peak, float(high if kind == "q8_0" else low), outer)
    step, base, ends = ((t.expand_as(x)).reshape(target.shape) for t in (step, base, ends))
    free = Grid(step, base, torch.zeros_like(step), torch.zeros_like(step, dtype=torch.bool), low, high)
    codes = torch.where(ends.isnan() | (step == 0), free.nearest(target), ends)
    last = (codes == low) | ((codes == high) & (kind == "q8_0" or kind in LEVELS))
    return Grid(step, base, codes, last, low, high)


def preserve(target: Tensor, directions: Tensor, kind: str, stored: torch.dtype = torch.float32) -> Tensor:
    """Round a matrix to a lattice so that what it writes along directions stays.

    Args:
        target: `[d_out, d_in]` the exact edited matrix, any float dtype; d_in a multiple of 32.
        directions: `[k, d_out]` linearly independent rows.
        kind: q4_0, q4_1, q5_0, q5_1 or q8_0.
        stored: See `grid`.

    Returns:
        `[d_out, d_in]` float64 on the device of `target` (the CPU where it has no float64): values of the lattice. Kept
        in `stored`, a later `simulate` gives them back exactly; for q8_0 in bfloat16, whose eight bits cannot tell all
        its codes apart, but for single steps here and there.

    Raises:
        UsageError: rows that cannot be cut into groups, or directions of another size.
    """
    v = orthonormalise(directions.to(target.device))
    if target.ndim != 2 or v.shape[1] != target.shape[0]:
        raise UsageError(f"a matrix of shape {list(target.shape)}", valid=f"[{v.shape[1]}, d_in]")
    require_groups(target)
    result = torch.empty(target.shape, dtype=torch.float64, device=v.device)
    for columns in chunks(target):
        part = double(target[:, columns])
        lattice = grid(part, kind, stored)
        result[:, columns] = lattice.values(settle(part, v, lattice))
    return result


def chunks(matrix: Tensor) -> list[slice]:
    """Return slices of columns, whole groups each, that are rounded together."""
    width = max(GROUP, COLUMNS // max(1, matrix.shape[0]) // GROUP * GROUP)
    return [slice(start, start + width) for start in range(0, matrix.shape[1], width)]


def settle(target: Tensor, directions: Tensor, lattice: Grid) -> Tensor:
    """Return codes close to a matrix with no error along directions.

    Args:
        target: `[d_out, c]` float64.
        directions: `[k, d_out]` float64 orthonormal rows.
        lattice: Of the same shape as `target`.

    Returns:
        `[d_out, c]` float64 whole numbers.
    """
    shift = torch.zeros_like(target)  # Vᵀμ
    codes = lattice.codes
    for _ in range(1 if len(directions) == 1 else SWEEPS):
        for v in directions:
            codes, step = _along(target, target - shift, v, lattice)
            shift = shift + v[:, None] * step
    for _ in range(MOVES * len(directions)):
        if not _move(target, directions, lattice, codes):
            break
    return codes


def _along(target: Tensor, shifted: Tensor, v: Tensor, lattice: Grid) -> tuple[Tensor, Tensor]:
    """Move the cheapest codes of every column until the error along one direction is gone.

    Returns:
        Codes `[d_out, c]`, and by how much the multiplier of the direction grew, `[c]`.
    """
    codes = lattice.nearest(shifted)
    values = lattice.values(codes)
    left = v @ (values - target)
    size = lattice.step.abs()
    change = -torch.sign(v)[:, None] * torch.sign(left) * size
    turn = torch.where(lattice.step < 0, -torch.sign(change), torch.sign(change))
    progress = v.abs()[:, None] * size
    free = ~lattice.held & (progress > 0) & (codes + turn >= lattice.low) & (codes + turn <= lattice.high)
    price = (size / 2 + torch.sign(change) * (values - shifted)) / torch.where(progress > 0, v.abs()[:, None], 1.0)
    price, order = torch.where(free, price, torch.inf).sort(dim=0)
    gained = torch.where(price.isinf(), 0.0, progress.gather(0, order))
    taken = (gained.cumsum(0) - gained / 2 <= left.abs()) & ~price.isinf()
    last = torch.where(taken, price, 0.0).amax(0)
    chosen = torch.zeros_like(taken).scatter(0, order, taken)
    return torch.where(chosen, codes + turn, codes), torch.sign(left) * last


def _move(target: Tensor, directions: Tensor, lattice: Grid, codes: Tensor) -> bool:
    """Move in every column the one code that takes most off the error along the directions; in place.

    Returns:
        Whether there was one anywhere.
    """
    error = lattice.values(codes) - target
    slope = directions.mT @ (directions @ error)
    weight = directions.square().sum(0)[:, None]
    best = codes.new_zeros(codes.shape[1])
    row, turn = torch.zeros_like(best, dtype=torch.long), torch.zeros_like(best)
    for sign in (1.0, -1.0):
        change = sign * lattice.step
        gain = -(2 * slope + weight * change + THRIFT * (change + 2 * error)) * change
        free = ~lattice.held & (codes + sign >= lattice.low) & (codes + sign <= lattice.high)
        gain, at = torch.where(free, gain, 0.0).max(dim=0)
        better = gain > best
        best, row = torch.where(better, gain, best), torch.where(better, at, row)
        turn = torch.where(better, sign, turn)
    codes[row, torch.arange(codes.shape[1], device=codes.device)] += turn
    return bool((best > 0).any())
