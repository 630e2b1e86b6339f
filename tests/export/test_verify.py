"""The gate reads saved bytes: it passes what was asked, and finds what is not there or should not have changed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from export_cases import an_edit, load
from safetensors.torch import load_file

import pico
from perpend.core.edits import Edit, ModuleEdit, through_post_norm
from perpend.errors import GateFailed, RunFailed
from perpend.export.checkpoint import SINGLE, Checkpoint
from perpend.export.shards import bake
from perpend.export.verify import leak_gate, untouched_equal
from perpend.models.anatomy import Anatomy


class Export:
    """A pico checkpoint, exported."""

    def __init__(self, folder: Path, out: Path, edit=None, dtype=torch.float32, **wanted: object) -> None:
        self.source, self.out, self.model = folder, out, load(folder, dtype)
        self.anatomy = Anatomy.of(self.model)
        self.edit = edit(self) if edit else an_edit(self.anatomy, **wanted)
        self.result = bake(folder, self.edit, self.anatomy, out, self.model)

    def gate(self, **more: object):
        return leak_gate(self.source, self.out, self.edit, self.anatomy, self.model, **more)

    def overwrite(self, name: str, data: bytes, at: int = 0, of: int | None = None) -> None:
        """Put bytes into a tensor of the exported file."""
        entry = Checkpoint(self.out).tensors[name]
        with (self.out / entry.shard).open("r+b") as file:
            file.seek(entry.begin + at)
            file.write(data)


@pytest.mark.parametrize("mode", ["plain", "column", "row"])
@pytest.mark.parametrize("weight", [-0.5, 0.25, 1.0, 1.5])
def test_asked_is_realised_in_every_mode(pico_dir, tmp_path, mode, weight):
    rows = Export(pico_dir("gpt2"), tmp_path / "out", mode=mode, weight=weight).gate()
    assert [row.ok for row in rows] == [True] * 6
    for row in rows:
        assert row.asked == pytest.approx(weight - 0.1 * row.layer)
        assert row.realised == pytest.approx(row.asked, abs=1e-5)
        assert row.noise < 1e-5
        if mode == "plain":
            assert row.missing == row.realised


def test_row_mode_shows_what_comes_back(pico_dir, tmp_path):
    export = Export(pico_dir("llama"), tmp_path / "out", mode="row", weight=1.0)
    rows = export.gate()
    assert max(abs(row.missing - row.asked) for row in rows) > 1e-3
    v = next(iter(export.edit.modules.values())).directions
    new = load_file(export.out / SINGLE)[f"{rows[0].module}.weight"]
    old = load_file(export.source / SINGLE)[f"{rows[0].module}.weight"]
    slope = float(((v @ new) * (v @ old)).sum() / (v @ old).square().sum())
    assert rows[0].missing == pytest.approx(1 - slope, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_within_the_gate_and_shows_as_noise(tmp_path, dtype):
    export = Export(pico.save("llama", tmp_path / "source", dtype=dtype), tmp_path / "out", dtype=dtype)
    for row in export.gate():
        assert row.realised == pytest.approx(row.asked, abs=0.01)
        assert 0 < row.noise < 0.02


def test_module_that_was_not_written_fails_and_is_named(pico_dir, tmp_path):
    export = Export(pico_dir("llama"), tmp_path / "out")
    name = "model.layers.1.self_attn.o_proj"
    export.overwrite(f"{name}.weight", load_file(export.source / SINGLE)[f"{name}.weight"].numpy().tobytes())
    with pytest.raises(GateFailed, match=rf"{name}: 1 of 6 modules miss .* asked 0\.70 and got 0\.00") as error:
        export.gate()
    assert "try: --allow-leak" in str(error.value)
    rows = export.gate(allow_leak=True)
    assert [row.module for row in rows if not row.ok] == [name]
    assert next(row for row in rows if not row.ok).miss == pytest.approx(0.7)


def test_small_miss_passes_and_larger_one_fails(pico_dir, tmp_path):
    export = Export(pico_dir("llama"), tmp_path / "out")
    asked = export.edit
    export.edit = Edit({n: ModuleEdit(p.directions, p.weight + 0.04, p.mode) for n, p in asked.modules.items()})
    assert all(row.ok for row in export.gate())
    export.edit = Edit({n: ModuleEdit(p.directions, p.weight + 0.06, p.mode) for n, p in asked.modules.items()})
    with pytest.raises(GateFailed, match="6 of 6 modules"):
        export.gate()


def test_one_expert_that_was_not_written_is_found(pico_dir, tmp_path):
    export = Export(pico_dir("mixtral"), tmp_path / "out")
    assert len(export.gate()) == 6
    name = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    export.overwrite(name, load_file(export.source / SINGLE)[name].numpy().tobytes())
    missed = [row for row in export.gate(allow_leak=True) if not row.ok]
    assert [(row.module, row.expert) for row in missed] == [("model.layers.2.mlp.experts", 3)]


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_leak_behind_a_post_norm_is_reported_and_does_not_fail(pico_dir, tmp_path, family):
    export = Export(pico_dir(family), tmp_path / "out", weight=1.2)
    rows = export.gate()
    assert all(row.ok and row.residual is not None for row in rows)
    assert max(abs(row.residual - row.asked) for row in rows) > 0.02
    writer = export.anatomy.writers[0]
    v = export.edit.modules[writer.name].directions * export.anatomy.post_norm_gain(export.model, writer)
    old, new = (load_file(f / SINGLE)[writer.key] for f in (export.source, export.out))
    slope = float(((v @ new) * (v @ old)).sum() / (v @ old).square().sum())
    assert rows[0].residual == pytest.approx(1 - slope, abs=1e-4)


def test_directions_carried_through_the_post_norm_are_missing_behind_it(pico_dir, tmp_path):
    v = torch.nn.functional.normalize(torch.randn(1, pico.HIDDEN, generator=torch.Generator().manual_seed(3)))

    def carried(export):
        gains = {w.name: export.anatomy.post_norm_gain(export.model, w) for w in export.anatomy.writers}
        return Edit({name: ModuleEdit(through_post_norm(v, gain), 1.0) for name, gain in gains.items()})

    export = Export(pico_dir("gemma2"), tmp_path / "out", carried)
    for row in export.gate(through_post_norm=True):
        writer = export.anatomy.writer(row.module)
        gain = export.anatomy.post_norm_gain(export.model, writer)
        left = (v * gain) @ load_file(export.out / SINGLE)[writer.key]
        assert left.norm() < 1e-4 * ((v * gain) @ load_file(export.source / SINGLE)[writer.key]).norm()
        assert row.residual == pytest.approx(1.0, abs=1e-5)


def test_matrix_that_never_wrote_along_the_direction_has_nothing_to_miss(tmp_path):
    folder = pico.save("llama", tmp_path / "source")
    tensors = load_file(folder / SINGLE)
    silent = torch.zeros(1, pico.HIDDEN)
    silent[0, 5] = 1.0
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.weight"][5] = 0
    from safetensors.torch import save_file

    save_file(tensors, folder / SINGLE, {"format": "pt"})
    export = Export(folder, tmp_path / "out", lambda e: Edit({name: ModuleEdit(silent, 1.0)}))
    (row,) = export.gate()
    assert row.ok
    assert math.isnan(row.realised)
    assert row.miss == 0
    assert json.loads(json.dumps(row.to_json()))["realised"] is None


def test_modules_with_weight_factor_zero_have_no_row(pico_dir, tmp_path):
    export = Export(pico_dir("llama"), tmp_path / "out")
    export.edit = export.edit.scaled(0.0)
    assert export.gate() == []


def test_tensor_of_another_dtype_is_refused(pico_dir, tmp_path):
    export = Export(pico_dir("llama"), tmp_path / "out")
    shutil.rmtree(export.out)
    pico.save("llama", export.out, dtype=torch.bfloat16)
    with pytest.raises(RunFailed, match="is not what it was"):
        export.gate()


@pytest.mark.parametrize("size", [{}, {"max_shard_size": "60KB"}])
def test_untouched_counts_everything_else(tmp_path, size):
    export = Export(pico.save("gemma3", tmp_path / "source", **size), tmp_path / "out")
    found = untouched_equal(export.source, export.out, export.result.edited)
    checkpoint = Checkpoint(export.source)
    assert found.ok
    assert found.tensors == len(checkpoint.tensors) - len(export.edit)
    data = sum(checkpoint.tensors[name].nbytes for name in export.result.edited)
    assert found.bytes == sum((export.source / s).stat().st_size for s in checkpoint.shards) - data
    assert found.files == export.result.files - len(checkpoint.shards)
    assert json.loads(json.dumps(found.to_json()))["ok"] is True


def test_untouched_finds_every_kind_of_difference(pico_dir, tmp_path):
    export = Export(pico_dir("llama"), tmp_path / "out")
    norm = "model.layers.1.input_layernorm.weight"

    def differing(**more):
        return untouched_equal(export.source, export.out, export.result.edited, **more).differing

    assert differing() == ()
    export.overwrite(norm, b"\x00", at=127)
    assert differing() == (f"{SINGLE}: {norm}",)
    with (export.out / SINGLE).open("r+b") as file:
        file.seek(9)
        file.write(b"X")
    assert differing() == (f"{SINGLE}: header", f"{SINGLE}: {norm}")
    (export.out / "config.json").write_bytes(b" " + (export.out / "config.json").read_bytes()[1:])
    (export.out / "tokenizer.json").unlink()
    (export.out / "README.md").write_text("card")
    assert differing()[:1] == ("README.md",)
    assert differing(added=["README.md"], left_out=["tokenizer.json"])[:1] == ("config.json",)
    assert "tokenizer.json" in differing()
    assert "generation_config.json" not in differing()


def test_untouched_finds_an_edited_tensor_that_was_not_announced(pico_dir, tmp_path):
    export = Export(pico_dir("llama"), tmp_path / "out")
    hidden, *rest = export.result.edited
    assert untouched_equal(export.source, export.out, rest).differing == (f"{SINGLE}: {hidden}",)
