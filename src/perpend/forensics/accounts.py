"""Accounts of how one matrix became another, each of which predicts the other and is held to its prediction.

A directional ablation is W' = s ⊙ (W - λ Pᵀ(R W)) ⊙ t (`perpend.core.maps`): given the directions and λ, every
element of W' is determined, scales included. So an account has k·m + 1 unknowns for m·n numbers, and what it explains
is 1 - ‖W' - prediction‖² / ‖W' - W‖², rounding allowed for on both sides.

How the directions are found without being told: they are the left singular vectors of the difference after the scales
have been undone, which takes a few rounds, since the scales in turn depend on the directions.

plain: of W' - W.
column: of W' diag(1/t) - W; t_j is the slope of column j of W' on that of W, off the directions.
row: of (W' ⊘ n) ⊘ s - W ⊘ n with row norms n; s_i is the slope of row i, off what the directions read.
weighted: of (W' - W) ⊘ n: a direction found on rows of unit norm whose removal is scaled back to the rows' size,
    without keeping their norms.

That the difference is an ablation and no other low-rank change shows in what it reads: an ablation subtracts along v
what W itself wrote along v, so vᵀ(W' - W) is a multiple of vᵀW, n numbers by one. For a change of the same rank that
knows nothing of W, cos² of the two is about 1/n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from perpend.core.leak import realised
from perpend.core.linear import orthonormalise
from perpend.core.maps import Geometry, HookMap, blocks, inverse
from perpend.core.quant import GROUP, LEVELS, RANGES, simulate
from perpend.errors import PerpendError
from perpend.forensics.spectrum import Difference, Spectrum, of_difference, spectrum

MODES = ("plain", "column", "row", "weighted")
"""Ways to take a direction out of a matrix, the simplest first."""
LARGEST = 4
"""Directions per matrix that are looked for."""
COHERENT = 0.3
"""cos² of what a difference reads and what the matrix wrote, above which the fit is tried."""
ENOUGH = 0.02
"""What a further direction must explain."""
ROUNDS = 3
QUANTISED = (*RANGES, *LEVELS)


@dataclass(frozen=True, eq=False)
class Ablation:
    """The account that directions were taken out of a matrix."""

    side: str
    """`output`: out of what the matrix writes, (I - λ vvᵀ) W. `input`: out of what it reads, W (I - λ vvᵀ)."""
    mode: str
    """One of `MODES`."""
    weight: float
    """λ, fitted."""
    directions: Tensor
    """`[k, d]` float32 orthonormal rows."""
    explained: float
    """Share of ‖W' - W‖² beyond rounding that the account predicts; below 0 when it predicts worse than nothing."""
    misses: dict[str, float]
    """‖W' - prediction‖² / ‖W‖² of every mode that was tried, rounding included."""

    @property
    def rank(self) -> int:
        """Number of directions, k."""
        return len(self.directions)


def coherence(before: Tensor, after: Tensor, left: Tensor) -> tuple[float, float]:
    """Return cos² of vᵀ(W' - W) and vᵀW for a left singular vector v `[m]`, and of (W' - W) r and W r for its right."""
    dot = lost = wrote = 0.0
    reads: list[Tensor] = []
    for _, (w, new) in blocks(before, after):
        a, d = left @ w, left @ (new - w)
        reads.append(d)
        dot, lost, wrote = dot + float(a @ d), lost + float(d @ d), wrote + float(a @ a)
    right = torch.cat(reads)
    right = right / right.norm().clamp(min=1e-300)
    whole = difference = torch.zeros_like(left)
    for columns, (w, new) in blocks(before, after):
        whole, difference = whole + w @ right[columns], difference + (new - w) @ right[columns]
    denominator = float((whole @ whole) * (difference @ difference))
    mirrored = float(whole @ difference) ** 2 / denominator if denominator else 0.0
    return (dot * dot / (lost * wrote) if lost * wrote else 0.0), mirrored


def row_norms(matrix: Tensor) -> Tensor:
    """Return the norms of the rows, `[m]` float64."""
    square = torch.zeros(matrix.shape[0], dtype=torch.float64)
    for _, (w,) in blocks(matrix):
        square += w.square().sum(1)
    return square.sqrt()


def ablation(
    before: Tensor, after: Tensor, sizes: Difference, found: Spectrum, sides: tuple[str, ...]
) -> Ablation | None:
    """Return the best account of an ablation, None when nothing speaks for one.

    Args:
        before: `[m, n]` W, any float dtype.
        after: `[m, n]` W'.
        sizes: Of the two.
        found: Spectrum of their difference.
        sides: Of `output` and `input`, those whose dimension is the residual stream's.
    """
    best: Ablation | None = None
    direct, mirrored = coherence(before, after, found.left[0])
    for side, hint in (("output", direct), ("input", mirrored)):
        if side not in sides:
            continue
        pair = (before, after) if side == "output" else (before.mT, after.mT)
        start = _by_rows(*pair)
        if max(hint, start[1]) < COHERENT:
            continue
        made = _fitted(*pair, sizes, side, found if side == "output" else None, start[0])
        if best is None or made.explained > best.explained:
            best = made
    return best


