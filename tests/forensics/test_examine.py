"""What was done is told from the weights alone, and nothing that was not done."""

from __future__ import annotations

import math

import pytest
import torch

import suspects
from perpend.core.kernels import fit_kernel
from perpend.core.maps import ModuleEdit, edit_weight
from perpend.core.quant import simulate
from perpend.core.schedule import NormalKernel, PerLayer, Tent
from perpend.errors import UsageError
from perpend.forensics import pairs
from perpend.forensics.examine import Examination, examine
from perpend.forensics.spectrum import spacing

KERNEL = NormalKernel(peak_weight=0.9, peak_layer=5.3, spread=2.0)


@pytest.fixture
def told(tmp_path):
    """`told(before, after)` is the examination of two sets of tensors."""

    def go(before, after, third=None) -> Examination:
        sets = {"before": before, "after": after} | ({"third": third} if third else {})
        folders = [suspects.write(tmp_path / name, tensors) for name, tensors in sets.items()]
        return examine(*folders)

    return go


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["plain", "column", "row"])
def test_an_ablation_is_told_with_its_direction_mode_strength_and_kernel(told, mode, dtype):
    before = suspects.base(dtype)
    weights = KERNEL.weights(suspects.LAYERS)
    found = told(before, suspects.ablated(before, weights, mode))
    assert (found.verdict.name, found.verdict.confidence > 0.8) == ("ablation", True)
    assert (found.shared.side, found.shared.rank, found.shared.scope) == ("output", 1, "one for all layers")
    assert found.shared.mode == mode
    assert found.shared.certainty > 5
    assert abs(float(found.shared.directions[0] @ suspects.directions()[0])) > 0.999
    assert set(found.kernels) == set(suspects.WRITERS)
    for measured, kernel in found.kernels.values():
        assert measured == pytest.approx(weights, abs=0.02)
        assert kernel.kind == "normal"
        assert kernel.peak_weight == pytest.approx(0.9, abs=0.02)
        assert kernel.peak_layer == pytest.approx(5.3, abs=0.1)
        assert kernel.spread == pytest.approx(2.0, abs=0.1)
    assert len(found.changes) == 2 * sum(weight != 0 for weight in weights)


def test_strengthening_is_a_negative_weight_factor_and_a_tent_is_a_tent(told):
    before = suspects.base()
    weights = Tent(peak_weight=-0.6, peak_layer=4, spread=3.7).weights(suspects.LAYERS)
    measured, kernel = told(before, suspects.ablated(before, weights)).kernels["mlp.down_proj"]
    assert measured == pytest.approx(weights, abs=0.02)
    assert (kernel.kind, round(kernel.peak_layer)) == ("tent", 4)


def test_directions_of_each_layer_are_told_from_one_for_all(told):
    before = suspects.base()
    found = told(before, suspects.ablated(before, [1.0] * suspects.LAYERS, per_layer=True))
    assert (found.verdict.name, found.shared.scope) == ("ablation", "one per layer")
    assert found.shared.within > 0.99
    assert found.kernels["mlp.down_proj"][1].kind == "constant"


def test_directions_that_turn_slowly_are_one_per_layer_and_a_tent_that_ends_above_zero_is_one(told):
    """As the most common tool makes them: neighbouring layers at |cos| 0.95 or so, λ falling linearly to an edge."""
    before, (v, other) = suspects.base(), suspects.directions(2)
    weights = [
        max(0.0, 1.13 - 0.19 * abs(layer - 6.4)) if abs(layer - 6.4) <= 3.32 else 0.0
        for layer in range(suspects.LAYERS)
    ]

    def take(layer, kind, w):
        angle = torch.tensor(0.15 * layer)
        own = (angle.cos() * v + angle.sin() * other)[None]
        return edit_weight(w, ModuleEdit(own, weights[layer]))

    found = told(before, suspects.changed(before, suspects.WRITERS, take))
    assert found.shared.scope == "one per layer"
    assert found.shared.neighbours == pytest.approx(math.cos(0.15), abs=0.01)
    measured, kernel = found.kernels["mlp.down_proj"]
    assert measured == pytest.approx(weights, abs=0.02)
    assert (kernel.kind, round(kernel.peak_weight, 1), round(kernel.peak_layer, 1)) == ("tent", 1.1, 6.4)


