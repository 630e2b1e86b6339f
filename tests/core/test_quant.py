"""Rounding to block formats: the same bits as llama.cpp's own, and an edit that a later plain pass leaves alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perpend.core.leak import realised
from perpend.core.linear import orthonormalise
from perpend.core.quant import LATTICE, moved, preserve, simulate
from perpend.errors import UsageError

KINDS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def weights(rows: int = 256, columns: int = 128, seed: int = 0) -> Tensor:
    """A matrix whose rows are uneven, with a block of zeros, one of ties and one of numbers too small for float16."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator) * 0.05 * (0.2 + torch.rand(rows, 1, generator=generator))
    made[3, :32], made[7, :32], made[5, :32] = 0, -0.5, made[5, :32] * 1e-7
    return made


def directions(rows: int = 256, k: int = 1, seed: int = 1, massive: float = 0.0) -> Tensor:
    v = torch.randn(k, rows, generator=torch.Generator().manual_seed(seed))
    v[0, 0] += massive
    return orthonormalise(v)


def edited(w: Tensor, v: Tensor, weight: float) -> Tensor:
    return w.double() - weight * v.mT @ (v @ w.double())


def error(q: Tensor, t: Tensor) -> float:
    return float((q.double() - t).norm() / t.norm())


@pytest.mark.parametrize("kind", [*KINDS, "bf16"])
def test_a_plain_pass_gives_the_bits_of_the_reference(kind):
    gguf = pytest.importorskip("gguf")
    w, own = weights(), getattr(gguf.GGMLQuantizationType, kind.upper())
    wanted = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), own), own).copy())
    assert torch.equal(simulate(w, kind), wanted)
    assert torch.equal(simulate(w.reshape(2, 128, 128), kind), wanted.reshape(2, 128, 128))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("weight", [0.6, 1.0])
def test_on_the_lattice_a_plain_pass_loses_the_edit_and_ours_does_not(weight, k):
    v = directions(576, k)
    w = simulate(weights(576), "q4_0").bfloat16()
    t = edited(w, v, weight)
    plain = simulate(t.bfloat16(), "q4_0")
    saved = preserve(t, v, "q4_0", torch.bfloat16).bfloat16()
    assert realised(w, plain, v).weight < weight - 0.2
    kept = realised(w, simulate(saved, "q4_0"), v)
    assert kept.weight == pytest.approx(weight, abs=2e-3)
    assert kept.noise < 5e-3
    assert realised(w, saved, v).weight == pytest.approx(weight, abs=5e-3)  # before that pass as well as after
    assert error(saved, t) < 1.7 * error(plain, t)


@pytest.mark.parametrize("kind", KINDS)
def test_on_ordinary_weights_it_costs_a_hundredth(kind):
    w, v = weights(), directions()
    t = edited(w, v, 0.7)
    q = preserve(t, v, kind)
    assert realised(w, q, v).weight == pytest.approx(0.7, abs=1e-3)
    assert realised(w, q, v).noise < 2e-3 < realised(w, simulate(t, kind), v).noise
    assert error(q, t) < 1.03 * error(simulate(t, kind), t)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([(k, d) for k in KINDS for d in ("float32",)] + [("q4_0", "bfloat16"), ("q4_0", "float16")]),
    st.integers(0, 999),
    st.sampled_from([1e-4, 1.0, 30.0]),
    st.sampled_from([0.0, 30.0]),
)
def test_a_later_plain_pass_changes_nothing(form, seed, scale, massive):
    kind, stored = form[0], getattr(torch, form[1])
    w, v = weights(64, 64, seed) * scale, directions(64, 2, seed, massive)
    q = preserve(edited(w, v, 1.0), v, kind, stored)
    assert torch.equal(simulate(q.to(stored), kind).double(), q)


def test_a_direction_that_lies_on_one_dimension_is_taken_out_too():
    w, v = simulate(weights(), "q4_0"), directions(massive=40.0)
    assert v[0, 0] > 0.8
    assert realised(w, preserve(edited(w, v, 1.0), v, "q4_0"), v).weight == pytest.approx(1.0, abs=0.01)


def test_q8_0_in_bfloat16_keeps_the_weight_factor():
    w, v = simulate(weights(), "q8_0").bfloat16(), directions()
    saved = preserve(edited(w, v, 0.5), v, "q8_0", torch.bfloat16).bfloat16()
    assert realised(w, simulate(saved, "q8_0"), v).weight == pytest.approx(0.5, abs=5e-3)


def test_the_lattice_is_recognised():
    w = weights()
    assert moved(w, "q4_0") > 3 * LATTICE
    assert moved(simulate(w, "q4_0"), "q4_0") == 0
    assert 0 < moved(simulate(w, "q4_0").bfloat16(), "q4_0") < LATTICE / 2
    assert moved(torch.zeros(4, 32), "q4_0") == 0


def test_rows_that_cannot_be_cut_into_groups_are_refused():
    with pytest.raises(UsageError, match="multiples of 32"):
        simulate(torch.ones(4, 48), "q4_0")
    with pytest.raises(UsageError, match="multiples of 32"):
        preserve(torch.ones(4, 48), torch.eye(4)[:1], "q4_0")
    with pytest.raises(UsageError, match="unknown type 'q4_k'"):
        simulate(torch.ones(4, 32), "q4_k")
