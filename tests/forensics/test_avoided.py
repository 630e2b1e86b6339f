"""Which directions the writers of neighbouring layers avoid, when there is none to ask for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import perpend
from perpend.cli.main import main
from perpend.core.edits import Edit, ModuleEdit, edit_weight
from perpend.core.quant import simulate
from perpend.errors import UsageError
from perpend.forensics.avoided import AVOIDED, AVOIDED_LONG, Avoided, Window, least, most, windows
from pico import FAMILIES

LAYERS, HIDDEN = 12, 96
DEMO = [0.0, 0.0, 0.0, 0.33, 0.73, 1.19, 1.48, 1.4, 1.03, 0.58, 0.0, 0.0]
"""A kernel that goes past 1 and is nowhere above 1 for more than a few layers."""
HARD = [0.0, 0.0, 0.0, 0.0, 0.5, 0.9, 1.0, 0.9, 0.5, 0.0, 0.0, 0.0]


@pytest.fixture(scope="session")
def untouched(tmp_path_factory):
    """A Llama of random weights, wide and deep enough for every kind of window."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS}
    folder = tmp_path_factory.mktemp("untouched") / "llama"
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes)).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def made(untouched, tmp_path):
    """`made(change)` is the folder of the model with every matrix of its layers replaced by `change(name, W)`."""

    def go(change):
        folder = tmp_path / "made"
        shutil.copytree(untouched, folder)
        tensors = load_file(folder / "model.safetensors")
        for name, w in tensors.items():
            if ".layers." in name and w.ndim == 2:
                tensors[name] = change(name, w.float()).to(w.dtype).contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return go


def drawn(k: int, seed: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(HIDDEN, k, generator=g, dtype=torch.float64)).Q.mT.float()


def layer_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def ablated(weights, v, kinds=("o_proj", "down_proj"), mode="plain"):
    def change(name, w):
        touched = any(kind in name for kind in kinds) and weights[layer_of(name)]
        return edit_weight(w, ModuleEdit(v, weights[layer_of(name)], mode)) if touched else w

    return change


def overlap(v: torch.Tensor, found: Avoided) -> float:
    """The least cosine between the spans."""
    return float(torch.linalg.svdvals(v @ found.directions.mT).min())


@pytest.mark.parametrize("mode", ["plain", "column", "row"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("weights", [DEMO, HARD], ids=["past one", "hard"])
def test_an_edit_is_found_with_its_rank_and_its_directions(made, weights, rank, mode):
    v = drawn(rank)
    audit = perpend.audit(str(made(ablated(weights, v, mode=mode))))
    best = most(audit.search)
    assert best.found
    assert best.rank == rank
    assert best.component is None
    assert overlap(v, best) > 0.97
    assert all(weights[layer] for layer in range(best.layers[0], best.layers[1] + 1))
    assert ("one direction" if rank == 1 else f"{rank} directions") in audit.verdict
    assert "an edit, or made so" in audit.verdict


def test_every_writer_is_asked_for_what_was_found(made, tmp_path):
    v = drawn(1)
    folder = made(ablated(DEMO, v))
    audit = perpend.audit(str(folder))
    modules = [f"model.layers.{k}.{name}" for k in range(LAYERS) for name in ("self_attn.o_proj", "mlp.down_proj")]
    Edit({name: ModuleEdit(v, 1.0) for name in modules}).save(tmp_path / "edit.safetensors")
    told = perpend.audit(str(folder), directions=tmp_path / "edit.safetensors")
    assert [row.module for row in audit.rows] == [row.module for row in told.rows]
    assert audit.missing == told.missing == 10  # where |1 - λ| is below a half, in layers 4 to 9 but not at 1.48
    assert f"{audit.missing} of {2 * LAYERS} writers, in layers 4 to 9" in audit.verdict


def test_layers_that_avoid_directions_of_their_own_are_asked_for_those(made):
    def change(name, w):
        return ablated(HARD, drawn(1, seed=layer_of(name)))(name, w)

    audit = perpend.audit(str(made(change)))
    assert {row.layer for row in audit.rows if row.missing} == {5, 6, 7}


def test_an_edit_of_the_mlp_alone_is_found_where_attention_hides_it(made):
    v = drawn(1)
    best = most(perpend.audit(str(made(ablated(HARD, v, kinds=("down_proj",))))).search)
    assert best.found
    assert best.component == "mlp"
    assert overlap(v, best) > 0.97


def test_a_weak_edit_of_every_layer_is_found_in_long_windows(made):
    v = drawn(1)
    audit = perpend.audit(str(made(ablated([0.4] * LAYERS, v))))
    search = audit.search
    assert audit.missing == 0
    assert f"all {2 * LAYERS} writers write a good part" in audit.verdict
    assert {w.bound for w in search if w.found} == {AVOIDED_LONG}
    assert overlap(v, most(search)) > 0.97


def lora(name, w):
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    return w + 0.01 * torch.randn(w.shape[0], 8, generator=g) @ torch.randn(8, w.shape[1], generator=g)


def noisy(name, w):
    return w + 0.02 * w.square().mean().sqrt() * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))