def _by_rows(before: Tensor, after: Tensor) -> tuple[Spectrum, float]:
    """Return the spectrum of (W' - W) ⊘ n, and how coherent it is with W ⊘ n."""
    unit = inverse(row_norms(before))[:, None]

    def columns() -> Iterator[Tensor]:
        for _, (w, new) in blocks(before, after):
            yield (new - w) * unit

    found = spectrum(columns, before.shape, LARGEST)
    v, dot, lost, wrote = found.left[0], 0.0, 0.0, 0.0
    for _, (w, new) in blocks(before, after):
        a, d = v @ (w * unit), v @ ((new - w) * unit)
        dot, lost, wrote = dot + float(a @ d), lost + float(d @ d), wrote + float(a @ a)
    return found, dot * dot / (lost * wrote) if lost * wrote else 0.0


def _fitted(
    before: Tensor, after: Tensor, sizes: Difference, side: str, plain: Spectrum | None, rows: Spectrum
) -> Ablation:
    """Fit every mode, and as many directions as are worth it."""
    plain = plain or of_difference(before, after, LARGEST)
    best: Ablation | None = None
    for k in range(1, min(LARGEST, *before.shape) + 1):
        made: list[Ablation] = []
        for mode in MODES:
            start = (plain if mode in ("plain", "column") else rows).left[:k]
            if len(start) == k:
                made += [_one(before, after, sizes, side, mode, start)]
        leading = min(made, key=lambda one: one.misses[one.mode])
        leading = replace(leading, misses={one.mode: one.misses[one.mode] for one in made})
        if best is not None and leading.explained < best.explained + ENOUGH:
            break
        best = leading
        if best.explained > 1 - ENOUGH:
            break
    assert best is not None
    return best


def _one(before: Tensor, after: Tensor, sizes: Difference, side: str, mode: str, start: Tensor) -> Ablation:
    """Fit one mode with `k` directions, from a start `[k, m]`."""
    v = start
    if mode in ("column", "row"):
        for _ in range(ROUNDS):
            v = spectrum(partial(_columns, before, after, mode, v), before.shape, len(start)).left
    try:
        return told(before, after, sizes, side, mode, v)
    except PerpendError:  # directions that are not independent: no account
        return Ablation(side, mode, 0.0, v.float(), -1.0, {mode: math.inf})


def told(before: Tensor, after: Tensor, sizes: Difference, side: str, mode: str, directions: Tensor) -> Ablation:
    """Return the account of given directions `[k, m]` with λ fitted; W is transposed where `side` is `input`."""
    v = orthonormalise(directions)
    weight, made = _fit_weight(before, after, mode, v)
    explained, missed = explains(before, after, sizes, made)
    return Ablation(side, mode, weight, v.float(), explained, {mode: missed / max(sizes.size, 1e-300) ** 2})


def _fit_weight(before: Tensor, after: Tensor, mode: str, v: Tensor) -> tuple[float, HookMap]:
    """Return λ by least squares and the map that it makes."""
    if mode == "weighted":
        norms = row_norms(before)
        read, dot, square = v * inverse(norms), 0.0, 0.0
        for _, (w, new) in blocks(before, after):
            a, d = read @ w, read @ (new - w)
            dot, square = dot - float((a * d).sum()), square + float(a.square().sum())
        weight = dot / square if square else 0.0
        return weight, HookMap(read, v * norms, weight)
    weight = realised(before, after, v, mode=mode).weight  # type: ignore[arg-type]
    weight = 0.0 if weight != weight else weight
    return weight, Geometry.of(before, v, mode).at(weight)  # type: ignore[arg-type]


def explains(before: Tensor, after: Tensor, sizes: Difference, made: HookMap) -> tuple[float, float]:
    """Return the share of ‖W' - W‖² beyond rounding that a map predicts, and ‖W' - prediction‖².

    What the prediction misses is counted twice, and the smaller count taken: against the exact prediction, less what
    rounding adds, and against the prediction rounded to the dtype of W', which knows that steps smaller than half a
    spacing vanish.
    """
    exact = rounded = 0.0
    for columns, (w, new) in blocks(before, after):
        expected = made.edited(w, columns)
        exact += float((new - expected).square().sum())
        rounded += float((new - expected.to(after.dtype).double()).square().sum())
    missed = min(max(0.0, exact - sizes.rounding), rounded)
    return (1 - missed / sizes.beyond if sizes.beyond else 0.0), exact


