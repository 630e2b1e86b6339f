"""Weight factors over the layers."""

import itertools
import math
import subprocess
import sys
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from perpend import config
from perpend.core.kinds import Method, Mode
from perpend.core.schedule import CUT, KINDS, Band, Constant, NormalKernel, PerLayer, Schedule, Tent, layers

parse = TypeAdapter(Schedule).validate_python


def test_the_public_card_of_a_4b_model_is_a_normal_kernel():
    weights = NormalKernel(peak_weight=0.55, peak_layer=18, spread=5).weights(34)
    edited = [layer for layer, weight in enumerate(weights) if weight]
    assert edited == list(range(7, 30))
    assert [round(weights[layer], 2) for layer in (7, 18, 29)] == [0.05, 0.55, 0.05]


def test_the_default_is_that_kernel_by_share_of_depth():
    default = NormalKernel().weights(34)
    card = NormalKernel(peak_weight=1, peak_layer=18.02, spread=5.1).weights(34)
    assert default == pytest.approx(card)


@given(
    peak=st.floats(0, 33),
    spread=st.floats(0.5, 20),
    weight=st.floats(-2, 2),
    kind=st.sampled_from([NormalKernel, Tent, Band]),
)
def test_weight_factors_fall_with_the_distance_from_the_peak_and_never_exceed_it(peak, spread, weight, kind):
    weights = kind(peak_weight=weight, peak_layer=peak, spread=spread).weights(34)
    assert len(weights) == 34
    sizes = [abs(weights[layer]) for layer in sorted(range(34), key=lambda layer: abs(layer - peak))]
    assert all(one >= other - 1e-12 for one, other in itertools.pairwise(sizes))
    assert sizes[0] <= abs(weight)
    assert all(size == 0 or size >= CUT for size in sizes)
    assert all(w * weight >= 0 for w in weights)


@given(
    first=st.none() | st.floats(-2, 20),
    last=st.none() | st.floats(-2, 20),
    kind=st.sampled_from([NormalKernel, Tent, Band]),
)
def test_edges_are_hard_and_change_nothing_between_them(first, last, kind):
    whole = kind(peak_layer=9, spread=8).weights(20)
    cut = kind(peak_layer=9, spread=8, first=first, last=last).weights(20)
    for layer, (one, other) in enumerate(zip(whole, cut, strict=True)):
        inside = (first is None or layer >= first) and (last is None or layer <= last)
        assert other == (one if inside else 0.0)


def test_an_edge_is_a_layer_or_a_share_of_the_depth():
    made = parse({"kind": "normal", "spread": 50, "first": "40%", "last": 8})
    assert [layer for layer, weight in enumerate(made.weights(10)) if weight] == [4, 5, 6, 7, 8]
    assert parse(made.model_dump(mode="json")) == made


def test_normal_kernel_by_its_formula():
    weights = NormalKernel(peak_weight=-0.8, peak_layer=2.5, spread=1.5, cut=0).weights(6)
    assert weights == pytest.approx([-0.8 * math.exp(-((layer - 2.5) ** 2) / (2 * 1.5**2)) for layer in range(6)])


def test_tent_band_constant_and_list():
    assert Tent(peak_weight=1, peak_layer=2, spread=2).weights(5) == [0, 0.5, 1, 0.5, 0]
    assert Band(peak_weight=0.7, peak_layer=2, spread=1).weights(5) == [0, 0.7, 0.7, 0.7, 0]
    assert Constant(weight=0.3).weights(3) == [0.3] * 3
    assert PerLayer(values=(0, 0.01, 1.5)).weights(3) == [0, 0.01, 1.5]
    with pytest.raises(ValueError, match="2 weight factors and the model 3 layers"):
        PerLayer(values=(0, 1)).weights(3)


@given(depth=st.integers(1, 100), share=st.floats(1, 100))
def test_a_share_of_the_depth_is_that_many_layers(depth, share):
    assert layers(f"{share}%", depth) == pytest.approx(share / 100 * depth)
    by_share = NormalKernel(peak_layer=f"{share}%", spread="20%").weights(depth)
    assert by_share == pytest.approx(NormalKernel(peak_layer=share / 100 * depth, spread=0.2 * depth).weights(depth))


@pytest.mark.parametrize("kind", list(KINDS))
def test_schedules_are_told_apart_by_kind_and_survive_json(kind):
    extra = {"values": [1.0, 0.5]} if kind == "list" else {}
    made = parse({"kind": kind, **extra})
    assert type(made) is KINDS[kind]
    assert parse(made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "normal", "spread": 0},
        {"kind": "normal", "spread": "-5%"},
        {"kind": "normal", "peak_layer": "half"},
        {"kind": "normal", "peak_layer": "nan"},
        {"kind": "normal", "peak_weight": float("inf")},
        {"kind": "normal", "peak": 3},
        {"kind": "tent", "cut": -1},
        {"kind": "band", "first": "low"},
        {"kind": "constant", "first": 3},
        {"kind": "gauss"},
        {"kind": "list"},
    ],
)
def test_what_makes_no_schedule_is_refused(bad):
    with pytest.raises(ValidationError):
        parse(bad)


def test_the_names_of_modes_and_methods_are_those_that_configuration_explains():
    assert get_args(Mode) == tuple(config.MODES)
    assert get_args(Method) == tuple(config.METHODS)


def test_schedules_and_names_load_without_torch():
    code = "import sys, perpend.config, perpend.core; assert 'torch' not in sys.modules; perpend.core.Edit({})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
