"""An export for q4_0: the edit is there in bfloat16, and still there when the file is quantised plainly."""

from __future__ import annotations

import pytest
import torch
from export_cases import an_edit, load, on_lattice
from safetensors.torch import load_file

import pico
from perpend.core.leak import realised
from perpend.core.quant import moved, simulate
from perpend.errors import GateFailed, UsageError
from perpend.export.shards import bake
from perpend.export.verify import leak_gate
from perpend.models.anatomy import Anatomy


@pytest.mark.parametrize("mode", ["plain", "column", "row"])
def test_the_edit_survives_a_later_plain_pass(tmp_path, mode):
    source = on_lattice(tmp_path / "base")
    model = load(source, torch.bfloat16)
    anatomy = Anatomy.of(model)
    edit = an_edit(anatomy, 0.7, mode)
    found = {}
    for rounding in ("auto", "q4_0"):
        result = bake(source, edit, anatomy, tmp_path / rounding, model, rounding=rounding)
        before, after = (load_file(folder / "model.safetensors") for folder in (source, result.path))
        for name, part in edit.modules.items():
            later = simulate(after[f"{name}.weight"], "q4_0")
            missed = realised(before[f"{name}.weight"], later, part.directions, mode=mode).weight - part.weight
            found.setdefault(rounding, []).append(abs(missed))
        assert {name for name in before if not torch.equal(before[name], after[name])} == set(result.edited)
    assert max(found["q4_0"]) < 0.01
    assert max(found["auto"]) > 0.1
    assert 0 < result.rounding["plain_error"] < result.rounding["error"] < 0.2


def test_the_gate_asks_for_the_weight_factor_after_that_pass(tmp_path):
    source = on_lattice(tmp_path / "base")
    model = load(source, torch.bfloat16)
    anatomy = Anatomy.of(model)
    edit = an_edit(anatomy, 0.7)
    for rounding in ("auto", "q4_0"):
        bake(source, edit, anatomy, tmp_path / rounding, model, rounding=rounding)
    rows = leak_gate(source, tmp_path / "q4_0", edit, anatomy, model, rounding="q4_0")
    assert all(abs(row.quantised - row.asked) < 0.01 for row in rows)
    assert all(row.quantised is None for row in leak_gate(source, tmp_path / "auto", edit, anatomy, model))
    with pytest.raises(GateFailed, match="miss their weight factor"):
        leak_gate(source, tmp_path / "auto", edit, anatomy, model, rounding="q4_0")


def test_ordinary_weights_and_matrices_that_lie_the_other_way_round(tmp_path):
    model = pico.build("gpt2", n_embd=128, n_inner=256)
    model.save_pretrained(tmp_path / "base")
    anatomy = Anatomy.of(model)
    edit = an_edit(anatomy, 1.0)
    bake(tmp_path / "base", edit, anatomy, tmp_path / "out", model, rounding="q4_0")
    writer = anatomy.writers[0]
    saved = load_file(tmp_path / "out" / "model.safetensors")[writer.key]
    assert writer.out_axis == 1
    assert moved(writer.matrix(saved).contiguous(), "q4_0") < 1e-6 < moved(saved, "q4_0")
    leak_gate(tmp_path / "base", tmp_path / "out", edit, anatomy, model, rounding="q4_0")


def test_rows_that_q4_0_cannot_hold_are_said_before_anything_is_written(tmp_path, pico_dir):
    model = load(pico_dir("llama"))  # the MLP has 48 columns
    anatomy = Anatomy.of(model)
    with pytest.raises(UsageError, match="q4_0 cannot hold rows of 48"):
        bake(pico_dir("llama"), an_edit(anatomy), anatomy, tmp_path / "out", model, rounding="q4_0")
    assert list(tmp_path.iterdir()) == []