def test_three_layers_are_too_few_to_tell_a_kernel_from_a_tent():
    assert fit_kernel([0.0, 0.0, 0.3, 0.9, 0.4, 0.0, 0.0, 0.0]).kind == "none"
    assert fit_kernel(NormalKernel().weights(12)).kind == "normal"
    assert fit_kernel(Tent(peak_layer=5, spread=4.5).weights(12)).kind == "tent"
    assert fit_kernel([0.0, 0.0, 0.5, 0.5, 0.0]).kind == "band"


def test_two_directions_are_two(told):
    before, v = suspects.base(torch.float32), suspects.directions(2)
    found = told(before, suspects.ablated(before, [0.7] * suspects.LAYERS, v=v))
    assert (found.verdict.name, found.shared.rank) == ("ablation", 2)
    assert float((found.shared.directions @ v.mT).square().sum()) == pytest.approx(2, abs=1e-4)


def test_what_is_read_is_told_from_what_is_written_even_in_square_matrices(told):
    before, v = suspects.base(), suspects.directions()
    after = suspects.changed(before, ("self_attn.q_proj",), lambda layer, kind, w: w - 0.8 * (w @ v.mT) @ v)
    found = told(before, after)
    assert (found.verdict.name, found.shared.side) == ("ablation", "input")
    assert found.kernels["self_attn.q_proj"][0] == pytest.approx([0.8] * suspects.LAYERS, abs=0.02)


def test_faint_layers_are_measured_along_the_shared_direction(told):
    before = suspects.base()
    weights = [0.0, 0.06, 0.08, 1.0, 1.0, 1.0, 0.06, 0.0, 0.0, 0.0]
    found = told(before, suspects.ablated(before, PerLayer(values=tuple(weights)).weights(suspects.LAYERS)))
    assert found.kernels["mlp.down_proj"][0] == pytest.approx(weights, abs=0.02)


@pytest.mark.parametrize(
    ("rank", "kinds", "left"),
    [
        (4, suspects.WRITERS + suspects.READERS, None),
        (1, suspects.WRITERS, None),
        (1, suspects.WRITERS, suspects.directions() * 8),
    ],
    ids=["adapter", "rank one", "rank one, one left vector for all"],
)
def test_an_adapter_is_no_ablation(told, rank, kinds, left):
    before = suspects.base()
    found = told(before, suspects.adapted(before, rank, kinds, left))
    assert found.verdict.name == "low-rank"
    assert {change.rank for change in found.changes} == {rank}
    assert found.verdict.scores["ablation"] < 0.1
    assert not found.kernels


def test_noise_training_and_rounding_to_a_format_are_told_apart(told, tmp_path):
    before = suspects.base()
    every = suspects.WRITERS + suspects.READERS
    others = {
        "noise": suspects.noisy(before),
        "fine-tune": suspects.trained(before),
        "quantised": suspects.changed(before, every, lambda layer, kind, w: simulate(w, "q4_0")),
    }
    start = suspects.write(tmp_path / "start", before)
    for name, after in others.items():
        found = examine(start, suspects.write(tmp_path / name, after))
        assert found.verdict.name == name
        assert found.verdict.confidence >= 0.5
        assert found.verdict.scores["ablation"] < 0.1
    assert "q4_0" in found.verdict.detail
    assert all(change.lattice for change in found.changes)


def test_a_model_of_another_seed_is_unrelated_and_nothing_is_said_to_predict_it(told):
    found = told(suspects.base(), suspects.base(seed=1))
    verdict = found.verdict
    assert (verdict.name, verdict.passed, verdict.told) == ("unrelated", 41, 41)
    assert verdict.confidence > 0.9
    assert verdict.detail.startswith("another model of this architecture")
    assert "predict" not in verdict.basis
    assert max(abs(change.sizes.cosine) for change in found.changes) < 0.1
    assert not found.kernels


