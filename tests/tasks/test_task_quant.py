"""`perpend quant check`: what a plain pass leaves of an edit, from the weights and from what the model says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from task_cases import MACHINE, a_recipe

sys.path.insert(0, str(Path(__file__).parent.parent / "export"))

from export_cases import an_edit, load, on_lattice

import perpend
import pico
from perpend.cli.main import main
from perpend.core.quant import moved, simulate
from perpend.errors import UsageError
from perpend.export.checkpoint import Checkpoint
from perpend.export.shards import bake
from perpend.export.survey import Survey
from perpend.models.anatomy import Anatomy
from perpend.models.simulated import matrices, quantise


@pytest.fixture(scope="module")
def lattice(tmp_path_factory):
    """A model on the q4_0 lattice, one of the same shape off it, and an edit of either."""
    folder = tmp_path_factory.mktemp("quant")
    on = on_lattice(folder / "on")
    pico.tokenizer().save_pretrained(on)
    off = pico.build("llama", hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    off.bfloat16().save_pretrained(folder / "off")
    an_edit(Anatomy.of(load(on)), 0.6).save(folder / "edit.safetensors")
    return folder


def test_the_lattice_is_found_and_the_lost_edit_too(lattice):
    found = perpend.quant_check(str(lattice / "on"), edit=lattice / "edit.safetensors")
    q4, q8, half = found.passes
    assert (q4.lattice, q4.held) == (6, 6)
    assert q4.moved < 0.005
    assert q4.kept < 0.6
    assert q4.missed == 6
    assert (q8.lattice, q8.missed) == (0, 0)
    assert abs(q8.kept - 1) < 0.02
    assert (half.moved, half.missed) == (0.0, 0)
    ordinary = perpend.quant_check(str(lattice / "off"), edit=lattice / "edit.safetensors", types=["q4_0"]).passes[0]
    assert ordinary.lattice == 0
    assert 0.05 < ordinary.moved < 0.12
    assert abs(ordinary.kept - 1) < 0.1


def test_an_edit_rounded_for_the_type_is_kept_as_apply_would_write_it(lattice, tmp_path):
    recipe = a_recipe(tmp_path, export={"rounding": "q4_0"})
    found = perpend.quant_check(str(lattice / "on"), edit=lattice / "edit.safetensors", types=["q4_0"], recipe=recipe)
    assert found.passes[0].missed == 0
    assert abs(found.passes[0].kept - 1) < 0.01
    model, edit = load(lattice / "on", torch.bfloat16), an_edit(Anatomy.of(load(lattice / "on")), 0.6)
    anatomy = Anatomy.of(model)
    bake(lattice / "on", edit, anatomy, tmp_path / "out", model, rounding="q4_0")
    survey = Survey(Checkpoint(lattice / "on"), model, anatomy, edit)
    written = load(tmp_path / "out", torch.bfloat16)
    for writer in anatomy.writers:
        ((_, saved),) = survey.saved(writer, "q4_0")
        assert torch.equal(saved, writer.matrix(writer.weight(written)))


def test_every_expert_is_looked_at_and_the_worst_is_named(tmp_path):
    model = pico.build("qwen3_moe", hidden_size=128, moe_intermediate_size=64)
    anatomy = Anatomy.of(model)
    experts = next(w for w in anatomy.writers if w.experts)
    with torch.no_grad():
        whole = experts.matrix(experts.weight(model))
        whole.copy_(simulate(whole.contiguous(), "q4_0"))
        experts.matrix(experts.weight(model), 1).normal_()
    model.save_pretrained(tmp_path / "model")
    an_edit(anatomy, 0.6).save(tmp_path / "edit.safetensors")
    found = perpend.quant_check(str(tmp_path / "model"), edit=tmp_path / "edit.safetensors", types=["q4_0"])
    row = next(row for row in found.rows if row.module == experts.name)
    assert row.moved["q4_0"] > 0.05  # the one that is not on the lattice
    assert abs(row.quantised["q4_0"] - row.asked) > 0.1  # one that is


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
def test_the_matrices_of_the_layers_are_quantised_along_their_input_axis_and_nothing_else(family):
    wide = {
        "llama": {"hidden_size": 128, "intermediate_size": 256},
        "gpt2": {"n_embd": 128, "n_inner": 256},
        "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 64},
        "gpt_oss": {"hidden_size": 128, "intermediate_size": 64},
    }[family]
    model = pico.build(family, **wide)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    anatomy = Anatomy.of(model)
    names = {name for name, _ in matrices(model, anatomy)}
    count = quantise(model, anatomy, "q4_0")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == names
    assert count == len(names)
    assert {writer.key for writer in anatomy.writers} <= names
    assert not [n for n in names if "norm" in n or "embed" in n or "router" in n or n.endswith(("gate.weight", "bias"))]
    for name, matrix in matrices(model, anatomy):
        assert moved(matrix.contiguous(), "q4_0") < 1e-6, name


def test_replies_tell_a_lost_edit_from_quantising(lattice, tmp_path):
    recipe = a_recipe(tmp_path)
    found = perpend.quant_check(
        str(lattice / "on"),
        edit=lattice / "edit.safetensors",
        types=["q4_0", "bf16"],
        acceptance=True,
        recipe=recipe,
        machine=MACHINE,
    )
    assert list(found.replies.judged) == ["base@own", "edit@own", "base@q4_0", "edit@q4_0"]
    assert {judged.n for judged in found.replies.judged.values()} == {4}
    assert list(found.replies.compared()) == [
        "base@own → edit@own",
        "base@own → base@q4_0",
        "edit@own → edit@q4_0",
        "base@q4_0 → edit@q4_0",
    ]
    json.dumps(found.to_json())


def test_the_command_prints_a_row_per_type_and_json(lattice, capsys):
    asked = ["quant", "check", str(lattice / "on"), "--edit", str(lattice / "edit.safetensors")]
    assert main([*asked, "--types", "q4_0"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "of the asked weight factors are left after a plain pass, 6 modules miss theirs" in shown
    assert main([*asked, "--for", "q4_0", "--types", "q4_0,q8_0", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [found["missed"] for found in data["passes"]] == [0, 0]
    assert data["rounding"] == "q4_0"
    assert main(["quant", "check", str(lattice / "on"), "--types", "q4_1,q40"]) == 2
    assert "unknown type 'q40'" in capsys.readouterr().err


def test_a_dry_run_counts_the_states_that_would_reply(lattice, capsys):
    asked = ["quant", "check", str(lattice / "on"), "--edit", str(lattice / "edit.safetensors"), "--dry-run", "--json"]
    assert main([*asked, "--limit", "5", "--acceptance", "--types", "q4_0,bf16"]) == 0
    assert json.loads(capsys.readouterr().out)["forecast"]["prompts"] == 5 * 4  # untouched and edited, own and q4_0
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out)["forecast"]["prompts"] == 0


def test_what_cannot_be_surveyed_is_one_line(lattice, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="GGUF"):
        perpend.quant_check(str(tmp_path / "model.gguf"))
    other = an_edit(Anatomy.of(pico.build("gpt2")))
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="no writer"):
        perpend.quant_check(str(lattice / "on"), edit=tmp_path / "other.safetensors")
