"""The adapter of an edit is the edit: PEFT loads it, answers as the edited weights do, and merges to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_cases import an_edit, load, logits
from safetensors.torch import load_file

import pico
from perpend.core.edits import Edit, ModuleEdit
from perpend.core.linear import orthonormalise
from perpend.errors import UsageError
from perpend.export.adapter import CONFIG, EXACT, WEIGHTS, write_adapter
from perpend.export.shards import bake
from perpend.models.anatomy import Anatomy
from perpend.models.quiet import silenced

peft = pytest.importorskip("peft")

BOTH = [(family, mode) for family in ("llama", "gpt2", "qwen2", "gemma3", "opt") for mode in ("plain", "row")]
PLAIN = [
    (family, "plain") for family in ("mixtral", "gpt_oss", "llama4_text", "deepseek_v3", "granitemoehybrid", "jamba")
]


def adapted(source: Path, folder: Path, mode: str = "plain", rank: int = 8, edit: Edit | None = None, **how):
    """Write the adapter of an edit; returns the model, its edit and what was written."""
    model = load(source)
    anatomy = Anatomy.of(model)
    edit = edit or an_edit(anatomy, mode=mode, **how)
    folder.mkdir()
    made = write_adapter(source, edit, anatomy, model, folder, base="org/base", revision="abc", rank=rank)
    return model, edit, made


def wrapped(model: torch.nn.Module, folder: Path):
    with silenced():
        device = str(model.device)  # PEFT would take the GPU that there is
        return peft.PeftModel.from_pretrained(model, str(folder), torch_device=device).eval()


@pytest.mark.parametrize(("family", "mode"), BOTH + PLAIN)
def test_an_exact_adapter_answers_and_merges_to_the_edited_weights(pico_dir, tmp_path, family, mode):
    source = pico_dir(family)
    model, edit, made = adapted(source, tmp_path / "adapter", mode, rank=1, weight=1.0, seed=3)
    assert made.exact
    assert max(row.error for row in made.rows) <= EXACT
    assert {row.form for row in made.rows} == {"dora" if mode == "row" else "lora"}
    anatomy, before = Anatomy.of(model), logits(model)
    bake(source, edit, anatomy, tmp_path / "edited", model)
    baked = load(tmp_path / "edited")
    wanted = logits(baked)
    live = wrapped(model, tmp_path / "adapter")
    scale = wanted.abs().max().item()
    assert (before - wanted).abs().max() > 0.05 * scale, "the edit does something"
    torch.testing.assert_close(logits(live), wanted, rtol=1e-4, atol=1e-5 * scale)
    merged = dict(live.merge_and_unload().named_parameters())
    for name, value in baked.named_parameters():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)


def test_what_a_column_wise_edit_loses_is_measured_and_shrinks_with_the_rank(pico_dir, tmp_path):
    source, errors = pico_dir("llama"), []
    for rank in (1, 8, 32):
        folder = tmp_path / str(rank)
        model, edit, made = adapted(source, folder, "column", rank)
        anatomy = Anatomy.of(model)
        bake(source, edit, anatomy, tmp_path / f"edited{rank}", model)
        baked, merged = load(tmp_path / f"edited{rank}"), wrapped(load(source), folder).merge_and_unload()
        for row in made.rows:
            old, new, got = (anatomy.writer(row.module).weight(m).detach() for m in (model, baked, merged))
            assert (got - new).norm() / (new - old).norm() == pytest.approx(row.error, rel=1e-2, abs=1e-5)
        errors.append(made.error)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5, "at full rank nothing is lost"


def test_a_row_wise_edit_of_fused_experts_has_no_exact_form_and_says_so(pico_dir, tmp_path):
    _, _, made = adapted(pico_dir("mixtral"), tmp_path / "adapter", "row")
    assert not made.exact
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["use_dora"] is False
    wrapped(load(pico_dir("mixtral")), tmp_path / "adapter")


def test_modules_of_different_rank_share_one_adapter(pico_dir, tmp_path):
    anatomy = Anatomy.of(pico.build("llama"))
    v = orthonormalise(torch.randn(3, anatomy.hidden_size, generator=torch.Generator().manual_seed(1))).float()
    parts = {w.name: ModuleEdit(v[: 1 + k % 3], 0.5 * (k != 4)) for k, w in enumerate(anatomy.writers)}
    _, _, made = adapted(pico_dir("llama"), tmp_path / "adapter", edit=Edit(parts))
    assert (made.rank, made.exact, len(made.rows)) == (3, True, len(parts) - 1)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert len(tensors) == 2 * (len(parts) - 1)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert made.bytes < 0.25 * sum(p.numel() * 4 for p in pico.build("llama").parameters())


def test_the_adapter_names_its_base(pico_dir, tmp_path):
    adapted(pico_dir("llama"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")


@pytest.mark.parametrize("family", ["falcon_h1", "mamba2"])
def test_models_that_peft_refuses_are_named_with_the_reason(pico_dir, tmp_path, family):
    with pytest.raises(UsageError, match=f"state-space projection of a '{family}' model"):
        adapted(pico_dir(family), tmp_path / "adapter")


def test_an_edit_of_nothing_and_a_rank_of_nothing_are_refused(pico_dir, tmp_path):
    anatomy = Anatomy.of(pico.build("llama"))
    nothing = Edit({w.name: ModuleEdit(torch.eye(anatomy.hidden_size)[:1], 0.0) for w in anatomy.writers})
    with pytest.raises(UsageError, match="changes nothing"):
        adapted(pico_dir("llama"), tmp_path / "a", edit=nothing)
    with pytest.raises(UsageError, match="--rank"):
        adapted(pico_dir("llama"), tmp_path / "b", "column", rank=0)