def test_another_architecture_is_unrelated_whether_it_shares_matrices_or_none(told, tmp_path):
    before = suspects.base()
    other = {
        name: torch.cat([x, x]) if "up_proj" in name or "q_proj" in name else x
        for name, x in suspects.base(seed=1).items()
    }
    other |= {f"model.layers.{k}.self_attn.q_norm.weight": torch.ones(8) for k in range(suspects.LAYERS)}
    verdict = told(before, other).verdict
    assert (verdict.name, verdict.passed, verdict.told) == ("unrelated", 21, 21)
    assert verdict.detail.startswith("another architecture, with weights that have nothing in common")
    assert "20 tensors of the base's are missing or of another shape and 10 tensors are new" in verdict.detail
    wider = {name: torch.cat([x, x]) if x.ndim == 2 else x for name, x in suspects.base().items()}
    verdict = examine(tmp_path / "before", suspects.write(tmp_path / "wider", wider)).verdict
    assert verdict.name == "unrelated"  # and not identical, although every norm is
    assert "not one matrix has the name and the shape" in verdict.detail


@pytest.mark.parametrize("size", [0.5, 3.0, 8.0])
def test_a_heavy_fine_tune_is_still_one(told, size):
    found = told(suspects.base(), suspects.trained(suspects.base(), size))
    assert found.verdict.name == "fine-tune"
    assert found.verdict.scores["unrelated"] < 0.1
    assert found.verdict.basis.endswith("no account predicts half of the change")
    if size == 8.0:
        assert min(change.sizes.moved for change in found.changes) > 3
        assert max(change.sizes.cosine for change in found.changes) < 0.4


def test_noise_larger_than_the_weights_is_noise_as_long_as_they_show(told):
    before, g = suspects.base(), torch.Generator().manual_seed(4)
    every = suspects.WRITERS + suspects.READERS
    after = suspects.changed(before, every, lambda layer, kind, w: w + 0.1 * torch.randn(w.shape, generator=g))
    assert told(before, after).verdict.name == "noise"


def test_matrices_that_were_put_in_place_of_others_are_told_with_what_was_kept(told):
    before, other = suspects.base(), suspects.base(seed=1)
    after = suspects.changed(before, suspects.WRITERS, lambda layer, kind, w: w)
    after |= {name: other[name] for name in before if "down_proj" in name}
    verdict = told(before, after).verdict
    assert (verdict.name, verdict.passed) == ("unrelated", 10)
    assert verdict.detail.startswith("weights replaced")
    assert "31 matrices are as they were" in verdict.detail


def test_what_lacks_tensors_of_the_base_is_not_simply_the_same(told):
    before = suspects.base()
    part = {name: x for name, x in before.items() if "layers.9." not in name}
    verdict = told(before, part).verdict
    assert verdict.name == "identical"
    assert verdict.detail.endswith("in what both have; 5 tensors of the base's are missing or of another shape")


def test_the_cosine_of_independent_matrices_is_within_its_chance():
    from perpend.forensics.spectrum import difference

    g = torch.Generator().manual_seed(0)

    def uneven(m: int, n: int) -> torch.Tensor:
        return torch.randn(m, n, generator=g) * torch.randn(m, 1, generator=g).exp()

    def thin(m: int, n: int) -> torch.Tensor:
        return torch.randn(m, 3, generator=g) @ torch.randn(3, n, generator=g)

    def heavy(m: int, n: int) -> torch.Tensor:
        return torch.randn(m, n, generator=g) ** 3

    for make in (uneven, thin, heavy):
        sizes = [difference(make(48, 80), make(48, 80)) for _ in range(300)]
        scores = torch.tensor([one.cosine / one.chance for one in sizes])
        assert 0.7 < float(scores.std()) < 1.2, make
        assert float(scores.abs().max()) < 5, make
    w = uneven(48, 80)
    assert difference(w, 2 * w).cosine == pytest.approx(1)
    assert difference(w, torch.zeros(48, 80)).cosine == 0