def _columns(before: Tensor, after: Tensor, mode: str, v: Tensor | None) -> Iterator[Tensor]:
    """Yield the columns of the difference with the scales of a mode undone, given the directions so far `[k, m]`."""
    if mode == "row" and v is not None:
        norms = row_norms(before)
        unit, scale = inverse(norms), _row_scale(before, after, v * inverse(norms))
        for _, (w, new) in blocks(before, after):
            yield (new / scale[:, None] - w) * unit[:, None]
        return
    for _, (w, new) in blocks(before, after):
        if mode == "column" and v is not None:
            rest, rest_new = w - v.mT @ (v @ w), new - v.mT @ (v @ new)
            new = new / _slope((rest_new * rest).sum(0), rest.square().sum(0))
        yield new - w


def _row_scale(before: Tensor, after: Tensor, read: Tensor) -> Tensor:
    """Return the slope of the rows of W' on those of W `[m]`, off what `read` `[k, m]` reads of W."""
    a = torch.linalg.qr(torch.cat([read @ w for _, (w,) in blocks(before)], 1).mT).Q.mT
    dot = square = torch.zeros(before.shape[0], dtype=torch.float64)
    old = new_part = torch.zeros(before.shape[0], len(a), dtype=torch.float64)
    for columns, (w, new) in blocks(before, after):
        dot, square = dot + (w * new).sum(1), square + w.square().sum(1)
        old, new_part = old + w @ a[:, columns].mT, new_part + new @ a[:, columns].mT
    return _slope(dot - (old * new_part).sum(1), square - old.square().sum(1))


def _slope(dot: Tensor, square: Tensor) -> Tensor:
    """Return a scale as a slope, 1 where it cannot be told or would not be a scale."""
    sound = square > 1e-12
    slope = torch.where(sound, dot / torch.where(sound, square, 1.0), 1.0)
    return torch.where(slope > 0.1, slope, 1.0)


def quantised(before: Tensor, after: Tensor) -> tuple[str, float]:
    """Return the format whose round trip, or the dtype to which a cast, predicts W' best, and the share it explains."""
    best = ("", 0.0)
    kinds = QUANTISED if before.shape[-1] % GROUP == 0 else ()
    some = slice(None, None, max(1, before.shape[0] // 64))
    for name, rounding in [(kind, partial(simulate, kind=kind)) for kind in kinds] + _CASTS:
        if _explained(before[some], after[some], rounding) < 0.5:  # a few rows tell what is not worth reading whole
            continue
        if (share := _explained(before, after, rounding)) > best[1]:
            best = (name, share)
    return best


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()


_CASTS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    (str(dtype).removeprefix("torch."), partial(_cast, dtype=dtype))
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
]


def _explained(before: Tensor, after: Tensor, rounding: Callable[[Tensor], Tensor]) -> float:
    """Return 1 - ‖W' - Q(W)‖² / ‖W' - W‖² for a rounding Q, some rows at a time."""
    missed, energy, rows = 0.0, 0.0, max(1, (1 << 20) // before.shape[1])
    for w, new in zip(torch.split(before, rows), torch.split(after, rows), strict=True):
        made = rounding(w.float()).to(after.dtype).double()
        missed += float((new.double() - made).square().sum())
        energy += float((new.double() - w.double()).square().sum())
    return 1 - missed / energy if energy else 0.0


def on_lattice(before: Tensor, after: Tensor) -> bool:
    """Whether blocks of 32 neighbours of W' hold at most 16 values where those of W hold more: a 4-bit lattice."""
    if before.shape[-1] % GROUP:
        return False
    few = [_distinct(x.reshape(-1, GROUP)) for x in (before, after)]
    return few[1] <= 16 < few[0]


def _distinct(groups: Tensor) -> float:
    """Return the median number of values in up to 1,024 groups spread over a matrix."""
    some = groups[:: max(1, len(groups) // 1024)].float().sort(-1).values
    return float(((some.diff(dim=-1) != 0).sum(-1) + 1).double().median())


def along(before: Tensor, after: Tensor, third: Tensor, sizes: Difference) -> tuple[float, float]:
    """Return α of W' - W = α (T - W), how far W' lies on the way to a third matrix, and the share that it predicts.

    The share is that of ‖W' - W‖² beyond rounding, which is allowed for in what is missed as well.
    """
    dot = square = energy = 0.0
    for _, (w, new, other) in blocks(before, after, third):
        d, t = new - w, other - w
        dot, square, energy = (
            dot + float((d * t).sum()),
            square + float(t.square().sum()),
            energy + float(d.square().sum()),
        )
    if not square or not sizes.beyond:
        return 0.0, 0.0
    missed = max(0.0, energy - dot * dot / square - sizes.rounding)
    return dot / square, max(0.0, 1 - missed / sizes.beyond)
