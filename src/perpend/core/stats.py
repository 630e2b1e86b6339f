"""Intervals and paired tests for rates and scores: a number is never printed alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from perpend.errors import UsageError

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
_CHUNK = 4_000_000


def wilson(k: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a rate of k in n (Wilson 1927); 0 to 1 when n is 0.

    It keeps its coverage at rates near 0 and 1: 96 of 100, 189 of 200 and 281 of 300 are the smallest counts whose
    lower bound is above 0.9.

    Raises:
        UsageError: k outside 0 to n.
    """
    if not 0 <= k <= n:
        raise UsageError(f"{k} of {n}", valid="0 to n of n")
    if n == 0:
        return 0.0, 1.0
    share, penalty = k / n, z * z / n
    centre = (share + penalty / 2) / (1 + penalty)
    reach = z * math.sqrt((share * (1 - share) + penalty / 4) / n) / (1 + penalty)
    return (0.0 if k == 0 else max(0.0, centre - reach)), (1.0 if k == n else min(1.0, centre + reach))


def rogan_gladen(
    k: int, n: int, sensitivity: tuple[int, int], specificity: tuple[int, int], z: float = Z95
) -> tuple[float, float, float]:
    """Return the rate that a judge of known error would have found had it not erred, with its interval.

    The rate is (p + Sp - 1) / (Se + Sp - 1), cut to 0 and 1 (Rogan & Gladen 1978, "Estimating prevalence from the
    results of a screening test"). The interval is that of Lang & Reiczigel 2014, "Confidence limits for prevalence of
    disease adjusted for estimated sensitivity and specificity": Agresti-Coull counts, the delta method over all three
    samples, and a shift for its bias. It is widened to hold the rate where it would not.

    Args:
        k: Replies that the judge calls positive.
        n: Replies that it judged.
        sensitivity: Of replies known to be positive, how many it called so, and how many there were.
        specificity: Of replies known to be negative, how many it called so, and how many there were.
        z: Quantile of the normal distribution.

    Returns:
        Corrected rate, lower and upper bound.

    Raises:
        UsageError: counts that are none, nothing judged, or a judge no better than chance (Se + Sp ≤ 1).
    """
    samples = ((k, n), sensitivity, specificity)
    if not all(0 <= part <= whole and whole for part, whole in samples):
        raise UsageError(" and ".join(f"{part} of {whole}" for part, whole in samples), valid="0 to n of n, n above 0")
    p, se, sp = (part / whole for part, whole in samples)
    if se + sp <= 1:
        raise UsageError(f"sensitivity {se:.2f} and specificity {sp:.2f} are no better than chance")
    counts = [(part + extra / 2, whole + extra) for (part, whole), extra in zip(samples, (z * z, 2, 2), strict=True)]
    (q, m), (a, na), (b, nb) = [(part / whole, whole) for part, whole in counts]
    youden = max(a + b - 1, 1e-9)
    rate = (q + b - 1) / youden
    va, vb = a * (1 - a) / na, b * (1 - b) / nb
    middle = rate + 2 * z * z * (rate * va - (1 - rate) * vb)
    reach = z * math.sqrt(q * (1 - q) / m + va * rate**2 + vb * (1 - rate) ** 2) / youden
    found, low, high = (min(1.0, max(0.0, x)) for x in ((p + sp - 1) / (se + sp - 1), middle - reach, middle + reach))
    return found, min(found, low), max(found, high)


def fisher_more(k: int, n: int, known: tuple[int, int]) -> float:
    """Return the one-sided p-value of Fisher's exact test that a rate of k in n is above a known one.

    The probability of k or more in n where both samples have one rate, given how many both have together (Fisher 1935,
    "The logic of inductive inference"). It uses the sizes of both samples, and rejects at most as often as it says.

    Args:
        k: Counted.
        n: Of so many.
        known: The same of the other sample.

    Raises:
        UsageError: counts that are none.
    """
    other, m = known
    if not (0 <= k <= n and 0 <= other <= m):
        raise UsageError(f"{k} of {n} and {other} of {m}", valid="0 to n of n")
    from scipy.stats import hypergeom

    return float(hypergeom.sf(k - 1, n + m, k + other, n))


def mcnemar_exact(b: int, c: int) -> float:
    """Return the two-sided exact McNemar p-value of a paired comparison; 1 when nothing changed.

    Args:
        b: Pairs that only the first got right.
        c: Pairs that only the second got right.

    Raises:
        UsageError: a negative count.
    """
    if b < 0 or c < 0:
        raise UsageError(f"{b} and {c} discordant pairs", valid="counts of 0 or more")
    n = b + c
    tail = sum(math.comb(n, i) for i in range(min(b, c) + 1))
    return min(1.0, float(2 * tail / 2**n))


def paired_counts(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int, int, int]:
    """Return how many pairs only the second has, only the first has, both have, and neither has.

    Args:
        before: The first of every pair.
        after: The second, in the same order.
    """
    pairs = list(zip(before, after, strict=True))
    gained, lost, both, neither = (
        pairs.count(pair) for pair in ((False, True), (True, False), (True, True), (False, False))
    )
    return gained, lost, both, neither


