"""Intervals and tests against scipy and against numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, fisher_exact, spearmanr

from perpend.core.stats import (
    bootstrap_mean,
    cohen_kappa,
    fisher_more,
    mcnemar_exact,
    paired_bootstrap,
    paired_wilson,
    rogan_gladen,
    spearman,
    wilson,
)
from perpend.errors import UsageError


@given(data=st.data(), n=st.integers(1, 500))
@settings(max_examples=100, deadline=None)
def test_wilson_is_scipys(data, n):
    k = data.draw(st.integers(0, n))
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(96, 100), (189, 200), (281, 300)])
def test_the_smallest_counts_that_show_more_than_nine_in_ten(k, n):
    assert wilson(k, n)[0] > 0.9
    assert wilson(k - 1, n)[0] < 0.9


def test_wilson_at_the_ends():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    assert wilson(96, 100, z=0) == (0.96, 0.96)
    for k, n in [(-1, 10), (11, 10)]:
        with pytest.raises(UsageError):
            wilson(k, n)


COUNTS = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(rate=COUNTS, sensitivity=COUNTS, specificity=COUNTS)
@settings(max_examples=300, deadline=None)
def test_a_corrected_rate_lies_in_its_interval_and_in_0_to_1(rate, sensitivity, specificity):
    se, sp = (a / b for a, b in (sensitivity, specificity))
    if se + sp <= 1:
        with pytest.raises(UsageError, match="chance"):
            rogan_gladen(*rate, sensitivity, specificity)
        return
    found, low, high = rogan_gladen(*rate, sensitivity, specificity)
    assert 0 <= low <= found <= high <= 1
    share = found * se + (1 - found) * (1 - sp)  # the judge, applied to the corrected rate, says what it said
    if 0 < found < 1:
        assert share == pytest.approx(rate[0] / rate[1])
    turned = rogan_gladen(rate[1] - rate[0], rate[1], specificity, sensitivity)
    assert turned == pytest.approx((1 - found, 1 - high, 1 - low))


def test_a_judge_that_never_errs_corrects_nothing():
    found, low, high = rogan_gladen(60, 100, (10**9, 10**9), (10**9, 10**9))
    assert found == pytest.approx(0.6)
    assert (low, high) == pytest.approx(wilson(60, 100), abs=0.01)


def test_corrected_by_hand():
    assert rogan_gladen(70, 100, (90, 100), (80, 100))[0] == pytest.approx((0.7 + 0.8 - 1) / 0.7)
    assert rogan_gladen(5, 100, (90, 100), (80, 100))[0] == 0.0
    for counts in [(0, 0), (3, 2)]:
        with pytest.raises(UsageError, match="of"):
            rogan_gladen(1, 2, counts, (1, 1))


@pytest.mark.parametrize("truth", [0.05, 0.3, 0.7, 0.92])
@pytest.mark.parametrize(("se", "sp"), [(0.95, 0.98), (0.8, 0.9)])
def test_the_interval_of_a_corrected_rate_covers_the_truth(truth, se, sp):
    rng = np.random.default_rng(0)
    said = rng.binomial(200, truth * se + (1 - truth) * (1 - sp), 1000)
    right, wrong = rng.binomial(80, se, 1000), rng.binomial(60, sp, 1000)
    found = [rogan_gladen(int(k), 200, (int(a), 80), (int(b), 60)) for k, a, b in zip(said, right, wrong, strict=True)]
    assert np.mean([low <= truth <= high for _, low, high in found]) >= 0.935


@given(b=st.integers(0, 60), c=st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_exact_binomial_test(b, c):
    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9)


@given(one=COUNTS, other=COUNTS)
@settings(max_examples=200, deadline=None)
def test_a_rate_is_compared_with_a_known_one_as_by_scipys_fisher(one, other):
    (k, n), (known, m) = one, other
    expected = fisher_exact([[k, n - k], [known, m - known]], alternative="greater").pvalue
    assert fisher_more(k, n, other) == pytest.approx(expected, rel=1e-8, abs=1e-300)


def test_fisher_by_hand():
    assert fisher_more(3, 4, (1, 4)) == pytest.approx(17 / 70)  # the lady tasting tea, Fisher 1935
    assert fisher_more(0, 5, (2, 9)) == pytest.approx(1)
    assert fisher_more(0, 0, (2, 9)) == pytest.approx(1)
    with pytest.raises(UsageError):
        fisher_more(3, 2, (1, 4))


def test_mcnemar_by_hand():
    assert mcnemar_exact(0, 5) == 2 / 32
    assert mcnemar_exact(0, 0) == 1.0
    assert 0 <= mcnemar_exact(0, 5000) < 1e-300
    with pytest.raises(UsageError):
        mcnemar_exact(-1, 3)


def test_the_bootstrap_of_a_mean_is_as_wide_as_theory_says():
    x = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = bootstrap_mean(x)
    assert mean == x.mean()
    error = x.std() / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert bootstrap_mean(x, level=0.5)[1] > low


def test_bootstraps_are_reproducible_and_chunks_do_not_matter(monkeypatch):
    x = list(np.random.default_rng(2).normal(size=50))
    assert bootstrap_mean(x, 200, seed=3) == bootstrap_mean(x, 200, seed=3)
    assert bootstrap_mean(x, 200, seed=3) != bootstrap_mean(x, 200, seed=4)
    whole = bootstrap_mean(x, 200, seed=3)
    monkeypatch.setattr("perpend.core.stats._CHUNK", 60 * 50)
    assert bootstrap_mean(x, 200, seed=3) == pytest.approx(whole)


def test_pairing_removes_what_the_prompts_have_in_common():
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 10, 200)
    a, b = prompts + rng.normal(0, 0.1, 200), prompts + 0.5 + rng.normal(0, 0.1, 200)
    difference, low, high = paired_bootstrap(a, b)
    assert low < 0.5 < high
    assert high - low < 0.1
    assert difference == pytest.approx(b.mean() - a.mean())
    assert paired_bootstrap([1, 0, 1], [1, 0, 1]) == (0, 0, 0)
    assert paired_bootstrap([0, 0], [1, 1]) == (1, 1, 1)


def test_kappa_by_hand():
    # 2 x 2: 20 both yes, 15 both no, 5 and 10 apart (Cohen's classic example): 0.4
    a = ["yes"] * 20 + ["yes"] * 5 + ["no"] * 10 + ["no"] * 15
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4)
    assert cohen_kappa([0, 1, 2], [0, 1, 2]) == 1
    assert cohen_kappa([0, 1], [1, 0]) == -1
    assert cohen_kappa(["a", "a"], ["a", "a"]) == 1
    assert cohen_kappa(["a", "a"], ["a", "b"]) == 0


def test_spearman_is_scipys():
    a, b = [3.0, 1, 2, 2, 5], [1.0, 0, 3, 2, 9]
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman([1, 2, 3], [1, 4, 9]) == pytest.approx(1)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_mean([]),
        lambda: bootstrap_mean([1.0, float("nan")]),
        lambda: paired_bootstrap([1.0], [1.0, 2.0]),
        lambda: cohen_kappa([], []),
        lambda: cohen_kappa(["a"], []),
        lambda: spearman([1.0], [1.0]),
        lambda: spearman([1.0, 2.0], [1.0]),
    ],
)
def test_misuse_is_told(call):
    with pytest.raises(UsageError):
        call()


def test_the_paired_interval_is_that_of_newcombe():
    """12 and 2 discordant of 50 pairs with 36 of both, an example of Newcombe 1998; and nothing changed at all."""
    difference, low, high = paired_wilson(2, 12, 36, 0)
    assert difference == pytest.approx(-0.2)
    assert (low, high) == pytest.approx((-0.3404, -0.0569), abs=5e-5)
    assert paired_wilson(0, 0, 0, 20)[2] == pytest.approx(wilson(0, 20)[1])
    assert paired_wilson(0, 0, 0, 0) == (0.0, -1.0, 1.0)
    for counts in ((3, 9, 10, 4), (0, 5, 0, 5), (1, 0, 30, 0)):
        gained, lost, both, neither = counts
        turned = paired_wilson(lost, gained, both, neither)
        there = paired_wilson(*counts)
        assert [-turned[0], -turned[2], -turned[1]] == pytest.approx(there)