def tuned(name, w):
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    u, v = (torch.linalg.qr(torch.randn(size, min(w.shape), generator=g)).Q for size in w.shape)
    return w + 0.05 * (u * torch.arange(1, min(w.shape) + 1) ** -0.5) @ v.mT


def read_less(name, w):
    v = drawn(1)
    return w - w @ v.mT @ v if "q_proj" in name or "gate_proj" in name else w


@pytest.mark.parametrize(
    "change",
    [lambda name, w: w, lora, noisy, tuned, read_less, lambda name, w: simulate(w, "q4_0")],
    ids=["nothing", "low rank", "noise", "training", "readers", "q4_0"],
)
def test_what_is_no_edit_of_the_writers_is_called_none(made, change):
    audit = perpend.audit(str(made(change)))
    assert not any(w.found for w in audit.search)
    assert audit.rows == ()
    assert audit.missing == 0
    assert audit.verdict == "no direction is avoided by neighbouring writers together"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_untouched_family_is_called_edited(pico_dir, family):
    search = perpend.audit(str(pico_dir(family))).search
    assert search
    assert not any(w.found for w in search)


def test_dead_dimensions_are_no_edit(made):
    def change(name, w):
        w = w.clone()
        if "o_proj" in name or "down_proj" in name:
            w[5:8] = 0
        return w

    assert not any(w.found for w in perpend.audit(str(made(change))).search)


def test_windows_are_single_layers_threes_halves_and_the_whole():
    assert [(w.first, w.last) for w in windows(3)] == [(0, 0), (1, 1), (2, 2), (0, 2)]
    assert [(w.first, w.last) for w in windows(2)] == [(0, 0), (1, 1), (0, 1)]
    long = [(w.first, w.last) for w in windows(12) if w.bound == AVOIDED_LONG]
    assert long == [(0, 5), (3, 8), (6, 11), (0, 11)]
    assert all(w.bound == AVOIDED for w in windows(9))


def test_a_window_with_few_columns_is_not_looked_at(untouched):
    search = perpend.audit(str(untouched)).search
    kinds = {(w.component, w.layers[1] - w.layers[0] + 1) for w in search if w.bound == AVOIDED}
    assert kinds == {(None, 1), ("mlp", 1), (None, 3), ("attention", 3), ("mlp", 3)}  # a square matrix is not, alone


@pytest.mark.parametrize("removed", [0, 1, 3])
def test_the_last_eigenvalues_are_those_of_a_full_decomposition(removed):
    g = torch.Generator().manual_seed(removed)
    w = torch.randn(240, 700, generator=g, dtype=torch.float64)
    v = torch.linalg.qr(torch.randn(240, 3, generator=g, dtype=torch.float64)).Q[:, :removed]
    w = w - v @ (v.mT @ w)
    gram = w @ w.mT
    gram = gram * (240 / gram.trace())
    values, vectors = least(gram, 5)
    expected = torch.linalg.eigvalsh(gram)[:5].clamp_min(0)
    assert values.tolist() == pytest.approx(expected.tolist(), rel=2e-3, abs=1e-9)
    assert torch.allclose(vectors.mT @ vectors, torch.eye(5, dtype=torch.float64), atol=1e-8)
    if removed:
        assert float(torch.linalg.svdvals(v.mT @ vectors[:, :removed]).min()) > 1 - 1e-6


def test_one_dimension_and_no_matrices_are_no_reason_to_fail():
    assert list(Window(0, 0, AVOIDED).told()) == []
    assert most([]) is None


def test_weights_that_are_not_finite_are_refused_in_one_line(made, capsys):
    def change(name, w):
        w = w.clone()
        w[0, 0] = float("nan") if "layers.4.mlp.down_proj" in name else w[0, 0]
        return w

    folder = str(made(change))
    with pytest.raises(UsageError, match="not finite"):
        perpend.audit(folder)
    assert main(["audit", folder]) == 2
    assert "model.layers.4.mlp.down_proj.weight" in capsys.readouterr().err


def test_what_was_found_is_printed_and_given_to_programs(made, capsys):
    folder = str(made(ablated(HARD, drawn(2))))
    assert main(["audit", folder, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    found = [window for window in data["search"] if window["found"]]
    assert found
    assert all(window["ratio"] < window["bound"] for window in found)
    assert {window["rank"] for window in found if window["component"] is None} == {2}
    assert main(["audit", folder]) == 0
    told = capsys.readouterr().out
    assert "2 directions" in told
    assert "missing" in told
    assert "Directions written least" in told


def test_two_directions_are_found_in_a_very_small_model_too(pico_dir, tmp_path):
    folder = tmp_path / "pico"
    shutil.copytree(pico_dir("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    v = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(2))).Q.mT
    for name, w in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensors[name] = edit_weight(w, ModuleEdit(v, 1.0))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    best = most(perpend.audit(str(folder)).search)
    assert (best.found, best.rank) == (True, 2)
    assert float(torch.linalg.svdvals(v @ best.directions.mT).min()) > 0.999