def paired_wilson(gained: int, lost: int, both: int, neither: int, z: float = Z95) -> tuple[float, float, float]:
    """Return the difference of two paired rates, after minus before, and Newcombe's interval of it.

    Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on paired
    data", method 10: Wilson intervals of both rates, with their correlation. Where nothing changed it is still as wide
    as n prompts allow, which a bootstrap is not.

    Args:
        gained: Pairs that only the second has.
        lost: Pairs that only the first has.
        both: Pairs that both have.
        neither: Pairs that neither has.
        z: Quantile of the normal distribution.

    Returns:
        Difference, lower and upper bound; 0, -1 and 1 without pairs.

    Raises:
        UsageError: a negative count.
    """
    if min(gained, lost, both, neither) < 0:
        raise UsageError("negative counts of pairs", valid="counts of 0 or more")
    n = gained + lost + both + neither
    if not n:
        return 0.0, -1.0, 1.0
    after, before = both + gained, both + lost
    (la, ua), (lb, ub) = wilson(after, n, z), wilson(before, n, z)
    pa, pb = after / n, before / n
    margins = after * (n - after) * before * (n - before)
    cross = both * neither - gained * lost
    phi = (max(cross - n / 2, 0) if cross > 0 else cross) / math.sqrt(margins) if margins else 0.0
    down, up = (
        math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y)) for x, y in ((pa - la, ub - pb), (ua - pa, pb - lb))
    )
    return pa - pb, pa - pb - down, pa - pb + up


def bootstrap_mean(
    x: Sequence[float] | npt.NDArray[np.float64], n: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Return the mean of x and its percentile bootstrap interval.

    Args:
        x: One number per prompt.
        n: Resamples.
        seed: Seed of the resamples.
        level: Coverage.

    Returns:
        Mean, lower and upper bound.

    Raises:
        UsageError: x is empty or not finite.
    """
    values = np.asarray(x, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise UsageError("no finite numbers to average")
    rng = np.random.default_rng(seed)
    rows = max(1, min(n, _CHUNK // values.size))
    means = [
        values[rng.integers(0, values.size, (min(rows, n - start), values.size))].mean(axis=1)
        for start in range(0, n, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], n: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Return mean(b) - mean(a) over pairs and its percentile bootstrap interval: how much b gains over a.

    Args:
        a: One number per prompt, before.
        b: One number per prompt, after, in the same order.
        n: Resamples of whole pairs.
        seed: Seed of the resamples.
        level: Coverage.

    Raises:
        UsageError: other lengths, empty, or not finite.
    """
    if len(a) != len(b):
        raise UsageError(f"{len(a)} and {len(b)} numbers are no pairs", valid="the same prompts in the same order")
    return bootstrap_mean(np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64), n, seed, level)


def bootstrap_ratio(
    above: Sequence[float], below: Sequence[float], n: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of Σ above / Σ below over pairs.

    Args:
        above: One number per prompt.
        below: One number per prompt, in the same order.
        n: Resamples of whole pairs.
        seed: Seed of the resamples.
        level: Coverage.

    Raises:
        UsageError: other lengths, empty, or not finite.
    """
    pairs = np.asarray([above, below], dtype=np.float64) if len(above) == len(below) else np.empty((2, 0))
    if not pairs.size or not np.isfinite(pairs).all():
        raise UsageError("no finite pairs to take a ratio of")
    rng, count = np.random.default_rng(seed), pairs.shape[1]
    rows = max(1, min(n, _CHUNK // count))
    sums = [pairs[:, rng.integers(0, count, (min(rows, n - start), count))].sum(axis=2) for start in range(0, n, rows)]
    total = np.concatenate(sums, axis=1)
    ratio = np.divide(total[0], total[1], out=np.full(total.shape[1], np.inf), where=total[1] > 0)
    low, high = np.quantile(ratio, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Return Cohen's κ of two judges' labels: agreement beyond chance, 1 for full agreement (Cohen 1960).

    Where both give one and the same label throughout, κ is 0/0; it is returned as 1, since they agree.

    Raises:
        UsageError: other lengths, or empty.
    """
    if len(a) != len(b) or not a:
        raise UsageError(f"{len(a)} and {len(b)} labels", valid="two labels of each reply, at least one reply")
    n = len(a)
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    chance = sum(list(a).count(label) * list(b).count(label) for label in set(a) | set(b)) / n**2
    return 1.0 if chance == 1 else (observed - chance) / (1 - chance)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; 0 when either is constant and ranks nothing.

    Raises:
        UsageError: other lengths, or fewer than two.
    """
    if len(a) != len(b) or len(a) < 2:
        raise UsageError(f"{len(a)} and {len(b)} numbers have no rank correlation", valid="two or more pairs")
    if len(set(a)) == 1 or len(set(b)) == 1:
        return 0.0
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)
