"""The weight factor over the layers: which schedule the fitted λ follow, with its peak and spread.

λ_l of one kind of module over all L layers, zeros included, is fitted by least squares with the shapes of
`perpend.core.schedule` and with the tent of other tools, which falls linearly to a weight at its edge and is 0 beyond.
Shapes with more parameters fit better by nature: the Bayesian information criterion L log(rss / L) + p log L of p
parameters chooses (Schwarz 1978), with rss bounded below by what λ can be measured to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from perpend.core.schedule import CUT, NormalKernel

RESOLUTION = 0.004
"""Standard error of a fitted λ that is taken for granted."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Kernel:
    """A schedule that fits."""

    kind: str
    """normal, tent, band, constant; `none` when no shape fits to 0.05, or when so few layers were edited that a normal
    kernel and a tent both fit exactly."""
    peak_weight: float
    peak_layer: float | None
    """In layers from 0; None for a constant."""
    spread: float | None
    """Standard deviation of the normal kernel, half-width of tent and band, in layers; None for a constant."""
    edge: float | None
    """Weight at the edge of a tent."""
    rms: float
    """Root mean square of what is left of λ."""
    others: dict[str, float]
    """What is left with the other shapes."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dict(vars(self))


def _normal(x: Values, p: Sequence[float]) -> Values:
    made = p[0] * np.exp(-((x - p[1]) ** 2) / (2 * p[2] ** 2))
    return np.where(np.abs(made) >= CUT, made, 0.0)


def _smooth(x: Values, p: Sequence[float]) -> Values:
    return np.asarray(p[0] * np.exp(-((x - p[1]) ** 2) / (2 * p[2] ** 2)))


def _tent(x: Values, p: Sequence[float]) -> Values:
    z = np.abs(x - p[1]) / p[2]
    return np.where(z <= 1, p[0] + (p[3] - p[0]) * z, 0.0)


def _band(x: Values, p: Sequence[float]) -> Values:
    return np.where(np.abs(x - p[1]) <= p[2], p[0], 0.0)


def fit_kernel(weights: Sequence[float]) -> Kernel:
    """Return the schedule that λ of every layer follows.

    Args:
        weights: λ of layers 0 to L - 1, 0 where nothing was changed; L at least 1.
    """
    y = np.asarray(weights, dtype=np.float64)
    x = np.arange(len(y), dtype=np.float64)
    found: dict[str, tuple[float, list[float]]] = {"constant": (_rss(y, np.full_like(y, y.mean())), [float(y.mean())])}
    found["band"] = _best_band(x, y)
    found["normal"] = _least(x, y, _normal, _starts(x, y), smooth=_smooth)
    found["tent"] = min(
        _best_tent(x, y), _least(x, y, _tent, [[*start[:2], 2 * start[2], 0.0] for start in _starts(x, y)])
    )
    floor = len(y) * RESOLUTION**2

    def criterion(kind: str) -> float:
        rss, p = found[kind]
        return len(y) * math.log(max(rss, floor) / len(y)) + len(p) * math.log(len(y) + 1)

    chosen = min(found, key=criterion)
    rms = {kind: math.sqrt(rss / len(y)) for kind, (rss, _) in found.items()}
    p = found[chosen][1]
    others = {kind: value for kind, value in rms.items() if kind != chosen}
    if chosen == "constant":
        kind = chosen if rms[chosen] < 0.05 else "none"
        return Kernel(kind, p[0], None, None, None, rms[chosen], others)
    either = max(rms["normal"], rms["tent"]) <= RESOLUTION
    kind = chosen if rms[chosen] < 0.05 and not (either and chosen in ("normal", "tent")) else "none"
    return Kernel(kind, p[0], p[1], abs(p[2]), p[3] if chosen == "tent" else None, rms[chosen], others)


def nearest_normal(weights: Sequence[float]) -> NormalKernel:
    """Return the normal kernel that follows λ of every layer most closely, whether it fits or not.

    Args:
        weights: λ of layers 0 to L - 1; L at least 1.
    """
    y = np.asarray(weights, dtype=np.float64)
    if not y.any():
        return NormalKernel(peak_weight=0.0)
    x = np.arange(len(y), dtype=np.float64)
    _, (peak, place, spread) = _least(x, y, _normal, _starts(x, y), smooth=_smooth)
    return NormalKernel(peak_weight=round(peak, 4), peak_layer=round(place, 4), spread=round(abs(spread), 4))


def _rss(y: Values, made: Values) -> float:
    return float(((y - made) ** 2).sum())


def _starts(x: Values, y: Values) -> list[list[float]]:
    """Return peak weight, peak layer and spread to start from: moments, and a few widths around the largest."""
    top = int(np.abs(y).argmax())
    mass = np.abs(y) / max(float(np.abs(y).sum()), 1e-12)
    centre = float((mass * x).sum())
    width = max(1.0, math.sqrt(float((mass * (x - centre) ** 2).sum())))
    peak = float(y[top]) or 1e-3
    return [[peak, centre, width], [peak, float(top), width], [peak, float(top), 2 * width], [peak, centre, width / 2]]


def _least(
    x: Values,
    y: Values,
    shape: Callable[[Values, Sequence[float]], Values],
    starts: Sequence[Sequence[float]],
    smooth: Callable[[Values, Sequence[float]], Values] | None = None,
) -> tuple[float, list[float]]:
    """Fit a shape with cuts by direct search, from several starts; a smooth form of it finds the way first."""
    from scipy.optimize import minimize

    def cost(p: Sequence[float], form: Callable[[Values, Sequence[float]], Values]) -> float:
        return _rss(y, form(x, p)) if p[2] > 0.2 else 1e6

    best: tuple[float, list[float]] = (math.inf, list(starts[0]))
    for start in starts:
        p = list(start)
        for form in (smooth, shape, shape):
            if form is not None:
                p = list(minimize(cost, p, args=(form,), method="Nelder-Mead", options={"maxiter": 600}).x)
        if (rss := cost(p, shape)) < best[0]:
            best = (rss, [float(v) for v in p])
    return best


def _best_tent(x: Values, y: Values) -> tuple[float, list[float]]:
    """Return the best tent over the layers that were edited: linear in |x - peak|, for every place of the peak."""
    inside = np.abs(y) > RESOLUTION
    best: tuple[float, list[float]] = (math.inf, [0.0, 0.0, 1.0, 0.0])
    if not inside.any():
        return best
    for place in np.arange(x[inside][0], x[inside][-1] + 0.01, 0.02):
        away = np.abs(x - place)
        level, slope = np.linalg.lstsq(np.stack([np.ones_like(away), away], 1)[inside], y[inside], rcond=None)[0]
        reach = float(away[inside].max())
        beyond = float(away[~inside].min(initial=reach + 1))
        ends = -level / slope if slope else math.inf  # where it comes to 0, if that is before the next layer
        spread = float(max(ends if reach <= ends < beyond else (reach + beyond) / 2, reach, 0.3))
        made = [float(level), float(place), spread, float(level + slope * spread)]
        best = min(best, (_rss(y, _tent(x, made)), made))
    return best


def _best_band(x: Values, y: Values) -> tuple[float, list[float]]:
    """Return the best band: every run of layers, each with its mean."""
    best: tuple[float, list[float]] = (math.inf, [0.0, 0.0, 1.0])
    whole = float((y**2).sum())
    sums = np.concatenate([[0.0], np.cumsum(y)])
    for first in range(len(y)):
        for last in range(first, len(y)):
            count = last - first + 1
            mean = float(sums[last + 1] - sums[first]) / count
            rss = whole - count * mean * mean
            if rss < best[0] - 1e-12:
                best = (max(0.0, rss), [mean, (first + last) / 2, count / 2])
    return best