def test_the_same_and_a_cast_are_said_to_be_so(tmp_path):
    before = suspects.base(torch.float32)
    narrow = {name: tensor.bfloat16() for name, tensor in before.items()}
    wide = {name: tensor.float() for name, tensor in narrow.items()}
    sets = {"before": before, "narrow": narrow, "wide": wide}
    at = {name: suspects.write(tmp_path / name, tensors) for name, tensors in sets.items()}
    assert examine(at["before"], at["before"]).verdict.name == "identical"
    assert examine(at["narrow"], at["wide"]).verdict.name == "cast"
    rounded = examine(at["before"], at["narrow"]).verdict
    assert (rounded.name, "bfloat16" in rounded.detail) == ("cast", True)


def test_a_merge_needs_its_other_parent(told, tmp_path):
    before, parent = suspects.base(), suspects.trained(suspects.base())
    merged = {name: (0.7 * before[name].float() + 0.3 * parent[name].float()).bfloat16() for name in before}
    found = told(before, merged, parent)
    assert found.verdict.name == "interpolation"
    assert "0.3 of the way" in found.verdict.detail
    alone = examine(tmp_path / "before", tmp_path / "after").verdict
    assert alone.name == "fine-tune"
    assert any("--third" in ground for ground in alone.grounds)


def test_the_average_of_two_fine_tunes_that_differ_by_a_few_rounding_steps_is_told(told):
    one = suspects.base()
    nudge = {name: 1.5 * spacing(tensor.double(), tensor.dtype).float() for name, tensor in one.items()}
    g = torch.Generator().manual_seed(3)
    other = {
        name: (x.float() + nudge[name] * torch.randn(x.shape, generator=g)).bfloat16() if x.ndim == 2 else x
        for name, x in one.items()
    }
    average = {name: (0.5 * one[name].float() + 0.5 * other[name].float()).bfloat16() for name in one}
    found = told(one, average, other)
    assert (found.verdict.name, found.verdict.confidence > 0.8) == ("interpolation", True)
    assert float(found.verdict.detail.split()[0]) == pytest.approx(0.5, abs=0.01)


def test_names_are_matched_from_the_layer_on_and_only_what_differs_is_read(told, monkeypatch):
    before = suspects.base()
    after = suspects.ablated(before, [1.0] + [0.0] * (suspects.LAYERS - 1))
    renamed = {name.replace("model.", "language_model.model."): tensor for name, tensor in after.items()}
    renamed["visual.patch.weight"] = torch.zeros(2, 2)
    read, original = [], pairs.read_tensor
    monkeypatch.setattr(pairs, "read_tensor", lambda c, entry: read.append(entry.name) or original(c, entry))
    found = told(before, renamed)
    assert found.verdict.name == "ablation"
    assert found.added == ("visual.patch.weight",)
    assert (found.missing, found.tensors, found.equal) == ((), len(before), len(before) - 2)
    assert {name.split(".")[-2] for name in read} == {"o_proj", "down_proj"}


def test_checkpoints_without_a_common_tensor_are_refused(told):
    with pytest.raises(UsageError, match="no tensor of the same name and shape"):
        told(suspects.base(), {"other.weight": torch.zeros(3, 3)})


def test_rounding_alone_has_no_rank():
    from perpend.forensics.spectrum import difference, of_difference

    w = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    sizes, found = difference(w, w.bfloat16()), of_difference(w, w.bfloat16())
    assert sizes.energy == pytest.approx(sizes.rounding, rel=0.05)
    assert 0.5 * sizes.floor < float(found.values[0]) < sizes.floor
    exact = torch.linalg.svdvals(w.bfloat16().double() - w.double())
    assert float(found.values[0]) == pytest.approx(float(exact[0]), rel=0.05)
