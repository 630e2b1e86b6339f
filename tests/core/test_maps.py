"""The exact maps: hooks are weights, in every mode, for every weight factor and rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import FACTORS, MODES, Case, cases, few, largest_terms

from perpend.core.edits import (
    Geometry,
    HookMap,
    ModuleEdit,
    edit_bias,
    edit_weight,
    low_rank,
    plain_map,
    through_post_norm,
)
from perpend.core.linear import orthonormalise
from perpend.errors import RunFailed, UsageError

factors = st.sampled_from(FACTORS)
modes = st.sampled_from(MODES)
precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])


@precisions
@given(case=cases(), factor=factors, mode=modes)
@few
def test_hooks_compute_what_edited_weights_compute(dtype, tolerance, case: Case, factor, mode):
    weight, bias, x = case.weight.to(dtype), case.bias.to(dtype), case.x.to(dtype)
    edit = ModuleEdit(case.directions, factor, mode)
    hooks = HookMap.of(weight, edit)
    by_hooks = hooks.apply(hooks.scale(x) @ weight.mT + bias)
    by_weights = x @ edit_weight(weight, edit).mT + edit_bias(bias, edit, weight)
    assert by_hooks.dtype == by_weights.dtype == dtype
    unit = torch.maximum(largest_terms(case, hooks.input_scale), by_weights.norm().double())
    assert (by_hooks - by_weights).norm() <= tolerance * unit


@given(case=cases(), factor=factors)
@few
def test_plain_is_the_projection(case: Case, factor):
    edit = ModuleEdit(case.directions, factor)
    projection = torch.eye(len(case.weight), dtype=torch.float64) - factor * case.directions.mT @ case.directions
    torch.testing.assert_close(edit_weight(case.weight, edit), projection @ case.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(edit_bias(case.bias, edit), projection @ case.bias, rtol=1e-6, atol=1e-6)


@given(case=cases(), factor=factors)
@few
def test_column_mode_keeps_every_column_norm(case: Case, factor):
    edited = edit_weight(case.weight, ModuleEdit(case.directions, factor, "column"))
    torch.testing.assert_close(edited.norm(dim=0), case.weight.norm(dim=0), rtol=1e-9, atol=0)


@given(case=cases(), factor=factors)
@few
def test_column_mode_is_the_plain_edit_with_columns_rescaled(case: Case, factor):
    plain = edit_weight(case.weight, ModuleEdit(case.directions, factor))
    norms = plain.norm(dim=0)
    expected = plain * torch.where(norms > 0, case.weight.norm(dim=0) / norms.clamp(min=1e-300), 1.0)
    edited = edit_weight(case.weight, ModuleEdit(case.directions, factor, "column"))
    torch.testing.assert_close(edited, expected, rtol=1e-8, atol=1e-12)


@precisions
@given(case=cases(), mode=st.sampled_from(["plain", "column"]))
@few
def test_nothing_of_the_direction_is_left_at_one(dtype, tolerance, case: Case, mode):
    edited = edit_weight(case.weight.to(dtype), ModuleEdit(case.directions, 1, mode)).double()
    basis = orthonormalise(case.directions.float())  # the directions as the edit keeps them
    assert (basis @ edited).norm() <= tolerance / 10 * edited.norm()


@given(case=cases(), factor=factors)
@few
def test_row_mode_edits_rows_of_unit_norm_and_brings_their_norm_back(case: Case, factor):
    norms = case.weight.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, case.weight / norms.clamp(min=1e-300), 0.0)
    v = orthonormalise(case.directions.float())
    expected = norms * torch.nn.functional.normalize(unit - factor * v.mT @ (v @ unit), dim=1)
    edited = edit_weight(case.weight, ModuleEdit(case.directions, factor, "row"))
    torch.testing.assert_close(edited, expected, rtol=1e-8, atol=1e-10)


def test_row_mode_puts_part_of_the_direction_back_where_rows_are_uneven():
    torch.manual_seed(0)
    weight = torch.randn(64, 64) * (2 * torch.randn(64, 1)).exp()
    v = orthonormalise(torch.randn(1, 64)).float()
    left = (v @ edit_weight(weight, ModuleEdit(v, 1, "row"))).norm() / (v @ weight).norm()
    assert left > 0.05


@given(case=cases(), mode=modes)
@few
def test_a_weight_factor_of_zero_gives_the_very_same_tensors(case: Case, mode):
    edit = ModuleEdit(case.directions, 0.0, mode)
    weight, bias = case.weight.bfloat16(), case.bias.bfloat16()
    assert edit_weight(weight, edit) is weight
    assert edit_bias(bias, edit, weight) is bias
    hooks = HookMap.of(weight, edit)
    assert hooks.is_identity
    assert hooks.input_scale is None
    assert hooks.apply(bias) is bias
    assert hooks.scale(bias) is bias


@given(case=cases(zeros=False), factor=factors, mode=modes)
@few
def test_zero_columns_and_in_row_mode_zero_rows_stay_zero_and_finite(case: Case, factor, mode):
    case.weight[:, 1] = 0
    case.weight[2] = 0
    edited = edit_weight(case.weight, ModuleEdit(case.directions, factor, mode))
    assert torch.isfinite(edited).all()
    assert (edited[:, 1] == 0).all()
    if mode == "row":
        assert (edited[2] == 0).all()


def test_row_mode_leaves_the_bias_of_a_zero_row_alone():
    torch.manual_seed(0)
    weight, bias, v = torch.randn(8, 8), torch.randn(8), orthonormalise(torch.randn(1, 8)).float()
    weight[2] = 0
    edit = ModuleEdit(v, 0.7, "row")
    assert edit_bias(bias, edit, weight)[2] == bias[2]
    assert HookMap.of(weight, edit).apply(bias)[2] == bias[2]


@given(seed=st.integers(0, 2**32), k=st.integers(1, 4))
@few
def test_orthonormal_rows_keep_their_nested_spans_and_their_signs(seed, k):
    rows = torch.randn(k, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = orthonormalise(rows)
    torch.testing.assert_close(found @ found.mT, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    lower = rows @ found.mT
    torch.testing.assert_close(lower.tril() @ found, rows)
    assert (lower.diagonal() > 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", FACTORS)
def test_a_matrix_of_zeros_stays_zero(mode, factor):
    edit = ModuleEdit(torch.eye(4)[:1], factor, mode)
    assert (edit_weight(torch.zeros(4, 4), edit) == 0).all()
    hooks = HookMap.of(torch.zeros(4, 4), edit)
    assert torch.isfinite(hooks.apply(hooks.scale(torch.ones(4)))).all()


def test_a_column_within_the_span_vanishes_at_one_and_nothing_is_blown_up():
    torch.manual_seed(0)
    v = orthonormalise(torch.randn(1, 16)).float()
    weight = torch.randn(16, 8)
    weight[:, 3] = 5 * v[0]
    edit = ModuleEdit(v, 1, "column")
    edited = edit_weight(weight, edit)
    assert edited[:, 3].norm() < 1e-5
    assert HookMap.of(weight, edit).input_scale.max() < 10
    torch.testing.assert_close(edited[:, :3].norm(dim=0), weight[:, :3].norm(dim=0))


@given(case=cases(zeros=False), factor=factors, mode=modes)
@few
def test_only_the_span_counts_not_the_basis(case: Case, factor, mode):
    torch.manual_seed(len(case.x[0]))
    turn = torch.linalg.qr(torch.randn(len(case.directions), len(case.directions), dtype=torch.float64)).Q
    one = Geometry.of(case.weight, case.directions, mode).at(factor)
    other = Geometry.of(case.weight, turn @ case.directions, mode).at(factor)
    y = case.x @ case.weight.mT
    torch.testing.assert_close(
        one.apply(one.scale(case.x) @ case.weight.mT), other.apply(other.scale(case.x) @ case.weight.mT)
    )
    torch.testing.assert_close(one.apply(y), other.apply(y), rtol=1e-9, atol=1e-9)


@given(case=cases(), first=factors, second=factors)
@few
def test_plain_edits_compose(case: Case, first, second):
    twice = plain_map(plain_map(case.bias, case.directions, first), case.directions, second)
    once = plain_map(case.bias, case.directions, 1 - (1 - first) * (1 - second))
    torch.testing.assert_close(twice, once, rtol=1e-12, atol=1e-12)


@given(case=cases(), factor=factors)
@few
def test_the_axis_is_the_output_even_when_square(case: Case, factor):
    size = min(case.weight.shape)
    square, v = case.weight[:size, :size], orthonormalise(case.directions[:, :size] + 1e-3)
    edited = edit_weight(square, ModuleEdit(v, factor))
    basis = orthonormalise(v.float())
    torch.testing.assert_close(basis @ edited, (1 - factor) * basis @ square, rtol=1e-9, atol=1e-9)


@given(case=cases(), factor=factors)
@few
def test_low_rank_is_the_plain_edit(case: Case, factor):
    edit = ModuleEdit(case.directions, factor)
    b, a = low_rank(case.weight, edit)
    assert b.shape == (len(case.weight), len(case.directions))
    torch.testing.assert_close(case.weight + b @ a, edit_weight(case.weight, edit), rtol=1e-10, atol=1e-10)


def test_rows_of_one_batch_carry_different_candidates():
    torch.manual_seed(0)
    y = torch.randn(3, 4, 8, dtype=torch.float64)
    v = orthonormalise(torch.randn(3, 2, 8))
    factor = torch.tensor([0.3, 1.0, -0.5], dtype=torch.float64)
    together = plain_map(y, v[:, None], factor[:, None])
    for row in range(3):
        torch.testing.assert_close(together[row], plain_map(y[row], v[row], float(factor[row])))


@pytest.mark.parametrize("mode", MODES)
def test_hooks_are_differentiable_in_the_weight_factor_and_the_direction(mode):
    torch.manual_seed(0)
    weight, x = torch.randn(6, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)

    def output(factor, direction):
        hooks = Geometry.of(weight, direction, mode).at(factor)
        return hooks.apply(hooks.scale(x) @ weight.mT)

    factor = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, (factor, direction))


@pytest.mark.parametrize("mode", MODES)
def test_geometry_is_gathered_once_for_all_weight_factors(mode):
    torch.manual_seed(0)
    weight, x, v = torch.randn(6, 5), torch.randn(3, 5), orthonormalise(torch.randn(1, 6)).float()
    geometry = Geometry.of(weight, v, mode)
    for factor in FACTORS:
        hooks, fresh = geometry.at(factor), HookMap.of(weight, ModuleEdit(v, factor, mode))
        torch.testing.assert_close(
            hooks.apply(hooks.scale(x)[:, :1] + weight[:, 0]), fresh.apply(fresh.scale(x)[:, :1] + weight[:, 0])
        )


@pytest.mark.parametrize("mode", MODES)
def test_halves_are_edited_in_float32_and_hooks_keep_their_dtype(mode):
    torch.manual_seed(0)
    weight, v = torch.randn(16, 12).bfloat16(), orthonormalise(torch.randn(1, 16)).float()
    edit = ModuleEdit(v, 0.5, mode)
    assert edit_weight(weight, edit).dtype == torch.float32
    torch.testing.assert_close(edit_weight(weight, edit), edit_weight(weight.float(), edit), rtol=0, atol=0)
    hooks = HookMap.of(weight, edit)
    y = torch.randn(2, 3, 16).bfloat16()
    assert hooks.apply(y).dtype == torch.bfloat16
    torch.testing.assert_close(hooks.apply(y), hooks.apply(y.float()).bfloat16(), rtol=0, atol=0)
    assert hooks.scale(torch.ones(2, 12).bfloat16()).dtype == torch.bfloat16


def test_wide_matrices_are_edited_block_by_block_without_a_seam():
    torch.manual_seed(0)
    weight, v = torch.randn(8, 2500, dtype=torch.float64), orthonormalise(torch.randn(2, 8))
    edit = ModuleEdit(v, 0.7, "row")
    expected = edit_weight(weight.flip(1), edit).flip(1)
    torch.testing.assert_close(edit_weight(weight, edit), expected, rtol=1e-12, atol=1e-12)
    assert (edit_weight(weight, ModuleEdit(v, 0.7, "column"))[:, 2400:] - weight[:, 2400:]).norm() > 0.1


@given(case=cases(), factor=factors)
@few
def test_through_a_post_norm_the_share_left_after_it_is_the_one_asked_for(case: Case, factor):
    gain = torch.linspace(-3, 40, len(case.weight), dtype=torch.float64) + 0.1
    inner = through_post_norm(case.directions, gain)
    edited = edit_weight(case.weight, ModuleEdit(inner, factor))
    read = case.directions * gain
    torch.testing.assert_close(
        read @ edited, (1 - factor) * read @ case.weight, rtol=1e-4, atol=1e-4 * float(read.norm())
    )


def test_a_gain_that_blanks_out_the_direction_is_an_error():
    with pytest.raises(RunFailed):
        through_post_norm(torch.eye(4)[:1], torch.tensor([0.0, 1, 1, 1]))


def test_misuse_is_told():
    v = torch.eye(4)[:1]
    with pytest.raises(UsageError, match="orthonormal"):
        ModuleEdit(2 * v, 1)
    with pytest.raises(UsageError, match="orthonormal"):
        ModuleEdit(torch.full((1, 4), torch.nan), 1)
    with pytest.raises(UsageError, match="shape"):
        ModuleEdit(v[0], 1)
    with pytest.raises(UsageError, match="finite"):
        ModuleEdit(v, float("inf"))
    with pytest.raises(UsageError, match="plain, column, row"):
        ModuleEdit(v, 1, "norm")
    with pytest.raises(UsageError, match=r"\[3, 4\]"):
        edit_weight(torch.zeros(3, 4), ModuleEdit(v, 1))
    with pytest.raises(UsageError, match="needs the module's matrix"):
        HookMap.of(None, ModuleEdit(v, 1, "column"))
    with pytest.raises(UsageError, match="needs the module's matrix"):
        edit_bias(torch.zeros(4), ModuleEdit(v, 1, "row"))
    with pytest.raises(UsageError, match="no low-rank form"):
        low_rank(torch.zeros(4, 4), ModuleEdit(v, 1, "column"))
    with pytest.raises(RunFailed, match="dependent"):
        orthonormalise(torch.ones(2, 4))
    with pytest.raises(UsageError, match="5 directions in 4"):
        orthonormalise(torch.ones(5, 4))
