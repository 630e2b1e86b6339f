"""Realised weight factors, measured on two matrices alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import FACTORS, MODES, Case, cases, few

from perpend.core.edits import ModuleEdit, edit_weight, realised, through_post_norm
from perpend.core.linear import orthonormalise
from perpend.errors import UsageError


@given(case=cases(), factor=st.sampled_from(FACTORS), mode=st.sampled_from(MODES))
@few
def test_the_asked_weight_factor_is_found_in_every_mode(case: Case, factor, mode):
    edit = ModuleEdit(case.directions, factor, mode)
    found = realised(case.weight, edit_weight(case.weight, edit), edit.directions, mode=mode)
    assert found.weight == pytest.approx(factor, abs=1e-6)
    assert found.noise < 1e-5


@pytest.fixture
def writer():
    torch.manual_seed(0)
    return torch.randn(256, 192) * torch.randn(256, 1).exp(), orthonormalise(torch.randn(1, 256)).float()


@pytest.mark.parametrize("mode", MODES)
def test_it_survives_rounding_to_bfloat16(writer, mode):
    weight, v = writer
    weight = weight.bfloat16()
    edited = edit_weight(weight, ModuleEdit(v, 0.6, mode)).bfloat16()
    found = realised(weight, edited, v, mode=mode)
    assert found.weight == pytest.approx(0.6, abs=0.01)
    assert 0 < found.noise < 0.05


def test_an_edit_that_was_lost_is_found_out(writer):
    weight, v = writer
    assert realised(weight, weight, v) == (0.0, 0.0)
    half = torch.lerp(weight, edit_weight(weight, ModuleEdit(v, 1)), 0.5)
    assert realised(weight, half, v).weight == pytest.approx(0.5, abs=1e-6)


def test_noise_is_what_the_weight_factor_does_not_explain(writer):
    weight, v = writer
    torch.manual_seed(1)
    along = v @ weight
    extra = torch.randn_like(along)
    extra -= (extra @ along.mT) / (along @ along.mT) * along
    edited = edit_weight(weight, ModuleEdit(v, 0.4)) + v.mT @ (0.3 * extra * along.norm() / extra.norm())
    found = realised(weight, edited, v)
    assert found.weight == pytest.approx(0.4, abs=1e-5)
    assert found.noise == pytest.approx(0.3, abs=1e-5)


def test_reading_a_row_edit_plainly_shows_what_came_back(writer):
    weight, v = writer
    edited = edit_weight(weight, ModuleEdit(v, 1, "row"))
    assert realised(weight, edited, v, mode="row").weight == pytest.approx(1, abs=1e-6)
    plainly = realised(weight, edited, v)
    left = (v @ edited).norm() / (v @ weight).norm()
    assert left > 0.05
    assert (1 - plainly.weight) ** 2 + plainly.noise**2 == pytest.approx(float(left) ** 2, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_a_gain_of_one_is_no_gain(writer, mode):
    weight, v = writer
    weight[:9] = 0
    edited = edit_weight(weight, ModuleEdit(v, 0.8, mode))
    assert realised(weight, edited, v, torch.ones(256), mode=mode) == pytest.approx(
        realised(weight, edited, v, mode=mode), abs=1e-6
    )


def test_with_a_gain_the_leak_into_the_residual_stream_is_read(writer):
    weight, v = writer
    gain = torch.linspace(-1, 30, 256)
    read = (v * gain).double()

    def by_hand(edited):
        old, new = read @ weight.double(), read @ edited.double()
        return 1 - float((new * old).sum() / old.square().sum())

    plain = edit_weight(weight, ModuleEdit(v, 1))
    assert realised(weight, plain, v, gain).weight == pytest.approx(by_hand(plain), abs=1e-6)
    assert by_hand(plain) < 0.9
    inner = through_post_norm(v, gain)
    exact = edit_weight(weight, ModuleEdit(inner, 0.7))
    assert realised(weight, exact, v, gain).weight == pytest.approx(0.7, abs=1e-5)
    assert realised(weight, exact, inner).weight == pytest.approx(0.7, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_matrix_that_never_wrote_along_the_direction_has_no_realised_factor(mode):
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    found = realised(weight, weight, torch.eye(8)[2:3], mode=mode)
    assert math.isnan(found.weight)
    assert found.noise == 0
    assert math.isnan(realised(torch.zeros(8, 8), torch.zeros(8, 8), torch.eye(8)[:1], mode=mode).weight)


def test_matrices_of_other_shapes_are_refused():
    with pytest.raises(UsageError):
        realised(torch.zeros(4, 4), torch.zeros(4, 5), torch.eye(4)[:1])
