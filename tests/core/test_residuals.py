"""Streaming sums: the same as all at once, whatever the batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perpend.core.residuals import ResidualFitter, top_share, winsorize
from perpend.errors import RunFailed, UsageError

TENSORS = ("mean", "half_means", "norm", "top4_share", "second_moment")


def fitted(x, sizes=None, **options):
    fitter = ResidualFitter(x.shape[1], x.shape[2], **options)
    for batch in x.split(sizes or len(x)):
        fitter.update(batch)
    return fitter


def same(a, b):
    assert a.count == b.count
    for name in TENSORS:
        one, other = getattr(a, name), getattr(b, name)
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@st.composite
def streams(draw):
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(sum(sizes), 3, 8, generator=generator) + 10
    return x, sizes, draw(st.sampled_from([None, 0.8])), draw(st.booleans())


@given(stream=streams())
@settings(max_examples=40, deadline=None)
def test_streaming_is_the_batch(stream):
    x, sizes, quantile, second = stream
    options = {"winsorize": quantile, "second_moment": second}
    same(fitted(x, sizes, **options).stats(), fitted(x, **options).stats())


def test_the_numbers_are_the_definitions():
    torch.manual_seed(0)
    x = torch.randn(7, 3, 8)
    stats = fitted(x, 2, second_moment=True).stats()
    wide = x.double()
    torch.testing.assert_close(stats.mean, wide.mean(0))
    torch.testing.assert_close(stats.half_means, torch.stack([wide[0::2].mean(0), wide[1::2].mean(0)]))
    torch.testing.assert_close(stats.norm, wide.norm(dim=-1).mean(0))
    torch.testing.assert_close(stats.second_moment, torch.stack([wide[:, i].mT @ wide[:, i] / 7 for i in range(3)]))
    square = (wide.mean(0) ** 2).sort(dim=-1, descending=True).values
    torch.testing.assert_close(stats.top4_share, square[:, :4].sum(-1) / square.sum(-1))
    assert stats.mean.dtype == torch.float64
    assert (stats.n_layers, stats.hidden_size) == (3, 8)


@given(stream=streams())
@settings(max_examples=30, deadline=None)
def test_merging_adds_up(stream):
    x, _, quantile, second = stream
    options = {"winsorize": quantile, "second_moment": second}
    cut = 2 * (len(x) // 4)  # an even cut keeps the halves
    whole, left, right = fitted(x, **options), fitted(x[:cut], **options), fitted(x[cut:], **options)
    left.merge(right)
    same(left.stats(), whole.stats())
    if cut:
        right.merge(fitted(x[:cut], **options))
        same(right.stats(), whole.stats())


def test_merging_is_exact_on_numbers_that_float32_would_lose():
    x = torch.full((6, 1, 4), 2.0**-20)
    x[0] = 2.0**20
    whole, parts = fitted(x), [fitted(part) for part in x.split(2)]
    for part in parts[1:]:
        parts[0].merge(part)
    assert torch.equal(parts[0].stats().mean, whole.stats().mean)
    assert torch.equal(whole.stats().mean, torch.full((1, 4), (2.0**20 + 5 * 2.0**-20) / 6, dtype=torch.float64))


def test_it_goes_on_from_its_state():
    torch.manual_seed(0)
    x = torch.randn(9, 2, 6)
    first = fitted(x[:5], 2)
    second = ResidualFitter(2, 6)
    second.load_state_dict(first.state_dict())
    second.update(x[5:])
    same(second.stats(), fitted(x).stats())


def test_a_saved_state_is_a_copy():
    x = torch.ones(4, 2, 6)
    fitter = fitted(x)
    state = fitter.state_dict()
    fitter.update(x)
    assert state["counts"].tolist() == [2, 2]
    other = ResidualFitter(2, 6)
    other.load_state_dict(state)
    other.update(x)
    assert state["counts"].tolist() == [2, 2]
    assert state["sum"].max() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_float64(dtype):
    x = torch.full((5000, 1, 4), 1.01).to(dtype)
    assert torch.equal(fitted(x, 1000).stats().mean, x[0].double())


def test_float16_at_its_limit_does_not_overflow():
    x = torch.full((100, 1, 4), 65504.0, dtype=torch.float16)
    stats = fitted(x, 10, second_moment=True).stats()
    assert torch.isfinite(stats.norm).all()
    assert torch.isfinite(stats.second_moment).all()
    assert torch.equal(stats.mean, torch.full((1, 4), 65504.0, dtype=torch.float64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("quantile", [None, 0.9])
def test_a_broken_layer_is_named(value, quantile):
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    x[2, 1, 5] = value
    with pytest.raises(RunFailed, match="layer 1: the residuals of 1 of 4 prompts are not finite"):
        fitted(x, 2, winsorize=quantile).stats()


def test_no_prompts_and_other_shapes_are_refused():
    fitter = ResidualFitter(2, 4)
    with pytest.raises(UsageError, match="no prompts"):
        fitter.stats()
    for shape in [(3, 4), (1, 3, 4), (1, 2, 5)]:
        with pytest.raises(UsageError, match=r"\[prompts, 2, 4\]"):
            fitter.update(torch.zeros(shape))
    with pytest.raises(UsageError):
        fitter.merge(ResidualFitter(2, 5))
    with pytest.raises(UsageError):
        fitter.merge(ResidualFitter(2, 4, second_moment=True))
    with pytest.raises(UsageError):
        fitter.merge(ResidualFitter(2, 4, winsorize=0.9))
    with pytest.raises(UsageError):
        fitter.load_state_dict({"mean": torch.zeros(1)})


@given(seed=st.integers(0, 2**32), d=st.integers(1, 40), q=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_winsorizing_clips_at_the_quantile_of_each_residual(seed, d, q):
    x = torch.randn(2, 3, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bound = x.abs().quantile(q, dim=-1, keepdim=True)
    torch.testing.assert_close(winsorize(x, q), torch.clamp(x, -bound, bound), rtol=1e-12, atol=1e-12)


def test_a_quantile_out_of_range_is_refused():
    with pytest.raises(UsageError):
        winsorize(torch.zeros(3), 1.5)


def test_massive_dimensions_no_longer_decide_a_winsorized_mean():
    torch.manual_seed(0)
    x = torch.randn(64, 1, 512).half()
    x[:, :, 7] = 60000
    plain, clipped = fitted(x).stats(), fitted(x, winsorize=0.99).stats()
    assert torch.isfinite(clipped.mean).all()
    assert plain.top4_share > 0.99
    assert clipped.norm < 40


def test_the_top_share_of_zeros_is_zero():
    assert top_share(torch.zeros(3, 8)).tolist() == [0, 0, 0]
    assert top_share(torch.ones(8)) == 0.5
    assert top_share(torch.ones(2)) == 1
